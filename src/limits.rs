//! The fixed limits of the program. Each name contains the unit; the comment gives the reason.
//!
//! Limits that an operator can change are configuration keys instead (`config::flag_table`).

/// Size of a request or response head, all lines together, in bytes. A larger request head is
/// rejected with 431; a larger response head counts as malformed.
pub const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Length of the request line in bytes. A longer one is rejected with 414.
pub const REQUEST_LINE_BYTES_MAX: usize = 16 * 1024;
/// Header fields in one head. A request with more is rejected with 431; a response with more counts
/// as malformed. Servers built on hyper or httparse commonly allow 100.
pub const HEAD_FIELDS_MAX: usize = 128;
/// Total size of the chunk extensions of one body in bytes. The limits on body sizes do not count
/// them, so without their own limit a sender could add any number of bytes.
pub const CHUNK_EXTENSION_BYTES_MAX: u64 = 16 * 1024;
/// Size of one chunk in bytes. A body with a larger chunk counts as malformed: it can never arrive,
/// and another reader of the size may keep it in a double, which is exact up to here, or in a
/// signed integer.
pub const CHUNK_BYTES_MAX: u64 = 1 << 53;
/// Hexadecimal digits of a chunk size, leading zeros included. h11, which vLLM's HTTP server uses,
/// accepts the same number.
pub const CHUNK_SIZE_DIGITS_MAX: u8 = 20;
/// Size of the trailer section of one chunked body in bytes. A body with a larger one counts as
/// malformed.
pub const TRAILER_BYTES_MAX: u64 = 16 * 1024;
/// Unknown field names that the Connection fields of one head may list. A head that lists more is
/// refused; real clients list one or two.
pub const HOP_NAMES_MAX: usize = 16;
/// Interim (1xx) responses an engine may send before the final response. With more, the response
/// counts as malformed.
pub const INTERIM_RESPONSES_MAX: u32 = 16;

/// Edits that one leg applies to the client's JSON body, and also byte ranges that they replace
/// (one edit replaces every duplicate of its member). A leg that needs more fails.
pub const JSON_EDITS_MAX: usize = 72;
/// Header of one part of a form, in bytes. Parsers of engines allow 4 KiB per field.
pub const FORM_PART_HEAD_BYTES_MAX: usize = 16 * 1024;
/// Value of a part of a form that is read before it is forwarded, in bytes.
pub const FORM_VALUE_BYTES_MAX: usize = 64 * 1024;
/// Nesting depth of a JSON body. A deeper body is refused; the engine's parser also stops near
/// 1,000 levels.
pub const JSON_DEPTH_MAX: usize = 1024;
/// Longest member name that is compared, in bytes after unescaping. Longer names match nothing.
pub const JSON_NAME_BYTES_MAX: usize = 64;
/// Members of one body that are recorded because the proxy reads or edits them, duplicates
/// included. A body with more is refused.
pub const JSON_MEMBERS_MAX: usize = 48;
/// Objects scanned in one body (the top level, `sampling_params`, `extra_args`, `vllm_xargs`),
/// duplicates included. A well-formed request has at most four.
pub const JSON_OBJECTS_MAX: usize = 16;
/// Longest value in bytes that the response rewriter replaces. If a value arrives in several reads,
/// the rewriter withholds up to this many bytes of it. Token counts and `null` are shorter.
pub const JSON_HELD_BYTES_MAX: usize = 32;

/// Edits that are applied to one response. A response is edited by one or two.
pub const RESPONSE_EDITS_MAX: usize = 4;

const _: () = assert!(REQUEST_LINE_BYTES_MAX < HEAD_BYTES_MAX);
// One more digit must not overflow the size of a chunk.
const _: () = assert!(CHUNK_BYTES_MAX <= u64::MAX >> 4);
// There is at most one replacement per recorded member and one insertion per object, so edits of
// recorded members cannot exceed the limit. The two values of a leg that are not copied divide an
// insertion at the top level into up to five.
const _: () = assert!(JSON_MEMBERS_MAX + JSON_OBJECTS_MAX + 4 <= JSON_EDITS_MAX);

