//! The TLS configuration.

use std::path::PathBuf;

/// TLS settings for clients and engines. The default is plain text everywhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsConfig {
    /// TLS towards clients; `None` serves plain text.
    pub listener: Option<ListenerTls>,
    /// TLS towards prefillers; `None` is plain text.
    pub prefiller: Option<UpstreamTls>,
    /// TLS towards the local decoders; `None` is plain text.
    pub decoder: Option<UpstreamTls>,
    /// TLS towards encoders; `None` is plain text.
    pub encoder: Option<UpstreamTls>,
    /// File with CA certificates (PEM) trusted for engines in addition to the system's; `None`
    /// trusts only the system's.
    pub ca_file: Option<PathBuf>,
    /// Client certificate for engines that request one; `None` sends none.
    pub client_identity: Option<Identity>,
}

/// TLS towards clients.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListenerTls {
    /// Directory with `tls.crt` and `tls.key` (PEM); `None` uses a self-signed certificate.
    pub cert_dir: Option<PathBuf>,
}

/// TLS towards one kind of engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UpstreamTls {
    /// Whether the engine's certificate is verified.
    pub verify: bool,
}

/// A certificate chain and its private key, both as PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// File with the certificate chain, leaf first.
    pub cert_file: PathBuf,
    /// File with the private key of the leaf certificate.
    pub key_file: PathBuf,
}
