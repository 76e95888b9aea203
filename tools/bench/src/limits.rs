//! All fixed limits of the tool.

/// Maximum bytes of a response head.
pub const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Maximum number of header fields in one response.
pub const HEAD_FIELDS_MAX: usize = 128;
/// Maximum bytes of a chunk's size line, including extensions, and of each trailer line.
pub const CHUNK_LINE_BYTES_MAX: usize = 16 * 1024;
/// Maximum number of trailer lines in one response.
pub const TRAILER_LINES_MAX: u32 = 128;
/// Maximum number of interim (1xx) responses before the final one.
pub const INTERIM_RESPONSES_MAX: u32 = 16;
/// Maximum bytes of one server-sent event; a larger one is an error.
pub const EVENT_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Maximum bytes of one response's text, all of which is kept for comparison; a longer text is an
/// error.
pub const TEXT_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Bytes of an unexpected response body, such as an error page, after which the client stops
/// reading it and fails the request.
pub const SHOWN_BODY_BYTES_MAX: usize = 2 * 1024;
/// Maximum bytes of the response body of `/v1/models`.
pub const MODELS_BYTES_MAX: usize = 1024 * 1024;

/// Maximum bytes that one receive call returns: several dozen events.
pub const RECEIVE_BYTES: usize = 16 * 1024;
/// Maximum number of ready sockets that the client handles per wake-up.
pub const EVENTS_PER_WAKE_MAX: usize = 256;
/// Maximum number of connections to each side (engine or proxy) in an `overhead` run.
pub const CONNECTIONS_MAX: usize = 1024;
/// Connections to each side that are opened before an open-loop run; more are opened on demand.
pub const OPEN_LOOP_CONNECTIONS: usize = 16;
/// Maximum number of idle connections per side that the peer may close, or send unexpected bytes
/// on, before the run ends with an error.
pub const REOPENED_MAX: u64 = 100_000;
/// Maximum number of requests per side that may wait for a connection. Beyond this the run ends
/// with an error, since the rate of the open loop cannot be sustained.
pub const WAITING_MAX: usize = 10_000;
/// Timeout in milliseconds of opening a connection, including the TLS handshake, and of the request
/// for `/v1/models`.
pub const CONNECT_MS_MAX: u64 = 5_000;
/// Interval of checks for requests without progress, in milliseconds.
pub const SILENCE_CHECK_MS: u64 = 500;
/// Microseconds before a planned send during which the client polls the clock instead of sleeping.
/// A timer wakes it tens of microseconds late, and later still on a virtual machine.
pub const SPIN_BEFORE_SEND_US: u64 = 150;

/// Maximum number of proxies in one `overhead` run.
pub const PROXIES_MAX: usize = 8;
/// Maximum number of sides of an `overhead` run: the proxies and the engine itself.
pub const SIDES_MAX: usize = PROXIES_MAX + 1;
/// Longest name of a proxy in reports, in bytes.
pub const NAME_BYTES_MAX: usize = 32;
/// Maximum number of rounds of requests in one `overhead` run, not counting the warm-up.
pub const ROUNDS_MAX: u64 = 500_000;
/// Maximum number of gaps between events that are kept per side. Every resample iterates over all
/// of them. Beyond this the run ends early, and the report states so.
pub const GAPS_MAX: usize = 2_000_000;
/// Number of failed requests, on all sides together, after which an `overhead` run ends.
pub const FAILURES_MAX: u64 = 20;
/// Number of resamples that the bootstrap draws to compute the 95 % intervals: enough for stable
/// 2.5 % and 97.5 % points.
pub const RESAMPLES: usize = 2_000;
/// Minimum number of values above a quantile for the quantile to be meaningful.
pub const BEYOND_QUANTILE_MIN: usize = 5;
/// A delay of the client itself causes a warning if it exceeds this share of the measured overhead,
/// or of the overhead's uncertainty if that is larger.
pub const CLIENT_SHARE_MAX: f64 = 0.25;

