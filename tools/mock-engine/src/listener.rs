//! Listen addresses, listeners and client connections, over TCP or Unix sockets.
//!
//! A stale socket file, on which nothing listens, is replaced, and the file is removed when the
//! engine stops. A file that is in use, or that is not a socket, is left alone.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, SockRef, Socket, Type};
use tokio::io::Interest;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::tls::{Tls, TlsStream};

/// Listen backlog in connections, the same as in vLLM.
const BACKLOG: i32 = 2_048;
/// Placeholder for the rank's number in the path of a socket.
const RANK: &str = "{rank}";

/// The listen address of an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A TCP address; port 0 selects any free port.
    Tcp(SocketAddr),
    /// The path of a socket, or `@name` for an abstract one.
    Unix(String),
}

impl From<SocketAddr> for Place {
    fn from(addr: SocketAddr) -> Self {
        Self::Tcp(addr)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => addr.fmt(f),
            Self::Unix(path) => write!(f, "unix:{path}"),
        }
    }
}

impl Place {
    /// Returns the listen address for `rank`, one of `ranks`: the port plus `rank` (port 0 is
    /// unchanged), or the path with `{rank}` replaced.
    ///
    /// # Errors
    ///
    /// Returns an error if the port would exceed 65535, or if several ranks would share one path.
    pub(crate) fn of_rank(&self, rank: u32, ranks: u32) -> io::Result<Self> {
        let wrong = |text| io::Error::new(ErrorKind::InvalidInput, text);
        match self {
            Self::Tcp(addr) if addr.port() == 0 => Ok(self.clone()),
            Self::Tcp(addr) => {
                let port = u16::try_from(u32::from(addr.port()) + rank);
                let port = port.map_err(|_| wrong("port above 65535"))?;
                Ok(Self::Tcp(SocketAddr::new(addr.ip(), port)))
            }
            Self::Unix(path) if ranks > 1 && !path.contains(RANK) => Err(wrong(
                "several ranks cannot share one socket; put {rank} into its path",
            )),
            Self::Unix(path) => Ok(Self::Unix(path.replace(RANK, &rank.to_string()))),
        }
    }

