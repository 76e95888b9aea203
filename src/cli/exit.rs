//! How the program ends: a message, and an exit code that systemd and scripts can distinguish.

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

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
    /// reader of a pipe (`| head`) has exited.
    #[must_use]
    pub fn report(&self) -> ExitCode {
        let text = self.message.trim_end();
        if !text.is_empty() {
            let _ = if self.to_stdout {
                writeln!(std::io::stdout().lock(), "{text}")
            } else {
                writeln!(std::io::stderr().lock(), "{text}")
            };
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
