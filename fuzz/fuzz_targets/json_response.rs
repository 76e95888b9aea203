//! The handoff of a prefill answer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringside::json::fuzz::fuzz_response(data));
