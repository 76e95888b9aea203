//! HTTP/1.1 as pure bytes: heads, message framing, hop-by-hop fields, head writers.
//!
//! Nothing here knows a socket, a clock or a configuration, and nothing allocates per message
//! beyond vectors that the caller reuses. The rule for everything that is read: find the one
//! reading that RFC 9112 gives, or refuse. A lenient reading is how two parties come to disagree
//! about where a message ends, so nothing is repaired, on the client's side and on the engine's.

mod chunked;
mod error;
mod framing;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod head;
mod hop;
mod name;
mod sse;
mod syntax;
mod target;
#[cfg(test)]
mod testing;
mod write;

pub use chunked::{ChunkError, Chunked};
pub use error::HeadError;
pub use framing::{
    BodyMeter, Framing, expects_continue, parse_decimal, request_framing, request_keeps_alive,
    response_framing, response_keeps_alive, wants_upgrade,
};
pub use head::{Field, Method, RequestHead, ResponseHead, Version};
pub use hop::{HopFilter, drop_field, is_hop_by_hop, list_items};
pub use name::Name;
pub use sse::SseEvents;
pub use target::{TargetForm, authority_of, origin_form, path_is, path_of, target_form};
pub use write::{
    ChunkLine, LAST_CHUNK, chunk_line, push_decimal, push_field, push_request_line,
    push_status_line, reason_phrase,
};
