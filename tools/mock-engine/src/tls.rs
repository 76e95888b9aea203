//! An engine behind TLS: the same bytes, encrypted.
//!
//! Plain rustls around a plain socket; nothing of it is shared with ringside, whose mistakes it
//! would hide.

use std::io::{self, ErrorKind, Read, Write};
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use tokio::net::TcpStream;

use crate::sync::Guarded;

/// What an engine needs to speak TLS.
#[derive(Clone, Debug)]
pub struct Tls {
    config: Arc<ServerConfig>,
    /// Whether a close is announced; some servers do not.
    close_notify: bool,
}

impl Tls {
    /// A chain and its key, both PEM.
    ///
    /// # Errors
    ///
    /// What is wrong with them.
    pub fn new(chain: &[u8], key: &[u8]) -> io::Result<Self> {
        Self::with(chain, key, None)
    }

    /// As [`Tls::new`]; clients must show a certificate that leads to one of `roots` (PEM).
    ///
    /// # Errors
    ///
    /// What is wrong with them.
    pub fn with_clients_of(chain: &[u8], key: &[u8], roots: &[u8]) -> io::Result<Self> {
        Self::with(chain, key, Some(roots))
    }

    /// From files.
    ///
    /// # Errors
    ///
    /// What is wrong with them.
    pub fn from_files(chain: &Path, key: &Path) -> io::Result<Self> {
        Self::new(&std::fs::read(chain)?, &std::fs::read(key)?)
    }

    /// Closes without a word.
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

/// A client's connection behind TLS, as ready and unready as a socket.
#[derive(Debug)]
pub(crate) struct TlsStream {
    tcp: TcpStream,
    state: Guarded<State>,
    close_notify: bool,
}

#[derive(Debug)]
struct State {
    session: ServerConnection,
    /// Decrypted bytes that were not read.
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

    /// Receives once. `false`: the connection has ended.
    fn receive(&mut self, tcp: &TcpStream) -> io::Result<bool> {
        if self.session.read_tls(&mut Socket(tcp))? == 0 {
            return Ok(false);
        }
        let processed = self.session.process_new_packets();
        // The alert that says why, or what the handshake answers.
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
    /// Shakes hands.
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

    /// Sends what is kept, and waits until more may be.
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
                // What does not fit now is not worth a wait.
                let _ = state.flush(&self.tcp);
            });
        }
    }
}
