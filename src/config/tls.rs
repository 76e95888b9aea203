//! Where connections are encrypted.

use std::path::PathBuf;

/// TLS on both sides. The default is none anywhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsConfig {
    /// Towards clients; `None` serves plain text.
    pub listener: Option<ListenerTls>,
    /// Towards prefillers.
    pub prefiller: Option<UpstreamTls>,
    /// Towards the local decoders.
    pub decoder: Option<UpstreamTls>,
    /// Towards encoders.
    pub encoder: Option<UpstreamTls>,
    /// Certificates (PEM) trusted besides the system's.
    pub ca_file: Option<PathBuf>,
    /// Shown to engines that ask for one.
    pub client_identity: Option<Identity>,
}

/// TLS towards clients.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListenerTls {
    /// Directory with `tls.crt` and `tls.key` (PEM); `None` makes a self-signed certificate.
    pub cert_dir: Option<PathBuf>,
}

/// TLS towards one kind of engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UpstreamTls {
    /// Whether the engine's certificate is checked.
    pub verify: bool,
}

/// A certificate chain and its key, both PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The chain, leaf first.
    pub cert_file: PathBuf,
    /// The key of the leaf.
    pub key_file: PathBuf,
}
