//! The control log: messages about the process and its state changes, written to standard error
//! and, if configured, to a file. At level `info` and above it has no lines per request.

use std::io::{IsTerminal, stderr};
use std::sync::Mutex;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::writer::{BoxMakeWriter, MakeWriterExt};

use super::Exit;
use super::log_file::RotatedFile;

use crate::config::{LogConfig, LogFormat, LogLevel};

/// Starts the control log of this process. Further calls have no effect.
///
/// # Errors
/// The log file cannot be opened.
pub fn init_log(config: &LogConfig) -> Result<(), Exit> {
    let writer = match &config.file {
        None => BoxMakeWriter::new(stderr),
        Some(file) => {
            let opened = RotatedFile::open(file);
            let opened = opened.map_err(|error| {
                let path = file.path.display();
                Exit::config(format!(
                    "ringside: log file {path} cannot be opened: {error}"
                ))
            })?;
            BoxMakeWriter::new(stderr.and(Mutex::new(opened)))
        }
    };
    let level = match config.level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    // https://no-color.org
    let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let builder = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(!plain && config.file.is_none() && stderr().is_terminal())
        .with_writer(writer);
    // The only possible error is that a log has already been started.
    let _ = match config.format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    Ok(())
}
