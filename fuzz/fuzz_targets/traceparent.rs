//! The trace a caller says its request belongs to.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ringside::trace::fuzz::fuzz_traceparent(data));
