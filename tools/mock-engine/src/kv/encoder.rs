//! The contract of an encoder: a request contains one item (an image, audio or video) of a client's
//! chat completion request, and the response contains the `ec_transfer_params` for that item.

use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use super::fields::{Cap, absent, broken, not_streamed, one_token};
use super::{Admitted, Call};
use crate::api::{Kind, Refusal, hex};
use crate::config::HandoffShape;
use crate::json::Fields;

/// The `type` values of message content parts that an encoder accepts.
const ITEMS: [&str; 4] = ["image_url", "audio_url", "video_url", "input_audio"];

/// Returns the member of `ec_transfer_params` that an encoder on `port` returns for `item`, the
/// bytes of a content part. The result is the key and the bytes of the value.
#[must_use]
pub fn encoded_params(item: &str, port: u16) -> (String, String) {
    let key = hex(&Sha256::digest(item.as_bytes()));
    let value = format!(
        "{{\"peer_host\":\"127.0.0.1\", \"peer_port\":{port},\"size_bytes\":9007199254740993,\
         \"mock_floats\":[1.0,1e5],\"mock_escape\":\"\\u003c\"}}"
    );
    (key.get(..16).unwrap_or_default().to_owned(), value)
}

/// Checks a request to an encoder, and returns the `ec_transfer_params` for its response.
pub(crate) fn admit(call: &Call<'_>) -> Result<Admitted, Refusal> {
    if call.kind != Kind::Chat {
        return Err(broken(format!(
            "path: want a chat completion request, got {:?}",
            call.kind
        )));
    }
    not_streamed(call.fields)?;
    one_token(call.fields, call.kind, Cap::IfGiven, Cap::IfGiven)?;
    absent(call.fields, "kv_transfer_params")?;
    let item = only_item(call.fields)?;
    let ids: Vec<&str> = call
        .head
        .headers
        .iter()
        .filter(|(name, _)| name.eq_ignore_ascii_case("x-request-id"))
        .map(|(_, id)| id.as_str())
        .collect();
    let is_numbered = |id: &&str| {
        id.rsplit_once("-enc-")
            .is_some_and(|(_, nth)| nth.parse::<u32>().is_ok())
    };
    if ids.len() != 1 || !ids.iter().all(is_numbered) {
        return Err(broken(format!("x-request-id: want …-enc-N, got {ids:?}")));
    }
    let (key, value) = encoded_params(item, call.port);
    let params = match call.shape {
        HandoffShape::Omit => None,
        HandoffShape::Null => Some("null".to_owned()),
        HandoffShape::Empty => Some("{}".to_owned()),
        HandoffShape::Text => Some("\"not an object\"".to_owned()),
        HandoffShape::List => Some("[{\"peer_host\":\"e\"}]".to_owned()),
        HandoffShape::Fresh | HandoffShape::Flat | HandoffShape::Stale | HandoffShape::Decoys => {
            Some(format!("{{ \"{key}\" : {value} }}"))
        }
    };
    Ok(Admitted {
        members: params.map_or_else(String::new, |params| {
            format!(",\"ec_transfer_params\":{params}")
        }),
        ..Admitted::default()
    })
}

/// Returns the bytes of the only content part of the only message. Any other content of `messages`
/// is an error.
fn only_item<'a>(fields: &Fields<'a>) -> Result<&'a str, Refusal> {
    let raw = fields.raw("messages").unwrap_or("absent");
    let messages: Vec<Fields<'a>> =
        serde_json::from_str(raw).map_err(|_| broken("messages: not a list of objects"))?;
    let [message] = messages.as_slice() else {
        let count = messages.len();
        return Err(broken(format!("messages: want one, got {count}")));
    };
    if message.string("role").as_deref() != Some("user") {
        return Err(broken("messages[0].role: want user"));
    }
    let raw = message.raw("content").unwrap_or("absent");
    let parts: Vec<&'a RawValue> = serde_json::from_str(raw)
        .map_err(|_| broken("messages[0].content: not a list of parts"))?;
    let [part] = parts.as_slice() else {
        let count = parts.len();
        return Err(broken(format!(
            "messages[0].content: want one part, got {count}"
        )));
    };
    let fields = Fields::parse(part.get().as_bytes()).ok();
    let kind = fields.map(|fields| match fields.raw("type") {
        Some(_) => fields.string("type").unwrap_or_default(),
        // vLLM takes such a part for the item that it has.
        None => {
            let has = |kind: &&&str| fields.raw(kind).is_some();
            ITEMS
                .iter()
                .find(has)
                .copied()
                .unwrap_or_default()
                .to_owned()
        }
    });
    let kind = kind.unwrap_or_default();
    if !ITEMS.contains(&kind.as_str()) {
        return Err(broken(format!("messages[0].content[0].type: got {kind:?}")));
    }
    Ok(part.get())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_must_have_one_item_in_one_message() {
        let item = |text: &str| {
            let body = format!("{{\"messages\":{text}}}");
            let fields = Fields::parse(body.as_bytes()).unwrap();
            only_item(&fields)
                .map(str::to_owned)
                .map_err(|refusal| refusal.message)
        };
        let good = r#"[{"role":"user","content":[{"type":"image_url","image_url":{"url":"u"}}]}]"#;
        assert_eq!(
            item(good),
            Ok(r#"{"type":"image_url","image_url":{"url":"u"}}"#.to_owned())
        );
        for (bad, want) in [
            ("[]", "want one, got 0"),
            (r#"[{"role":"user","content":"x"}]"#, "list of parts"),
            (r#"[{"role":"system","content":[]}]"#, "want user"),
            (r#"[{"role":"user","content":[]}]"#, "got 0"),
            (
                r#"[{"role":"user","content":[{"type":"text"}]}]"#,
                "got \"text\"",
            ),
            (r#"[{"role":"user","content":[{"text":"x"}]}]"#, "got \"\""),
        ] {
            let message = item(bad).unwrap_err();
            assert!(message.contains(want), "{message} / {want}");
        }
        let (key, value) = encoded_params("a", 1);
        assert_eq!(key, "ca978112ca1bbdca");
        assert!(serde_json::from_str::<serde_json::Value>(&value).is_ok());
    }
}
