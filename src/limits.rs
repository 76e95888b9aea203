//! Every fixed bound of the program, with its unit in the name and the reason beside it.
//!
//! What an operator may change is a default here and a field of the configuration.

/// Head of a request or an answer, all lines together, in bytes (431 for a request above it).
pub const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Request line in bytes (414 above it).
pub const REQUEST_LINE_BYTES_MAX: usize = 16 * 1024;
/// Header fields of one head (431 above it). hyper and httparse users commonly stop at 100.
pub const HEAD_FIELDS_MAX: usize = 128;
/// Chunk extensions of one body, all chunks together, in bytes: a side channel otherwise unlimited.
pub const CHUNK_EXTENSION_BYTES_MAX: u64 = 16 * 1024;
/// Trailer section of one chunked body in bytes.
pub const TRAILER_BYTES_MAX: u64 = 16 * 1024;
/// Names of unknown fields that the Connection fields of one head may list; a head with more is
/// refused. Real clients list one or two.
pub const HOP_NAMES_MAX: usize = 16;
/// Interim (1xx) answers an engine may send before the final one.
pub const INTERIM_ANSWERS_MAX: u32 = 16;

/// Edits of one JSON body.
pub const JSON_EDITS_MAX: usize = 64;
/// Nesting of a JSON body; a deeper one is refused. The engine's parser stops near 1,000 too.
pub const JSON_DEPTH_MAX: usize = 1024;
/// Longest member name that is compared, in bytes after unescaping; longer names match nothing.
pub const JSON_NAME_BYTES_MAX: usize = 64;
/// Watched members noted in one body, duplicates included; a body with more is refused.
pub const JSON_MEMBERS_MAX: usize = 48;
/// Objects read in one body (the top level, `sampling_params`, `extra_args`), repetitions
/// included; honest bodies have three at most.
pub const JSON_OBJECTS_MAX: usize = 16;
/// Longest value in bytes that the answer rewriter replaces; it holds back as much of one that
/// arrives in parts. Counts and `null` are shorter.
pub const JSON_HELD_BYTES_MAX: usize = 32;

const _: () = assert!(REQUEST_LINE_BYTES_MAX < HEAD_BYTES_MAX);
// One replacement per member and one insertion per object at most, so no edit of members that
// were noted can fail for their number.
const _: () = assert!(JSON_MEMBERS_MAX + JSON_OBJECTS_MAX <= JSON_EDITS_MAX);
