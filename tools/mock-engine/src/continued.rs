//! Chat completion requests with `continue_final_message`: determines how many tokens of the
//! response the request already contains.
//!
//! The generated text is a function of the prompt. For these requests, the prompt is the messages
//! before the trailing assistant messages. The responses to a series of such requests therefore add
//! up to the response to the first request, and text that belongs to another prompt is detected.

use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use crate::api::{Refusal, hex};
use crate::json::Fields;
use crate::token::tag_of;

/// The point at which a response continues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Continued {
    /// Number of tokens of the response that the request already contains.
    pub(crate) first: u32,
    /// SHA-256 (hex) of the bytes of `messages`, without the trailing assistant messages.
    pub(crate) prompt_sha256: String,
}

/// Returns the point at which a chat completion request continues a response, or `Ok(None)` if the
/// request does not set `continue_final_message`. Returns an error if the request has no trailing
/// assistant messages, if they are not the start of the response to its prompt, or if
/// `add_generation_prompt` is not `false`.
pub(crate) fn continued(fields: &Fields<'_>) -> Result<Option<Continued>, Refusal> {
    if !fields.is_true("continue_final_message") {
        return Ok(None);
    }
    if fields.raw("add_generation_prompt") != Some("false") {
        let message =
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.";
        return Err(Refusal::bad("add_generation_prompt", message));
    }
    let raw = fields.raw("messages").unwrap_or("null");
    let messages: Vec<&RawValue> = serde_json::from_str(raw)
        .map_err(|_| Refusal::bad("messages", "Input should be a valid list"))?;
    let mut response = Vec::new();
    let mut rest = messages.as_slice();
    while let Some((last, before)) = rest.split_last()
        && let Some(text) = assistant_text(last)
    {
        response.push(text);
        rest = before;
    }
    if response.is_empty() {
        let message = "the last message is not an assistant message";
        return Err(Refusal::bad("messages", message));
    }
    // The `messages` value of the first request: everything up to the last message that is not
    // part of the response, and the closing bracket.
    let end = rest.last().map_or(1, |last| {
        last.get().as_ptr() as usize - raw.as_ptr() as usize + last.get().len()
    });
    let prompt = format!("{}]", raw.get(..end).unwrap_or_default());
    let prompt_sha256 = hex(&Sha256::digest(prompt.as_bytes()));
    let text: String = response.into_iter().rev().collect();
    let first = tokens_in(&text, tag_of(&prompt_sha256))
        .ok_or_else(|| Refusal::bad("messages", "the last message continues another response"))?;
    Ok(Some(Continued {
        first,
        prompt_sha256,
    }))
}

fn assistant_text(message: &RawValue) -> Option<String> {
    let message = Fields::parse(message.get().as_bytes()).ok()?;
    if message.string("role")? == "assistant" {
        message.string("content")
    } else {
        None
    }
}

/// Returns the number of tokens in `text`, or `None` if `text` is not the start of the response
/// whose tokens contain `tag`.
fn tokens_in(text: &str, tag: &str) -> Option<u32> {
    let mut count = 0;
    for token in text.split_inclusive(' ') {
        if token != format!("t{count}-{tag} ") {
            return None;
        }
        count += 1;
    }
    Some(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token::expected_text;

    fn read(text: &str) -> Result<Option<u32>, String> {
        let fields = Fields::parse(text.as_bytes()).unwrap();
        continued(&fields)
            .map(|continued| continued.map(|continued| continued.first))
            .map_err(|refusal| refusal.message)
    }

    #[test]
    fn tokens_of_the_response_so_far_are_counted_and_verified() {
        let user = r#"{"role":"user","content":"q"}"#;
        let sha = hex(&Sha256::digest(format!("[{user}]").as_bytes()));
        let flags = r#""continue_final_message":true,"add_generation_prompt":false"#;
        let said = |text: &str| format!(r#"{{"role":"assistant","content":"{text}"}}"#);
        let body = |messages: &str| format!("{{{flags},\"messages\":[{messages}]}}");
        let three = said(&expected_text(&sha, 3));
        assert_eq!(read(&body(&format!("{user},{three}"))), Ok(Some(3)));
        // The response so far is split over two messages.
        let (one, two) = (said(&expected_text(&sha, 1)), format!("t1-{} ", &sha[..8]));
        let both = format!("{user}, {one} ,{}", said(&two));
        assert_eq!(read(&body(&both)), Ok(Some(2)));
        let foreign = said(&expected_text("00000000", 3));
        let foreign = read(&body(&format!("{user},{foreign}"))).unwrap_err();
        assert!(foreign.contains("another response"), "{foreign}");
        assert!(read(&body(user)).unwrap_err().contains("assistant"));
        assert_eq!(read(&format!("{{\"messages\":[{user}]}}")), Ok(None));
        let both_true = format!(r#"{{"continue_final_message":true,"messages":[{user}]}}"#);
        assert!(read(&both_true).unwrap_err().contains("Cannot set both"));
    }
}
