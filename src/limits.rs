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
pub const INTERIM_RESPONSES_MAX: u32 = 16;

/// Edits of one JSON body.
pub const JSON_EDITS_MAX: usize = 64;
/// Nesting of a JSON body; a deeper one is refused. The engine's parser stops near 1,000 too.
pub const JSON_DEPTH_MAX: usize = 1024;
/// Longest member name that is compared, in bytes after unescaping; longer names match nothing.
pub const JSON_NAME_BYTES_MAX: usize = 64;
/// Watched members noted in one body, duplicates included; a body with more is refused.
pub const JSON_MEMBERS_MAX: usize = 48;
/// Objects read in one body (the top level, `sampling_params`, `extra_args`, `vllm_xargs`),
/// repetitions included; honest bodies have four at most.
pub const JSON_OBJECTS_MAX: usize = 16;
/// Longest value in bytes that the answer rewriter replaces; it holds back as much of one that
/// arrives in parts. Counts and `null` are shorter.
pub const JSON_HELD_BYTES_MAX: usize = 32;

const _: () = assert!(REQUEST_LINE_BYTES_MAX < HEAD_BYTES_MAX);
// One replacement per member and one insertion per object at most, so no edit of members that
// were noted can fail for their number.
const _: () = assert!(JSON_MEMBERS_MAX + JSON_OBJECTS_MAX <= JSON_EDITS_MAX);

