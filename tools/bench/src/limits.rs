//! Every fixed bound of the tool, with its unit in the name and the reason beside it.

/// Head of an answer in bytes.
pub const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Header fields of one answer.
pub const HEAD_FIELDS_MAX: usize = 128;
/// Line that announces a chunk, extension included, and each trailer line, in bytes.
pub const CHUNK_LINE_BYTES_MAX: usize = 16 * 1024;
/// Trailer lines of one answer.
pub const TRAILER_LINES_MAX: u32 = 128;
/// Interim (1xx) answers before the final one.
pub const INTERIM_RESPONSES_MAX: u32 = 16;
/// One server-sent event in bytes.
pub const EVENT_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Text of one answer that is kept for comparison, in bytes.
pub const TEXT_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Body of an answer that is no event stream, kept to be shown, in bytes.
pub const SHOWN_BODY_BYTES_MAX: usize = 2 * 1024;
/// Body of `/v1/models` in bytes.
pub const MODELS_BYTES_MAX: usize = 1024 * 1024;

/// Bytes received at once from one connection: some dozens of events.
pub const RECEIVE_BYTES: usize = 16 * 1024;
/// Connections looked at after one wake-up.
pub const EVENTS_PER_WAKE_MAX: usize = 256;
/// Connections to each side.
pub const CONNECTIONS_MAX: usize = 1024;
/// Connections to each side that are opened before an open-loop run; more are opened on demand.
pub const OPEN_LOOP_CONNECTIONS: usize = 16;
/// Connections per side that the other end may close while nothing is asked of them.
pub const REOPENED_MAX: u64 = 100_000;
/// Requests of the open loop that wait for a connection; at the bound the run ends, because its
/// rate cannot be kept.
pub const WAITING_MAX: usize = 10_000;
/// Milliseconds a connect may take.
pub const CONNECT_MS_MAX: u64 = 5_000;
/// Milliseconds between two looks at what has been silent for too long.
pub const SILENCE_LOOK_MS: u64 = 500;
/// Microseconds before a planned send from which on the clock is watched instead of sleeping: a
/// timer's wake-up is late by tens of microseconds, on a virtual machine by more.
pub const SPIN_BEFORE_SEND_US: u64 = 150;

/// Pairs of requests in one run.
pub const PAIRS_MAX: u64 = 500_000;
/// Gaps between chunks kept per side; the run ends early at the bound and says so. Every resample
/// walks all of them.
pub const GAPS_MAX: usize = 2_000_000;
/// Failed requests after which the run ends.
pub const FAILURES_MAX: u64 = 20;
/// Resamples of the bootstrap: enough for steady 2.5 % and 97.5 % points.
pub const RESAMPLES: usize = 2_000;
/// Values that have to lie beyond a quantile for it to be more than an accident of few values.
pub const BEYOND_QUANTILE_MIN: usize = 5;
/// Share of the measured overhead (or of its uncertainty, if that is larger) from which on the
/// client's own delay is worth a warning.
pub const CLIENT_SHARE_MAX: f64 = 0.25;

/// Share of the time that a client that never sleeps may be kept off its CPU without a warning: more
/// than this and a hundredth of all stamps may be late.
pub const OFF_CPU_SHARE_MAX: f64 = 0.005;
/// Share of the time that a client may be busy without a warning.
pub const BUSY_SHARE_MAX: f64 = 0.5;

/// Words of a generated prompt.
pub const PROMPT_TOKENS_MAX: u32 = 1_000_000;
/// Tokens of one answer.
pub const RESPONSE_TOKENS_MAX: u32 = 100_000;
/// Requests per second of the open loop.
pub const RATE_MAX: f64 = 100_000.0;
/// Points of one curve in the HTML report; more than a screen has pixels is of no use.
pub const CURVE_POINTS_MAX: usize = 400;
/// Columns of the timeline in the HTML report.
pub const TIMELINE_COLUMNS_MAX: usize = 200;
/// Clock readings and loopback round trips with which the client measures itself.
pub const SELF_CHECKS: usize = 2_000;

/// Streams that a soak keeps running.
pub const STREAMS_MAX: usize = 16_384;
/// Descriptors of a soak besides its streams.
pub const OWN_DESCRIPTORS: u64 = 64;
/// Milliseconds between two looks at what is due: planned aborts, ends of pauses, silence. A planned
/// abort is late by up to this.
pub const SOAK_LOOK_MS: u64 = 10;
/// Seconds without a byte after which a request has failed; a pause of its own does not count.
pub const SOAK_SILENCE_S: u64 = 60;
/// Longest prompt in bytes: more than one read of any proxy.
pub const SOAK_PROMPT_BYTES_MAX: u32 = 32 * 1024;
/// Milliseconds between a sent request and its planned abort.
pub const ABORT_AFTER_MS_MAX: u64 = 100;
/// Milliseconds that a slow reader does not read.
pub const PAUSE_MS_MAX: u64 = 5_000;
/// Receive buffer of a slow reader in bytes; the kernel doubles it.
pub const NARROW_BUFFER_BYTES: usize = 2 * 1024;
/// Failed requests that are described.
pub const SOAK_ERRORS_SHOWN_MAX: usize = 10;
/// Failed requests after which a soak ends.
pub const SOAK_ERRORS_MAX: u64 = 50;
/// Milliseconds between two samples of the proxy's process; less in a short run.
pub const SAMPLE_MS_MAX: u64 = 2_000;
/// Samples of a short run.
pub const SAMPLES_MIN: u64 = 60;
/// Samples that a window has to hold for its median to mean something.
pub const WINDOW_SAMPLES_MIN: usize = 3;
/// Seconds at the beginning that no window holds; a fifth of a short run.
pub const SOAK_WARMUP_S_MAX: u64 = 60;
/// Seconds of the first and the last window; a quarter of a short run.
pub const WINDOW_S_MAX: u64 = 60;
/// Growth of the median of the resident set from the first to the last window that still counts as
/// flat: this share ...
pub const RSS_GROWTH_SHARE_MAX: f64 = 0.05;
/// ... and so many bytes more.
pub const RSS_GROWTH_BYTES_MAX: u64 = 1024 * 1024;
/// Growth of the median of open descriptors that still counts as flat.
pub const DESCRIPTORS_GROWTH_MAX: u64 = 16;
/// Seconds that the proxy has to let go of descriptors after the last connection was closed.
pub const SETTLE_S_MAX: u64 = 30;
/// Seconds between two lines of progress.
pub const SOAK_PROGRESS_S: u64 = 10;

const _: () = assert!(OPEN_LOOP_CONNECTIONS <= CONNECTIONS_MAX);
