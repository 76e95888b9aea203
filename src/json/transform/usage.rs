//! Sets the counts of the prompt's tokens in a decode engine's response.
//!
//! A decode engine that pulled the KV cache of a prompt reports other counts of cached tokens than
//! the prefill engine, which computed the prompt. Clients should see the latter's, so they are set
//! wherever the response has a `usage` object: a count is replaced, or the member or its parent
//! object is inserted.

use super::action::{Action, Part, Place, REQUIRED_MAX, Required};

/// Location of the counts in the `usage` of an API's responses, and their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UsageShape {
    /// `usage.prompt_tokens_details` at the top level: chat completions and completions.
    Chat,
    /// `usage.input_tokens_details` at the top level and in the top-level `response`: the responses
    /// API.
    Responses,
    /// `usage` at the top level and in the top-level `message`: the messages API.
    Messages,
}

/// The prefill engine's counts of a prompt's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PromptUsage {
    /// Tokens found in the prefix cache.
    pub cached: u64,
    /// Tokens added to the prefix cache. `None` if the engine does not report them.
    pub created: Option<u64>,
    /// All other tokens, as the messages API counts them. `None` in other APIs.
    pub other: Option<u64>,
}

impl PromptUsage {
    /// No tokens, and no counts that only some engines report.
    pub const NONE: Self = Self {
        cached: 0,
        created: None,
        other: None,
    };
}

const TOP: Place = Place(0);
/// The object in an event that contains the `usage`.
const WRAPPED: Place = Place(1);
const USAGE: Place = Place(2);
const DETAILS: Place = Place(3);

/// The details as a member: `"prompt_tokens_details":{"cached_tokens":123}`.
const DETAILS_MEMBER: Part = Part(0);
/// The value of the details: `{"cached_tokens":123}`.
const DETAILS_VALUE: Part = Part(1);
/// The first part that is a count as a member: `"cached_tokens":123`.
const MEMBERS: u8 = 2;
/// The first part that is the value of a count: `123`.
const VALUES: u8 = MEMBERS + COUNTS as u8;

/// Number of counts: `cached`, `created` and `other`.
const COUNTS: usize = 3;

impl UsageShape {
    /// Returns the name of the object in an event that contains the `usage`.
    const fn wrapper(self) -> Option<&'static [u8]> {
        match self {
            Self::Chat => None,
            Self::Responses => Some(b"response"),
            Self::Messages => Some(b"message"),
        }
    }

    /// Returns the name of the object in `usage` that contains the counts, as a member begins.
    const fn details(self) -> Option<&'static [u8]> {
        match self {
            Self::Chat => Some(b"\"prompt_tokens_details\":"),
            Self::Responses => Some(b"\"input_tokens_details\":"),
            Self::Messages => None,
        }
    }

    /// Returns the object that contains the counts.
    const fn place(self) -> Place {
        match self {
            Self::Chat | Self::Responses => DETAILS,
            Self::Messages => USAGE,
        }
    }

    /// Returns the names of the counts, as members begin.
    const fn names(self) -> [&'static [u8]; COUNTS] {
        match self {
            Self::Chat => [b"\"cached_tokens\":", b"\"created_cache_tokens\":", b""],
            Self::Responses => [b"\"cached_tokens\":", b"\"cache_write_tokens\":", b""],
            Self::Messages => [
                b"\"cache_read_input_tokens\":",
                b"\"cache_creation_input_tokens\":",
                b"\"input_tokens\":",
            ],
        }
    }
}

/// Returns the name in the beginning of a member, which has it in quotes and before a colon.
fn name_in(member: &'static [u8]) -> &'static [u8] {
    member
        .get(1..member.len().saturating_sub(2))
        .unwrap_or_default()
}

/// Sets the counts of a prompt's tokens.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    shape: UsageShape,
    cached: u64,
    /// Whether the count of added tokens is inserted where it is missing.
    has_created: bool,
    /// The counts as texts; `None` for one that passes.
    texts: [Option<Digits>; COUNTS],
}

