//! Tokens: the generated text, and how texts are split into tokens.
//!
//! Every token is one word with the white space after it, so a tool that splits at white space
//! counts as many tokens as `usage` reports. The generated text is a function of the prompt's hash.
//! From any part of the text, a test can determine which prompt it belongs to and whether tokens
//! are missing.

use std::collections::{HashMap, VecDeque};
use std::fmt::Write as _;

use serde_json::value::RawValue;

use crate::json::Fields;
use crate::sync::Guarded;

/// The context length that the engine reports.
pub(crate) const MODEL_TOKENS_MAX: u64 = 131_072;
/// Number of token ids whose word is their number; the ids of all other words are larger.
const NUMBERED: u32 = 50_000;
/// Number of token ids, a prime.
const VOCABULARY: u64 = 2_147_483_647;
/// Maximum number of words that [`Words`] remembers, and maximum length of such a word in bytes.
const WORDS_MAX: usize = 65_536;
const WORD_BYTES_MAX: usize = 256;
/// Maximum depth of lists and objects in a prompt in which text is looked for.
const PROMPT_DEPTH_MAX: u32 = 6;

/// Returns the text of a response of `tokens` tokens to the prompt with this hash.
#[must_use]
pub fn expected_text(prompt_sha256: &str, tokens: u32) -> String {
    text_from(tag_of(prompt_sha256), 0, tokens)
}

/// Returns `tokens` tokens of generated text, starting with token number `first` (counted from 0).
/// Each token contains its number and `tag`.
pub(crate) fn text_from(tag: &str, first: u32, tokens: u32) -> String {
    let mut text = String::with_capacity(tokens as usize * 14);
    for i in first..first.saturating_add(tokens) {
        let _ = write!(text, "t{i}-{tag} ");
    }
    text
}

/// Returns the length of `text_from(tag, first, tokens)` in bytes.
pub(crate) fn text_bytes(tag: &str, first: u32, tokens: u32) -> u64 {
    let last = u64::from(first) + u64::from(tokens);
    let digits = digits_below(last) - digits_below(u64::from(first));
    digits + u64::from(tokens) * (tag.len() as u64 + 3)
}

/// Returns the number of decimal digits of all numbers from 0 to `end - 1`.
fn digits_below(end: u64) -> u64 {
    // Every number has a last digit, every number from 10 on has one more, and so on.
    let mut digits = end;
    let mut power: u64 = 10;
    while power < end {
        digits += end - power;
        power = power.saturating_mul(10);
    }
    digits
}

/// Returns the token ids of a response of `tokens` tokens to the prompt with this hash.
#[must_use]
pub fn expected_token_ids(prompt_sha256: &str, tokens: u32) -> Vec<u32> {
    let seed = seed_of(tag_of(prompt_sha256));
    (0..tokens).map(|i| token_id(seed, i)).collect()
}

/// Each token contains this tag, instead of the start of the prompt's hash, in a response to a
/// handoff that was used before or was issued for another prompt. Pass it to [`expected_text`]
/// instead of the hash to get the text of such a response.
pub const FOREIGN_TAG: &str = "f0e19000";

/// Returns the first 8 characters of a prompt's hash, which each token of the generated text
/// contains.
pub(crate) fn tag_of(prompt_sha256: &str) -> &str {
    prompt_sha256.get(..8).unwrap_or(prompt_sha256)
}

pub(crate) fn seed_of(tag: &str) -> u32 {
    u32::from_str_radix(tag, 16).unwrap_or(0)
}

pub(crate) fn token_id(seed: u32, i: u32) -> u32 {
    ((u64::from(seed) + u64::from(i)) % u64::from(NUMBERED)) as u32
}

