//! Entry point of the `ringside-bench` program.

use std::process::ExitCode;

use ringside_bench::cli::{self, Task};
use ringside_bench::exit::Exit;
use ringside_bench::{neighbours, overhead, soak};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(exit) => exit.report(),
    }
}

fn run() -> Result<(), Exit> {
    match cli::parse(std::env::args_os())? {
        Task::Overhead(options) => overhead::run(*options),
        Task::Soak(options) => soak::run(&options),
        Task::Neighbours(options) => neighbours::run(&options),
    }
}
