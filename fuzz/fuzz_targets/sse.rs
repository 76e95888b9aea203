//! Event streams: counted, rewritten, counted again.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringside::json::fuzz::fuzz_sse(data));
