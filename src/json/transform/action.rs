//! The terms in which an edit describes its handling of a response.

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

/// Maximum number of members that an edit requires in one object.
pub(super) const REQUIRED_MAX: usize = 2;