/// Bytes a client may send ahead of its answer before only its end is watched for.
pub const CLIENT_AHEAD_BYTES_MAX: usize = 64 * 1024;
/// The shard's receive buffer for heads and tokens.
pub const RECEIVE_SMALL_BYTES: usize = 64 * 1024;
/// Bytes received at once while a head is awaited. A small request comes whole in one piece; of a
/// large one little has to be copied out again before its body goes its own way (receiving 64 KiB
/// here cost 10 % of the CPU of a 1 MiB upload, measured).
pub const RECEIVE_HEAD_BYTES: usize = 16 * 1024;
/// The shard's receive buffer for bodies: larger pieces mean fewer system calls per MiB (copying
/// 1 MiB costs 417 us in 256 KiB pieces against 451-481 us in 64 KiB ones, measured).
pub const RECEIVE_LARGE_BYTES: usize = 256 * 1024;
/// Bytes of TLS records received at once.
pub const TLS_RECEIVE_BYTES: usize = 64 * 1024;
/// Received bytes of one connection that wait for the rest of their record or handshake message.
/// A record has 16 KiB at most, a handshake message (a certificate chain) 64 KiB.
pub const TLS_HELD_BYTES_MAX: usize = 80 * 1024;
/// Bytes encrypted before they are sent: as many as a connection keeps of what its peer does not
/// take. Four full records.
pub const TLS_SEND_BYTES: usize = 64 * 1024;
/// Receives of one TLS connection that bring no payload before others get their turn.
pub const TLS_STEPS_MAX: u32 = 16;
/// Sessions with engines that one shard remembers for resumption, per kind of engine.
pub const TLS_SESSIONS_MAX: usize = 256;
/// Bytes of a file of certificates or of a key.
pub const CERTIFICATE_FILE_BYTES_MAX: u64 = 1024 * 1024;
/// Request bytes kept for one safe replay; a longer upload is not replayed.
pub const REPLAY_BYTES_MAX: usize = 64 * 1024;
/// Buffers up to this capacity are kept for reuse; larger ones are given back.
pub const RECYCLED_BUFFER_BYTES_MAX: usize = 4 * 1024;
/// Buffers kept for reuse by one shard.
pub const RECYCLED_BUFFERS_MAX: usize = 256;
/// Room for fields of a head up to this many is kept for reuse too; heads with more are rare.
pub const RECYCLED_FIELDS_MAX: usize = 32;
/// Receives of one body before other connections of the shard get their turn.
pub const STEPS_PER_TURN_MAX: u32 = 16;
/// Size of a pipe that a body passes through within the kernel.
pub const PIPE_BYTES: usize = 1024 * 1024;
/// Pipes of the whole process: the kernel lets an unprivileged user have 64 MiB of them.
pub const PIPES_MAX: usize = 32;
/// Unused pipes that one shard keeps.
pub const PIPES_IDLE_MAX: usize = 4;
/// Bytes still to come from which a body passes through a pipe. Of 1 MiB, copying by way of one
/// 256 KiB buffer, which stays in the core's cache, costs less (146 against 167 us per MiB); of
/// 2 MiB splicing does (185 against 213, and 195 against 223 of 16 MiB).
pub const SPLICE_BYTES_MIN: u64 = 2 * 1024 * 1024;
// A body that could be sent again is not spliced.
const _: () = assert!(SPLICE_BYTES_MIN >= REPLAY_BYTES_MAX as u64);
/// Pipes filled for one body before other connections of the shard get their turn.
pub const SPLICES_PER_TURN_MAX: u32 = 4;
/// Bytes up to which the slices of a send are put together first: copying them costs less than
/// the kernel's walk over a message header (2 % of a small request, measured).
pub const SEND_JOINED_BYTES_MAX: usize = 4096;
/// Slices of one vectored send.
pub const SEND_SLICES_MAX: usize = 64;
/// Bytes read and thrown away after an answer that was given before the request had ended, so
/// that the answer is not lost to a reset.
pub const LINGER_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Milliseconds the same may take.
pub const LINGER_MS_MAX: u64 = 1000;
/// Bytes of a client's `x-request-id` that are taken over; a longer one is replaced.
pub const REQUEST_ID_BYTES_MAX: usize = 256;
/// Connections accepted from one listener before other work gets its turn.
pub const ACCEPT_BATCH_MAX: usize = 64;
/// Milliseconds without accepting after the process ran out of descriptors or memory.
pub const ACCEPT_PAUSE_MS: u64 = 100;
/// Seconds of silence before the kernel asks whether a peer is still there. Without it a peer
/// that vanished without a word would be waited for as long as an engine may be silent.
pub const KEEPALIVE_IDLE_SECS: u64 = 30;
/// Seconds between two such questions.
pub const KEEPALIVE_INTERVAL_SECS: u64 = 10;
/// Unanswered questions after which the peer counts as gone.
pub const KEEPALIVE_PROBES_MAX: u32 = 6;
/// Milliseconds before a connect to a Unix socket whose queue is full is tried again; twice as many
/// each time. The wheel's tick (10 ms) comes on top.
pub const CONNECT_PAUSE_MS_MIN: u64 = 1;
/// Milliseconds such a pause may grow to: an engine that accepts again is not kept waiting.
pub const CONNECT_PAUSE_MS_MAX: u64 = 32;
/// Such tries of one connect: they end after 131 s where no connect timeout ends them sooner, as
/// the kernel's own for TCP do (127 s).
pub const CONNECT_TRIES_MAX: u32 = 4096;
/// Seconds a leg may go on for the sake of another engine after its client has left. Engines give
/// an unfinished transfer up after 480 s.
pub const ORPHAN_SECS_MAX: u64 = 600;
/// Seconds a decoder whose client has left is waited for: for the first byte of its answer, which
/// says that its transfer has ended (reference `competitors` 9.2).
pub const ORPHAN_FIRST_BYTE_SECS_MAX: u64 = 30;
/// Milliseconds a prefiller's bootstrap server has to name its engines.
pub const BOOTSTRAP_MS_MAX: u64 = 5000;
/// Seconds its answer is used; a decoder that does not know an engine ends that sooner.
pub const BOOTSTRAP_SECS_MAX: u64 = 30;
/// Prefillers whose engines one shard remembers.
pub const BOOTSTRAPS_MAX: usize = 1024;
/// Milliseconds a decoder has to refuse the request that gives stranded KV cache up.
pub const RELEASE_MS_MAX: u64 = 5000;
/// Addresses tried for one engine name.
pub const ADDRESSES_MAX: usize = 8;
/// Seconds a resolved name is used.
pub const RESOLVED_SECS_MAX: u64 = 30;
/// Names waiting to be resolved in the whole process.
pub const RESOLVE_QUEUE_MAX: usize = 1024;
/// Records that wait in one shard's ring for the exporter, one of each request and one of each leg
/// that runs beside it. A record of a split request is about 4 KiB.
pub const TRACE_RING_RECORDS: usize = 1024;
/// Legs of one request that have spans of their own; retries and chunks beyond it have none.
pub const TRACE_LEGS_MAX: usize = 48;
/// Attributes of one span; ours have 19 at most.
pub const TRACE_ATTRIBUTES_MAX: usize = 24;
/// Bytes of a text in a span: of paths and targets that somebody else has written.
pub const TRACE_TEXT_BYTES_MAX: usize = 256;
/// Spans of one export, give or take one record.
pub const TRACE_BATCH_SPANS_MAX: usize = 512;
/// Milliseconds between two looks at the rings.
pub const TRACE_SWEEP_MS: u64 = 100;
/// Seconds between two warnings of exports that fail.
pub const TRACE_WARNING_SECS: u64 = 60;
/// Milliseconds the last exports may take when the process ends.
pub const TRACE_FLUSH_MS_MAX: u64 = 3000;
/// Growth of a buffered body whose length is not announced, in bytes per reservation.
pub const BODY_RESERVE_STEP_BYTES: usize = 64 * 1024;
/// A configuration file in bytes. One with every key is a few KiB.
pub const CONFIGURATION_BYTES_MAX: u64 = 1024 * 1024;