/// Returns the number of tokens in a prompt, given the JSON of a request's `prompt`, `messages`,
/// `input`, `system` or `token_ids`: its words or its token ids, at least 1.
#[must_use]
pub fn prompt_tokens(json: &str) -> u64 {
    let has_text = memchr::memchr2(b'"', b'{', json.as_bytes()).is_some();
    if json.starts_with('[') && !has_text {
        return memchr::memchr_iter(b',', json.as_bytes()).count() as u64 + 1;
    }
    let mut tokens = 0;
    each_text(json, PROMPT_DEPTH_MAX, &mut |text| tokens += count(text));
    tokens.max(1)
}

/// Calls `visit` with each text of a prompt: a string, the `content` or `text` of an object, and
/// the same in the items of a list.
pub(crate) fn each_text(json: &str, depth: u32, visit: &mut dyn FnMut(&str)) {
    let Some(depth) = depth.checked_sub(1) else {
        return;
    };
    match json.as_bytes().first() {
        Some(b'"') => {
            if let Ok(text) = serde_json::from_str::<&str>(json) {
                visit(text);
            } else if let Ok(text) = serde_json::from_str::<String>(json) {
                visit(&text);
            }
        }
        Some(b'[') => {
            let items = serde_json::from_str::<Vec<&RawValue>>(json).unwrap_or_default();
            for item in items {
                each_text(item.get(), depth, visit);
            }
        }
        Some(b'{') => {
            let fields = Fields::parse(json.as_bytes()).unwrap_or_default();
            if let Some(inner) = fields.some("content").or_else(|| fields.some("text")) {
                each_text(inner, depth, visit);
            }
        }
        _ => {}
    }
}

/// Calls `visit` with each text of the prompt `json`, at any depth that [`prompt_tokens`] counts.
pub(crate) fn each_prompt_text(json: &str, visit: &mut dyn FnMut(&str)) {
    each_text(json, PROMPT_DEPTH_MAX, visit);
}

/// Returns the number of tokens in `text`.
pub(crate) fn count(text: &str) -> u64 {
    let (mut words, mut inside) = (0, false);
    for byte in text.bytes() {
        let is_word = !byte.is_ascii_whitespace();
        words += u64::from(is_word && !inside);
        inside = is_word;
    }
    // White space alone is one token.
    words.max(u64::from(!text.is_empty()))
}

/// Returns the tokens of `text`: each word with the white space after it. White space at the start
/// belongs to the first word.
pub(crate) fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let start = rest.find(|c: char| !c.is_ascii_whitespace())?;
        let after = rest.get(start..)?;
        let word = after
            .find(|c: char| c.is_ascii_whitespace())
            .unwrap_or(after.len());
        let space = after.get(word..)?;
        let space = space
            .find(|c: char| !c.is_ascii_whitespace())
            .unwrap_or(space.len());
        let (piece, left) = rest.split_at_checked(start + word + space)?;
        rest = left;
        Some(piece)
    })
    .chain((!text.is_empty() && text.trim_ascii().is_empty()).then_some(text))
}

/// Returns the 64-bit FNV-1a hash of `bytes`.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// Returns the word of a numbered token id.
fn numbered(id: u32) -> String {
    format!("w{id} ")
}

/// Returns the id of the token `piece`.
pub(crate) fn id_of(piece: &str) -> u32 {
    let number = piece
        .strip_prefix('w')
        .and_then(|text| text.strip_suffix(' '));
    match number.and_then(|number| number.parse().ok()) {
        Some(id) if id < NUMBERED && numbered(id) == piece => id,
        _ => {
            let others = VOCABULARY - u64::from(NUMBERED);
            NUMBERED + (hash(piece.as_bytes()) % others) as u32
        }
    }
}

/// The words of the token ids that the engine has returned. An id is a hash, so a word cannot be
/// derived from it.
#[derive(Debug, Default)]
pub(crate) struct Words(Guarded<Seen>);

#[derive(Debug, Default)]
struct Seen {
    words: HashMap<u32, String>,
    /// The ids in the order of their arrival.
    order: VecDeque<u32>,
}