/// Bytes buffered from a client that sends more before its response is complete. At this limit
/// nothing more is read, and only the client's disconnect is detected.
pub const CLIENT_AHEAD_BYTES_MAX: usize = 64 * 1024;
/// Size of a shard's receive buffers for requests and for tokens, in bytes.
pub const RECEIVE_SMALL_BYTES: usize = 64 * 1024;
/// Bytes received per call while the rest of a head is missing: what arrives is appended to the
/// bytes before it, so a body is copied.
pub const RECEIVE_HEAD_BYTES: usize = 16 * 1024;
/// A request of which at least this much has arrived in one call keeps the buffer that it was
/// received into; a smaller part is copied to a buffer of its size. So a request never holds a
/// buffer more than twice as large as it needs.
pub const KEPT_RECEIVED_BYTES_MIN: usize = RECEIVE_SMALL_BYTES / 2;
/// Receive buffers for requests that one shard keeps for reuse.
pub const RECYCLED_RECEIVED_MAX: usize = 16;
/// Size of a shard's receive buffer for bodies, in bytes. A larger buffer needs fewer system calls
/// per MiB (copying 1 MiB takes 417 us with 256 KiB reads and 451-481 us with 64 KiB reads,
/// measured).
pub const RECEIVE_LARGE_BYTES: usize = 256 * 1024;
/// Bytes of TLS records received from a socket per call.
pub const TLS_RECEIVE_BYTES: usize = 64 * 1024;
/// Received bytes that one TLS connection holds until the rest of their record or handshake message
/// arrives. A record is at most 16 KiB, a handshake message (a certificate chain) at most 64 KiB.
pub const TLS_HELD_BYTES_MAX: usize = 80 * 1024;
/// Plaintext bytes encrypted per send. If the peer stops reading, a connection holds at most this
/// much unsent payload. Equals four full records.
pub const TLS_SEND_BYTES: usize = 64 * 1024;
/// Receives without payload after which an idle TLS connection counts as used.
pub const TLS_STEPS_MAX: u32 = 16;
/// TLS sessions with engines that one shard caches for resumption, per client configuration.
pub const TLS_SESSIONS_MAX: usize = 256;
/// Size of a certificate or key file in bytes. A larger file is not loaded.
pub const CERTIFICATE_FILE_BYTES_MAX: u64 = 1024 * 1024;
/// Bytes of a request body that are kept so that the request can be sent again once, on another
/// connection. An upload with a longer body is not repeated.
pub const REPLAY_BYTES_MAX: usize = 64 * 1024;
/// Milliseconds after a whole request was sent on a pooled connection within which the end of that
/// connection means that the engine had closed it before. Such an end arrives after one round trip;
/// the rest is for a shard that is busy.
pub const REPLAY_MS_MAX: u64 = 250;
/// Largest capacity in bytes of a buffer that is kept for reuse. Larger buffers are freed.
pub const RECYCLED_BUFFER_BYTES_MAX: usize = 4 * 1024;
/// Buffers that one shard keeps for reuse, for each of the two kinds (bytes and header fields).
pub const RECYCLED_BUFFERS_MAX: usize = 256;
/// Largest capacity, in fields, of a header field vector that is kept for reuse. Heads with more
/// fields are rare.
pub const RECYCLED_FIELDS_MAX: usize = 32;
/// Microseconds that one poll of a task may take before other tasks run: its turn. All tasks that
/// move bulk data share the same time between two polls of the kernel. The time of a poll is
/// estimated from its socket calls, with the two constants below. One call can exceed it: the
/// largest moves 2 MiB.
pub const TURN_MICROS_MAX: u32 = 200;
/// Estimated nanoseconds of a socket call and of the work that belongs to it.
pub const TURN_CALL_NANOS: u32 = 4000;
/// Estimated nanoseconds of moving 1 KiB to or from a socket. A body of 1 MiB takes 417 us to be
/// received and sent (see `RECEIVE_LARGE_BYTES`).
pub const TURN_NANOS_PER_KIB: u32 = 200;
/// Readiness events that are processed before tasks that move bulk data, accept or perform
/// handshakes get a turn.
pub const TURN_EVENTS_MAX: usize = 64;
/// Capacity in bytes of a pipe through which a body is spliced within the kernel.
pub const PIPE_BYTES: usize = 1024 * 1024;
/// Pipes open in the whole process. The kernel allows an unprivileged user 64 MiB of pipe buffers
/// (`pipe-user-pages-soft`).
pub const PIPES_MAX: usize = 32;
/// Idle pipes that one shard keeps open.
pub const PIPES_IDLE_MAX: usize = 4;
/// A body with at least this many bytes left is spliced through a pipe instead of copied. For 1
/// MiB, copying is cheaper (146 us per MiB, against 167 us spliced) because its 256 KiB buffer
/// stays in the core's cache. From 2 MiB on, splicing is cheaper (185 us per MiB, against 213 us
/// copied; for 16 MiB, 195 us against 223 us).
pub const SPLICE_BYTES_MIN: u64 = 2 * 1024 * 1024;
// A body small enough to be sent again must not be spliced.
const _: () = assert!(SPLICE_BYTES_MIN >= REPLAY_BYTES_MAX as u64);
/// A vectored send of at most this many bytes in total copies its slices into one buffer first. The
/// copy costs less than the kernel's processing of a `msghdr` (2 % of a small request, measured).
pub const SEND_JOINED_BYTES_MAX: usize = 4096;
/// Slices in one vectored send.
pub const SEND_SLICES_MAX: usize = 64;
/// Bytes that one call offers to a socket. A peer on the same machine that keeps reading takes many
/// MiB in one call, during which nothing else runs on the shard. A request with a body of 1 MiB
/// fits.
pub const SEND_BYTES_MAX: usize = 2 * 1024 * 1024;
/// Bytes read and discarded from a client whose response was sent before its request had ended.
/// Closing a socket with unread bytes makes the kernel send a reset, which can destroy the
/// response.
pub const LINGER_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Time limit for reading and discarding the rest of a client's request after the response, in
/// milliseconds.
pub const LINGER_MS_MAX: u64 = 1000;
/// Longest client `x-request-id` that is used, in bytes. A longer one is replaced by a generated
/// one.
pub const REQUEST_ID_BYTES_MAX: usize = 256;
/// Calls to encoders that one request has in progress at the same time.
pub const ENCODER_CALLS_MAX: usize = 32;
/// Connections accepted from one listener before the shard's other tasks run. Accepting one takes
/// some 20 us.
pub const ACCEPT_BATCH_MAX: usize = 16;
/// Milliseconds for which a shard stops accepting on a listener after an accept failed, for example
/// because the process ran out of descriptors or memory, or at the limit on client connections.
pub const ACCEPT_PAUSE_MS: u64 = 100;
/// The same if idle connections are being closed to make room.
pub const ACCEPT_PAUSE_MS_MIN: u64 = 1;
/// Free places for client connections below which a shard takes none in vain: more than a process
/// has shards.
pub const PLACES_FEW: usize = 1024;
/// Idle client connections that are closed together at the limit, as in nginx.
pub const IDLE_CLOSED_MAX: usize = 32;
/// Milliseconds for which a port that is in use is tried again at the start.
pub const BIND_RETRY_MS_MAX: u64 = 1000;
/// Milliseconds between two such attempts.
pub const BIND_RETRY_PAUSE_MS: u64 = 20;
/// Descriptors that are not available to clients and their engines: the admin server, log files,
/// name look-ups, discovery.
pub const RESERVED_FILES: u64 = 128;
/// Descriptors of each shard, in addition to one listener per rank.
pub const SHARD_FILES: u64 = 16;
/// Seconds for which a connection, to a client or to an engine, is idle before the kernel sends a
/// TCP keep-alive probe. Without probes, a peer that vanished without closing its connection would
/// be waited for as long as an engine may stay silent.
pub const KEEPALIVE_IDLE_SECS: u64 = 30;
/// Seconds between two TCP keep-alive probes.
pub const KEEPALIVE_INTERVAL_SECS: u64 = 10;
/// Consecutive unacknowledged TCP keep-alive probes after which the kernel closes the connection.
pub const KEEPALIVE_PROBES_MAX: u32 = 6;
/// Seconds between two checks for peers that have vanished while bytes were on the way to them, to
/// which keep-alive does not apply.
pub const VANISHED_CHECK_SECS: u64 = 15;
/// Retransmissions or probes without an acknowledgement after which a peer may count as vanished:
/// the eighth is sent after 51 s if the first is after 0.2 s.
pub const VANISHED_TRIES_MIN: u8 = 8;
/// Milliseconds without an acknowledgement after which a peer may count as vanished.
pub const VANISHED_MS_MIN: u32 = 45_000;
/// Milliseconds before a connect to a Unix socket whose accept queue is full is retried. The pause
/// doubles with each retry; the timer wheel's tick (10 ms) is added to it.
pub const CONNECT_PAUSE_MS_MIN: u64 = 1;
/// Longest pause before a connect to a Unix socket whose accept queue is full is retried, in
/// milliseconds. It is short so that an engine that accepts again is reached promptly.
pub const CONNECT_PAUSE_MS_MAX: u64 = 32;
/// Attempts to connect to a Unix socket whose accept queue is full. Without a connect timeout they
/// end after 131 s or more, close to the 127 s after which the kernel stops retrying a TCP connect.
pub const CONNECT_TRIES_MAX: u32 = 4096;
/// Seconds a leg may continue after its client has disconnected, because another engine depends on
/// it (`docs/engines.md#client-disconnects`). Engines abandon an unfinished transfer after 480 s.
pub const DETACHED_LEG_SECS_MAX: u64 = 600;
/// Seconds to wait for the first byte of a decoder's response body after its client has
/// disconnected. That byte shows that the KV transfer has ended
/// (`docs/engines.md#client-disconnects`).
pub const DETACHED_FIRST_BYTE_SECS_MAX: u64 = 30;
/// Milliseconds within which a prefiller's bootstrap server must return its list of engines.
pub const BOOTSTRAP_MS_MAX: u64 = 5000;
/// Seconds for which the list of engines from a prefiller's bootstrap server is cached. The list is
/// dropped sooner if a decoder rejects an engine in it.
pub const BOOTSTRAP_SECS_MAX: u64 = 30;
/// Bytes of all lists of engines that one shard caches. A list of 16 engines has less than 1 KiB.
pub const BOOTSTRAP_CACHE_BYTES_MAX: usize = 1024 * 1024;
/// Prefillers whose lists of engines one shard caches.
pub const BOOTSTRAPS_MAX: usize = 1024;
/// Bytes of a response body that the proxy reads without keeping them. A longer response is an
/// error, so that an engine cannot occupy a connection without end.
pub const READ_PAST_BYTES_MAX: u64 = 4 << 30;
/// Milliseconds within which an engine must state its version.
pub const VERSION_MS_MAX: u64 = 1000;
/// Seconds for which the version of an engine is used before it is asked again. An engine that is
/// replaced by another release takes longer to load its model.
pub const VERSION_SECS_MAX: u64 = 30;
/// Engines whose versions one shard remembers.
pub const VERSIONS_MAX: usize = 1024;
/// Bytes of a response text that a speculative prefill repeats, as in pd-sidecar.
pub const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Seconds within which a speculative prefill must finish, as in pd-sidecar.
pub const WARM_UP_SECS_MAX: u64 = 30;
/// Prefillers whose identity for NIXL push one shard remembers.
pub const PUSH_PREFILLERS_MAX: usize = 1024;
/// Seconds within which a second change of a prefiller's identity means that its legs are no longer
/// started together, as in pd-sidecar. A restart changes it once.
pub const PUSH_CHANGES_SECS: u64 = 300;
/// Seconds for which the legs to such a prefiller then run one after the other.
pub const PUSH_SERIAL_SECS: u64 = 600;
/// Milliseconds within which a decoder must reject the request that releases stranded KV cache
/// (`docs/stranded-kv.md`).
pub const RELEASE_MS_MAX: u64 = 5000;
/// Addresses tried per engine name.
pub const ADDRESSES_MAX: usize = 8;
/// Seconds after which a resolved name is looked up again. The old addresses are used until the new
/// look-up completes.
pub const RESOLVED_SECS_MAX: u64 = 30;
/// Names queued for the resolver threads in the whole process. The pending look-ups of one shard
/// have the same limit.
pub const RESOLVE_QUEUE_MAX: usize = 1024;
/// Trace records that one shard's ring holds for the exporter: one per request, plus one per leg
/// that runs in its own task. The record of a split request is about 4 KiB.
pub const TRACE_RING_RECORDS: usize = 1024;
/// Legs of one request that get their own spans. Further retries and decode chunks get none.
pub const TRACE_LEGS_MAX: usize = 48;
/// Attributes of one span. The spans recorded here have at most 19.
pub const TRACE_ATTRIBUTES_MAX: usize = 24;
/// Bytes kept of a text attribute of a span; the rest is dropped. Clients control the length of
/// some texts, for example of paths and targets.
pub const TRACE_TEXT_BYTES_MAX: usize = 256;
/// Spans in one export. The limit is checked before each record is taken, so the last record may
/// exceed it.
pub const TRACE_BATCH_SPANS_MAX: usize = 512;
/// Milliseconds between two reads of the trace rings.
pub const TRACE_SWEEP_MS: u64 = 100;
/// Minimum number of seconds between two warnings about failed exports.
pub const TRACE_WARNING_SECS: u64 = 60;
/// Milliseconds that exporting the remaining spans may take when the process ends.
pub const TRACE_FLUSH_MS_MAX: u64 = 3000;
/// Bytes of log lines that wait to be written. Further lines are counted and lost.
pub const LOG_QUEUE_BYTES_MAX: usize = 1024 * 1024;
/// Milliseconds for which the process waits at its end until its last message has been written.
pub const EXIT_MESSAGE_MS_MAX: u64 = 500;
/// Milliseconds for which the process waits at its end until the control log has been written, and
/// the same for the access log.
pub const LOG_FLUSH_MS_MAX: u64 = 300;
/// Milliseconds for which the process waits at the end of a drain for requests that it has cut.
pub const CUT_MS_MAX: u64 = 300;
/// Milliseconds after the deadline of a drain after which the process is ended.
pub const END_MS_MAX: u64 = 950;
const _: () = assert!(CUT_MS_MAX + 2 * LOG_FLUSH_MS_MAX < END_MS_MAX);
/// Connections at the same time to each of the ports for pages: admin and metrics. When there are
/// more, the oldest is closed.
pub const PAGE_CONNECTIONS_MAX: usize = 64;
/// Seconds that the TLS handshake of such a connection may take.
pub const PAGE_HANDSHAKE_SECS: u64 = 10;
/// Seconds within which the head of a request for a page must arrive, from the accept or from its
/// first byte.
pub const PAGE_HEAD_SECS: u64 = 10;
/// Seconds after a page after which a connection without another request is closed. Scrapers ask
/// every 15 to 60 s.
pub const PAGE_IDLE_SECS: u64 = 75;
/// Seconds for which a client may read nothing of a page.
pub const PAGE_WRITE_SECS: u64 = 10;
/// Pause in milliseconds after an accept failed, for example because the process has no descriptor
/// left.
pub const PAGE_ACCEPT_PAUSE_MS: u64 = 100;
/// Seconds between two pings of each shard.
pub const PING_SECS: u64 = 1;
/// Consecutive pings that a shard may leave unanswered before it counts as stuck.
pub const PINGS_MISSED_MAX: u32 = 10;
/// Bytes of a request body that is kept which must arrive within `--body-timeout` to count as
/// progress.
pub const BODY_PROGRESS_BYTES_MIN: u64 = 16 * 1024;
/// Free bytes at the end of a heap of the allocator (glibc) from which on it returns them to the
/// system, and size from which on an allocation is a separate mapping. The largest value that
/// glibc accepts for the latter.
#[cfg(all(target_env = "gnu", target_pointer_width = "64"))]
pub const ALLOCATOR_FREE_BYTES_MAX: i32 = 32 * 1024 * 1024;
/// Bytes by which what is kept must have fallen below its peak before the allocator's free memory
/// is returned to the system. The free memory of smaller peaks is left for the next requests.
pub const GIVE_BACK_BYTES_MIN: u64 = 16 * 1024 * 1024;
/// Seconds for which that must last.
pub const GIVE_BACK_LOW_SECS: u32 = 3;
/// Seconds after which it may be returned again. Meanwhile other threads wait for memory for some
/// milliseconds.
pub const GIVE_BACK_PAUSE_SECS: u32 = 30;
/// Smallest capacity in bytes of a buffer for bytes that are kept. Most handoffs fit.
pub const KEPT_BYTES_MIN: usize = 512;
/// Allocation step in bytes for a larger buffer whose length is not known in advance, and step in
/// which a body whose length is known is counted.
pub const KEPT_STEP_BYTES: usize = 64 * 1024;
/// Bytes of a bootstrap server's list of engines, or of a page with an engine's version. An engine
/// in the list takes some 200 bytes.
pub const PAGE_BYTES_MAX: usize = 1024 * 1024;
/// Members of the transfer parameters that encoders return for one request. A request has as many
/// items at most (`ENCODER_ITEMS_MAX`), and each usually adds one.
pub const ENCODED_MEMBERS_MAX: usize = 1024;
/// Size of a configuration file in bytes. A larger file is refused. A file with every key is a few
/// KiB.
pub const CONFIGURATION_BYTES_MAX: u64 = 1024 * 1024;

