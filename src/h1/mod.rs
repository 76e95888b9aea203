//! HTTP/1.1 as pure bytes.
