//! HTTP/1.1 parsing and writing on byte buffers: heads, message framing, hop-by-hop fields.
//!
//! This module does not depend on sockets, clocks or the configuration. It allocates nothing per
//! message except in vectors that the caller reuses.
//!
//! Parsers either find the one meaning that RFC 9112 gives to their input or refuse the input.
//! Lenient parsing is how two parties end up disagreeing about where a message ends (request
//! smuggling), so nothing is repaired, neither in requests nor in responses.

mod chunked;
mod error;
mod first_line;
mod framing;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod head;
mod hop;
mod method;
mod multipart;
mod name;
mod sse;
mod syntax;
mod target;
#[cfg(test)]
mod testing;
mod write;

pub use chunked::{ChunkError, Chunked, Taken};
pub use error::HeadError;
pub use framing::{
    BodyMeter, Framing, expects_continue, is_coded, parse_decimal, request_framing,
    request_keeps_alive, response_framing, response_keeps_alive, wants_websocket,
};
pub use head::{
    Field, FirstLine, Head, RequestHead, RequestLine, ResponseHead, StatusLine, Version,
};
pub use hop::{HopFilter, drop_field, is_hop_by_hop, list_items};
pub use method::Method;
pub use multipart::{FormError, boundary, part_name};
pub use name::Name;
pub use sse::{DataLines, LinePart, is_event_stream};
pub use target::{
    TargetForm, authority_of, origin_form, path_ends_with, path_is, path_of, target_form,
};
pub use write::{
    ChunkLine, LAST_CHUNK, chunk_line, push_decimal, push_field, push_request_line,
    push_status_line, reason_phrase,
};
