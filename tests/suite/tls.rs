//! TLS towards clients and engines: handshakes, certificates, what ends and what must not.

use crate::harness::Launch;
