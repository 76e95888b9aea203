//! The edits that [`Transforms`](super::Transforms) can apply, and what it asks of each.

use super::cached_tokens::CachedTokens;

/// An object of the response that an edit reads, as the edit numbers them. 0 is the top level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place(pub(super) u8);

impl Place {
    pub(super) const TOP: Self = Self(0);
}

/// A text that an edit writes, as the edit numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part(pub(super) u8);

/// The handling of a member whose name has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// It passes.
    Skip,
    /// If its value is an object, that object is read as `place`. Any other value is replaced by
    /// `otherwise`, or passes if that is `None`.
    Enter {
        place: Place,
        otherwise: Option<Part>,
    },
    /// Its value is replaced.
    Replace(Part),
}

/// A member that is added to an object which does not have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Required {
    pub(super) name: &'static [u8],
    /// The text of the member.
    pub(super) part: Part,
}

/// One edit of a response.
#[derive(Clone, Copy, Debug)]
pub enum ResponseEdit {
    /// Sets the cached-token count.
    CachedTokens(CachedTokens),
}

impl ResponseEdit {
    /// Returns the next position from `from` on that may belong to a name for which the edit looks;
    /// the length of `piece` if there is none.
    pub(super) fn candidate(&self, piece: &[u8], from: usize) -> usize {
        match self {
            Self::CachedTokens(_) => CachedTokens::candidate(piece, from),
        }
    }

    /// Returns the handling of the member `name` of the object at `place`.
    pub(super) fn member(&self, place: Place, name: &[u8]) -> Action {
        match self {
            Self::CachedTokens(edit) => edit.member(place, name),
        }
    }

    /// Returns the member that the object at `place` must have, if there is one.
    pub(super) const fn required(&self, place: Place) -> Option<Required> {
        match self {
            Self::CachedTokens(edit) => edit.required(place),
        }
    }

    /// Returns the member that has the text `part` as its value; `part` itself if it is a member.
    pub(super) const fn member_of(&self, part: Part) -> Part {
        match self {
            Self::CachedTokens(_) => CachedTokens::member_of(part),
        }
    }

    /// Returns a text that the edit writes.
    pub(super) fn text(&self, part: Part) -> &[u8] {
        match self {
            Self::CachedTokens(edit) => edit.text(part),
        }
    }
}
