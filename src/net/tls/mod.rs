//! TLS, implemented as a [`Conn`]: the modules that use `net` only see whether a connection is
//! encrypted.
//!
//! [`Wire`] is a connection with or without TLS, and [`Secure`] is an executor with such
//! connections. The handshake is part of the connect to an engine, and of the wait before the first
//! request of a client ([`Conn::poll_open`]). Its result is passed to the [`Report`] callback of
//! the [`Acceptor`] or [`Dialer`]. The control plane reads the certificate and key files and renews
//! certificates.

mod conn;
mod session;
mod setup;
mod state;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};

use super::{Address, Conn, Instant, Net, Opened, Timer};
pub use conn::Tls;
use session::Session;
pub use setup::{Certificate, SetupError, Trust, client_config, server_config};

/// The result of a handshake, or the reason why an open connection failed later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The handshake succeeded.
    Ok,
    /// A client sent plain-text HTTP instead of a TLS handshake.
    PlainText,
    /// The negotiation with ALPN failed: the peer does not support `http/1.1`.
    Protocol,
    /// Both sides have no TLS version, cipher suite, curve or signature scheme in common.
    Version,
    /// The peer's certificate is missing or failed verification (name, validity period, issuer).
    Certificate,
    /// The peer sent an alert that no other variant covers.
    Alert,
    /// The connection ended, or was abandoned, during the handshake.
    Unfinished,
    /// The peer sent bytes that violate the TLS protocol, or another error occurred.
    Broken,
}

impl Outcome {
    /// All values, in the order of [`Outcome::index`].
    pub const ALL: [Self; 8] = [
        Self::Ok,
        Self::PlainText,
        Self::Protocol,
        Self::Version,
        Self::Certificate,
        Self::Alert,
        Self::Unfinished,
        Self::Broken,
    ];

    /// Returns the position of this value in [`Outcome::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }

    /// Returns the label used in metrics and logs.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::PlainText => "plain_text",
            Self::Protocol => "protocol",
            Self::Version => "version",
            Self::Certificate => "certificate",
            Self::Alert => "alert",
            Self::Unfinished => "unfinished",
            Self::Broken => "broken",
        }
    }

    fn of(error: &rustls::Error) -> Self {
        use rustls::{AlertDescription, Error};
        match error {
            Error::NoApplicationProtocol
            | Error::AlertReceived(AlertDescription::NoApplicationProtocol) => Self::Protocol,
            Error::PeerIncompatible(_)
            | Error::AlertReceived(AlertDescription::ProtocolVersion) => Self::Version,
            Error::AlertReceived(_) => Self::Alert,
            Error::InvalidCertificate(_) | Error::NoCertificatesPresented => Self::Certificate,
            _ => Self::Broken,
        }
    }
}

/// An [`Outcome`] with details, as passed to [`Report`].
#[derive(Debug)]
pub struct End<'a> {
    /// The category of the result.
    pub outcome: Outcome,
    /// The exact error of the TLS session. `None` for [`Outcome::Ok`], [`Outcome::PlainText`] and
    /// [`Outcome::Unfinished`].
    pub error: Option<&'a rustls::Error>,
    /// The IP address and port of the peer, or `None` if the peer is connected over a Unix socket.
    pub peer: Option<SocketAddr>,
}

/// Callback that receives the result of a handshake, and the error if an open connection fails
/// later. It must neither block nor use the connection.
pub type Report = dyn Fn(&End<'_>);

/// Starts TLS, as the server, on connections accepted from clients.
#[derive(Clone)]
pub struct Acceptor {
    config: Arc<ServerConfig>,
    report: Rc<Report>,
}

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Acceptor").finish_non_exhaustive()
    }
}

impl Acceptor {
    /// Creates an acceptor for one shard.
    #[must_use]
    pub fn new(config: Arc<ServerConfig>, report: Rc<Report>) -> Self {
        Self { config, report }
    }

    /// Wraps an accepted connection in TLS. The first wait on it, usually [`Conn::poll_open`],
    /// performs the handshake.
    pub fn accept<C: Conn>(&self, conn: C) -> Wire<C> {
        let session = Session::server(Arc::clone(&self.config));
        Wire::Tls(Box::new(Tls::new(conn, session, Rc::clone(&self.report))))
    }
}

/// Starts TLS, as the client, on connections to engines of one role.
#[derive(Clone)]
pub struct Dialer {
    config: Arc<ClientConfig>,
    report: Rc<Report>,
}

impl std::fmt::Debug for Dialer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dialer").finish_non_exhaustive()
    }
}

impl Dialer {
    /// Creates a dialer for one shard, with a separate cache of resumable TLS sessions.
    #[must_use]
    pub fn new(config: &ClientConfig, report: Rc<Report>) -> Self {
        let mut config = config.clone();
        setup::remember_sessions(&mut config);
        Self {
            config: Arc::new(config),
            report,
        }
    }