/// Number of CPUs that an `overhead` run needs if the machine has them: one each for the client,
/// the engine and the proxy that the current request passes.
pub const CPUS_NEEDED: usize = 3;
/// Share of the needed CPUs that other programs may use: more than an idle system uses, and little
/// enough that a wake-up rarely waits for another program's time slice.
pub const BUSY_CPUS_SHARE_MAX: f64 = 0.10;
/// Share of the CPU time that the hypervisor may give to other machines.
pub const STEAL_SHARE_MAX: f64 = 0.02;
/// Share of the looks during a run that may find the machine busy. A job that starts once an hour
/// must not void a long run.
pub const BUSY_LOOKS_SHARE_MAX: f64 = 0.2;
/// Number of programs that are named if the machine is busy.
pub const PROGRAMS_NAMED_MAX: usize = 3;
/// CPUs that a program must use to be named.
pub const PROGRAM_CPUS_MIN: f64 = 0.05;
/// Milliseconds for which other programs are observed before a run.
pub const LOOK_BEFORE_MS: u64 = 1_000;
/// Milliseconds of each look during a run: 30 ticks of the kernel's counters per CPU.
pub const LOOK_DURING_MS: u64 = 300;
/// Seconds between two looks during a run.
pub const LOOK_EVERY_S: u64 = 5;
/// Share of the run's time that a client with `--busy-poll` may wait for a CPU without a warning.
/// Beyond this, one in a hundred timestamps may be late.
pub const OFF_CPU_SHARE_MAX: f64 = 0.005;
/// Share of the run's time that the client may be busy without a warning.
pub const BUSY_SHARE_MAX: f64 = 0.5;

/// Maximum number of words in a generated prompt; each word is about one token.
pub const PROMPT_TOKENS_MAX: u32 = 1_000_000;
/// Maximum number of tokens that can be requested in one response.
pub const RESPONSE_TOKENS_MAX: u32 = 100_000;
/// Maximum rate of the open loop: requests per second to all sides together.
pub const RATE_MAX: f64 = 100_000.0;
/// Maximum number of responses that have a row in the JSON report: about 20 MiB. Beyond it the
/// report states how many are left out.
pub const ROWS_MAX: usize = 100_000;
/// Number of segments of one curve in the HTML report. Segments smaller than a pixel would not be
/// visible.
pub const CURVE_POINTS_MAX: usize = 400;
/// Maximum number of columns of the timeline in the HTML report.
pub const TIMELINE_COLUMNS_MAX: usize = 200;
/// Seconds between two lines of progress of an `overhead` run, unless standard error is a terminal.
pub const PROGRESS_LINE_S: u64 = 10;
/// Number of clock readings, and of bytes sent over loopback, with which the client measures its
/// own precision.
pub const SELF_CHECKS: usize = 2_000;

/// Maximum number of concurrent connections of a soak (`--streams`).
pub const STREAMS_MAX: usize = 16_384;
/// Number of file descriptors that a soak needs in addition to one per connection.
pub const OWN_DESCRIPTORS: u64 = 64;
/// Interval of checks for due actions, in milliseconds: planned aborts, ends of pauses, timeouts. A
/// planned abort may be this late.
pub const SOAK_CHECK_MS: u64 = 10;
/// Seconds without a received byte after which a request fails, not counting the client's own
/// pauses.
pub const SOAK_SILENCE_S: u64 = 60;
/// Maximum bytes of filler in a soak prompt: more than any proxy reads in one call.
pub const SOAK_PROMPT_BYTES_MAX: u32 = 32 * 1024;
/// Maximum milliseconds between a sent request and its planned abort.
pub const ABORT_AFTER_MS_MAX: u64 = 100;
/// Maximum length in milliseconds of a pause in which a soak does not read from a connection.
pub const PAUSE_MS_MAX: u64 = 5_000;
/// Size in bytes of the receive buffer of a connection that a soak reads slowly; the kernel doubles
/// the value.
pub const NARROW_BUFFER_BYTES: usize = 2 * 1024;
/// Maximum number of failed requests that a soak report describes.
pub const SOAK_ERRORS_SHOWN_MAX: usize = 10;
/// Number of failed requests after which a soak ends.
pub const SOAK_ERRORS_MAX: u64 = 50;
/// Milliseconds between two samples of the proxy's process; fewer in a short run.
pub const SAMPLE_MS_MAX: u64 = 2_000;
/// Minimum number of samples of the proxy's process in a run; a short run is sampled more often to
/// reach it.
pub const SAMPLES_MIN: u64 = 60;
/// Minimum number of samples in a window for its median to be meaningful.
pub const WINDOW_SAMPLES_MIN: usize = 3;
/// Seconds at the start of a soak that are warm-up, during which the proxy's process may grow; a
/// fifth of a short run.
pub const SOAK_WARMUP_S_MAX: u64 = 60;
/// Seconds of each of the two windows whose medians are compared, one after the warm-up and one at
/// the end of a soak; a quarter of a short run.
pub const WINDOW_S_MAX: u64 = 60;
/// Share of the first window's median resident set by which the median may grow until the last
/// window, in addition to [`RSS_GROWTH_BYTES_MAX`].
pub const RSS_GROWTH_SHARE_MAX: f64 = 0.05;
/// Bytes by which the median resident set may grow from the first to the last window, in addition
/// to [`RSS_GROWTH_SHARE_MAX`].
pub const RSS_GROWTH_BYTES_MAX: u64 = 1024 * 1024;
/// Number by which the proxy's median number of open descriptors may grow from the first to the
/// last window.
pub const DESCRIPTORS_GROWTH_MAX: u64 = 16;
/// Seconds to wait, after a soak has closed its last connection, for the proxy's number of open
/// descriptors to return to that of the start. Exceeding them is not an error.
pub const SETTLE_S_MAX: u64 = 30;
/// Seconds between two lines of progress.
pub const SOAK_PROGRESS_S: u64 = 10;