    /// Returns the TCP address, or `0.0.0.0:0` for a Unix socket.
    pub(crate) fn addr(&self) -> SocketAddr {
        match self {
            Self::Tcp(addr) => *addr,
            Self::Unix(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
        }
    }

    fn address(&self) -> io::Result<SockAddr> {
        match self {
            Self::Tcp(addr) => Ok((*addr).into()),
            Self::Unix(path) => {
                SockAddr::unix(path.replacen('@', "\0", usize::from(path.starts_with('@'))))
            }
        }
    }

    /// Returns the path of a Unix socket's file, or `None` for an abstract socket or a TCP address.
    fn file(&self) -> Option<&Path> {
        match self {
            Self::Unix(path) if !path.starts_with('@') => Some(Path::new(path)),
            Self::Unix(_) | Self::Tcp(_) => None,
        }
    }

    fn socket(&self) -> io::Result<Socket> {
        let domain = match self {
            Self::Tcp(addr) => Domain::for_address(*addr),
            Self::Unix(_) => Domain::UNIX,
        };
        let socket = Socket::new(domain, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    }

    /// Removes an existing socket file on which nothing listens. A file that is not a socket is an
    /// error.
    fn remove_stale_file(&self) -> io::Result<()> {
        let Some(file) = self.file() else {
            return Ok(());
        };
        let Ok(metadata) = std::fs::symlink_metadata(file) else {
            return Ok(());
        };
        if !metadata.file_type().is_socket() {
            let text = format!("{} exists and is not a socket", file.display());
            return Err(io::Error::new(ErrorKind::AlreadyExists, text));
        }
        match self.socket()?.connect(&self.address()?) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                std::fs::remove_file(file)
            }
            // Another process listens, or the state is unclear: `bind` reports the error.
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

/// A bound socket that is not listening yet, so connects to it are refused.
#[derive(Debug)]
pub(crate) struct Bound {
    socket: Socket,
    file: Option<SocketFile>,
}

impl Bound {
    pub(crate) fn at(place: &Place) -> io::Result<Self> {
        place.remove_stale_file()?;
        let socket = place.socket()?;
        if matches!(place, Place::Tcp(_)) {
            socket.set_reuse_address(true)?;
        }
        socket.bind(&place.address()?)?;
        let file = place.file().map(SocketFile::of).transpose()?;
        Ok(Self { socket, file })
    }

    /// Returns the address that the socket is bound to: `place`, with the port that the kernel
    /// chose if `place` has port 0.
    pub(crate) fn place(&self, place: Place) -> io::Result<Place> {
        let found = self.socket.local_addr()?;
        Ok(found.as_socket().map_or(place, Place::Tcp))
    }

    /// Starts listening, so that connects succeed. Does not need a runtime.
    pub(crate) fn listen(&self) -> io::Result<()> {
        self.socket.listen(BACKLOG)
    }

    /// Turns the socket into a listener. Must be called within a runtime.
    fn open(self) -> io::Result<Open> {
        self.listen()?;
        let is_unix = self.socket.domain()? == Domain::UNIX;
        let listener = if is_unix {
            Listener::Unix(UnixListener::from_std(self.socket.into())?)
        } else {
            Listener::Tcp(TcpListener::from_std(self.socket.into())?)
        };
        Ok(Open {
            listener,
            _file: self.file,
        })
    }
}

/// The file of a bound socket, removed on drop unless another file has replaced it.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            identity: identity(path)?,
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            // An error means that the file has been removed in the meantime.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// The state of an engine's listener.
#[derive(Debug)]
pub(crate) enum ListenerState {
    Open(Open),
    /// Connects are refused. The socket is bound but not listening, which reserves the address;
    /// `None` if binding or listening failed.
    Shut(Option<Bound>),
}

#[derive(Debug)]
pub(crate) struct Open {
    listener: Listener,
    _file: Option<SocketFile>,
}

#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Open {
    pub(crate) async fn accept(&self) -> io::Result<Stream> {
        Ok(match &self.listener {
            Listener::Tcp(listener) => Stream::Tcp(listener.accept().await?.0),
            Listener::Unix(listener) => Stream::Unix(listener.accept().await?.0),
        })
    }
}

impl Open {
    /// Stops listening. Closing does not do that while another process has a copy of the
    /// descriptor, which a child that has not executed its program yet has for a moment: connects
    /// would succeed and be reset afterwards.
    fn stop_listening(&self) {
        let socket = match &self.listener {
            Listener::Tcp(listener) => SockRef::from(listener),
            Listener::Unix(listener) => SockRef::from(listener),
        };
        // It fails only if the socket does not listen.
        let _ = socket.shutdown(Shutdown::Both);
    }
}

impl ListenerState {
    pub(crate) fn shut(self, place: &Place) -> Self {
        match self {
            Self::Open(open) => {
                open.stop_listening();
                drop(open);
                Self::Shut(Bound::at(place).ok())
            }
            Self::Shut(bound) => Self::Shut(bound),
        }
    }

    pub(crate) fn open(self, place: &Place) -> Self {
        let bound = match self {
            Self::Open(open) => return Self::Open(open),
            Self::Shut(bound) => bound.or_else(|| Bound::at(place).ok()),
        };
        let opened = bound.and_then(|bound| bound.open().ok());
        opened.map_or(Self::Shut(None), Self::Open)
    }
}

/// A client's connection.
#[derive(Debug)]
pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<TlsStream>),
}

/// Makes the same call on the inner stream of any variant.
macro_rules! either {
    ($stream:expr, $inner:ident => $call:expr) => {
        match $stream {
            Stream::Tcp($inner) => $call,
            Stream::Unix($inner) => $call,
            Stream::Tls($inner) => $call,
        }
    };
}

impl Stream {
    pub(crate) async fn readable(&self) -> io::Result<()> {
        either!(self, stream => stream.readable().await)
    }

    pub(crate) async fn writable(&self) -> io::Result<()> {
        either!(self, stream => stream.writable().await)
    }

    pub(crate) async fn ready(&self, interest: Interest) -> io::Result<tokio::io::Ready> {
        match self {
            Self::Tcp(stream) => stream.ready(interest).await,
            Self::Unix(stream) => stream.ready(interest).await,
            Self::Tls(stream) => stream.tcp().ready(interest).await,
        }
    }

    /// Performs the TLS handshake on a TCP stream if `tls` is given; returns any other stream
    /// unchanged.
    pub(crate) async fn secured(self, tls: Option<&Tls>) -> io::Result<Self> {
        match (self, tls) {
            (Self::Tcp(tcp), Some(tls)) => {
                let stream = TlsStream::accept(tcp, tls).await?;
                Ok(Self::Tls(Box::new(stream)))
            }
            (stream, _) => Ok(stream),
        }
    }

    pub(crate) fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        either!(self, stream => stream.try_read(buffer))
    }

    pub(crate) fn try_read_buf(&self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        either!(self, stream => stream.try_read_buf(buffer))
    }

    pub(crate) fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        either!(self, stream => stream.try_write(bytes))
    }

    /// Sets `TCP_NODELAY`, so that small events are sent immediately.
    pub(crate) fn set_nodelay(&self) {
        if let Self::Tcp(stream) = self {
            // If this fails, events are delayed, which affects the timing only.
            let _ = stream.set_nodelay(true);
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
            Self::Tls(stream) => stream.tcp().as_fd(),
        }
    }
}
