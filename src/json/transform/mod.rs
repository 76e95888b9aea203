//! Edits of a response while it is forwarded: a short list of edits over one scan.
//!
//! An edit is one file, which states the members that it reads, replaces and requires.
//! [`Transforms`] applies the edits.

mod action;
mod cached_tokens;
mod scan;

pub use cached_tokens::{CachedTokens, UsageShape};
pub use scan::Transforms;

use action::{Action, Part, Place, Required};

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
    /// Sets the cached-token count.
    CachedTokens(CachedTokens),
}

impl ResponseEdit {
    /// Returns the count that the edit sets, if it sets the cached-token count.
    #[must_use]
    pub const fn cached_tokens(&self) -> Option<u64> {
        match self {
            Self::CachedTokens(edit) => Some(edit.count()),
        }
    }

    /// Returns the next position from `from` on that may belong to a name for which the edit looks;
    /// the length of `piece` if there is none.
    fn candidate(&self, piece: &[u8], from: usize) -> usize {
        match self {
            Self::CachedTokens(_) => CachedTokens::candidate(piece, from),
        }
    }

    /// Returns the handling of the member `name` of the object at `place`.
    fn member(&self, place: Place, name: &[u8]) -> Action {
        match self {
            Self::CachedTokens(edit) => edit.member(place, name),
        }
    }

    /// Returns the member that the object at `place` must have, if there is one.
    const fn required(&self, place: Place) -> Option<Required> {
        match self {
            Self::CachedTokens(edit) => edit.required(place),
        }
    }

    /// Returns the member that has the text `part` as its value; `part` itself if it is a member.
    const fn member_of(&self, part: Part) -> Part {
        match self {
            Self::CachedTokens(_) => CachedTokens::member_of(part),
        }
    }

    /// Returns a text that the edit writes.
    fn text(&self, part: Part) -> &[u8] {
        match self {
            Self::CachedTokens(edit) => edit.text(part),
        }
    }
}
