//! Request targets (RFC 9112 3.2): their forms, their path.

use memchr::memchr;

use super::head::Method;
use super::syntax::hex_value;

/// The form of a request target (RFC 9112 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetForm {
    /// `/path?query`
    Origin,
    /// `http://host/path?query`; every server must accept it (RFC 9112 3.2.2).
    Absolute,
    /// `host:port`, with CONNECT only.
    Authority,
    /// `*`, with OPTIONS only.
    Asterisk,
}

/// The form of `target`, or none when it has no form that goes with `method`.
///
/// Of absolute forms only `http` and `https` with a host and a path (or nothing) behind it are
/// taken: user information is refused (RFC 9110 4.2.4), and a query without a path has no origin
/// form that could be cut out of it.
#[must_use]
pub fn target_form(method: Method, target: &[u8]) -> Option<TargetForm> {
    if method == Method::Connect {
        return (is_authority(target) && !target.is_empty()).then_some(TargetForm::Authority);
    }
    match target {
        b"*" => (method == Method::Options).then_some(TargetForm::Asterisk),
        [b'/', ..] => Some(TargetForm::Origin),
        _ => {
            let (authority, rest) = split_absolute(target)?;
            let fits = !authority.is_empty()
                && is_authority(authority)
                && (rest.is_empty() || rest[0] == b'/');
            fits.then_some(TargetForm::Absolute)
        }
    }
}

/// What an origin server is to be asked for: `target` itself in origin form, the part behind the
/// authority of an absolute form (`/` when that is empty), none for the other forms.
#[must_use]
pub fn origin_form(target: &[u8]) -> Option<&[u8]> {
    if target.first() == Some(&b'/') {
        return Some(target);
    }
    match split_absolute(target)?.1 {
        [] => Some(b"/"),
        rest => (rest[0] == b'/').then_some(rest),
    }
}

/// The authority of a target in absolute form, none for the other forms.
#[must_use]
pub fn authority_of(target: &[u8]) -> Option<&[u8]> {
    split_absolute(target).map(|(authority, _)| authority)
}

/// The raw path of a target in origin form: what stands before `?`. Empty for the other forms.
#[must_use]
pub fn path_of(target: &[u8]) -> &[u8] {
    if target.first() != Some(&b'/') {
        return &[];
    }
    &target[..memchr(b'?', target).unwrap_or(target.len())]
}

/// Whether the path of an origin-form target is `path` after percent decoding, and nothing else:
/// dot segments and repeated slashes stay what they are. False for other forms, for a malformed
/// percent encoding and for an encoded NUL.
#[must_use]
pub fn path_is(target: &[u8], path: &str) -> bool {
    let mut raw = path_of(target);
    for &want in path.as_bytes() {
        let (byte, rest) = match raw {
            [b'%', high, low, rest @ ..] => match (hex_value(*high), hex_value(*low)) {
                (Some(high), Some(low)) => (high << 4 | low, rest),
                _ => return false,
            },
            [b'%', ..] | [] => return false,
            [byte, rest @ ..] => (*byte, rest),
        };
        if byte != want || byte == 0 {
            return false;
        }
        raw = rest;
    }
    raw.is_empty() && !path.is_empty()
}

/// The authority and what follows it, when `target` begins with `http://` or `https://`.
fn split_absolute(target: &[u8]) -> Option<(&[u8], &[u8])> {
    let rest = strip_scheme(target, b"http://").or_else(|| strip_scheme(target, b"https://"))?;
    let end = rest.iter().position(|byte| matches!(byte, b'/' | b'?'));
    Some(rest.split_at(end.unwrap_or(rest.len())))
}

fn strip_scheme<'a>(target: &'a [u8], scheme: &[u8]) -> Option<&'a [u8]> {
    let (head, rest) = target.split_at_checked(scheme.len())?;
    head.eq_ignore_ascii_case(scheme).then_some(rest)
}

/// Whether `bytes` is `host [":" port]` without user information (RFC 3986 3.2.2). The empty host
/// is one: RFC 9112 3.2 has clients send it where the target has no authority.
pub(super) fn is_authority(bytes: &[u8]) -> bool {
    let (host_fits, port) = match bytes {
        [b'[', rest @ ..] => {
            let Some(end) = memchr(b']', rest) else {
                return false;
            };
            (
                end > 0 && rest[..end].iter().all(is_literal_byte),
                &rest[end + 1..],
            )
        }
        _ => {
            let end = memchr(b':', bytes).unwrap_or(bytes.len());
            (is_registered_name(&bytes[..end]), &bytes[end..])
        }
    };
    let port_fits = match port {
        [] => true,
        [b':', digits @ ..] => digits.len() <= 5 && digits.iter().all(u8::is_ascii_digit),
        _ => false,
    };
    host_fits && port_fits
}

/// IPv6 and later address literals; `%` begins a zone (RFC 6874).
const fn is_literal_byte(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b':' | b'.' | b'%' | b'-' | b'_' | b'~')
}

fn is_registered_name(mut host: &[u8]) -> bool {
    loop {
        host = match host {
            [] => return true,
            [b'%', high, low, rest @ ..] if hex_value(*high).and(hex_value(*low)).is_some() => rest,
            [byte, rest @ ..] if is_name_byte(*byte) => rest,
            _ => return false,
        };
    }
}

/// Unreserved bytes and sub-delimiters (RFC 3986 2.2, 2.3), less the comma: a list of two hosts
/// joined by a gateway must not pass for one.
const fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(
            byte,
            b'-' | b'.'
                | b'_'
                | b'~'
                | b'!'
                | b'$'
                | b'&'
                | b'\''
                | b'('
                | b')'
                | b'*'
                | b'+'
                | b';'
                | b'='
        )
}