impl Words {
    /// Returns the id of the token `piece` and remembers the word, unless it is very long. When too
    /// many words are known, the oldest is dropped.
    pub(crate) fn id(&self, piece: &str) -> u32 {
        let id = id_of(piece);
        if id >= NUMBERED && piece.len() <= WORD_BYTES_MAX {
            let mut seen = self.0.lock();
            if seen.words.insert(id, piece.to_owned()).is_none() {
                seen.order.push_back(id);
            }
            if seen.order.len() > WORDS_MAX
                && let Some(oldest) = seen.order.pop_front()
            {
                seen.words.remove(&oldest);
            }
        }
        id
    }

    /// Returns the word of the token `id`: its number if the word is not known.
    pub(crate) fn word(&self, id: u32) -> String {
        let known = self.0.lock().words.get(&id).cloned();
        known.unwrap_or_else(|| numbered(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_ids_follow_from_the_hash() {
        assert_eq!(expected_text("0123456789", 2), "t0-01234567 t1-01234567 ");
        for (first, tokens) in [(0, 0), (0, 10), (3, 200), (99, 2), (100, 1)] {
            let length = text_from("ab", first, tokens).len() as u64;
            assert_eq!(text_bytes("ab", first, tokens), length, "{first} {tokens}");
        }
        assert_eq!(expected_token_ids("0000c34f99", 3), [49_999, 0, 1]);
        assert!(u32::from_str_radix(FOREIGN_TAG, 16).is_ok());
    }

    #[test]
    fn each_token_is_one_word() {
        for (text, want) in [
            ("", &[][..]),
            (" ", &[" "]),
            ("a", &["a"]),
            ("a b", &["a ", "b"]),
            ("  a\n\tb  ", &["  a\n\t", "b  "]),
            ("h\u{e9}\u{a0}x y", &["h\u{e9}\u{a0}x ", "y"]),
        ] {
            let got: Vec<&str> = pieces(text).collect();
            assert_eq!(got, want, "{text:?}");
            assert_eq!(count(text), want.len() as u64, "{text:?}");
            assert_eq!(got.concat(), text);
        }
        let generated = expected_text("0123456789", 9);
        assert_eq!(count(&generated), 9);
        assert_eq!(generated.split_whitespace().count(), 9);
    }

    #[test]
    fn prompts_are_counted_in_words_and_ids() {
        for (json, want) in [
            (r#""one two""#, 2),
            (r#""""#, 1),
            (r#""a\nb c""#, 3),
            (r#"["a b","c"]"#, 3),
            ("[1,2,3]", 3),
            ("[[1,2],[3]]", 3),
            (
                r#"[{"role":"user","content":"a b"},{"role":"user","content":"c"}]"#,
                3,
            ),
            (
                r#"[{"content":[{"type":"text","text":"a b"},{"type":"image_url"}]}]"#,
                2,
            ),
            (
                r#"[{"role":"user","content":[{"type":"x","content":"a"}]}]"#,
                1,
            ),
            ("null", 1),
        ] {
            assert_eq!(prompt_tokens(json), want, "{json}");
        }
    }

    #[test]
    fn ids_lead_back_to_their_words() {
        let words = Words::default();
        let text = "the quick  brown\nfox w7 w07 w50000 ";
        let ids: Vec<u32> = pieces(text).map(|piece| words.id(piece)).collect();
        assert_eq!(ids[4], 7);
        assert!(ids[5] >= NUMBERED && ids[6] >= NUMBERED);
        let back: String = ids.iter().map(|id| words.word(*id)).collect();
        assert_eq!(back, text);
        assert_eq!(words.word(12), "w12 ");
        for i in 0..WORDS_MAX {
            words.id(&format!("x{i}"));
        }
        assert_eq!(words.0.lock().words.len(), WORDS_MAX);
        assert_ne!(words.word(ids[0]), "the ");
    }
}
