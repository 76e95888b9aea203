//! The requests of a soak run: their bytes, and the tags of the expected responses.

use crate::limits::SOAK_PROMPT_BYTES_MAX;
use crate::request::{Api, prompt_of};
use crate::soak::check::tag;

/// The parts that all requests of a run have in common.
#[derive(Clone, Debug)]
pub struct RequestTemplate {
    /// The request head up to and including `content-length: `; the value of this last field
    /// follows.
    head: String,
    api: Api,
    tokens: u32,
    /// Distinguishes the prompts of this run from those of other runs.
    salt: u64,
    filler: String,
}

/// A request, ready to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreparedRequest {
    /// The bytes of the request.
    pub bytes: Vec<u8>,
    /// The tag that every token of the expected response contains.
    pub tag: String,
}

impl RequestTemplate {
    /// Prepares requests to `path`, whose API is `api`, for responses of `tokens` tokens. `host` is
    /// the value of the `host` field, and `fields` are additional header fields.
    #[must_use]
    pub fn new(
        path: &str,
        api: Api,
        tokens: u32,
        salt: u64,
        host: &str,
        fields: &[(String, String)],
    ) -> Self {
        let mut head =
            format!("POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n");
        for (name, value) in fields {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("content-length: ");
        // A word and its space have at least four bytes.
        let mut filler = prompt_of(SOAK_PROMPT_BYTES_MAX / 4 + 1);
        filler.truncate(SOAK_PROMPT_BYTES_MAX as usize);
        Self {
            head,
            api,
            tokens,
            salt,
            filler,
        }
    }

    /// Returns request `number`. Its prompt is unique in the run and contains `prompt_bytes` bytes
    /// of filler, at most [`SOAK_PROMPT_BYTES_MAX`].
    #[must_use]
    pub fn of(&self, number: u64, stream: bool, prompt_bytes: u32) -> PreparedRequest {
        let filler = &self.filler[..self.filler.len().min(prompt_bytes as usize)];
        let text = format!("\"soak {:016x} {number} {filler}\"", self.salt);
        let (member, prompt) = match self.api {
            Api::Completions => ("prompt", text),
            Api::Chat => (
                "messages",
                format!("[{{\"role\":\"user\",\"content\":{text}}}]"),
            ),
        };
        let body = format!(
            "{{\"model\":\"mock-model\",\"{member}\":{prompt},\"max_tokens\":{},\
             \"ignore_eos\":true,\"stream\":{stream}}}",
            self.tokens
        );
        let bytes = format!("{}{}\r\n\r\n{body}", self.head, body.len());
        PreparedRequest {
            bytes: bytes.into_bytes(),
            tag: tag(&prompt),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn requests_are_valid_unique_and_tagged() {
        let fields = [("x-a".to_owned(), "b".to_owned())];
        for (path, api, member) in [
            ("/v1/completions", Api::Completions, "/prompt"),
            ("/v1/chat/completions", Api::Chat, "/messages"),
        ] {
            let asking = RequestTemplate::new(path, api, 9, 77, "h:1", &fields);
            let mut tags = std::collections::BTreeSet::new();
            for (number, bytes) in [(0, 0), (1, 0), (2, 500), (3, u32::MAX)] {
                let asked = asking.of(number, number % 2 == 0, bytes);
                let text = String::from_utf8(asked.bytes).unwrap();
                let (head, body) = text.split_once("\r\n\r\n").unwrap();
                assert!(head.starts_with(&format!("POST {path} HTTP/1.1\r\nhost: h:1\r\n")));
                assert!(head.contains("\r\nx-a: b\r\n"));
                assert!(head.ends_with(&format!("content-length: {}", body.len())));
                let json: Value = serde_json::from_str(body).unwrap();
                assert_eq!(json["max_tokens"], 9);
                assert_eq!(json["stream"], number % 2 == 0);
                let prompt = json.pointer(member).unwrap().to_string();
                assert_eq!(asked.tag, tag(&prompt));
                assert!(tags.insert(asked.tag));
            }
        }
    }
}
