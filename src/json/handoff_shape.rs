//! The known members of `kv_transfer_params`.

use super::cursor::string_is;
use super::error::JsonError;
use super::lex::{Event, Kind, Lexer};
use crate::span::Span;

/// The form of `remote_block_ids` in a handoff (`docs/engines.md#handoffs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocks {
    /// There are none, or the value is neither form: absent, `null`, an empty list, a list of
    /// strings.
    Other,
    /// A list of lists, one per KV cache group, as vLLM uses from 0.18.0 on.
    Nested,
    /// A list with numbers, as vLLM used up to 0.17.1.
    Flat,
}

/// Parses a number without sign, fraction and exponent. Returns `None` for any other text, and for
/// a number that does not fit into 64 bits.
pub(super) fn integer(text: &[u8]) -> Option<u64> {
    if !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Kind and span of the value of each known member of `kv_transfer_params`, in the order of
/// [`KNOWN`]; `None` for an absent member. The last of repeated members counts.
pub(super) struct Shape {
    /// Whether the object has no members.
    pub(super) is_empty: bool,
    members: [Option<(Kind, Span)>; KNOWN.len()],
}

/// The members of `kv_transfer_params` that are read.
const KNOWN: [&str; 3] = [
    "remote_block_ids",
    "remote_prefill_cached_tokens",
    "transfer_mode",
];

impl Shape {
    /// Finds the known members of `bytes`, which are the `kv_transfer_params` and valid JSON. Fails
    /// if they are not an object.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, JsonError> {
        let mut shape = Self {
            is_empty: true,
            members: [None; KNOWN.len()],
        };
        let mut lexer = Lexer::new();
        let mut member = None;
        while let Some(event) = lexer.next(bytes)? {
            match event {
                Event::Name { .. } => {
                    shape.is_empty = false;
                    let name = lexer.name();
                    member = KNOWN
                        .iter()
                        .position(|known| Some(known.as_bytes()) == name);
                }
                Event::Value { at, kind } => {
                    if let Some(member) = member {
                        shape.members[member] = Some((kind, Span::new(at, at)));
                    }
                }
                Event::ValueEnd { at } => {
                    if let Some((_, span)) = member.and_then(|m| shape.members[m].as_mut()) {
                        span.end = at;
                    }
                }
                Event::Comma { .. } | Event::Close { .. } => {}
            }
        }
        lexer.finish()?;
        Ok(shape)
    }

    pub(super) fn blocks(&self, bytes: &[u8]) -> Blocks {
        match self.members[0] {
            Some((Kind::Array, span)) => blocks(span.of(bytes)),
            Some(_) | None => Blocks::Other,
        }
    }

    pub(super) fn cached_tokens(&self, bytes: &[u8]) -> Option<u64> {
        let (_, span) = self.members[1]?;
        integer(span.of(bytes))
    }

    pub(super) fn is_push(&self, bytes: &[u8]) -> bool {
        self.members[2].is_some_and(|(_, span)| string_is(span.of(bytes), "push"))
    }
}

/// Determines the form of `remote_block_ids`, which must be a valid JSON array.
fn blocks(array: &[u8]) -> Blocks {
    let mut found = Blocks::Other;
    let mut depth = 0_u32;
    let mut at = 0;
    while let Some(&byte) = array.get(at) {
        at += 1;
        match byte {
            b'[' => {
                depth += 1;
                if depth == 2 {
                    found = Blocks::Nested;
                }
            }
            b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            b'"' => at += string_rest(&array[at..]),
            // One number among lists makes engines fail as a flat list does.
            b'0'..=b'9' | b'-' if depth == 1 => return Blocks::Flat,
            _ => {}
        }
    }
    found
}

/// Returns the number of bytes up to and including the closing quote of a string. `bytes` must
/// begin after its opening quote.
fn string_rest(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    bytes.len()
}
