//! Targets named by a routing header.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringside::fleet::fuzz::fuzz_target(data));
