//! The ways in which an engine fails its legs, as the log names them.

/// A kind of failure of an engine. A client that disconnects and a deadline of the request itself
/// are no failures of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Trouble {
    /// Its name does not resolve.
    Unresolved,
    /// No address of it accepts connections.
    Refused,
    /// It did not accept a connection within `--connect-timeout`.
    ConnectTimeout,
    /// It closed a connection before it responded.
    Closed,
    /// It did not respond in time.
    Late,
    /// Its response is malformed, truncated, or not the JSON that the proxy has to read.
    BadResponse,
    /// Its response, which the proxy has to read, is too long.
    TooLarge,
    /// It ended a response that was being relayed before its end.
    Cut,
    /// It responded with this status, which is 500 or above.
    Status(u16),
    /// It is this proxy itself, or one of its decoders as a prefiller.
    Itself,
}

impl Trouble {
    /// Number of kinds.
    pub const KINDS: usize = 10;

    /// Returns the position of the kind, below [`Trouble::KINDS`].
    #[must_use]
    pub const fn index(self) -> usize {
        match self {
            Self::Unresolved => 0,
            Self::Refused => 1,
            Self::ConnectTimeout => 2,
            Self::Closed => 3,
            Self::Late => 4,
            Self::BadResponse => 5,
            Self::TooLarge => 6,
            Self::Cut => 7,
            Self::Status(_) => 8,
            Self::Itself => 9,
        }
    }

    /// Returns the name of the kind in the log.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Unresolved => "unresolved",
            Self::Refused => "refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::Closed => "closed",
            Self::Late => "late",
            Self::BadResponse => "bad_response",
            Self::TooLarge => "too_large",
            Self::Cut => "cut",
            Self::Status(_) => "status",
            Self::Itself => "itself",
        }
    }
}

/// Formats the kind as the rest of a sentence that begins with the engine.
impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Unresolved => "its name does not resolve",
            Self::Refused => "it does not accept connections: it is down or still loading",
            Self::ConnectTimeout => "it did not accept a connection within --connect-timeout",
            Self::Closed => "it closed the connection before it responded",
            Self::Late => "it did not respond in time",
            Self::BadResponse => "its response is malformed or incomplete",
            Self::TooLarge => {
                "its response is longer than the proxy reads (--max-prefill-answer for a handoff)"
            }
            Self::Cut => "it ended a response in the middle",
            Self::Itself => "it is this proxy itself, or one of its decoders",
            Self::Status(status) => return write!(f, "it responded {status}"),
        })
    }
}
