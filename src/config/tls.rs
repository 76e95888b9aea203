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
    /// Lowest protocol version.
    pub min_version: TlsVersion,
    /// Names of the cipher suites for TLS 1.2, all from [`CIPHER_SUITES`]; empty enables all of
    /// them. Those of TLS 1.3 are always enabled.
    pub cipher_suites: Vec<&'static str>,
    /// Whether clients may also send plain text to the same port.
    pub accepts_plain_text: bool,
}

/// A version of TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsVersion {
    /// TLS 1.2
    #[default]
    Tls12,
    /// TLS 1.3
    Tls13,
}

/// The supported cipher suites of TLS 1.2, by their IANA names, which Go uses too.
pub const CIPHER_SUITES: [&str; 6] = [
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
];

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
