//! Rewriting the cached-token count of a response.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringside::json::fuzz::fuzz_usage(data));
