//! Sets the cached-token count in a decode engine's response.
//!
//! A decode engine that pulled the KV cache of a prompt reports the whole prompt as cached. Clients
//! should see the prefill engine's count instead, so `cached_tokens` is set wherever the response
//! has a `usage` object: its value is replaced, or the member or its parent object is inserted.

use std::sync::LazyLock;

use memchr::memmem;

use super::action::{Action, Part, Place, Required};

/// Location of `usage` in the responses of an API, and the name of the details object in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UsageShape {
    /// `usage.prompt_tokens_details` at the top level: chat completions and completions.
    Chat,
    /// `usage.input_tokens_details` at the top level and in the top-level `response`: the responses
    /// API.
    Responses,
}

impl UsageShape {
    const fn details(self) -> &'static [u8] {
        match self {
            Self::Chat => b"prompt_tokens_details",
            Self::Responses => b"input_tokens_details",
        }
    }
}

const TOP: Place = Place(0);
const RESPONSE: Place = Place(1);
const USAGE: Place = Place(2);
const DETAILS: Place = Place(3);

/// The details as a member: `"prompt_tokens_details":{"cached_tokens":123}`.
const DETAILS_MEMBER: Part = Part(0);
/// The value of the details: `{"cached_tokens":123}`.
const DETAILS_VALUE: Part = Part(1);
/// The count as a member: `"cached_tokens":123`.
const COUNT_MEMBER: Part = Part(2);
/// The value of the count: `123`.
const COUNT_VALUE: Part = Part(3);

/// Searches for `usage`. A text without this or an escape has no usage object.
///
/// The finder is static because it is as large as a whole edit and has a larger alignment.
static FINDER: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new(b"usage"));

/// Sets the cached-token count to a number.
#[derive(Clone, Copy, Debug)]
pub struct CachedTokens {
    shape: UsageShape,
    count: u64,
    text: Text,
}

impl CachedTokens {
    /// Creates the edit of a response of the given shape that sets the count to `count`.
    #[must_use]
    pub fn new(shape: UsageShape, count: u64) -> Self {
        Self {
            shape,
            count,
            text: Text::new(shape.details(), count),
        }
    }

    /// Returns the count.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// Returns the next position from `from` on that may belong to the name of a usage object: the
    /// letters `usage`, unless followed by `":null`. The length of `piece` if there is none.
    pub(super) fn candidate(piece: &[u8], mut from: usize) -> usize {
        let finder = &*FINDER;
        while let Some(found) = finder.find(&piece[from..]) {
            let end = from + found + finder.needle().len();
            if !piece[end..].starts_with(b"\":null") {
                return from + found;
            }
            from = end;
        }
        piece.len()
    }

    pub(super) fn member(&self, place: Place, name: &[u8]) -> Action {
        let enter = |place, otherwise| Action::Enter { place, otherwise };
        match (place, name) {
            (TOP | RESPONSE, b"usage") => enter(USAGE, None),
            (TOP, b"response") if self.shape == UsageShape::Responses => enter(RESPONSE, None),
            (USAGE, name) if name == self.shape.details() => enter(DETAILS, Some(DETAILS_VALUE)),
            (DETAILS, b"cached_tokens") => Action::Replace(COUNT_VALUE),
            _ => Action::Skip,
        }
    }

    pub(super) const fn required(&self, place: Place) -> Option<Required> {
        match place {
            USAGE => Some(Required {
                name: self.shape.details(),
                part: DETAILS_MEMBER,
            }),
            DETAILS => Some(Required {
                name: b"cached_tokens",
                part: COUNT_MEMBER,
            }),
            _ => None,
        }
    }

    pub(super) const fn member_of(part: Part) -> Part {
        match part {
            DETAILS_VALUE => DETAILS_MEMBER,
            COUNT_VALUE => COUNT_MEMBER,
            member => member,
        }
    }

    pub(super) fn text(&self, part: Part) -> &[u8] {
        self.text.part(part)
    }
}

/// The texts to insert, which are all slices of one text:
/// `"prompt_tokens_details":{"cached_tokens":123}` with the names and count of the response.
#[derive(Clone, Copy, Debug)]
struct Text {
    bytes: [u8; TEXT_BYTES_MAX],
    object: usize,
    member: usize,
    count: usize,
    end: usize,
}

/// Capacity of [`Text`] in bytes: the longer details name, 20 digits and the surrounding bytes fit.
const TEXT_BYTES_MAX: usize = 80;

impl Text {
    fn new(details: &[u8], count: u64) -> Self {
        let mut text = Self {
            bytes: [0; TEXT_BYTES_MAX],
            object: 0,
            member: 0,
            count: 0,
            end: 0,
        };
        text.push(b"\"");
        text.push(details);
        text.push(b"\":");
        text.object = text.end;
        text.push(b"{");
        text.member = text.end;
        text.push(b"\"cached_tokens\":");
        text.count = text.end;
        let mut unit = 1_u64;
        while count / unit >= 10 {
            unit *= 10;
        }
        while unit > 0 {
            text.push(&[b'0' + (count / unit % 10) as u8]);
            unit /= 10;
        }
        text.push(b"}");
        text
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes[self.end..self.end + bytes.len()].copy_from_slice(bytes);
        self.end += bytes.len();
    }

    fn part(&self, part: Part) -> &[u8] {
        match part {
            DETAILS_MEMBER => &self.bytes[..self.end],
            DETAILS_VALUE => &self.bytes[self.object..self.end],
            COUNT_MEMBER => &self.bytes[self.member..self.end - 1],
            _ => &self.bytes[self.count..self.end - 1],
        }
    }
}
