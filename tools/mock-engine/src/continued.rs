//! A chat that goes on with its last message: how much of the answer is in it already.
//!
//! The text of an answer is a function of the prompt, and here the prompt is the messages before
//! the trailing ones of the assistant; so answers cut into several requests add up to the answer
//! to the first of them, and a text that came from somewhere else is found out.

use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use crate::api::{Refusal, hex};
use crate::json::Fields;
use crate::response::tag_of;

/// Where an answer goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Continued {
    /// Tokens that are there already.
    pub(crate) first: u32,
    /// SHA-256 of the messages without those of the answer.
    pub(crate) prompt_sha256: String,
}

/// Reads what a chat continues; `None` where it continues nothing of ours.
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
        let message = "the last message is not one of the assistant";
        return Err(Refusal::bad("messages", message));
    }
    // What was sent first: all up to the last message before, and the bracket.
    let end = rest.last().map_or(1, |last| {
        last.get().as_ptr() as usize - raw.as_ptr() as usize + last.get().len()
    });
    let prompt = format!("{}]", raw.get(..end).unwrap_or_default());
    let prompt_sha256 = hex(&Sha256::digest(prompt.as_bytes()));
    let text: String = response.into_iter().rev().collect();
    let first = tokens_in(&text, tag_of(&prompt_sha256))
        .ok_or_else(|| Refusal::bad("messages", "the last message continues another answer"))?;
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

/// How many tokens a text is, if it is the beginning of the answer with this tag.
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
    use crate::response::expected_text;

    fn read(text: &str) -> Result<Option<u32>, String> {
        let fields = Fields::parse(text.as_bytes()).unwrap();
        continued(&fields)
            .map(|continued| continued.map(|continued| continued.first))
            .map_err(|refusal| refusal.message)
    }

    #[test]
    fn the_response_so_far_is_counted_and_checked() {
        let user = r#"{"role":"user","content":"q"}"#;
        let sha = hex(&Sha256::digest(format!("[{user}]").as_bytes()));
        let flags = r#""continue_final_message":true,"add_generation_prompt":false"#;
        let said = |text: &str| format!(r#"{{"role":"assistant","content":"{text}"}}"#);
        let body = |messages: &str| format!("{{{flags},\"messages\":[{messages}]}}");
        let three = said(&expected_text(&sha, 3));
        assert_eq!(read(&body(&format!("{user},{three}"))), Ok(Some(3)));
        // In one message or in several.
        let (one, two) = (said(&expected_text(&sha, 1)), format!("t1-{} ", &sha[..8]));
        let both = format!("{user}, {one} ,{}", said(&two));
        assert_eq!(read(&body(&both)), Ok(Some(2)));
        let foreign = said(&expected_text("00000000", 3));
        let foreign = read(&body(&format!("{user},{foreign}"))).unwrap_err();
        assert!(foreign.contains("another answer"), "{foreign}");
        assert!(read(&body(user)).unwrap_err().contains("assistant"));
        assert_eq!(read(&format!("{{\"messages\":[{user}]}}")), Ok(None));
        let both_true = format!(r#"{{"continue_final_message":true,"messages":[{user}]}}"#);
        assert!(read(&both_true).unwrap_err().contains("Cannot set both"));
    }
}
