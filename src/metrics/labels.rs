//! The sets of label values.
//!
//! Each set is an enum whose discriminant is the index of the value's counter. Recording is an
//! addition to an array element. Label values never come from requests, so no request can create a
//! new series.

macro_rules! labels {
    ($($(#[$about:meta])* $name:ident { $($(#[$what:meta])* $variant:ident = $label:literal,)* })*) => {
        $(
            $(#[$about])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
            pub enum $name {
                $($(#[$what])* $variant,)*
            }

            impl $name {
                /// All values, in the order of `index`.
                pub const ALL: [Self; [$($label),*].len()] = [$(Self::$variant),*];

                /// Returns the label's text.
                #[must_use]
                pub const fn label(self) -> &'static str {
                    match self {
                        $(Self::$variant => $label,)*
                    }
                }

                /// Returns the position in `ALL`.
                #[must_use]
                pub const fn index(self) -> usize {
                    self as usize
                }
            }
        )*
    };
}

labels! {
    /// The kind of a request, by its path.
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
        /// Any other path; these requests are passed through.
        Other = "other",
    }

    /// The status class of a response, or `Aborted`.
    CodeClass {
        /// Informational: the response to an upgrade.
        C1xx = "1xx",
        /// Success.
        C2xx = "2xx",
        /// Redirection.
        C3xx = "3xx",
        /// Client error.
        C4xx = "4xx",
        /// Server error, of an engine or of ringside.
        C5xx = "5xx",
        /// No complete response was sent to the client.
        Aborted = "aborted",
    }

    /// The phase of a request, used to classify client disconnects.
    Phase {
        /// Between requests.
        Idle = "idle",
        /// The body was arriving.
        Upload = "upload",
        /// Connecting to an engine.
        Connect = "connect",
        /// Encode legs were running.
        Encode = "encode",
        /// The prefill leg was running.
        Prefill = "prefill",
        /// Waiting for the next prefill attempt.
        RetryWait = "retry_wait",
        /// The prefill response was received and the decode leg not yet sent: a disconnect in this
        /// phase strands KV cache (`docs/stranded-kv.md`).
        BetweenLegs = "between_legs",
        /// The decode leg was sent and no response had arrived.
        FirstByte = "first_byte",
        /// The response was being relayed.
        Streaming = "streaming",
        /// The client was not reading the response.
        Stalled = "stalled",
    }

    /// The kind of engine that a connection or a leg is for.
    LegRole {
        /// Computes the prompt's KV cache.
        Prefill = "prefill",
        /// Generates the response.
        Decode = "decode",
        /// Encodes images, audio and video.
        Encode = "encode",
        /// Mooncake's bootstrap server, which lists the engines of a prefiller.
        Bootstrap = "bootstrap",
    }

    /// The fate of KV cache that no decoder fetched.
    Stranded {
        /// The decoder rejected the release request, so the prefiller frees the blocks.
        Released = "released",
        /// The release request failed or was not rejected.
        Failed = "failed",
        /// The prefiller keeps the blocks until their lease expires.
        LeftToLease = "left_to_lease",
    }

    /// The role in which a request named a target.
    Named {
        /// Prefill engine.
        Prefill = "prefill",
        /// Encode engine.
        Encode = "encode",
        /// Engine that has part of the prompt's KV cache.
        CacheSource = "cache_source",
    }

    /// The source of allowlist entries, other than the configuration.
    AllowSource {
        /// The rules file.
        File = "file",
        /// The `InferencePool` object, whose selector determines the pods.
        Pool = "pool",
        /// The pods of the `InferencePool`.
        Pods = "pods",
    }

    /// The peer of a TLS connection.
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

    /// A part of the time that ringside itself adds.
    Direction {
        /// From the last request byte received from the client to the first byte sent to an engine.
        Request = "request",
        /// From the first response byte received from the engine to the first byte sent to the
        /// client.
        FirstByte = "first_byte",
        /// Handling of a later part of the response, from its receipt to its send.
        Chunk = "chunk",
    }
}

impl CodeClass {
    /// Returns the class of the status of a complete response.
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