    /// Wraps a connection to `host`, a name or an IP address, in TLS. The connect may still be in
    /// progress. The result becomes writable when the handshake has finished, and
    /// [`Conn::connected`] returns the handshake's result.
    pub fn dial<C: Conn>(&self, conn: C, host: &str) -> Wire<C> {
        let name = ServerName::try_from(host.to_owned());
        // A host that is not a valid server name cannot be in any certificate. It is replaced by
        // the unspecified address, which is in no certificate either, so verification fails.
        let name = name.unwrap_or_else(|_| IpAddr::V4(Ipv4Addr::UNSPECIFIED).into());
        let session = Session::client(Arc::clone(&self.config), name);
        Wire::Tls(Box::new(Tls::new(conn, session, Rc::clone(&self.report))))
    }
}

/// A connection with or without TLS.
#[derive(Debug)]
pub enum Wire<C: Conn> {
    /// A plain connection.
    Plain(C),
    /// A connection with TLS.
    Tls(Box<Tls<C>>),
}

/// Forwards a call to the connection inside a [`Wire`], with or without TLS.
macro_rules! either {
    ($wire:expr, $conn:ident => $call:expr) => {
        match $wire {
            Wire::Plain($conn) => $call,
            Wire::Tls($conn) => $call,
        }
    };
}

impl<C: Conn> Conn for Wire<C> {
    type Pipe = C::Pipe;

    fn poll_open(&self, cx: &mut Context<'_>) -> Poll<Opened> {
        match self {
            Self::Plain(_) => Poll::Ready(Opened::Ready),
            Self::Tls(conn) => conn.poll_open(cx),
        }
    }

    fn is_encrypted(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    fn uses_tls(&self) -> bool {
        either!(self, conn => conn.uses_tls())
    }

    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        either!(self, conn => conn.poll_readable(cx))
    }

    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<()> {
        either!(self, conn => conn.poll_writable(cx))
    }

    fn poll_hangup(&self, cx: &mut Context<'_>) -> Poll<()> {
        either!(self, conn => conn.poll_hangup(cx))
    }

    fn try_recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        either!(self, conn => conn.try_recv(buffer))
    }

    fn try_recv_append(&self, buffer: &mut Vec<u8>, bytes_max: usize) -> io::Result<usize> {
        either!(self, conn => conn.try_recv_append(buffer, bytes_max))
    }

    fn peek_ready(&self) -> bool {
        either!(self, conn => conn.peek_ready())
    }

    fn try_send(&self, bytes: &[u8]) -> io::Result<usize> {
        either!(self, conn => conn.try_send(bytes))
    }

    fn try_send_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        either!(self, conn => conn.try_send_vectored(slices))
    }

    fn try_fill(&self, pipe: &mut C::Pipe, bytes_max: usize) -> io::Result<usize> {
        either!(self, conn => conn.try_fill(pipe, bytes_max))
    }

    fn try_drain(&self, pipe: &mut C::Pipe) -> io::Result<usize> {
        either!(self, conn => conn.try_drain(pipe))
    }

    fn connected(&self) -> io::Result<()> {
        either!(self, conn => conn.connected())
    }

    fn finish(&self) {
        either!(self, conn => conn.finish());
    }

    fn abort(&self) {
        either!(self, conn => conn.abort());
    }

    fn reset_on_close(&self) {
        either!(self, conn => conn.reset_on_close());
    }

    fn close_cleanly(&self) {
        either!(self, conn => conn.close_cleanly());
    }

    fn peer(&self) -> Option<SocketAddr> {
        either!(self, conn => conn.peer())
    }
}

/// An executor whose connections may be encrypted. New connections are plain until they are passed
/// to a [`Dialer`] or an [`Acceptor`].
#[derive(Clone, Debug)]
pub struct Secure<N>(pub N);

impl<N: Net> Net for Secure<N> {
    type Conn = Wire<N::Conn>;

    const SPLICE_BYTES_MIN: u64 = N::SPLICE_BYTES_MIN;

    fn connect(&self, address: &Address) -> io::Result<Self::Conn> {
        self.0.connect(address).map(Wire::Plain)
    }

    fn pipe(&self) -> Option<<N::Conn as Conn>::Pipe> {
        self.0.pipe()
    }

    fn give_way(&self) -> impl Future<Output = ()> {
        self.0.give_way()
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.0.spawn(task);
    }

    fn spawn_vital(&self, task: impl Future<Output = ()> + 'static) {
        self.0.spawn_vital(task);
    }

    fn now(&self) -> Instant {
        self.0.now()
    }

    fn clock(&self) -> Instant {
        self.0.clock()
    }

    fn timer(&self) -> Timer {
        self.0.timer()
    }

    fn random(&self) -> u64 {
        self.0.random()
    }
}
