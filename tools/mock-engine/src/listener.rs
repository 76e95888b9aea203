//! Where an engine listens: a TCP port or a Unix socket.
//!
//! A socket's file is made anew when the one there is dead, and goes with the engine; a file that
//! somebody answers on, or that is no socket, is left alone.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::Interest;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use crate::tls::{Tls, TlsStream};

/// vLLM's listen backlog.
const BACKLOG: i32 = 2_048;
/// What stands for the rank's number in the path of a socket.
const RANK: &str = "{rank}";

/// Where an engine listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// An address; port 0 is any free one.
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
    /// The place of one of several ranks: so many ports above, or `{rank}` in the path replaced.
    ///
    /// # Errors
    ///
    /// A port above 65535; one path for several ranks.
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
                "one socket for several ranks; write {rank} into its path",
            )),
            Self::Unix(path) => Ok(Self::Unix(path.replace(RANK, &rank.to_string()))),
        }
    }

    /// The TCP address; of a Unix socket, port 0 of no address.
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

    /// The file of a Unix socket that has one.
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

    /// Removes the file of a socket that nobody listens on any more.
    fn remove_stale(&self) -> io::Result<()> {
        let Some(file) = self.file() else {
            return Ok(());
        };
        let Ok(metadata) = std::fs::symlink_metadata(file) else {
            return Ok(());
        };
        if !metadata.file_type().is_socket() {
            let text = format!("{} is there and no socket", file.display());
            return Err(io::Error::new(ErrorKind::AlreadyExists, text));
        }
        match self.socket()?.connect(&self.address()?) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                std::fs::remove_file(file)
            }
            // Somebody answers, or would: `bind` says so.
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

/// A bound socket that does not listen: connects to it are refused.
#[derive(Debug)]
pub(crate) struct Bound {
    socket: Socket,
    file: Option<SocketFile>,
}

impl Bound {
    pub(crate) fn at(place: &Place) -> io::Result<Self> {
        place.remove_stale()?;
        let socket = place.socket()?;
        if matches!(place, Place::Tcp(_)) {
            socket.set_reuse_address(true)?;
        }
        socket.bind(&place.address()?)?;
        let file = place.file().map(SocketFile::of).transpose()?;
        Ok(Self { socket, file })
    }

    /// Where it is bound: `place`, with the port that was found where it named none.
    pub(crate) fn place(&self, place: Place) -> io::Result<Place> {
        let found = self.socket.local_addr()?;
        Ok(found.as_socket().map_or(place, Place::Tcp))
    }

    /// Lets connects succeed. Needs no runtime yet.
    pub(crate) fn listen(&self) -> io::Result<()> {
        self.socket.listen(BACKLOG)
    }

    /// Accepts from now on; within a runtime.
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

/// The file of a bound socket, removed when it is dropped unless another has taken its place.
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
            // An error means that somebody was faster.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// The door of an engine.
#[derive(Debug)]
pub(crate) enum ListenerState {
    Open(Open),
    /// Bound to hold the place; `None` if even that failed.
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

impl ListenerState {
    pub(crate) fn shut(self, place: &Place) -> Self {
        match self {
            Self::Open(open) => {
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

/// The same call on either.
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

    /// Shakes hands first, where that is wanted.
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

    /// Sends small events at once.
    pub(crate) fn send_at_once(&self) {
        if let Self::Tcp(stream) = self {
            // Delayed events would spoil the timing, nothing else.
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
