//! The ringside program: parse, run, exit code.

fn main() {}
