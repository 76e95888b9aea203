//! The encoder stage: images, audio and video of a chat go to encoders first (reference 6.8).
//!
//! Each item becomes a request of its own, and the encoders' output travels by a store or by
//! `ec_transfer_params` of their answers, which every later leg carries.

use super::material::{Caps, Material};
use super::options::EcConnector;
use super::plan::{Leg, Role, Take};
use super::route::Api;
use crate::json::{EditError, Level, elements, inner, member, members, string_is, validate};

/// Items one request may have. Engines allow far fewer per prompt.
pub const ITEMS_MAX: usize = 256;

/// Kinds of content parts that encoders take, and whether a part names a URL, so that two of the
/// same are one.
const KINDS: [(&str, bool); 4] = [
    ("image_url", true),
    ("audio_url", true),
    ("video_url", true),
    ("input_audio", false),
];

/// More items than [`ITEMS_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManyItems;

/// The items of a request's messages in their order, repetitions of a URL left out.
///
/// # Errors
/// When there are too many.
pub fn items<'a>(material: &Material<'a>) -> Result<Vec<&'a [u8]>, TooManyItems> {
    let messages = material.document.last(Level::Top, "messages");
    let messages = messages.map_or(&b""[..], |member| member.value.of(material.body));
    let mut items = Vec::new();
    let mut seen: Vec<(&str, &[u8])> = Vec::new();
    for message in elements(messages) {
        let content = member(message.value, "content").unwrap_or_default();
        for part in elements(content) {
            let Some((kind, url)) = kind_of(part.value) else {
                continue;
            };
            if let Some(url) = url {
                if seen.contains(&(kind, url)) {
                    continue;
                }
                seen.push((kind, url));
            }
            if items.len() == ITEMS_MAX {
                return Err(TooManyItems);
            }
            items.push(part.value);
        }
    }
    Ok(items)
}

/// The kind of a content part, and the URL it names, as written.
fn kind_of(part: &[u8]) -> Option<(&'static str, Option<&[u8]>)> {
    let name = member(part, "type")?;
    let (kind, has_url) = *KINDS.iter().find(|(kind, _)| string_is(name, kind))?;
    let url = has_url.then(|| {
        let place = member(part, kind)?;
        // Some clients write the URL itself in place of an object with it.
        member(place, "url").or_else(|| inner(place).map(|_| place))
    });
    Some((kind, url.flatten()))
}

/// The leg of one item.
///
/// # Errors
/// When the body needs more edits than allowed.
pub fn leg(material: &Material<'_>, item: &[u8], ec: EcConnector) -> Result<Leg, EditError> {
    let material = Material {
        api: Api::Chat,
        ..*material
    };
    let messages = [br#"[{"role":"user","content":["#, item, b"]}]"].concat();
    let mut edits = material.edits();
    edits.set(Level::Top, "messages", &messages);
    edits.cap(&material, Caps::Sent);
    edits.whole_answer();
    let take = match ec {
        EcConnector::Example => Take::Nothing,
        EcConnector::Nixl => Take::Whole,
    };
    material.leg(Role::Encode, &edits, take)
}

/// The encoders' `ec_transfer_params`, merged member by member; of two with the same name the later
/// one counts.
#[derive(Debug, Default)]
pub struct Merge {
    members: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Merge {
    /// Takes one encoder's answer, a valid JSON text. `false`: it has no parameters, or they are no
    /// object with members.
    pub fn take(&mut self, answer: &[u8]) -> bool {
        let params = member(answer, "ec_transfer_params").unwrap_or_default();
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

    /// The merged object; `None` when no encoder gave any parameters.
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

    #[test]
    fn c4_params_are_merged_and_the_later_counts() {
        let mut merge = Merge::default();
        let answer = |params: &str| format!(r#"{{"id":"x","ec_transfer_params":{params}}}"#);
        assert!(merge.take(answer(r#"{"h1":{"peer_port":1},"h2":[1.0]}"#).as_bytes()));
        for nothing in ["null", "{}", "[]", "7", "\"x\""] {
            assert!(!merge.take(answer(nothing).as_bytes()), "{nothing}");
        }
        assert!(!merge.take(b"{}"));
        assert!(merge.take(answer(r#"{"h1":12345678901234567890}"#).as_bytes()));
        let merged = merge.finish().unwrap();
        let want = br#"{"h1":12345678901234567890,"h2":[1.0]}"#;
        assert_eq!(merged, want);
        assert_eq!(Merge::default().finish(), None);
    }
}
