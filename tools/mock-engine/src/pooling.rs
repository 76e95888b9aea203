//! The APIs of a pooling model: embeddings, scores and reranking.
//!
//! An embedding is the normalized sum of a vector for each word, which follows from the word alone.
//! The score is the cosine of two embeddings: the more words two texts share, the larger it is.
//! Equal texts have the score 1.

use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::api::Refusal;
use crate::exchange::Exchange;
use crate::json::Fields;
use crate::token;
use crate::wire::Plan;

/// Number of dimensions unless the request states another number, and the maximum.
const DIMENSIONS: usize = 64;
const DIMENSIONS_MAX: usize = 4_096;
/// Maximum number of texts in a request.
const INPUTS_MAX: usize = 2_048;
/// Maximum number of words times dimensions in a request. The sum takes about this many steps, in
/// which the engine does nothing else.
const STEPS_MAX: usize = 1 << 25;

/// An input text: the hash of each of its tokens.
type Input = Vec<u64>;

/// Returns the response to a request for embeddings.
pub(crate) fn embeddings(exchange: &Exchange<'_>, fields: &Fields<'_>) -> Result<Plan, Refusal> {
    let given = fields.some("input").or_else(|| fields.some("messages"));
    let given = given.ok_or_else(|| Refusal::bad("input", "Field required"))?;
    let inputs = inputs(given, "input")?;
    let dimensions = match fields.some("dimensions").map(str::parse) {
        None => DIMENSIONS,
        Some(Ok(given)) if (1..=DIMENSIONS_MAX).contains(&given) => given,
        Some(_) => {
            let message = format!("dimensions must be from 1 to {DIMENSIONS_MAX}.");
            return Err(Refusal::bad("dimensions", message));
        }
    };
    let in_base64 = match fields.some("encoding_format") {
        None | Some("\"float\"") => false,
        Some("\"base64\"") => true,
        Some(_) => {
            let message = "Input should be 'float' or 'base64'";
            return Err(Refusal::bad("encoding_format", message));
        }
    };
    let tokens = check_size(&inputs, dimensions)?;
    let data: Vec<Value> = inputs
        .iter()
        .enumerate()
        .map(|(index, input)| {
            let vector = vector(input, dimensions);
            let embedding = if in_base64 {
                let bytes: Vec<u8> = vector
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect();
                Value::from(base64(&bytes))
            } else {
                json!(vector)
            };
            json!({"index": index, "object": "embedding", "embedding": embedding})
        })
        .collect();
    Ok(list(exchange, "embd", &data, tokens))
}

/// Returns the response to a request for the scores of pairs of texts.
pub(crate) fn score(exchange: &Exchange<'_>, fields: &Fields<'_>) -> Result<Plan, Refusal> {
    let named = |names: [&'static str; 3]| {
        let found = names
            .iter()
            .find_map(|name| Some((*name, fields.some(name)?)));
        found.ok_or_else(|| Refusal::bad(names[0], "Field required"))
    };
    let (name, ones) = named(["queries", "text_1", "data_1"])?;
    let ones = inputs(ones, name)?;
    let (name, twos) = named(["documents", "text_2", "data_2"])?;
    let twos = inputs(twos, name)?;
    if ones.len() != 1 && ones.len() != twos.len() {
        return Err(Refusal::plain(
            400,
            "Input lengths must be either 1:1, 1:N or N:N",
        ));
    }
    let (tokens, scores) = scores(&ones, &twos)?;
    let data: Vec<Value> = scores
        .iter()
        .enumerate()
        .map(|(index, score)| json!({"index": index, "object": "score", "score": score}))
        .collect();
    Ok(list(exchange, "score", &data, tokens))
}

