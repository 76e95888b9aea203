//! Response heads.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringside::h1::fuzz::fuzz_response_head(data));