/// Rules of one allowlist file; a prefix covers a whole network in one.
pub const ALLOW_RULES_MAX: usize = 16 * 1024;
/// Bytes of one allowlist file.
pub const ALLOW_FILE_BYTES_MAX: u64 = 2 * 1024 * 1024;
/// Lines of such a file that one message says what is wrong with.
pub const ALLOW_PROBLEMS_SHOWN_MAX: usize = 100;
/// Pods, or pools, of one answer of the Kubernetes API; kubectl asks for as many.
pub const POOL_PAGE_OBJECTS: u32 = 500;
/// Pods of a pool that are kept; a Kubernetes cluster is made for 150,000 in all.
pub const POOL_OBJECTS_MAX: usize = 50_000;
/// Events of one watch that make one change of the allowlist, where they come that close.
pub const POOL_BATCH_MAX: usize = 512;
/// Seconds the Kubernetes API may take to answer.
pub const POOL_RESPONSE_SECS_MAX: u64 = 30;
/// Seconds after which the API server is asked to end a watch: one whose connection is dead is
/// found out then.
pub const POOL_WATCH_SECS: u32 = 240;
/// Seconds a watch that brought nothing must last to count as one that works.
pub const POOL_WATCH_SECS_MIN: u64 = 1;
/// Milliseconds before the Kubernetes API is asked again after two failures; twice as many each
/// time, less a random part.
pub const POOL_RETRY_MS_MIN: u64 = 500;
/// Milliseconds such a pause may grow to.
pub const POOL_RETRY_MS_MAX: u64 = 30_000;
/// Milliseconds a watched directory must be quiet before its files are read again: whoever changes
/// several writes them one after the other.
pub const WATCH_SETTLE_MS: u64 = 250;
/// Milliseconds after which they are read although the directory is not quiet.
pub const WATCH_SETTLE_MS_MAX: u64 = 2000;
/// Seconds between two looks at a watched directory that reports nothing.
pub const WATCH_LOOK_SECS: u64 = 60;
/// Seconds between two looks at a directory that cannot be watched.
pub const WATCH_RETRY_SECS: u64 = 2;
/// Bytes of events read at once; the longest event has 272.
pub const WATCH_READ_BYTES: usize = 4096;

const _: () = assert!(CONNECT_PAUSE_MS_MIN > 0 && CONNECT_PAUSE_MS_MAX.is_power_of_two());
const _: () = assert!(CLIENT_AHEAD_BYTES_MAX >= HEAD_BYTES_MAX);
const _: () = assert!(RECEIVE_SMALL_BYTES >= CLIENT_AHEAD_BYTES_MAX);
