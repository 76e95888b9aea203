//! Extracting the handoff from a prefill response.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringside::json::fuzz::fuzz_response(data));