/// Rules in one allowlist file. A file with more is refused. One rule with an address prefix covers
/// a whole network.
pub const ALLOW_RULES_MAX: usize = 16 * 1024;
/// Size of an allowlist file in bytes. A larger file is not loaded.
pub const ALLOW_FILE_BYTES_MAX: u64 = 2 * 1024 * 1024;
/// Invalid lines of an allowlist file that one message lists.
pub const ALLOW_PROBLEMS_SHOWN_MAX: usize = 100;
/// Objects (pods or pools) per page of a Kubernetes API list. kubectl uses the same page size.
pub const POOL_PAGE_OBJECTS: u32 = 500;
/// Pods kept per pool. Reading a pool with more fails. Kubernetes supports 150,000 pods in a whole
/// cluster.
pub const POOL_OBJECTS_MAX: usize = 50_000;
/// Watch events that are applied as one change of the allowlist if they arrive together.
pub const POOL_BATCH_MAX: usize = 512;
/// Seconds the Kubernetes API may take to respond.
pub const POOL_RESPONSE_SECS_MAX: u64 = 30;
/// Seconds after which the API server is requested to end a watch. A watch that stays open much
/// longer is on a dead connection.
pub const POOL_WATCH_SECS: u32 = 240;
/// Seconds that a watch on the Kubernetes API without events must last to count as successful and
/// reset the retry pause.
pub const POOL_WATCH_SECS_MIN: u64 = 1;
/// Milliseconds before the Kubernetes API is queried again after the second consecutive failure
/// (after the first, immediately). The pause doubles with each failure; a random part of it, less
/// than half, is subtracted.
pub const POOL_RETRY_MS_MIN: u64 = 500;
/// Longest pause before the Kubernetes API is queried again, in milliseconds.
pub const POOL_RETRY_MS_MAX: u64 = 30_000;
/// Milliseconds after a signal to end within which another one counts as its repetition.
pub const SAME_SIGNAL_MS_MAX: u64 = 1000;
/// Milliseconds without an event in a watched directory before its files are read again. Several
/// files that belong together are usually written one after the other.
pub const WATCH_SETTLE_MS: u64 = 250;
/// Milliseconds after the first event in a watched directory after which its files are read even if
/// events continue.
pub const WATCH_SETTLE_MS_MAX: u64 = 2000;
/// Seconds between two checks of a watched directory that reports no event.
pub const WATCH_POLL_SECS: u64 = 60;
/// Seconds between two checks of a directory that cannot be watched.
pub const WATCH_RETRY_SECS: u64 = 2;
/// Bytes of inotify events read per call. The longest event is 272 bytes.
pub const WATCH_READ_BYTES: usize = 4096;
/// Maximum number of endpoints (an engine's target in one role) in a shard's table, in addition to
/// the local decoders. When it is full, a new endpoint replaces one that was not used recently.
pub const ENDPOINTS_MAX: usize = 1024;
/// Number of endpoints among which the least recently used one is replaced when the table is full.
pub const ENDPOINT_SAMPLE: usize = 32;
/// Changes of the fleet's state that wait to be published. With more, their sources wait.
pub const CHANGES_MAX: usize = 256;

const _: () = assert!(CONNECT_PAUSE_MS_MIN > 0 && CONNECT_PAUSE_MS_MAX.is_power_of_two());
const _: () = assert!(CLIENT_AHEAD_BYTES_MAX >= HEAD_BYTES_MAX);
const _: () = assert!(RECEIVE_SMALL_BYTES >= CLIENT_AHEAD_BYTES_MAX);
