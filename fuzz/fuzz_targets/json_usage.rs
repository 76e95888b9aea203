//! Rewriting the counts of the prompt in a response.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringside::json::fuzz::fuzz_usage(data));
