//! The `ringside` binary: parses the command line, runs the command, returns the exit code.

use std::process::ExitCode;

use ringside::cli::{self, Command, Exit};
use ringside::control;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(exit) => exit.report(),
    }
}

fn run() -> Result<(), Exit> {
    match cli::parse(std::env::args_os())? {
        Command::Proxy(config, warnings) => control::run(*config, &warnings),
        Command::Check(check) => Err(control::check(*check)),
        #[cfg(feature = "mock")]
        Command::Mock(args) => match mock_engine::run_cli(args.into_iter()) {
            0 => Ok(()),
            code => Err(Exit {
                code,
                message: String::new(),
                to_stdout: false,
            }),
        },
        #[cfg(feature = "mock")]
        Command::Demo(options) => control::demo::run(options),
        #[cfg(not(feature = "mock"))]
        Command::Mock(_) | Command::Demo(_) => Err(Exit::usage(
            "ringside: this build has no mock engine; build it with the feature `mock`",
        )),
    }
}
