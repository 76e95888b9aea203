//! Addresses that can be connected to without name resolution: TCP addresses and Unix sockets.

use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use super::TargetError;

/// Longest socket path, or abstract name without its `@`, in bytes. `sun_path` has 108 bytes, one
/// of which is the NUL at the end of a path or at the start of an abstract name (unix(7)).
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// An address to connect to. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Address {
    /// An IP address and a port.
    Tcp(SocketAddr),
    /// A Unix stream socket on this machine.
    Unix(SocketPath),
}

impl Address {
    /// Returns the IP address and the port, or `None` for a Unix socket.
    #[must_use]
    pub const fn tcp(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(address) => Some(*address),
            Self::Unix(_) => None,
        }
    }
}

impl Address {
    /// Returns these addresses with another port.
    pub(crate) fn all_at(addresses: &[SocketAddr], port: u16) -> Vec<Self> {
        let at = |address: &SocketAddr| {
            let mut address = *address;
            address.set_port(port);
            Self::Tcp(address)
        };
        addresses.iter().map(at).collect()
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{path}"),
        }
    }
}

/// The path of a Unix socket, or an abstract name written `@name`.
///
/// Only normalised paths are accepted, so two different texts are two different sockets (except for
/// symbolic and hard links).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketPath(Arc<str>);

impl SocketPath {
    /// Parses an absolute path without empty, `.` or `..` components, or `@` followed by a name.
    ///
    /// # Errors
    /// Returns an error if `text` is neither of these, is longer than [`SOCKET_PATH_BYTES_MAX`], or
    /// contains white space or a control character.
    pub fn parse(text: &str) -> Result<Self, TargetError> {
        if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(TargetError::Blank);
        }
        if let Some(name) = text.strip_prefix('@') {
            return match name.len() {
                0 => Err(TargetError::SocketMissing),
                1..=SOCKET_PATH_BYTES_MAX => Ok(Self(text.into())),
                _ => Err(TargetError::SocketTooLong),
            };
        }
        let parts = match text.strip_prefix('/') {
            Some(parts) => parts,
            None if text.is_empty() => return Err(TargetError::SocketMissing),
            None => return Err(TargetError::SocketRelative),
        };
        if text.len() > SOCKET_PATH_BYTES_MAX {
            return Err(TargetError::SocketTooLong);
        }
        if parts.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(TargetError::SocketParts);
        }
        Ok(Self(text.into()))
    }

    /// Returns the abstract name without its `@`, or `None` for a path.
    #[must_use]
    pub fn abstract_name(&self) -> Option<&str> {
        self.0.strip_prefix('@')
    }

    /// Returns the path in the file system, or `None` for an abstract name.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        (!self.0.starts_with('@')).then(|| Path::new(&*self.0))
    }

    /// Returns the bytes for the member `sun_path` of `sockaddr_un` (unix(7)): a path without its
    /// terminating NUL, or an abstract name with its leading NUL.
    #[must_use]
    pub fn sun_path(&self) -> Vec<u8> {
        match self.abstract_name() {
            Some(name) => [b"\0", name.as_bytes()].concat(),
            None => self.0.as_bytes().to_vec(),
        }
    }
}

impl fmt::Display for SocketPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_absolute_paths_and_abstract_names() {
        let longest = format!("/{}", "x".repeat(SOCKET_PATH_BYTES_MAX - 1));
        let longest_name = format!("@{}", "x".repeat(SOCKET_PATH_BYTES_MAX));
        for text in ["/run/vllm.sock", "/a", "/run/é", &longest, &longest_name] {
            let socket = SocketPath::parse(text).unwrap();
            assert_eq!(socket.to_string(), text);
            assert_eq!(Address::Unix(socket).to_string(), format!("unix:{text}"));
        }
        let path = SocketPath::parse("/run/vllm.sock").unwrap();
        assert_eq!(path.path(), Some(Path::new("/run/vllm.sock")));
        assert_eq!(path.abstract_name(), None);
        assert_eq!(path.sun_path(), b"/run/vllm.sock");
        let name = SocketPath::parse("@engine/0").unwrap();
        assert_eq!(
            (name.path(), name.abstract_name()),
            (None, Some("engine/0"))
        );
        assert_eq!(name.sun_path(), b"\0engine/0");
    }

    #[test]
    fn refuses_everything_else() {
        use TargetError as E;
        let long = format!("/{}", "x".repeat(SOCKET_PATH_BYTES_MAX));
        // 60 characters, 120 bytes.
        let wide = format!("/{}", "é".repeat(60));
        let long_name = format!("@{}", "x".repeat(SOCKET_PATH_BYTES_MAX + 1));
        let cases = [
            ("", E::SocketMissing),
            ("@", E::SocketMissing),
            ("vllm.sock", E::SocketRelative),
            ("./vllm.sock", E::SocketRelative),
            ("unix:/run/vllm.sock", E::SocketRelative),
            ("/", E::SocketParts),
            ("/run/", E::SocketParts),
            ("//run/vllm.sock", E::SocketParts),
            ("/run//vllm.sock", E::SocketParts),
            ("/run/./vllm.sock", E::SocketParts),
            ("/run/../vllm.sock", E::SocketParts),
            ("/run/..", E::SocketParts),
            ("/run/vllm sock", E::Blank),
            ("/run/vllm\0", E::Blank),
            ("/run/vllm\n", E::Blank),
            ("/run/vllm\u{85}", E::Blank),
            ("@a b", E::Blank),
            (&long, E::SocketTooLong),
            (&wide, E::SocketTooLong),
            (&long_name, E::SocketTooLong),
        ];
        for (text, want) in cases {
            assert_eq!(SocketPath::parse(text), Err(want), "{text:?}");
        }
    }
}
