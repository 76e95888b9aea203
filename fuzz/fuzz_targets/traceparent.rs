//! The `traceparent` header field.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringside::trace::fuzz::fuzz_traceparent(data));
