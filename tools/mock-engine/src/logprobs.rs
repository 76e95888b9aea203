//! Log-probabilities of the generated tokens, in the formats of chat completions and completions.
//!
//! They follow from the token. The generated token is the most likely one; the other candidates
//! are `alt1 `, `alt2 ` and so on.

use serde_json::{Map, Value, json};

use crate::api::{Kind, Refusal};
use crate::json::Fields;
use crate::token::hash;

/// Maximum number of candidates per token, which is vLLM's default.
const CANDIDATES_MAX: u32 = 20;

/// Returns the number of candidates per token that a request asks for, or `None` if it asks for no
/// log-probabilities.
pub(crate) fn candidates(kind: Kind, fields: &Fields<'_>) -> Result<Option<u32>, Refusal> {
    let (name, wanted) = match kind {
        Kind::Completions => ("logprobs", fields.some("logprobs")),
        Kind::Chat => match fields.some("logprobs") {
            Some("true") => ("top_logprobs", fields.some("top_logprobs").or(Some("0"))),
            None | Some("false") => match fields.some("top_logprobs") {
                None | Some("0") => return Ok(None),
                Some(_) => {
                    let message = "when using `top_logprobs`, `logprobs` must be set to true.";
                    return Err(Refusal::bad("top_logprobs", message));
                }
            },
            Some(_) => return Err(Refusal::bad("logprobs", "Input should be a valid boolean")),
        },
        Kind::Responses | Kind::Messages | Kind::Generate => return Ok(None),
    };
    match wanted.map(str::parse::<u32>) {
        None => Ok(None),
        Some(Ok(count)) if count <= CANDIDATES_MAX => Ok(Some(count)),
        Some(Ok(count)) => {
            let message = format!(
                "Requested sample logprobs of {count}, which is greater than max allowed: \
                 {CANDIDATES_MAX}"
            );
            Err(Refusal::bad("logprobs", message))
        }
        Some(Err(_)) => Err(Refusal::bad(
            name,
            "Input should be a valid positive integer",
        )),
    }
}

/// Returns the log-probability of a generated token, from -0.999 to 0.
fn of(token: &str) -> f64 {
    -((hash(token.as_bytes()) % 1_000) as f64) / 1_000.0
}

/// Returns the `count` most likely tokens, the generated one first.
fn top(token: &str, count: u32) -> impl Iterator<Item = (String, f64)> {
    (0..count).map(move |rank| match rank {
        0 => (token.to_owned(), of(token)),
        _ => (format!("alt{rank} "), of(token) - 0.25 * f64::from(rank)),
    })
}

/// Returns the `logprobs` of a chat choice with these tokens.
pub(crate) fn chat<'a>(tokens: impl Iterator<Item = &'a str>, candidates: u32) -> Value {
    let entry = |token: &str, logprob: f64| json!({"token": token, "logprob": logprob, "bytes": token.as_bytes()});
    let content: Vec<Value> = tokens
        .map(|token| {
            let top = top(token, candidates).map(|(token, logprob)| entry(&token, logprob));
            json!({
                "token": token, "logprob": of(token), "bytes": token.as_bytes(),
                "top_logprobs": top.collect::<Value>(),
            })
        })
        .collect();
    json!({"content": content})
}

/// Returns the `logprobs` of a completions choice with these tokens. `offset` is the position of
/// the first one in the text.
pub(crate) fn completions<'a>(
    tokens: impl Iterator<Item = &'a str>,
    candidates: u32,
    mut offset: u64,
) -> Value {
    let (mut offsets, mut logprobs, mut texts, mut tops) = (vec![], vec![], vec![], vec![]);
    for token in tokens {
        offsets.push(offset);
        offset += token.chars().count() as u64;
        logprobs.push(of(token));
        texts.push(token);
        // The generated token is listed even if no candidate is asked for.
        let top = top(token, candidates.max(1));
        let top: Map<String, Value> = top.map(|(token, one)| (token, one.into())).collect();
        tops.push(top);
    }
    json!({
        "text_offset": offsets, "token_logprobs": logprobs, "tokens": texts, "top_logprobs": tops,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_candidates_is_checked() {
        for (kind, body, want) in [
            (Kind::Completions, r#"{"logprobs":0}"#, Some(Some(0))),
            (Kind::Completions, r#"{"logprobs":null}"#, Some(None)),
            (Kind::Completions, r#"{"logprobs":21}"#, None),
            (Kind::Completions, r#"{"logprobs":-1}"#, None),
            (Kind::Chat, r#"{"logprobs":true}"#, Some(Some(0))),
            (
                Kind::Chat,
                r#"{"logprobs":true,"top_logprobs":3}"#,
                Some(Some(3)),
            ),
            (Kind::Chat, r#"{"logprobs":false}"#, Some(None)),
            (Kind::Chat, r#"{"top_logprobs":3}"#, None),
            (Kind::Chat, r#"{"logprobs":1}"#, None),
            (Kind::Responses, r#"{"logprobs":1}"#, Some(None)),
        ] {
            let fields = Fields::parse(body.as_bytes()).unwrap();
            assert_eq!(candidates(kind, &fields).ok(), want, "{body}");
        }
    }

    #[test]
    fn each_token_has_its_candidates() {
        let value = completions(["a ", "b "].into_iter(), 2, 5);
        assert_eq!(value["text_offset"], json!([5, 7]));
        assert_eq!(value["tokens"], json!(["a ", "b "]));
        assert_eq!(value["top_logprobs"][1]["b "], value["token_logprobs"][1]);
        assert_eq!(value["top_logprobs"][1].as_object().unwrap().len(), 2);
        let value = chat(["a "].into_iter(), 0);
        assert_eq!(value["content"][0]["top_logprobs"], json!([]));
        assert_eq!(value["content"][0]["bytes"], json!([97, 32]));
        assert!(value["content"][0]["logprob"].as_f64().unwrap() <= 0.0);
    }
}
