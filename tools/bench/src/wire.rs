//! A connection of the measuring client, with or without TLS.
//!
//! With TLS, a receive is timestamped after decryption, because that is when a client has the
//! bytes.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};

use crate::socket::{self, Received};

/// TLS client configuration for one side.
#[derive(Clone)]
pub struct Secure {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl fmt::Debug for Secure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secure")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Secure {
    /// Returns a configuration for the server `host`. With `insecure`, any certificate is accepted.
    ///
    /// # Errors
    /// If `host` is not a valid server name, or this system has no root certificates.
    pub fn new(host: &str, insecure: bool) -> Result<Self, String> {
        let name = ServerName::try_from(host.to_owned()).map_err(|error| error.to_string())?;
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(rustls::ALL_VERSIONS)
            .map_err(|error| error.to_string())?;
        let mut config = if insecure {
            builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(AcceptAnyCertificate(provider)))
                .with_no_client_auth()
        } else {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err("this system has no root certificates; --insecure needs none".into());
            }
            builder.with_root_certificates(roots).with_no_client_auth()
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self {
            config: Arc::new(config),
            name,
        })
    }
}

/// A certificate verifier that accepts any certificate, but still checks handshake signatures.
#[derive(Debug)]
struct AcceptAnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAnyCertificate {
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
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// A connection, with or without TLS, that is being opened or is open.
pub struct Wire {
    socket: OwnedFd,
    tls: Option<Box<ClientConnection>>,
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").finish_non_exhaustive()
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Adapts a non-blocking socket to `Read` and `Write` for rustls.
struct Raw<'a>(&'a OwnedFd);

impl Read for Raw<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match socket::receive(self.0, buffer) {
            Received::Bytes(len) => Ok(len),
            Received::Nothing => Err(ErrorKind::WouldBlock.into()),
            Received::End => Ok(0),
            Received::Failed(error) => Err(error),
        }
    }
}

impl Write for Raw<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match socket::send(self.0, bytes) {
            Ok(0) => Err(ErrorKind::WouldBlock.into()),
            other => other,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Wire {
    /// Wraps a socket that is connecting, with a TLS session if `secure` is given.
    ///
    /// # Errors
    /// If the TLS session cannot be created.
    pub fn new(socket: OwnedFd, secure: Option<&Secure>) -> io::Result<Self> {
        let session = |secure: &Secure| {
            ClientConnection::new(Arc::clone(&secure.config), secure.name.clone()).map(Box::new)
        };
        let tls = secure.map(session).transpose().map_err(io::Error::other)?;
        Ok(Self { socket, tls })
    }

    /// Continues to open the connection after the socket has become ready. Returns `true` if
    /// requests can now be sent, and `false` if the TLS handshake is incomplete.
    ///
    /// # Errors
    /// If the connect or the TLS handshake failed.
    pub fn opened(&mut self) -> io::Result<bool> {
        socket::connected(&self.socket)?;
        let Some(tls) = &mut self.tls else {
            return Ok(true);
        };
        while tls.is_handshaking() {
            match tls.complete_io(&mut Raw(&self.socket)) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(!tls.wants_write())
    }

    /// Receives available bytes, decrypted if the connection uses TLS, without blocking.
    pub fn receive(&mut self, buffer: &mut [u8]) -> Received {
        let Some(tls) = &mut self.tls else {
            return socket::receive(&self.socket, buffer);
        };
        match tls.reader().read(buffer) {
            Ok(0) => return Received::End,
            Ok(len) => return Received::Bytes(len),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Received::Failed(error),
        }
        match tls.read_tls(&mut Raw(&self.socket)) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Received::Nothing,
            Err(error) => return Received::Failed(error),
        }
        if let Err(error) = tls.process_new_packets() {
            return Received::Failed(io::Error::other(error));
        }
        match tls.reader().read(buffer) {
            Ok(0) => Received::End,
            Ok(len) => Received::Bytes(len),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Received::Nothing,
            Err(error) => Received::Failed(error),
        }
    }

    /// Sends as many bytes as are accepted without blocking and returns their number, possibly 0.
    /// The TLS session may still buffer accepted bytes; see [`Wire::flush`].
    ///
    /// # Errors
    /// If the connection has failed.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else {
            return socket::send(&self.socket, bytes);
        };
        // Bytes accepted earlier are sent first. No new bytes are accepted while some are unsent.
        if !flush(tls, &self.socket)? {
            return Ok(0);
        }
        let taken = tls.writer().write(bytes)?;
        flush(tls, &self.socket)?;
        Ok(taken)
    }

    /// Sends the bytes that the TLS session still buffers; returns whether none are left. Without
    /// TLS, there are none.
    ///
    /// # Errors
    /// If the connection has failed.
    pub fn flush(&mut self) -> io::Result<bool> {
        match &mut self.tls {
            Some(tls) => flush(tls, &self.socket),
            None => Ok(true),
        }
    }
}

fn flush(tls: &mut ClientConnection, socket: &OwnedFd) -> io::Result<bool> {
    while tls.wants_write() {
        match tls.write_tls(&mut Raw(socket)) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}
