//! Exit codes and messages. The codes up to 3 have the same meaning as ringside's.

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

/// The exit code and message with which the program ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The program's exit code: one of the constants of [`Exit`].
    pub code: u8,
    /// Text to print: on standard output if `code` is 0, otherwise on standard error.
    pub message: String,
}

impl Exit {
    /// Success.
    pub const OK: u8 = 0;
    /// A failure at run time, for example of a server, of a request, of a check of the responses or
    /// the process, or of writing a report; also a gate that was not met.
    pub const RUNTIME: u8 = 1;
    /// Invalid command line.
    pub const USAGE: u8 = 2;
    /// The options are invalid for this machine or these servers; a retry will fail too.
    pub const CONFIG: u8 = 3;

    /// Creates an exit with code 0 that prints text which the user requested (help or version).
    pub fn said(message: impl Into<String>) -> Self {
        Self::new(Self::OK, message)
    }

    /// Creates an exit for a failure at run time.
    pub fn runtime(message: impl Into<String>) -> Self {
        Self::new(Self::RUNTIME, message)
    }

    /// Creates an exit for an invalid command line.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Self::USAGE, message)
    }

    /// Creates an exit for options that are invalid for this machine or these servers.
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(Self::CONFIG, message)
    }

    fn new(code: u8, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// Writes the message, to standard output if the code is 0 and otherwise to standard error, and
    /// returns the exit code. Ignores write errors, since the reader of a pipe may have closed it
    /// (`| head`).
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
