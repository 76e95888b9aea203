//! The `mock-engine` binary; see [`mock_engine::run_cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(mock_engine::run_cli(std::env::args().skip(1)))
}
