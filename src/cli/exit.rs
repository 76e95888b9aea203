//! How the program ends: a message, and an exit code that systemd and scripts can distinguish.

use std::fmt;
use std::io::Write;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::limits::EXIT_MESSAGE_MS_MAX;
use crate::sys::{BindError, CoreError};

/// An exit code with its message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit code of the process: one of the constants of [`Exit`], such as [`Exit::USAGE`].
    pub code: u8,
    /// Message to print. If it is empty, nothing is printed.
    pub message: String,
    /// Whether the message is requested output (help, version, a report) and goes to standard
    /// output instead of standard error.
    pub to_stdout: bool,
}

impl Exit {
    /// Exit code for success, including `--help`, `--version` and a valid `check-config`.
    pub const OK: u8 = 0;
    /// Exit code for a failure while running.
    pub const RUNTIME: u8 = 1;
    /// Exit code for an invalid command line.
    pub const USAGE: u8 = 2;
    /// Exit code for an invalid configuration. Restarting does not help.
    pub const CONFIG: u8 = 3;
    /// Exit code for an address that cannot be bound: a port is in use, the address does not exist,
    /// or a permission is missing.
    pub const ADDRESS: u8 = 4;
    /// Exit code for a kernel that lacks a required feature.
    pub const KERNEL: u8 = 5;

    /// Creates an exit with code 0 that prints `message`, which the user requested, to standard
    /// output.
    pub fn success(message: impl Into<String>) -> Self {
        Self {
            code: Self::OK,
            message: message.into(),
            to_stdout: true,
        }
    }

    /// Creates an exit for a failure while running.
    pub fn runtime(message: impl Into<String>) -> Self {
        Self::failed(Self::RUNTIME, message)
    }

    /// Creates an exit for an invalid command line.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::failed(Self::USAGE, message)
    }

    /// Creates an exit for an invalid configuration.
    pub fn config(message: impl Into<String>) -> Self {
        Self::failed(Self::CONFIG, message)
    }

    /// Creates an exit for an address that cannot be bound.
    pub fn address(message: impl Into<String>) -> Self {
        Self::failed(Self::ADDRESS, message)
    }

    /// Creates an exit for a missing kernel feature.
    pub fn kernel(message: impl Into<String>) -> Self {
        Self::failed(Self::KERNEL, message)
    }

    fn failed(code: u8, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            to_stdout: false,
        }
    }

    /// Prints the message and returns the exit code. Write errors are ignored, for example if the
    /// reader of a pipe (`| head`) has exited. A standard error that is not read delays the end by
    /// `EXIT_MESSAGE_MS_MAX` at most.
    #[must_use]
    pub fn report(&self) -> ExitCode {
        let text = format!("{}\n", self.message.trim_end());
        if self.message.trim_end().is_empty() {
            return ExitCode::from(self.code);
        }
        if self.to_stdout {
            let _ = std::io::stdout().lock().write_all(text.as_bytes());
            return ExitCode::from(self.code);
        }
        let (done, written) = mpsc::channel();
        let print = move || {
            let _ = std::io::stderr().lock().write_all(text.as_bytes());
            let _ = done.send(());
        };
        if thread::Builder::new().spawn(print).is_ok() {
            let _ = written.recv_timeout(Duration::from_millis(EXIT_MESSAGE_MS_MAX));
        }
        ExitCode::from(self.code)
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Exit {}

impl From<BindError> for Exit {
    fn from(error: BindError) -> Self {
        match error {
            BindError::Busy(_) | BindError::Permission(_) | BindError::NoSuchAddress(_) => {
                Self::address(format!("ringside: {error}"))
            }
            BindError::Failed(..) => Self::runtime(format!("ringside: {error}")),
        }
    }
}

impl From<CoreError> for Exit {
    fn from(error: CoreError) -> Self {
        Self::config(format!("ringside: --cores: {error}"))
    }
}
