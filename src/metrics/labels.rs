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

                /// Returns the value's text in metrics and logs.
                #[must_use]
                pub const fn label(self) -> &'static str {
                    match self {
                        $(Self::$variant => $label,)*
                    }
                }

                /// Returns the position of the value in `ALL`.
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
        /// A request to `/v1/chat/completions`.
        Chat = "chat",
        /// A request to `/v1/completions`.
        Completions = "completions",
        /// A request to `/v1/responses`.
        Responses = "responses",
        /// A request to `/v1/messages`.
        Messages = "messages",
        /// A request to `/inference/v1/generate`.
        Generate = "generate",
        /// A request to `/invocations`.
        Invocations = "invocations",
        /// A request to `/health`, to which ringside itself responds.
        Health = "health",
        /// A request to any other path. It is never split.
        Other = "other",
    }

    /// The engines among which a request is split, as pd-sidecar names them.
    Disagg {
        /// A prefiller and the decoder.
        PrefillDecode = "p/d",
        /// Encoders and the decoder.
        EncodeDecode = "e/d",
        /// Encoders, a prefiller and the decoder.
        EncodePrefillDecode = "e/p/d",
    }

    /// Why the routing headers of a request do not have one clear meaning.
    RoutingDoubt {
        /// The two names of a header have different values.
        Conflict = "conflict",
        /// A header has the prefix of routing headers and an unknown name.
        Unknown = "unknown",
    }

    /// An event of NIXL push with legs that start together.
    Push {
        /// The legs of a request were started together.
        Concurrent = "concurrent",
        /// The identity of a prefiller changed.
        Changed = "changed",
        /// A request whose legs were started together failed, or its decode leg was sent again.
        Failed = "failed",
        /// A prefiller whose identity changed twice is used in the serial order for a time.
        Serial = "serial",
    }

    /// The end of a speculative prefill.
    WarmUp {
        /// The prefiller has computed the conversation.
        Done = "done",
        /// The request to the prefiller failed or took too long.
        Failed = "failed",
        /// No request was sent: another one of the shard was running, or there was no response
        /// text that could be repeated.
        Skipped = "skipped",
    }

    /// The status class of the response that a client received, or `Aborted`.
    CodeClass {
        /// The response had a 1xx status: 101, which upgraded the connection.
        C1xx = "1xx",
        /// The response had a 2xx status (success).
        C2xx = "2xx",
        /// The response had a 3xx status (redirection).
        C3xx = "3xx",
        /// The response had a 4xx status (client error).
        C4xx = "4xx",
        /// The response had a 5xx status (server error), from an engine or from ringside.
        C5xx = "5xx",
        /// No complete response was sent to the client.
        Aborted = "aborted",
    }

    /// The phase that a request had reached when its client disconnected or when it failed.
    Phase {
        /// No part of the request was being forwarded: the connection was idle, the head was being
        /// received, or ringside itself was responding.
        Idle = "idle",
        /// The request body was being received from the client or forwarded to the engine.
        Upload = "upload",
        /// ringside was connecting to an engine.
        Connect = "connect",
        /// The encode legs of the request were running.
        Encode = "encode",
        /// The prefill leg of the request was running.
        Prefill = "prefill",
        /// ringside was pausing before the next attempt of the prefill leg.
        RetryWait = "retry_wait",
        /// The prefill response was received and the decode leg not yet sent: a disconnect in this
        /// phase strands KV cache (`docs/stranded-kv.md`).
        BetweenLegs = "between_legs",
        /// The decode leg had started, and its response had not been relayed to the client.
        FirstByte = "first_byte",
        /// The response was being relayed to the client.
        Streaming = "streaming",
        /// The client was not reading its response, so its connection accepted no more bytes.
        Stalled = "stalled",
    }

    /// The fate of the KV cache of a handoff that no decode leg carried.
    Stranded {
        /// The decoder rejected the release request with a 4xx status, as intended, so the
        /// prefiller frees the blocks.
        Released = "released",
        /// The release request could not be sent, or the decoder did not reject it.
        Failed = "failed",
        /// No release request was sent. The prefiller keeps the blocks until their lease expires.
        LeftToLease = "left_to_lease",
    }

    /// The role in which a request named a target.
    Named {
        /// The request named the target as a prefill engine.
        Prefill = "prefill",
        /// The request named the target as an encode engine.
        Encode = "encode",
        /// The request named the target as an engine that has part of the prompt's KV cache.
        CacheSource = "cache_source",
    }

    /// The source of allowlist entries, other than the configuration.
    AllowSource {
        /// The file of allowlist rules (`--allow-targets-file`).
        File = "file",
        /// The `InferencePool` object, whose selector determines the pods.
        Pool = "pool",
        /// The pods of the `InferencePool`.
        Pods = "pods",
    }

    /// The peer of a TLS connection.
    TlsPeer {
        /// A client that connects to ringside.
        Client = "client",
        /// A prefill engine.
        Prefill = "prefill",
        /// The local decoder.
        Decode = "decode",
        /// An encode engine.
        Encode = "encode",
    }

    /// A part of an exchange in which the time spent by ringside itself is measured.
    Direction {
        /// From the receipt of the whole body of a request that may be split (or the end of its
        /// encode stage) until its legs are planned.
        Request = "request",
        /// From the arrival of the response head from the engine until that head has been sent to
        /// the client.
        FirstByte = "first_byte",
        /// Processing of one further receive of the response body, including the attempt to send it
        /// to the client. One receive in 16 is measured.
        Chunk = "chunk",
    }
}

impl CodeClass {
    /// Returns the class to count for a complete response with this status.
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
    use crate::pd::Role;

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
        check!(Route CodeClass Phase Role Named AllowSource Stranded TlsPeer Direction);
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
