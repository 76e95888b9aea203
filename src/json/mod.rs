//! JSON surgery as pure bytes.
