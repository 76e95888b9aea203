//! The encoder stage: the images, audio and video of a request are first sent to encoders
//! (`docs/pd-sidecar.md#encoders`).
//!
//! Each item is sent as a separate request. The encoders' output is passed on through a store, or
//! through the `ec_transfer_params` of their responses, which every later leg carries.

use std::collections::HashSet;

use super::edits::Caps;
use super::leg::{Leg, Role, Take};
use super::options::EcConnector;
use super::request::PdRequest;
use crate::api::Api;
use crate::json::{EditError, Level, elements, inner, member, members, string_is, validate};

/// Maximum number of items (images, audio and video parts) in one request. Engines allow far fewer
/// per prompt.
pub const ITEMS_MAX: usize = 256;

/// Types of content parts that are sent to encoders, and whether such a part contains a URL. Parts
/// with the same type and URL are encoded once.
const KINDS: [(&str, bool); 4] = [
    ("image_url", true),
    ("audio_url", true),
    ("video_url", true),
    ("input_audio", false),
];

/// The request has more items than [`ITEMS_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManyItems;

/// Returns the items in the messages of a request, in order. An item with the type and URL of an
/// earlier one is omitted.
///
/// # Errors
/// If there are more than [`ITEMS_MAX`].
pub fn items<'a>(request: &PdRequest<'a>) -> Result<Vec<&'a [u8]>, TooManyItems> {
    let messages = request.document.last(Level::Top, "messages");
    let messages = messages.map_or(&b""[..], |member| member.value.of(request.body));
    let mut items = Vec::new();
    let mut seen: HashSet<(&str, &[u8])> = HashSet::new();
    for message in elements(messages) {
        let content = member(message.value, "content").unwrap_or_default();
        for part in elements(content) {
            let Some((kind, url)) = kind_of(part.value) else {
                continue;
            };
            if url.is_some_and(|url| !seen.insert((kind, url))) {
                continue;
            }
            if items.len() == ITEMS_MAX {
                return Err(TooManyItems);
            }
            items.push(part.value);
        }
    }
    Ok(items)
}

/// Returns the type of a content part and its URL, if it has one, with JSON escapes left in place.
/// Returns `None` if parts of that type are not sent to encoders.
fn kind_of(part: &[u8]) -> Option<(&'static str, Option<&[u8]>)> {
    let name = member(part, "type")?;
    let (kind, has_url) = *KINDS.iter().find(|(kind, _)| string_is(name, kind))?;
    let url = has_url.then(|| {
        let place = member(part, kind)?;
        // Some clients send the URL itself instead of an object that contains it.
        member(place, "url").or_else(|| inner(place).map(|_| place))
    });
    Some((kind, url.flatten()))
}