impl Usage {
    /// Creates the edit of a response of the given shape. Returns `None` if `usage` does not have
    /// all that the shape needs.
    #[must_use]
    pub fn new(shape: UsageShape, usage: &PromptUsage) -> Option<Self> {
        let counts = match shape {
            UsageShape::Chat | UsageShape::Responses => [Some(usage.cached), usage.created, None],
            // Together they are the whole prompt, so a decoder's own count must not remain.
            UsageShape::Messages => {
                let created = usage.created.unwrap_or(0);
                [Some(usage.cached), Some(created), Some(usage.other?)]
            }
        };
        Some(Self {
            shape,
            cached: usage.cached,
            has_created: shape == UsageShape::Messages && usage.created.is_some(),
            texts: counts.map(|count| count.map(Digits::new)),
        })
    }

    /// Returns the count of cached tokens.
    #[must_use]
    pub const fn cached_tokens(&self) -> u64 {
        self.cached
    }

    pub(super) fn member(&self, place: Place, name: &[u8]) -> Action {
        let enter = |place, otherwise| Action::Enter { place, otherwise };
        match (place, self.shape.details()) {
            (TOP | WRAPPED, _) if name == b"usage" => enter(USAGE, None),
            (TOP, _) if self.shape.wrapper() == Some(name) => enter(WRAPPED, None),
            (TOP | WRAPPED, _) => Action::Skip,
            (USAGE, Some(details)) if name_in(details) == name => {
                enter(DETAILS, Some(DETAILS_VALUE))
            }
            (USAGE, Some(_)) => Action::Skip,
            _ => self.count_named(name),
        }
    }

    fn count_named(&self, name: &[u8]) -> Action {
        let mut names = self.shape.names().into_iter();
        match names.position(|member| name_in(member) == name) {
            Some(count) if self.texts[count].is_some() => {
                Action::Replace(Part(VALUES + count as u8))
            }
            _ => Action::Skip,
        }
    }

    /// Returns the members that the object at `place` must have. [`Usage::member`] skips none of
    /// them.
    pub(super) fn required(&self, place: Place) -> [Option<Required>; REQUIRED_MAX] {
        if place == USAGE
            && let Some(details) = self.shape.details()
        {
            let name = name_in(details);
            let part = DETAILS_MEMBER;
            return [Some(Required { name, part }), None];
        }
        if place != self.shape.place() {
            return [None; REQUIRED_MAX];
        }
        let [cached, created, _] = self.shape.names();
        let required = |name, part| Required {
            name: name_in(name),
            part,
        };
        [
            Some(required(cached, Part(MEMBERS))),
            self.has_created
                .then(|| required(created, Part(MEMBERS + 1))),
        ]
    }

    pub(super) const fn member_of(part: Part) -> Part {
        match part {
            DETAILS_VALUE => DETAILS_MEMBER,
            Part(value) if value >= VALUES => Part(value - VALUES + MEMBERS),
            member => member,
        }
    }

    /// Passes a text to `out`, as consecutive slices.
    pub(super) fn write(&self, part: Part, out: &mut impl FnMut(&[u8])) {
        match part {
            DETAILS_MEMBER => {
                out(self.shape.details().unwrap_or_default());
                self.details(out);
            }
            DETAILS_VALUE => self.details(out),
            Part(member) if member < VALUES => self.count(usize::from(member - MEMBERS), out),
            Part(value) => self.value(usize::from(value - VALUES), out),
        }
    }

    fn details(&self, out: &mut impl FnMut(&[u8])) {
        out(b"{");
        self.count(0, out);
        out(b"}");
    }

    fn count(&self, count: usize, out: &mut impl FnMut(&[u8])) {
        out(self.shape.names()[count]);
        self.value(count, out);
    }

    fn value(&self, count: usize, out: &mut impl FnMut(&[u8])) {
        if let Some(text) = &self.texts[count] {
            out(text.text());
        }
    }
}

/// A number as text.
#[derive(Clone, Copy, Debug)]
struct Digits {
    /// The digits, at the end.
    bytes: [u8; DIGITS_MAX],
    start: usize,
}

/// Number of digits of the largest `u64`.
const DIGITS_MAX: usize = 20;

impl Digits {
    fn new(mut number: u64) -> Self {
        let mut digits = Self {
            bytes: [b'0'; DIGITS_MAX],
            start: DIGITS_MAX,
        };
        loop {
            digits.start -= 1;
            digits.bytes[digits.start] = b'0' + (number % 10) as u8;
            number /= 10;
            if number == 0 {
                return digits;
            }
        }
    }

    fn text(&self) -> &[u8] {
        &self.bytes[self.start..]
    }
}
