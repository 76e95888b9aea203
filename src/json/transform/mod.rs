//! Edits of a response while it is forwarded: a short list of edits over one scan.
//!
//! An edit is one file, which states the members that it reads, replaces and requires.
//! [`Transforms`] applies the edits.

mod action;
mod scan;
mod usage;

pub use scan::Transforms;
pub use usage::{PromptUsage, Usage, UsageShape};

use std::sync::LazyLock;

use action::{Action, Part, Place, REQUIRED_MAX, Required};
use memchr::memmem;

/// Format of a response body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ResponseForm {
    /// One JSON text.
    Json,
    /// A stream of server-sent events.
    Sse,
    /// Either of them, as the first byte shows: a JSON object begins with `{` or white space, an
    /// event stream of an engine with a field name or a comment.
    Detected,
}

/// One edit of a response.
#[derive(Clone, Copy, Debug)]
pub enum ResponseEdit {
    /// Sets the counts of the prompt's tokens.
    Usage(Usage),
}

/// Searches for `usage`. A text without this or an escape has no usage object.
///
/// The finder is static because it is as large as a whole edit and has a larger alignment.
static USAGE: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new(b"usage"));

/// Returns the next position from `from` on that may belong to the name of a usage object: the
/// letters `usage`, unless followed by `":null`. The length of `piece` if there is none.
fn usage_candidate(piece: &[u8], mut from: usize) -> usize {
    let finder = &*USAGE;
    while let Some(found) = finder.find(&piece[from..]) {
        let end = from + found + finder.needle().len();
        if !piece[end..].starts_with(b"\":null") {
            return from + found;
        }
        from = end;
    }
    piece.len()
}

impl ResponseEdit {
    /// Creates the edit of a response of the given shape that sets the counts of the prompt's
    /// tokens. Returns `None` if `usage` does not have all that the shape needs.
    #[must_use]
    pub fn usage(shape: UsageShape, usage: &PromptUsage) -> Option<Self> {
        Usage::new(shape, usage).map(Self::Usage)
    }

    /// Returns the count that the edit sets, if it sets the cached-token count.
    #[must_use]
    pub const fn cached_tokens(&self) -> Option<u64> {
        match self {
            Self::Usage(edit) => Some(edit.cached_tokens()),
        }
    }

    /// Returns the next position from `from` on that may belong to a name for which the edit looks;
    /// the length of `piece` if there is none.
    fn candidate(&self, piece: &[u8], from: usize) -> usize {
        match self {
            Self::Usage(_) => usage_candidate(piece, from),
        }
    }

    /// Returns the handling of the member `name` of the object at `place`.
    fn member(&self, place: Place, name: &[u8]) -> Action {
        match self {
            Self::Usage(edit) => edit.member(place, name),
        }
    }

    /// Returns the members that the object at `place` must have. [`ResponseEdit::member`] skips
    /// none of them.
    fn required(&self, place: Place) -> [Option<Required>; REQUIRED_MAX] {
        match self {
            Self::Usage(edit) => edit.required(place),
        }
    }

    /// Returns the member that has the text `part` as its value; `part` itself if it is a member.
    const fn member_of(&self, part: Part) -> Part {
        match self {
            Self::Usage(_) => Usage::member_of(part),
        }
    }

    /// Passes a text that the edit writes to `out`, as consecutive slices.
    fn write(&self, part: Part, out: &mut impl FnMut(&[u8])) {
        match self {
            Self::Usage(edit) => edit.write(part, out),
        }
    }
}