/// Returns the leg that sends one item to an encoder.
///
/// # Errors
/// If the body needs more than `JSON_EDITS_MAX` edits.
pub fn leg(request: &PdRequest<'_>, item: &[u8], ec: EcConnector) -> Result<Leg, EditError> {
    let request = PdRequest {
        api: Api::Chat,
        ..*request
    };
    let messages = [br#"[{"role":"user","content":["#, item, b"]}]"].concat();
    let mut edits = request.edits();
    edits.set(Level::Top, "messages", &messages);
    edits.cap(request.api, Caps::Sent);
    edits.whole_response();
    let take = match ec {
        EcConnector::Example => Take::Nothing,
        EcConnector::Nixl => Take::Whole,
    };
    request.leg(Role::Encode, &edits, take)
}

/// The encoders' `ec_transfer_params`, merged member by member. A later member replaces an earlier
/// one of the same name.
#[derive(Debug, Default)]
pub struct Merge {
    members: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Merge {
    /// Adds the parameters of one encoder's response, which must be valid JSON. Returns `false` if
    /// it has no `ec_transfer_params`, or if they are not an object with at least one member.
    pub fn take(&mut self, response: &[u8]) -> bool {
        let params = member(response, "ec_transfer_params").unwrap_or_default();
        if validate(params).is_err() {
            return false;
        }
        let before = self.members.len();
        let mut replaced = false;
        for item in members(params) {
            let known = self.members.iter_mut().find(|(key, _)| key == item.key);
            match known {
                Some((_, value)) => {
                    replaced = true;
                    *value = item.value.to_vec();
                }
                None => self.members.push((item.key.to_vec(), item.value.to_vec())),
            }
        }
        replaced || self.members.len() > before
    }

    /// Returns the merged object, or `None` if no response had any parameters.
    #[must_use]
    pub fn finish(self) -> Option<Vec<u8>> {
        if self.members.is_empty() {
            return None;
        }
        let mut object = vec![b'{'];
        for (index, (key, value)) in self.members.iter().enumerate() {
            if index > 0 {
                object.push(b',');
            }
            object.extend_from_slice(key);
            object.push(b':');
            object.extend_from_slice(value);
        }
        object.push(b'}');
        Some(object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pd::testing::{Subject, apply};
    use serde_json::json;

    fn items_of(messages: &str) -> Result<usize, TooManyItems> {
        let body = format!(r#"{{"messages":{messages}}}"#);
        items(&Subject::new(Api::Chat, &body).request()).map(|items| items.len())
    }

    #[test]
    fn c1_c3_items_are_counted_and_repeated_urls_omitted() {
        let image = r#"{"type":"image_url","image_url":{"url":"http://img/1"}}"#;
        let other = r#"{"type":"image_url","image_url":{"url":"http://img/2"}}"#;
        let plain = r#"{"type":"image_url","image_url":"http://img/3"}"#;
        let video = r#"{"type":"video_url","video_url":{"url":"http://img/1"}}"#;
        let audio = r#"{"type":"input_audio","input_audio":{"data":"QQ==","format":"wav"}}"#;
        let text = r#"{"type":"text","text":"image_url"}"#;
        let escaped = r#"{"ty\u0070e":"image\u005furl","image_url":{"url":"http://img/9"}}"#;
        let cases: [(&[&str], usize); 9] = [
            (&[text], 0),
            (&[image], 1),
            (&[image, text, other], 2),
            (&[image, image], 1),
            (&[plain, plain], 1),
            (&[video, video, image], 2),
            (&[audio, audio], 2),
            (&[escaped], 1),
            (&[r#"{"type":7}"#, "null", "[]"], 0),
        ];
        for (parts, want) in cases {
            let parts = parts.join(",");
            let one = format!(r#"[{{"role":"user","content":[{parts}]}}]"#);
            assert_eq!(items_of(&one), Ok(want), "{one}");
        }
        let two = format!(
            r#"[{{"content":"plain"}},{{"content":[{image}]}},{{"content":[{image},{audio}]}}]"#
        );
        assert_eq!(items_of(&two), Ok(2));
        assert_eq!(items_of(r#""no list""#), Ok(0));
        let many = vec![audio; ITEMS_MAX + 1].join(",");
        let many = format!(r#"[{{"content":[{many}]}}]"#);
        assert_eq!(items_of(&many), Err(TooManyItems));
    }

    #[test]
    fn c2_an_encode_request_has_one_item_and_a_token_limit_of_one() {
        let body = r#"{"model":"vl","max_tokens":8,"stream":true,"stream_options":{},"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"http://img/1"}},{"type":"text","text":"what?"}]}]}"#;
        let subject = Subject::new(Api::Chat, body);
        let request = subject.request();
        let item = items(&request).unwrap()[0];
        let leg = leg(&request, item, EcConnector::Nixl).unwrap();
        let want = json!({"model": "vl", "max_tokens": 1, "stream": false, "messages": [
            {"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "http://img/1"}}]}]});
        assert_eq!(apply(&leg, body), want);
    }

    #[test]
    fn c4_params_are_merged_and_the_later_one_is_kept() {
        let mut merge = Merge::default();
        let response = |params: &str| format!(r#"{{"id":"x","ec_transfer_params":{params}}}"#);
        assert!(merge.take(response(r#"{"h1":{"peer_port":1},"h2":[1.0]}"#).as_bytes()));
        for nothing in ["null", "{}", "[]", "7", "\"x\""] {
            assert!(!merge.take(response(nothing).as_bytes()), "{nothing}");
        }
        assert!(!merge.take(b"{}"));
        assert!(merge.take(response(r#"{"h1":12345678901234567890}"#).as_bytes()));
        let merged = merge.finish().unwrap();
        let want = br#"{"h1":12345678901234567890,"h2":[1.0]}"#;
        assert_eq!(merged, want);
        assert_eq!(Merge::default().finish(), None);
    }
}
