//! How the program ends: the exit codes of the house and one of its own, and a message.

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

/// The end of the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// One of the constants below.
    pub code: u8,
    /// What to say.
    pub message: String,
}

impl Exit {
    /// All went well.
    pub const OK: u8 = 0;
    /// Something failed while running: an upstream, a request, a report that could not be written.
    pub const RUNTIME: u8 = 1;
    /// The command line makes no sense.
    pub const USAGE: u8 = 2;
    /// What was asked for cannot work here; trying again will not help.
    pub const CONFIG: u8 = 3;
    /// The measured overhead is above `--max-overhead-p99`.
    pub const EXCEEDED: u8 = 6;

    /// A text that was asked for (help, version).
    pub fn said(message: impl Into<String>) -> Self {
        Self::new(Self::OK, message)
    }

    /// A failure while running.
    pub fn runtime(message: impl Into<String>) -> Self {
        Self::new(Self::RUNTIME, message)
    }

    /// A command line that makes no sense.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Self::USAGE, message)
    }

    /// Something that cannot work here.
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(Self::CONFIG, message)
    }

    /// An exceeded limit.
    pub fn exceeded(message: impl Into<String>) -> Self {
        Self::new(Self::EXCEEDED, message)
    }

    fn new(code: u8, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// Writes the message, errors to standard error, and gives the code to end with. A reader that
    /// went away (`| head`) is not an error.
    #[must_use]
    pub fn report(&self) -> ExitCode {
        let text = self.message.trim_end();
        if !text.is_empty() {
            let _ = if self.code == Self::OK {
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
