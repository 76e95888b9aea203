//! Request targets (RFC 9112 3.2): form, authority and path.

use memchr::memchr;

use super::method::Method;
use super::syntax::hex_value;

/// The form of a request target (RFC 9112 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetForm {
    /// Origin form: `/path?query`.
    Origin,
    /// Absolute form: `http://host/path?query`. Every server must accept it (RFC 9112 3.2.2).
    Absolute,
    /// Authority form: `host:port`, with CONNECT only.
    Authority,
    /// Asterisk form: `*`, with OPTIONS only.
    Asterisk,
}

/// Returns the form of `target`, or `None` if it has no form that is valid for `method`.
///
/// An absolute form is accepted only if the scheme is `http` or `https` and if it consists of a
/// host, an optional port and an optional path. User information is refused (RFC 9110 4.2.4). A
/// query without a path is refused because no slice of it is a target in origin form.
#[must_use]
pub fn target_form(method: Method, target: &[u8]) -> Option<TargetForm> {
    if method == Method::Connect {
        // Unlike in Host, the port is required here (RFC 9112 3.2.3).
        let has_port = target.contains(&b':') && target.last().is_some_and(u8::is_ascii_digit);
        let fits = has_port && has_host(target) && is_authority(target);
        return fits.then_some(TargetForm::Authority);
    }
    match target {
        b"*" => (method == Method::Options).then_some(TargetForm::Asterisk),
        [b'/', ..] => Some(TargetForm::Origin),
        _ => {
            let (authority, rest) = split_absolute(target)?;
            let fits = has_host(authority)
                && is_authority(authority)
                && (rest.is_empty() || rest[0] == b'/');
            fits.then_some(TargetForm::Absolute)
        }
    }
}

/// Returns the request target to send to an origin server.
///
/// For an origin form this is `target` itself, for an absolute form the part after the authority
/// (`/` if that part is empty), and `None` for all other forms.
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

/// Returns the authority of a target in absolute form, `None` for all other forms.
#[must_use]
pub fn authority_of(target: &[u8]) -> Option<&[u8]> {
    split_absolute(target).map(|(authority, _)| authority)
}

/// Returns the undecoded path of a target in origin form, which ends before the first `?`. The path
/// is empty for all other forms.
#[must_use]
pub fn path_of(target: &[u8]) -> &[u8] {
    if target.first() != Some(&b'/') {
        return &[];
    }
    &target[..memchr(b'?', target).unwrap_or(target.len())]
}

/// Returns whether the percent-decoded path of a target in origin form equals `path`.
///
/// Nothing but percent encoding is normalised: dot segments and repeated slashes are compared
/// literally. Returns `false` for all other forms, for malformed percent encoding and for an
/// encoded NUL.
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

/// Returns whether the percent-decoded path of a request target ends with `path`. A `%` without two
/// hexadecimal digits is a plain character, as it is for engines.
#[must_use]
pub fn path_ends_with(target: &[u8], path: &str) -> bool {
    let raw = path_of(target);
    if memchr(b'%', raw).is_none() {
        return raw.ends_with(path.as_bytes());
    }
    let mut decoded = Vec::with_capacity(raw.len());
    let mut rest = raw;
    while let [first, after @ ..] = rest {
        let byte = match rest {
            [b'%', high, low, ..] => hex_value(*high).zip(hex_value(*low)),
            _ => None,
        };
        let (byte, left) = match byte {
            Some((high, low)) => (high << 4 | low, &rest[3..]),
            None => (*first, after),
        };
        decoded.push(byte);
        rest = left;
    }
    decoded.ends_with(path.as_bytes())
}

/// Splits a target that begins with `http://` or `https://` into the authority and the rest, which
/// is empty or begins with `/` or `?`. Returns `None` for any other target.
fn split_absolute(target: &[u8]) -> Option<(&[u8], &[u8])> {
    let rest = strip_scheme(target, b"http://").or_else(|| strip_scheme(target, b"https://"))?;
    let end = rest.iter().position(|byte| matches!(byte, b'/' | b'?'));
    Some(rest.split_at(end.unwrap_or(rest.len())))
}

fn strip_scheme<'a>(target: &'a [u8], scheme: &[u8]) -> Option<&'a [u8]> {
    let (head, rest) = target.split_at_checked(scheme.len())?;
    head.eq_ignore_ascii_case(scheme).then_some(rest)
}

/// Returns whether the host of an authority is not empty, as RFC 9110 4.2.1 requires in a URI.
fn has_host(authority: &[u8]) -> bool {
    !matches!(authority, [] | [b':', ..])
}

/// Returns whether `bytes` is `host [":" port]` without user information (RFC 3986 3.2.2).
///
/// An empty host is accepted, because RFC 9112 3.2 requires clients to send an empty Host field if
/// the target URI has no authority.
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

/// Returns whether `byte` is allowed in an address literal of IPv6 or a later version. `%` starts a
/// zone identifier (RFC 6874).
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