/// Returns the response to a request to sort documents by their score.
pub(crate) fn rerank(exchange: &Exchange<'_>, fields: &Fields<'_>) -> Result<Plan, Refusal> {
    let query = fields
        .some("query")
        .ok_or_else(|| Refusal::bad("query", "Field required"))?;
    let query = inputs(query, "query")?;
    let given = fields.some("documents");
    let given = given.ok_or_else(|| Refusal::bad("documents", "Field required"))?;
    let items: Vec<&RawValue> = serde_json::from_str(given)
        .map_err(|_| Refusal::bad("documents", "Input should be a valid list"))?;
    if items.is_empty() {
        return Err(Refusal::plain(
            400,
            "At least one text_pair element must be given",
        ));
    }
    let documents = inputs(given, "documents")?;
    let top: usize = match fields.some("top_n").map(str::parse) {
        None | Some(Ok(0)) => usize::MAX,
        Some(Ok(top)) => top,
        Some(Err(_)) => return Err(Refusal::bad("top_n", "Input should be a valid integer")),
    };
    let (tokens, scores) = scores(query.get(..1).unwrap_or_default(), &documents)?;
    let mut order: Vec<(usize, f32)> = scores.into_iter().enumerate().collect();
    order.sort_by(|one, two| two.1.total_cmp(&one.1));
    let results: Vec<Value> = order
        .into_iter()
        .take(top)
        .map(|(index, score)| {
            let text = items
                .get(index)
                .map(|item| text_of(item.get()))
                .unwrap_or_default();
            json!({
                "index": index, "document": {"text": text, "multi_modal": null},
                "relevance_score": score,
            })
        })
        .collect();
    let body = json!({
        "id": exchange.new_id("score"), "model": exchange.shared.config.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens}, "results": results,
    });
    Ok(Plan::generated(body.to_string(), 1))
}

fn list(exchange: &Exchange<'_>, prefix: &str, data: &[Value], tokens: usize) -> Plan {
    let body = json!({
        "id": exchange.new_id(prefix), "object": "list", "created": crate::infer::now(),
        "model": exchange.shared.config.model, "data": data,
        "usage": {
            "prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0,
            "prompt_tokens_details": null, "completion_tokens_details": null,
        },
    });
    Plan::generated(body.to_string(), 1)
}

/// Reads one text, a list of texts, one list of token ids, or a list of these. The texts may also
/// be chat messages, or objects with a `text`.
fn inputs(json: &str, name: &'static str) -> Result<Vec<Input>, Refusal> {
    let items: Vec<&RawValue> = match json.as_bytes().first() {
        Some(b'[') => serde_json::from_str(json).unwrap_or_default(),
        _ => Vec::new(),
    };
    let first = items.first().map(|item| item.get().as_bytes());
    let inputs: Vec<Input> = match first.and_then(<[u8]>::first) {
        None if json.starts_with('[') => {
            return Err(Refusal::plain(400, "You must pass at least one prompt"));
        }
        Some(b'0'..=b'9') | None => vec![input(json, name)?],
        _ if items.len() > INPUTS_MAX => {
            let message = format!("{name} has more than {INPUTS_MAX} items.");
            return Err(Refusal::bad(name, message));
        }
        Some(_) => {
            let all: Result<_, _> = items.iter().map(|item| input(item.get(), name)).collect();
            all?
        }
    };
    if inputs.iter().any(Vec::is_empty) {
        return Err(Refusal::plain(400, "The decoder prompt cannot be empty"));
    }
    Ok(inputs)
}

/// Reads one text or one list of token ids.
fn input(json: &str, name: &'static str) -> Result<Input, Refusal> {
    match json.as_bytes().first() {
        Some(b'[') => {
            let ids: Vec<u32> = serde_json::from_str(json)
                .map_err(|_| Refusal::bad(name, "Input should be a valid list of token ids"))?;
            Ok(ids
                .iter()
                .map(|id| token::hash(&id.to_le_bytes()))
                .collect())
        }
        Some(b'"' | b'{') => {
            let mut hashes = Vec::new();
            token::each_prompt_text(json, &mut |text| {
                hashes.extend(
                    token::pieces(text).map(|piece| token::hash(piece.trim_ascii().as_bytes())),
                );
            });
            Ok(hashes)
        }
        _ => Err(Refusal::bad(name, "Input should be a valid string")),
    }
}

fn text_of(json: &str) -> String {
    let mut all = String::new();
    token::each_prompt_text(json, &mut |text| all.push_str(text));
    all
}