/// Number of quiet streams through the proxy in each cell of a `neighbours` run; one more stream
/// goes directly to the engine.
pub const QUIET_STREAMS: usize = 4;
/// Interval between two events of a quiet stream, in milliseconds.
pub const QUIET_INTERVAL_MS: u64 = 5;
/// Milliseconds for which the quiet streams run before the attack starts.
pub const QUIET_WARMUP_MS: u64 = 200;
/// Milliseconds that the first event of a quiet stream may take, and the last events of a
/// measurement. Beyond this the stream has stalled, which is an error.
pub const QUIET_STALL_MS_MAX: u64 = 10_000;
/// Share of the planned events that the engine must have sent for a row without a warning. With
/// fewer, something else has kept the engine or the measuring thread from running.
pub const QUIET_EVENTS_SHARE_MIN: f64 = 0.9;
/// Milliseconds to wait, after an attack, until the engine has no request of it left. Exceeding
/// them is not an error.
pub const ATTACK_DRAIN_MS_MAX: u64 = 2_000;
/// Pause in milliseconds before a failed connection of an attack is opened again; also the longest
/// time until the attack's thread notices that it shall stop.
pub const ATTACK_RETRY_MS: u64 = 10;
/// Niceness of the attack's thread: the lowest priority, so that it does not delay the measuring
/// thread on a small machine.
pub const ATTACK_NICENESS: i32 = 19;
/// Number of connections of the attacks that transfer large bodies.
pub const BULK_CONNECTIONS: usize = 100;
/// Number of connections of the attacks that consist of many small exchanges.
pub const SMALL_CONNECTIONS: usize = 1_000;
/// Size in bytes of the request body of an upload.
pub const UPLOAD_BYTES: usize = 4 * 1024 * 1024;
/// Size in bytes of the response body of a download.
pub const DOWNLOAD_BYTES: u64 = 64 * 1024 * 1024;
/// Number of requests that the pipelining attack sends together.
pub const PIPELINED_REQUESTS: u32 = 16;
/// Size in bytes of the request body of the resets attack.
pub const RESET_BODY_BYTES: usize = 200;
/// Maximum bytes that the engine and the attacks of a `neighbours` run receive in one call.
pub const NEIGHBOURS_RECEIVE_BYTES: usize = 64 * 1024;
/// Maximum bytes of a download that the engine sends in one call.
pub const DOWNLOAD_SEND_BYTES: usize = 256 * 1024;
/// Maximum number of connections that wait to be accepted by the engine of a `neighbours` run.
pub const ENGINE_BACKLOG: i32 = 4_096;
/// Longest time in milliseconds until the thread of the engine notices that it shall stop.
pub const ENGINE_STOP_MS: u64 = 50;
/// Number of open files that a `neighbours` run needs: the connections of an attack, those of the
/// proxy to the engine, and as many that a proxy has not closed yet.
pub const NEIGHBOURS_DESCRIPTORS: u64 = 4_096;
/// Maximum number of rounds of a `neighbours` run.
pub const NEIGHBOURS_ROUNDS_MAX: u32 = 1_000;

const _: () = assert!(OPEN_LOOP_CONNECTIONS <= CONNECTIONS_MAX);
