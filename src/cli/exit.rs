//! How the program ends: a code that systemd and scripts can tell apart, and a message.

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use crate::sys::{BindError, CoreError};

/// The end of the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// One of the constants below.
    pub code: u8,
    /// What to say.
    pub message: String,
    /// Whether the message was asked for (help, version) and belongs on standard output.
    pub to_stdout: bool,
}

impl Exit {
    /// All went well.
    pub const OK: u8 = 0;
    /// Something failed while running.
    pub const RUNTIME: u8 = 1;
    /// The command line makes no sense.
    pub const USAGE: u8 = 2;
    /// The configuration is invalid; starting again will not help.
    pub const CONFIG: u8 = 3;
    /// A port is taken, or a permission is missing.
    pub const ADDRESS: u8 = 4;
    /// The kernel lacks something needed.
    pub const KERNEL: u8 = 5;

    /// A text that was asked for.
    pub fn said(message: impl Into<String>) -> Self {
        Self {
            code: Self::OK,
            message: message.into(),
            to_stdout: true,
        }
    }

    /// A failure while running.
    pub fn runtime(message: impl Into<String>) -> Self {
        Self::failed(Self::RUNTIME, message)
    }

    /// A command line that makes no sense.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::failed(Self::USAGE, message)
    }

    /// An invalid configuration.
    pub fn config(message: impl Into<String>) -> Self {
        Self::failed(Self::CONFIG, message)
    }

    /// A taken port or a missing permission.
    pub fn address(message: impl Into<String>) -> Self {
        Self::failed(Self::ADDRESS, message)
    }

    /// A kernel that lacks something needed.
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

    /// Writes the message and gives the code to end with. A reader that went away (`| head`) is
    /// not an error.
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
