//! From certificates and keys to what sessions are begun with. Reads no file.

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

use crate::limits::TLS_SESSIONS_MAX;

/// The one protocol spoken inside.
const ALPN: &[u8] = b"http/1.1";

/// Why a certificate, a key or a set of roots cannot be used.
pub type SetupError = Error;

/// The certificate shown to clients. It can be replaced while connections are open: handshakes
/// from then on show the new one.
#[derive(Debug)]
pub struct Certificate(ArcSwap<CertifiedKey>);

impl Certificate {
    /// A chain, leaf first, and the key of the leaf.
    ///
    /// # Errors
    /// When the key cannot be used or belongs to another certificate.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Self, SetupError> {
        Ok(Self(ArcSwap::from_pointee(certified(chain, key)?)))
    }

    /// Replaces it. With an error nothing has changed.
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

/// What sessions with clients are begun with: TLS 1.2 and 1.3, `http/1.1`, tickets that all shards
/// understand.
///
/// # Errors
/// When the provider lacks what is needed, or there is no randomness for the key of the tickets.
pub fn server_config(certificate: Arc<Certificate>) -> Result<ServerConfig, SetupError> {
    let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(rustls::ALL_VERSIONS)?;
    let mut config = builder
        .with_no_client_auth()
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.ticketer = ring::Ticketer::new()?;
    Ok(config)
}

/// Which engines are believed.
#[derive(Clone, Debug)]
pub enum Trust {
    /// Those whose certificate is for their name and leads to one of these.
    Roots(Arc<RootCertStore>),
    /// All of them.
    Anyone,
}

/// What sessions with engines are begun with. `identity` is shown to engines that ask for one.
///
/// # Errors
/// When the provider lacks what is needed, or the identity's key is not its certificate's.
pub fn client_config(
    trust: Trust,
    identity: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
) -> Result<ClientConfig, SetupError> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(rustls::ALL_VERSIONS)?;
    let builder = match trust {
        Trust::Roots(roots) => builder.with_root_certificates(roots),
        Trust::Anyone => {
            let anyone = Arc::new(Anyone { provider });
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

/// Gives a configuration sessions of its own to resume: nothing is shared between shards, nor
/// between engines that are checked and those that are not.
pub(super) fn remember_sessions(config: &mut ClientConfig) {
    config.resumption = Resumption::in_memory_sessions(TLS_SESSIONS_MAX);
}

/// Believes every certificate, though not that its key was used: signatures are checked.
#[derive(Debug)]
struct Anyone {
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Anyone {
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
