//! TLS behind the seam: nothing above `net` knows more of it than that a connection is encrypted.
//!
//! [`Wire`] is a connection with or without it, [`Secure`] the engine whose connections are such.
//! A handshake is part of a connect, or of what is waited for before a first request
//! ([`Conn::poll_open`]); how it ended is told to whoever made the [`Acceptor`] or [`Dialer`].
//! Files, certificates and their renewal are the control plane's.

mod conn;
mod session;
mod setup;
mod state;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};

use super::{Address, Conn, Instant, Net, Timer};
pub use conn::Tls;
use session::Session;
pub use setup::{Certificate, SetupError, Trust, client_config, server_config};

/// What became of waiting for a connection to open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    /// It carries bytes.
    Ready,
    /// The peer speaks plain text where TLS is spoken. It can be answered in plain text.
    PlainText,
    /// It is of no use.
    Failed,
}

/// How a handshake ended, or what ended a connection against the rules later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Well.
    Ok,
    /// The peer speaks plain text.
    PlainText,
    /// The peer does not speak `http/1.1` (it offered other protocols only).
    Protocol,
    /// No version, cipher suite, curve or kind of signature in common.
    Version,
    /// The peer's certificate is missing, or not valid for its name, now, here.
    Certificate,
    /// The peer refused with an alert.
    Alert,
    /// The connection ended, or was given up, in the middle.
    Unfinished,
    /// Bytes that break TLS.
    Broken,
}

impl Outcome {
    /// Every value, in the order of `index`.
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

    /// Position in `ALL`.
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The label in metrics and logs.
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

/// How a handshake ended.
#[derive(Debug)]
pub struct End<'a> {
    /// In which of the known ways.
    pub outcome: Outcome,
    /// What exactly was wrong, where the session knows.
    pub error: Option<&'a rustls::Error>,
    /// The peer's address, where it has one.
    pub peer_ip: Option<IpAddr>,
}

/// Told how handshakes ended; must not wait, nor touch the connection.
pub type Report = dyn Fn(&End<'_>);

/// Begins TLS on accepted connections.
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
    /// An acceptor of one shard.
    #[must_use]
    pub fn new(config: Arc<ServerConfig>, report: Rc<Report>) -> Self {
        Self { config, report }
    }

    /// Puts TLS on a connection.
    pub fn accept<C: Conn>(&self, conn: C) -> Wire<C> {
        let session = Session::server(Arc::clone(&self.config));
        Wire::Tls(Box::new(Tls::new(conn, session, Rc::clone(&self.report))))
    }
}

/// Begins TLS on connections to one kind of engine.
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
    /// A dialer of one shard. It remembers sessions of its own to resume.
    #[must_use]
    pub fn new(config: &ClientConfig, report: Rc<Report>) -> Self {
        let mut config = config.clone();
        setup::remember_sessions(&mut config);
        Self {
            config: Arc::new(config),
            report,
        }
    }

    /// Puts TLS on a connection that is being made to `host`, a name or an address. It becomes
    /// writable when the handshake has ended, and [`Conn::connected`] says how.
    pub fn dial<C: Conn>(&self, conn: C, host: &str) -> Wire<C> {
        let name = ServerName::try_from(host.to_owned());
        // A name that can be in no certificate is asked for as an address that is in none.
        let name = name.unwrap_or_else(|_| IpAddr::V4(Ipv4Addr::UNSPECIFIED).into());
        let session = Session::client(Arc::clone(&self.config), name);
        Wire::Tls(Box::new(Tls::new(conn, session, Rc::clone(&self.report))))
    }
}

/// A connection with or without TLS.
#[derive(Debug)]
pub enum Wire<C: Conn> {
    /// Without.
    Plain(C),
    /// With.
    Tls(Box<Tls<C>>),
}

/// The same call on either.
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

    fn clear_readable(&self) {
        either!(self, conn => conn.clear_readable());
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

    fn peer_ip(&self) -> Option<IpAddr> {
        either!(self, conn => conn.peer_ip())
    }
}

/// An engine whose connections may be encrypted. New ones are plain until a [`Dialer`] or an
/// [`Acceptor`] has had them.
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

    fn yield_now(&self) -> impl Future<Output = ()> {
        self.0.yield_now()
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
