//! Overwriting values of a body in place.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringside::json::fuzz::fuzz_mask(data));