/// Returns whether `byte` is allowed in a host name: an unreserved byte or a sub-delimiter (RFC
/// 3986 2.2, 2.3) other than the comma.
///
/// A comma is refused so that two Host fields that a gateway joined to a list are not accepted as
/// one host.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_depend_on_the_method() {
        let cases = [
            (Method::Get, "/", Some(TargetForm::Origin)),
            (Method::Get, "//a/b", Some(TargetForm::Origin)),
            (Method::Connect, "a:443", Some(TargetForm::Authority)),
            (Method::Connect, "[::1]:443", Some(TargetForm::Authority)),
            (Method::Connect, "", None),
            (Method::Connect, "*", None),
            (Method::Connect, "a1", None),
            (Method::Connect, "a:", None),
            (Method::Connect, ":443", None),
            (Method::Connect, "[::1]", None),
            (Method::Get, "http://:80/", None),
            (Method::Connect, "http://a/", None),
            (Method::Options, "*", Some(TargetForm::Asterisk)),
            (Method::Post, "*", None),
            (Method::Options, "**", None),
            (Method::Get, "http://a", Some(TargetForm::Absolute)),
            (Method::Get, "HTTPS://a:1/b?c", Some(TargetForm::Absolute)),
            (Method::Get, "http://a:x/", None),
            (Method::Get, "http://a@b/", None),
            (Method::Get, "http://", None),
            (Method::Get, "http:/a", None),
            (Method::Get, "ws://a/", None),
        ];
        for (method, target, want) in cases {
            assert_eq!(target_form(method, target.as_bytes()), want, "{target}");
        }
    }

    #[test]
    fn origin_form_and_authority_are_extracted() {
        let cases = [
            ("/a?b", Some("/a?b"), None),
            ("http://h/a?b", Some("/a?b"), Some("h")),
            ("http://h:1", Some("/"), Some("h:1")),
            ("http://h?b", None, Some("h")),
            ("*", None, None),
            ("h:1", None, None),
        ];
        for (target, origin, authority) in cases {
            let target = target.as_bytes();
            assert_eq!(origin_form(target), origin.map(str::as_bytes));
            assert_eq!(authority_of(target), authority.map(str::as_bytes));
        }
    }

    #[test]
    fn paths_are_percent_decoded_but_not_normalised() {
        let path = "/v1/chat/completions";
        for target in [
            "/v1/chat/completions",
            "/v1/chat/completions?",
            "/v1/chat/completions?stream=1?2",
            "/v1/chat/%63ompletions",
            "/v1%2fchat%2Fcompletions",
        ] {
            assert!(path_is(target.as_bytes(), path), "{target}");
        }
        for target in [
            "",
            "*",
            "/v1/chat/completion",
            "/v1/chat/completionss",
            "/v1/chat/completions/",
            "//v1/chat/completions",
            "/v1/./chat/completions",
            "/v1/chat/completions%",
            "/v1/chat/completions%3F",
            "/v1/chat/completion%7",
            "/v1/chat/%6zompletions",
            "/v1/chat/completions%00",
            "/V1/chat/completions",
            "http://a/v1/chat/completions",
        ] {
            assert!(!path_is(target.as_bytes(), path), "{target}");
        }
        assert!(!path_is(b"/%00", "/\0"));
        assert_eq!(path_of(b"/a/b?c"), b"/a/b");
        assert_eq!(path_of(b"http://a/b"), b"");
    }

    #[test]
    fn the_end_of_a_path_is_compared_as_engines_decode_it() {
        for (target, want) in [
            ("/v1/completions", true),
            ("/prefix/v1/completions", true),
            ("/prefix/v1/complet%69ons?x=1", true),
            ("/a%2Fv1%2fcompletions", true),
            ("/%zz%/v1/completions", true),
            ("/xv1/completions", false),
            ("/v1/completions/x", false),
            ("/prefix?/v1/completions", false),
            ("*", false),
        ] {
            let ends = path_ends_with(target.as_bytes(), "/v1/completions");
            assert_eq!(ends, want, "{target}");
        }
    }

    #[test]
    fn authorities() {
        for good in [
            "",
            "a",
            "a.b-c_d~1",
            "a:80",
            "a:",
            "127.0.0.1:65535",
            "[::1]",
            "[fe80::1%25eth0]:8",
            "%61b",
            "a!$&'()*+;=",
        ] {
            assert!(is_authority(good.as_bytes()), "{good}");
        }
        for bad in [
            "a b", "a,b", "a/b", "u@a", "a:80:80", "a:8x", "a:+8", "a:123456", "::1", "[::1", "[]",
            "[::1]8", "a]", "%6", "%zz", "a\"", "a\\b", "\u{e4}", "a?b", "a#b",
        ] {
            assert!(!is_authority(bad.as_bytes()), "{bad}");
        }
    }
}
