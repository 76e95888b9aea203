//! The control log: messages about the process and its state changes, written to standard error
//! and, if configured, to a file. At level `info` and above it has no lines per request. A separate
//! thread writes it.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{IsTerminal, stderr};
use std::sync::OnceLock;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{fmt, reload};

use super::Exit;
use super::log_file::RotatedFile;
use super::log_queue::{LogQueue, LogQueues, Output};
use crate::config::{LogConfig, LogFormat, LogLevel};

/// The control log of this process.
static LOG: OnceLock<LogQueues> = OnceLock::new();
/// Sets the least severe level of the messages.
static SET_LEVEL: OnceLock<Box<dyn Fn(LevelFilter) + Send + Sync>> = OnceLock::new();

/// Returns the queues of the control log, or `None` before [`init_log`].
#[must_use]
pub fn log_queues() -> Option<&'static LogQueues> {
    LOG.get()
}

/// Sets the least severe level of the messages in the control log.
pub fn set_log_level(level: LogLevel) {
    if let Some(set) = SET_LEVEL.get() {
        set(filter(level));
    }
}

const fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    }
}

/// Starts the control log of this process. Further calls have no effect.
///
/// # Errors
/// The log file cannot be opened, or the thread that writes the log cannot be started.
pub fn init_log(config: &LogConfig) -> Result<(), Exit> {
    let mut outputs: Vec<Box<dyn Output>> = vec![Box::new(stderr())];
    if let Some(file) = &config.file {
        let opened = RotatedFile::open(file).map_err(|error| {
            let path = file.path.display();
            Exit::config(format!(
                "ringside: log file {path} cannot be opened: {error}"
            ))
        })?;
        outputs.push(Box::new(opened));
    }
    if LOG.get().is_some() {
        return Ok(());
    }
    let mention_lost = match config.format {
        LogFormat::Text => mention_lost,
        LogFormat::Json => mention_lost_as_json,
    };
    let queues = outputs
        .into_iter()
        .map(|output| LogQueue::start(output, mention_lost))
        .collect::<Result<_, _>>()
        .map_err(|error| Exit::runtime(format!("ringside: the log cannot be started: {error}")))?;
    let writer = LOG.get_or_init(|| LogQueues(queues)).clone();
    // The default hook writes to standard error, which may block.
    std::panic::set_hook(Box::new(|panic| {
        let trace = Backtrace::capture();
        match trace.status() {
            BacktraceStatus::Captured => tracing::error!("{panic}\n{trace}"),
            _ => tracing::error!("{panic}"),
        }
    }));
    // https://no-color.org
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let lines = fmt::layer()
        .with_ansi(!plain && config.file.is_none() && stderr().is_terminal())
        .with_writer(writer);
    let (filter, handle) = reload::Layer::new(filter(config.level));
    let registry = tracing_subscriber::registry().with(filter);
    // The only possible error is that a log has already been started.
    let _ = match config.format {
        LogFormat::Text => registry.with(lines).try_init(),
        LogFormat::Json => {
            let lines = lines.json().flatten_event(true);
            registry.with(lines).try_init()
        }
    };
    // Fails only once the log has ended.
    let _ = SET_LEVEL.set(Box::new(move |level| drop(handle.reload(level))));
    Ok(())
}

fn mention_lost(lost: u64) -> String {
    format!("WARN {lost} log lines were lost: the log cannot be written fast enough\n")
}

fn mention_lost_as_json(lost: u64) -> String {
    format!("{{\"level\":\"WARN\",\"message\":\"log lines were lost\",\"lost\":{lost}}}\n")
}
