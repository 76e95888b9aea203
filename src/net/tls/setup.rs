//! Builds TLS configurations from certificates and keys. Reads no files.

use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, RootCertStore, ServerConfig, SignatureScheme,
};

use crate::config::TlsVersion;
use crate::limits::TLS_SESSIONS_MAX;

/// The only ALPN protocol that is offered to engines and accepted from clients.
const ALPN: &[u8] = b"http/1.1";

/// Reason why a certificate, a key or a set of roots cannot be used.
pub type SetupError = Error;

/// The certificate presented to clients. It can be replaced while connections are open; later
/// handshakes use the new one.
#[derive(Debug)]
pub struct Certificate(ArcSwap<CertifiedKey>);

impl Certificate {
    /// Creates a certificate from a chain, leaf first, and the private key of the leaf.
    ///
    /// # Errors
    /// Fails if the chain is empty, the key cannot be used, or it belongs to another certificate.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Self, SetupError> {
        Ok(Self(ArcSwap::from_pointee(certified(chain, key)?)))
    }

    /// Replaces the certificate. In case of an error the previous one remains in use.
    ///
    /// # Errors
    /// As [`Certificate::new`].
    pub fn replace(
        &self,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<(), SetupError> {
        self.0.store(Arc::new(certified(chain, key)?));
        Ok(())
    }
}

fn certified(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<CertifiedKey, SetupError> {
    if chain.is_empty() {
        return Err(Error::NoCertificatesPresented);
    }
    CertifiedKey::from_der(chain, key, &ring::default_provider())
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load_full())
    }
}

/// Returns the configuration of sessions with clients: `http/1.1`, and session tickets that are
/// valid on all shards. `min_version` is the lowest protocol version. `suites` are the names of the
/// cipher suites for TLS 1.2; without any, all are enabled.
///
/// # Errors
/// Fails if the crypto provider does not support the protocol versions, or no random bytes are
/// available for the ticket key.
pub fn server_config(
    certificate: Arc<Certificate>,
    min_version: TlsVersion,
    suites: &[&str],
) -> Result<ServerConfig, SetupError> {
    let mut provider = ring::default_provider();
    if !suites.is_empty() {
        provider.cipher_suites.retain(|suite| {
            let name = suite.suite().as_str().unwrap_or_default();
            suite.tls13().is_some() || suites.contains(&name)
        });
    }
    let versions = match min_version {
        TlsVersion::Tls12 => rustls::ALL_VERSIONS,
        TlsVersion::Tls13 => &[&rustls::version::TLS13],
    };
    let builder =
        ServerConfig::builder_with_provider(Arc::new(provider)).with_protocol_versions(versions)?;
    let mut config = builder
        .with_no_client_auth()
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.ticketer = ring::Ticketer::new()?;
    Ok(config)
}

/// How the certificates of engines are verified.
#[derive(Clone, Debug)]
pub enum Trust {
    /// Accepts certificates that are valid for the engine's name and chain to one of these roots.
    Roots(Arc<RootCertStore>),
    /// Accepts every certificate, without verification of its name, validity period and issuer.
    AnyCertificate,
}

/// Returns the configuration of sessions with engines. `identity` is the client certificate for
/// engines that request one.
///
/// # Errors
/// Fails if the crypto provider does not support the protocol versions, or the key does not belong
/// to the certificate of `identity`.
pub fn client_config(
    trust: Trust,
    identity: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
) -> Result<ClientConfig, SetupError> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(rustls::ALL_VERSIONS)?;
    let builder = match trust {
        Trust::Roots(roots) => builder.with_root_certificates(roots),
        Trust::AnyCertificate => {
            let anyone = Arc::new(AnyCertificate { provider });
            builder.dangerous().with_custom_certificate_verifier(anyone)
        }
    };
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => builder.with_client_auth_cert(chain, key)?,
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

/// Gives a configuration a new cache of resumable sessions, so that no sessions are shared between
/// shards, or between engines whose certificates are verified and engines whose are not.
pub(super) fn remember_sessions(config: &mut ClientConfig) {
    config.resumption = Resumption::in_memory_sessions(TLS_SESSIONS_MAX);
}

/// A verifier that accepts every certificate. Handshake signatures are still verified.
#[derive(Debug)]
struct AnyCertificate {
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
