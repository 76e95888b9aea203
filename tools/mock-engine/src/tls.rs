//! TLS for an engine's TCP connections.
//!
//! This uses rustls directly on a socket. It shares no code with ringside, because shared code
//! would hide ringside's mistakes from the tests.

use std::io::{self, ErrorKind, Read, Write};
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use tokio::net::TcpStream;

use crate::sync::Guarded;

/// The TLS configuration of an engine.
#[derive(Clone, Debug)]
pub struct Tls {
    config: Arc<ServerConfig>,
    /// Whether to send `close_notify` before closing; some servers do not.
    close_notify: bool,
}

impl Tls {
    /// Returns a configuration with a certificate chain and its private key, both in PEM format.
    ///
    /// # Errors
    ///
    /// Returns an error if one of them is invalid or if they do not belong together.
    pub fn new(chain: &[u8], key: &[u8]) -> io::Result<Self> {
        Self::with(chain, key, None)
    }

    /// Like [`Tls::new`], but requires client certificates that chain up to one of `roots` (PEM).
    ///
    /// # Errors
    ///
    /// Returns an error if one of the arguments is invalid or if chain and key do not belong
    /// together.
    pub fn with_clients_of(chain: &[u8], key: &[u8], roots: &[u8]) -> io::Result<Self> {
        Self::with(chain, key, Some(roots))
    }

    /// Like [`Tls::new`], with the paths of two PEM files.
    ///
    /// # Errors
    ///
    /// Returns an error if a file cannot be read, or if [`Tls::new`] fails.
    pub fn from_files(chain: &Path, key: &Path) -> io::Result<Self> {
        Self::new(&std::fs::read(chain)?, &std::fs::read(key)?)
    }

    /// Returns the configuration, changed to close connections without sending `close_notify`.
    #[must_use]
    pub fn without_close_notify(mut self) -> Self {
        self.close_notify = false;
        self
    }

    fn with(chain: &[u8], key: &[u8], roots: Option<&[u8]>) -> io::Result<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let chain = certificates(chain)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(io::Error::other)?;
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(rustls::ALL_VERSIONS)
            .map_err(io::Error::other)?;
        let builder = match roots {
            None => builder.with_no_client_auth(),
            Some(pem) => {
                let mut roots = RootCertStore::empty();
                roots.add_parsable_certificates(certificates(pem)?);
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(verifier.build().map_err(io::Error::other)?)
            }
        };
        let config = builder.with_single_cert(chain, key);
        Ok(Self {
            config: Arc::new(config.map_err(io::Error::other)?),
            close_notify: true,
        })
    }
}

fn certificates(pem: &[u8]) -> io::Result<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(io::Error::other)
}

/// A TLS connection from a client, with the readiness interface of a plain socket.
#[derive(Debug)]
pub(crate) struct TlsStream {
    tcp: TcpStream,
    state: Guarded<State>,
    close_notify: bool,
}

#[derive(Debug)]
struct State {
    session: ServerConnection,
    /// Number of decrypted bytes that have not been read yet.
    unread: usize,
}

struct Socket<'a>(&'a TcpStream);

impl Read for Socket<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(buffer)
    }
}

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl State {
    fn flush(&mut self, tcp: &TcpStream) -> io::Result<()> {
        while self.session.wants_write() {
            self.session.write_tls(&mut Socket(tcp))?;
        }
        Ok(())
    }

    /// Reads once from the socket and processes the TLS records received. Returns `false` if the
    /// connection has ended.
    fn receive(&mut self, tcp: &TcpStream) -> io::Result<bool> {
        if self.session.read_tls(&mut Socket(tcp))? == 0 {
            return Ok(false);
        }
        let processed = self.session.process_new_packets();
        // Send handshake messages, or the alert that reports the error, before returning it.
        let flushed = self.flush(tcp);
        match processed {
            Ok(state) => self.unread = state.plaintext_bytes_to_read(),
            Err(error) => return Err(io::Error::new(ErrorKind::InvalidData, error)),
        }
        match flushed {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
            Ok(()) | Err(_) => Ok(true),
        }
    }
}

impl TlsStream {
    /// Performs the server side of the TLS handshake and returns the encrypted connection.
    pub(crate) async fn accept(tcp: TcpStream, tls: &Tls) -> io::Result<Self> {
        let session = ServerConnection::new(Arc::clone(&tls.config)).map_err(io::Error::other)?;
        let stream = Self {
            tcp,
            state: Guarded::new(State { session, unread: 0 }),
            close_notify: tls.close_notify,
        };
        loop {
            let step = stream.with(|state| {
                if !state.session.is_handshaking() {
                    return Ok(None);
                }
                if state.session.wants_write() {
                    state.flush(&stream.tcp).map(|()| Some(true))
                } else {
                    state.receive(&stream.tcp).map(Some)
                }
            });
            match step {
                Ok(None) => return Ok(stream),
                Ok(Some(true)) => {}
                Ok(Some(false)) => return Err(ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if stream.with(|state| state.session.wants_write()) {
                        stream.tcp.writable().await?;
                    } else {
                        stream.tcp.readable().await?;
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock())
    }

    pub(crate) const fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    pub(crate) async fn readable(&self) -> io::Result<()> {
        loop {
            let (unread, unsent) = self.with(|state| (state.unread, state.session.wants_write()));
            if unread > 0 {
                return Ok(());
            }
            if !unsent {
                return self.tcp.readable().await;
            }
            tokio::select! {
                readable = self.tcp.readable() => return readable,
                writable = self.writable() => writable?,
            }
        }
    }

    /// Waits until the socket is writable and all buffered TLS records have been sent.
    pub(crate) async fn writable(&self) -> io::Result<()> {
        loop {
            self.tcp.writable().await?;
            match self.with(|state| state.flush(&self.tcp)) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                flushed => return flushed,
            }
        }
    }

    pub(crate) fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.with(|state| {
            loop {
                match state.session.reader().read(buffer) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Ok(n) => {
                        state.unread = state.unread.saturating_sub(n);
                        return Ok(n);
                    }
                    Err(error) => return Err(error),
                }
                if !state.receive(&self.tcp)? {
                    return Ok(0);
                }
            }
        })
    }

    pub(crate) fn try_read_buf(&self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        let mut piece = [0; 16 << 10];
        let n = self.try_read(&mut piece)?;
        buffer.extend_from_slice(piece.get(..n).unwrap_or_default());
        Ok(n)
    }

    pub(crate) fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.with(|state| {
            state.flush(&self.tcp)?;
            let n = state.session.writer().write(bytes)?;
            match state.flush(&self.tcp) {
                Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
                Ok(()) | Err(_) => Ok(n),
            }
        })
    }
}

impl Drop for TlsStream {
    fn drop(&mut self) {
        if self.close_notify {
            self.with(|state| {
                state.session.send_close_notify();
                // If the socket does not accept the alert now, it is not sent: drop cannot wait.
                let _ = state.flush(&self.tcp);
            });
        }
    }
}
