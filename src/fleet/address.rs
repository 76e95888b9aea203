//! Where an engine can be connected to without asking anybody: a TCP address or a Unix socket.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use super::TargetError;

/// Bytes of a socket's path, or of an abstract name behind its `@`: `sun_path` has 108, and one is
/// the NUL at the end of a path or at the start of a name (unix(7)).
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// What a connect needs to know. Clones are cheap.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Address {
    /// An IP address and a port.
    Tcp(SocketAddr),
    /// A stream socket of this machine.
    Unix(SocketPath),
}

impl Address {
    /// The IP address, where it has one.
    #[must_use]
    pub const fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(address) => Some(address.ip()),
            Self::Unix(_) => None,
        }
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
/// Only plain spellings are taken, so that two texts that differ are two sockets (but for links).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketPath(Arc<str>);

impl SocketPath {
    /// Reads an absolute path without empty, `.` and `..` parts, or `@` and a name.
    ///
    /// # Errors
    /// What is not one, is longer than the kernel takes, or has a blank or a control byte.
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

    /// The abstract name, where it is one.
    #[must_use]
    pub fn abstract_name(&self) -> Option<&str> {
        self.0.strip_prefix('@')
    }

    /// The path in the file system, where it is one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        (!self.0.starts_with('@')).then(|| Path::new(&*self.0))
    }

    /// The bytes of `sun_path`, without the NUL behind a path: an abstract name has its NUL first.
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
    fn plain_absolute_paths_and_abstract_names() {
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
    fn everything_else_is_refused() {
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
