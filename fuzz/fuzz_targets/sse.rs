//! Counting and rewriting the events of a stream.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringside::json::fuzz::fuzz_sse(data));
