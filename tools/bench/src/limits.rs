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
pub const INTERIM_ANSWERS_MAX: u32 = 16;
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
pub const ANSWER_TOKENS_MAX: u32 = 100_000;
/// Requests per second of the open loop.
pub const RATE_MAX: f64 = 100_000.0;
/// Points of one curve in the HTML report; more than a screen has pixels is of no use.
pub const CURVE_POINTS_MAX: usize = 400;
/// Columns of the timeline in the HTML report.
pub const TIMELINE_COLUMNS_MAX: usize = 200;
/// Clock readings and loopback round trips with which the client measures itself.
pub const SELF_CHECKS: usize = 2_000;

const _: () = assert!(OPEN_LOOP_CONNECTIONS <= CONNECTIONS_MAX);
