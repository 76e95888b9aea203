//! Decides whether a decoder can take a prefiller's handoff.
//!
//! The only difference between releases of vLLM that is known to end a decoder is the form of
//! `remote_block_ids`: a flat list up to 0.17.1, a list of lists from 0.18.0 on
//! (vllm-project/vllm#35758). Both engines of a pair with equal versions use the same form, also
//! those of forks and of other hardware, which kept flat lists (`docs/engines.md#handoffs`).

use crate::json::{Blocks, inner, member};

/// The version of an engine, as its `/version` states it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineVersion(String);

/// Longest version that is kept, in bytes. Development builds have about 40.
const VERSION_BYTES_MAX: usize = 128;

impl EngineVersion {
    /// Reads the version from the body of a response to `GET /version`: `{"version":"0.18.0"}`.
    /// Returns `None` if it contains none.
    #[must_use]
    pub fn read(response: &[u8]) -> Option<Self> {
        let text = inner(member(response, "version")?)?;
        let text = std::str::from_utf8(text).ok()?;
        let fits = !text.is_empty() && text.len() <= VERSION_BYTES_MAX;
        (fits && text.bytes().all(|byte| byte.is_ascii_graphic())).then(|| Self(text.to_owned()))
    }

    /// Returns the form of block ids that this version uses; `None` if that is not known.
    fn blocks(&self) -> Option<Blocks> {
        let (release, is_exact) = self.release()?;
        match release {
            [0, 0..=16, _] | [0, 17, 0..=1] => Some(Blocks::Flat),
            // Builds between the two releases may use either form.
            [0, 17, _] => None,
            [0, 18, 0] => is_exact.then_some(Blocks::Nested),
            _ => Some(Blocks::Nested),
        }
    }

    /// Returns the numbers of the release, and whether this is the release itself rather than a
    /// build before it (PEP 440). Returns `None` if the version does not begin with numbers.
    fn release(&self) -> Option<([u32; 3], bool)> {
        let mut numbers = [0; 3];
        let mut rest = self.0.as_str();
        for (index, number) in numbers.iter_mut().enumerate() {
            if index > 0 {
                rest = rest.strip_prefix('.')?;
            }
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            *number = rest[..digits].parse().ok()?;
            rest = &rest[digits..];
        }
        let is_exact = rest.is_empty() || rest.starts_with('+') || rest.starts_with(".post");
        Some((numbers, is_exact))
    }
}

impl std::fmt::Display for EngineVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Returns whether the versions of the engines decide if a handoff with this form of block ids can
/// be passed on.
#[must_use]
pub fn depends_on_versions(blocks: Blocks) -> bool {
    blocks == Blocks::Flat
}

/// Returns why the decoder must not get a handoff with this form of block ids, or `None` if it can.
/// `None` as a version means that it is not known.
#[must_use]
pub fn refusal(
    blocks: Blocks,
    prefiller: Option<&EngineVersion>,
    decoder: Option<&EngineVersion>,
) -> Option<String> {
    if prefiller.is_some() && prefiller == decoder {
        return None;
    }
    let takes = decoder.and_then(EngineVersion::blocks);
    let is_taken = match blocks {
        Blocks::Other => true,
        Blocks::Nested => takes != Some(Blocks::Flat),
        Blocks::Flat => takes == Some(Blocks::Flat),
    };
    if is_taken {
        return None;
    }
    let (form, other) = match blocks {
        Blocks::Flat => ("a flat list", "a list of lists"),
        Blocks::Nested | Blocks::Other => ("a list of lists", "a flat list"),
    };
    let show = |version: Option<&EngineVersion>| match version {
        Some(version) => format!("version {version}"),
        None => "an unknown version".to_owned(),
    };
    Some(format!(
        "its remote_block_ids is {form}, and a decoder that expects {other} exits when it reads \
         it; the prefiller has {}, the decoder {}; run equal versions, or set --allow-flat-blocks \
         if the decoder takes flat lists",
        show(prefiller),
        show(decoder)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> EngineVersion {
        EngineVersion::read(format!(r#"{{"version":"{text}"}}"#).as_bytes()).unwrap()
    }

    #[test]
    fn releases_use_the_form_that_they_are_known_for() {
        for (text, want) in [
            ("0.9.2", Some(Blocks::Flat)),
            ("0.17.0", Some(Blocks::Flat)),
            ("0.17.1", Some(Blocks::Flat)),
            ("0.17.1rc1", Some(Blocks::Flat)),
            ("0.17.2rc1.dev4+g1234567", None),
            ("0.17.3", None),
            ("0.18.0rc1", None),
            ("0.18.0.dev7", None),
            ("0.18.0", Some(Blocks::Nested)),
            ("0.18.0+cpu", Some(Blocks::Nested)),
            ("0.18.0.post1", Some(Blocks::Nested)),
            ("0.18.1.dev3", Some(Blocks::Nested)),
            ("0.32.0", Some(Blocks::Nested)),
            ("1.0.0", Some(Blocks::Nested)),
            ("dev", None),
            ("0.18", None),
            ("0.99999999999.0", None),
        ] {
            assert_eq!(version(text).blocks(), want, "{text}");
        }
    }

    #[test]
    fn only_what_is_known_to_end_the_decoder_is_refused() {
        use Blocks::{Flat, Nested, Other};
        let (old, new) = (Some(version("0.17.1")), Some(version("0.32.0")));
        let fork = Some(version("0.17.2.dev1"));
        for (blocks, prefiller, decoder, want) in [
            (Flat, &old, &new, true),
            (Flat, &old, &None, true),
            (Flat, &None, &None, true),
            (Flat, &fork, &new, true),
            (Flat, &old, &old, false),
            (Flat, &new, &new, false),
            (Flat, &fork, &fork, false),
            (Flat, &fork, &old, false),
            (Nested, &new, &old, true),
            (Nested, &None, &old, true),
            (Nested, &new, &None, false),
            (Nested, &new, &fork, false),
            (Other, &new, &old, false),
            (Other, &None, &None, false),
        ] {
            let refused = refusal(blocks, prefiller.as_ref(), decoder.as_ref());
            assert_eq!(
                refused.is_some(),
                want,
                "{blocks:?} {prefiller:?} {decoder:?}"
            );
        }
        let why = refusal(Flat, old.as_ref(), None).unwrap();
        for part in [
            "remote_block_ids",
            "0.17.1",
            "unknown",
            "--allow-flat-blocks",
        ] {
            assert!(why.contains(part), "{why}");
        }
    }

    #[test]
    fn a_version_is_read_from_any_response_with_one() {
        let read = |text: &str| EngineVersion::read(text.as_bytes()).map(|found| found.to_string());
        assert_eq!(read(r#"{"version":"0.32.0"}"#).as_deref(), Some("0.32.0"));
        assert_eq!(read(r#"{"a":[1],"version" : "x"}"#).as_deref(), Some("x"));
        for text in [
            "",
            "{}",
            "[]",
            r#"{"version":7}"#,
            r#"{"version":""}"#,
            "Not Found",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
        assert_eq!(
            read(&format!(r#"{{"version":"{}"}}"#, "1".repeat(129))),
            None
        );
    }
}
