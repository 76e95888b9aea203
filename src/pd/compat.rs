//! Decides whether a decoder can take a prefiller's handoff.
//!
//! The only difference between releases of vLLM that is known to end a decoder is the form of
//! `remote_block_ids`: a flat list up to 0.17.1, a list of lists from 0.18.0 on
//! (vllm-project/vllm#35758). Both engines of a pair with equal versions use the same form, also
//! those of forks and of other hardware, which kept flat lists (`docs/engines.md#handoffs`).

use crate::fleet::EngineVersion;
use crate::json::Blocks;

/// Returns the form of block ids that a version uses; `None` if that is not known.
fn blocks_of(version: &EngineVersion) -> Option<Blocks> {
    let (release, is_exact) = version.release()?;
    match release {
        [0, 0..=16, _] | [0, 17, 0..=1] => Some(Blocks::Flat),
        // Builds between the two releases may use either form.
        [0, 17, _] => None,
        [0, 18, 0] => is_exact.then_some(Blocks::Nested),
        _ => Some(Blocks::Nested),
    }
}

/// Returns whether a decoder takes this form of block ids from a prefiller of any version. If not,
/// it takes the form only from a prefiller with the same version. `None` means that the decoder's
/// version is not known.
#[must_use]
pub fn takes(decoder: Option<&EngineVersion>, blocks: Blocks) -> bool {
    let known = decoder.and_then(blocks_of);
    match blocks {
        Blocks::Other => true,
        Blocks::Nested => known != Some(Blocks::Flat),
        Blocks::Flat => known == Some(Blocks::Flat),
    }
}

/// Returns why the decoder must not get a handoff with this form of block ids, or `None` if it can.
/// `None` as a version means that it is not known.
#[must_use]
pub fn refusal(
    blocks: Blocks,
    prefiller: Option<&EngineVersion>,
    decoder: Option<&EngineVersion>,
) -> Option<String> {
    if takes(decoder, blocks) || (prefiller.is_some() && prefiller == decoder) {
        return None;
    }
    let (form, other) = match blocks {
        Blocks::Flat => ("a flat list", "a list of lists"),
        Blocks::Nested | Blocks::Other => ("a list of lists", "a flat list"),
    };
    let decoder = match decoder {
        Some(version) => format!("has version {version}"),
        None => "has stated no version".to_owned(),
    };
    let prefiller = match prefiller {
        Some(version) => format!(", the prefiller version {version}"),
        None => String::new(),
    };
    Some(format!(
        "its remote_block_ids is {form}, and a decoder that expects {other} exits when it reads \
         it; the decoder {decoder}{prefiller}; run equal versions, or set \
         --check-handoff-versions=false if the decoder takes such lists"
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
            assert_eq!(blocks_of(&version(text)), want, "{text}");
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
            "stated no version",
            "--check-handoff-versions=false",
        ] {
            assert!(why.contains(part), "{why}");
        }
    }
}