/// Returns the number of tokens in `inputs`, or the error response if they are too many.
fn check_size(inputs: &[Input], dimensions: usize) -> Result<usize, Refusal> {
    let tokens = inputs.iter().map(Vec::len).sum::<usize>();
    if tokens.saturating_mul(dimensions) > STEPS_MAX {
        let most = STEPS_MAX / dimensions;
        let message = format!("The request has {tokens} tokens, more than {most}.");
        return Err(Refusal::plain(400, message));
    }
    Ok(tokens)
}

/// Returns the number of tokens in all pairs, and the score of each pair. There are as many pairs
/// as `twos`; a single input in `ones` belongs to all of them.
fn scores(ones: &[Input], twos: &[Input]) -> Result<(usize, Vec<f32>), Refusal> {
    check_size(ones, DIMENSIONS)?;
    let vectors = |inputs: &[Input]| -> Vec<Vec<f32>> {
        inputs
            .iter()
            .map(|input| vector(input, DIMENSIONS))
            .collect()
    };
    check_size(twos, DIMENSIONS)?;
    let (of_ones, of_twos) = (vectors(ones), vectors(twos));
    let scores = of_twos.iter().enumerate().map(|(index, two)| {
        let one = of_ones.get(index).or_else(|| of_ones.first());
        let cosine: f32 = one.map_or(0.0, |one| one.iter().zip(two).map(|(a, b)| a * b).sum());
        // Rounding can exceed the range of a cosine.
        cosine.clamp(-1.0, 1.0)
    });
    let tokens = ones.iter().chain(twos).map(Vec::len).sum();
    Ok((tokens, scores.collect()))
}

/// Returns the embedding of `input`, a vector of length 1.
fn vector(input: &[u64], dimensions: usize) -> Vec<f32> {
    let mut sum = vec![0.0_f32; dimensions];
    for hash in input {
        let mut state = *hash;
        for value in &mut sum {
            *value += unit(mix(&mut state));
        }
    }
    let length = sum.iter().map(|value| value * value).sum::<f32>().sqrt();
    if length > 0.0 {
        for value in &mut sum {
            *value /= length;
        }
    }
    sum
}

/// Returns the next number of the SplitMix64 sequence.
pub(crate) fn mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Maps the upper bits of a random number to a value from -1 to 1.
fn unit(random: u64) -> f32 {
    (random >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
}

/// Encodes `bytes` in base64 with padding (RFC 4648, section 4).
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let byte = |at: usize| u32::from(group.get(at).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for at in 0..4 {
            let six = (bits >> (18 - 6 * at) & 63) as usize;
            let letter = ALPHABET.get(six).filter(|_| at <= group.len());
            text.push(letter.map_or('=', |letter| char::from(*letter)));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_has_padding() {
        for (bytes, want) in [
            (&b""[..], ""),
            (b"f", "Zg=="),
            (b"fo", "Zm8="),
            (b"foo", "Zm9v"),
            (b"\xff\xfe\xfdb", "//79Yg=="),
        ] {
            assert_eq!(base64(bytes), want);
        }
    }

    #[test]
    fn shared_words_raise_the_score() {
        let of = |text: &str| input(&Value::from(text).to_string(), "x").unwrap();
        let query = [of("red green blue")];
        let others = [
            of("one two three"),
            of("red two blue"),
            of("red  green blue "),
        ];
        let (tokens, scores) = scores(&query, &others).unwrap();
        assert_eq!(tokens, 12);
        assert!(scores[0] < scores[1] && scores[1] < scores[2], "{scores:?}");
        assert!((scores[2] - 1.0).abs() < 1e-5);
    }

    #[test]
    fn inputs_are_texts_or_token_ids() {
        for (json, want) in [
            (r#""a b""#, &[2][..]),
            (r#"["a","b c"]"#, &[1, 2]),
            ("[1,2,3]", &[3]),
            ("[[1],[2,3]]", &[1, 2]),
            (r#"[{"text":"a b"}]"#, &[2]),
        ] {
            let got: Vec<usize> = inputs(json, "x").unwrap().iter().map(Vec::len).collect();
            assert_eq!(got, want, "{json}");
        }
        let many = format!("[{}\"a\"]", "\"a\",".repeat(INPUTS_MAX));
        for json in ["[]", r#""""#, "1.5", "[-1]", "[true]", r#"["a",""]"#, &many] {
            assert!(inputs(json, "x").is_err(), "{json}");
        }
    }
}
