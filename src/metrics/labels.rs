//! The closed sets of label values.
//!
//! A label never comes from a request: each set is an enum whose discriminant is the index of its
//! counter, so recording is an addition to an array element and a series cannot be invented.

macro_rules! labels {
    ($($(#[$about:meta])* $name:ident { $($(#[$what:meta])* $variant:ident = $label:literal,)* })*) => {
        $(
            $(#[$about])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
            pub enum $name {
                $($(#[$what])* $variant,)*
            }

            impl $name {
                /// Every value, in the order of `index`.
                pub const ALL: [Self; [$($label),*].len()] = [$(Self::$variant),*];

                /// The label's text.
                #[must_use]
                pub const fn label(self) -> &'static str {
                    match self {
                        $(Self::$variant => $label,)*
                    }
                }

                /// Position in `ALL`.
                #[must_use]
                pub const fn index(self) -> usize {
                    self as usize
                }
            }
        )*
    };
}

labels! {
    /// Which kind of request.
    Route {
        /// `/v1/chat/completions`.
        Chat = "chat",
        /// `/v1/completions`.
        Completions = "completions",
        /// `/v1/responses`.
        Responses = "responses",
        /// `/v1/messages`.
        Messages = "messages",
        /// `/inference/v1/generate`.
        Generate = "generate",
        /// `/invocations`.
        Invocations = "invocations",
        /// `/health`.
        Health = "health",
        /// Everything that is passed through.
        Other = "other",
    }

    /// How a request ended.
    CodeClass {
        /// Informational; the answer of an upgrade.
        C1xx = "1xx",
        /// Success.
        C2xx = "2xx",
        /// Redirection.
        C3xx = "3xx",
        /// The client's fault.
        C4xx = "4xx",
        /// The engine's or our fault.
        C5xx = "5xx",
        /// No complete answer reached the client.
        Aborted = "aborted",
    }

    /// What a request was doing; the phase a client left in.
    Phase {
        /// Between requests.
        Idle = "idle",
        /// The body was arriving.
        Upload = "upload",
        /// Connecting to an engine.
        Connect = "connect",
        /// The encode legs ran.
        Encode = "encode",
        /// The prefill leg ran.
        Prefill = "prefill",
        /// Waiting for the next prefill attempt.
        RetryWait = "retry_wait",
        /// Prefill had answered, decode was not sent yet: the KV cache is stranded.
        BetweenLegs = "between_legs",
        /// Decode was sent and had not answered.
        FirstByte = "first_byte",
        /// The answer was being relayed.
        Streaming = "streaming",
        /// The client did not take the answer.
        Stalled = "stalled",
    }

    /// Which engine a connection or an attempt belongs to.
    LegRole {
        /// Computes the prompt.
        Prefill = "prefill",
        /// Writes the answer.
        Decode = "decode",
        /// Embeds images, audio and video.
        Encode = "encode",
        /// Names a prefiller's engines.
        Bootstrap = "bootstrap",
    }

    /// What became of KV cache that no decoder fetched.
    Stranded {
        /// The prefiller was told to give it up.
        Released = "released",
        /// It was to be told, and could not be.
        Failed = "failed",
        /// Its lease runs out.
        LeftToLease = "left_to_lease",
    }

    /// What a request named a target as.
    Named {
        /// Computes the prompt.
        Prefill = "prefill",
        /// Encodes an image or the like.
        Encode = "encode",
        /// Has part of the KV cache.
        CacheSource = "cache_source",
    }

    /// Where allowed targets come from, besides the configuration.
    AllowSource {
        /// The file of rules.
        File = "file",
        /// The `InferencePool`, which says what its pods are.
        Pool = "pool",
        /// Its pods.
        Pods = "pods",
    }

    /// Whom a TLS session is with.
    TlsPeer {
        /// A client.
        Client = "client",
        /// A prefill engine.
        Prefill = "prefill",
        /// The local decoder.
        Decode = "decode",
        /// An encoder.
        Encode = "encode",
    }

    /// Which part of our own cost.
    Direction {
        /// From the client's last request byte to our first to the engine.
        Request = "request",
        /// From the engine's first answer byte to ours to the client.
        FirstByte = "first_byte",
        /// From a later read to its write.
        Chunk = "chunk",
    }
}

impl CodeClass {
    /// The class of a status code that was sent in full.
    #[must_use]
    pub const fn of(status: u16) -> Self {
        match status {
            100..=199 => Self::C1xx,
            200..=299 => Self::C2xx,
            300..=399 => Self::C3xx,
            400..=499 => Self::C4xx,
            _ => Self::C5xx,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn index_is_the_position_and_labels_are_unique() {
        macro_rules! check {
            ($($name:ident)*) => {$(
                let mut labels = Vec::new();
                for (position, value) in $name::ALL.iter().enumerate() {
                    assert_eq!(value.index(), position);
                    labels.push(value.label());
                }
                labels.sort_unstable();
                labels.dedup();
                assert_eq!(labels.len(), $name::ALL.len());
            )*};
        }
        check!(Route CodeClass Phase LegRole Named AllowSource Stranded TlsPeer Direction);
    }

    #[test]
    fn classes() {
        for (status, want) in [
            (101, "1xx"),
            (200, "2xx"),
            (302, "3xx"),
            (499, "4xx"),
            (502, "5xx"),
        ] {
            assert_eq!(CodeClass::of(status).label(), want);
        }
    }
}
