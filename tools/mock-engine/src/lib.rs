//! A vLLM look-alike for tests and demos.
