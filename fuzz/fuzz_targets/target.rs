//! Targets in routing headers.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringside::fleet::fuzz::fuzz_target(data));
