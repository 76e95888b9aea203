//! Forms in `multipart/form-data` (RFC 7578), as far as it takes to find a part by its name.
//!
//! What this module refuses, some parser reads otherwise than another: encoded names, repeated
//! parameters, folded lines. A form of a browser or an HTTP library has none of these.

use memchr::memmem;

use super::syntax::is_token;

/// Maximum length of a boundary in bytes (RFC 2046 5.1.1).
const BOUNDARY_BYTES_MAX: usize = 70;

/// Reason why a form cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormError {
    /// The Content-Type has no boundary, more than one, or one that is not valid.
    Boundary,
    /// The Content-Type states a character set other than UTF-8.
    Charset,
    /// The body does not begin with the boundary.
    Start,
    /// A boundary is neither followed by a line break nor by two hyphens.
    AfterBoundary,
    /// The header of a part is not valid, or larger than the limit.
    PartHead,
    /// The name of a part is missing, repeated or encoded.
    PartName,
    /// A value that must be read is larger than the limit.
    ValueTooLarge,
    /// The body ends before the last boundary.
    Incomplete,
}

impl FormError {
    /// Returns a description for the client.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Boundary => "the Content-Type must have one valid boundary",
            Self::Charset => "the charset must be utf-8",
            Self::Start => "the body must begin with the boundary",
            Self::AfterBoundary => "a boundary must be followed by a line break or two hyphens",
            Self::PartHead => "the header of a part is not valid",
            Self::PartName => "each part must have one plain name",
            Self::ValueTooLarge => "vllm_xargs is too large",
            Self::Incomplete => "the last boundary is missing",
        }
    }
}

/// Returns whether a Content-Type is `multipart/form-data`.
#[must_use]
pub fn is_form(content_type: &[u8]) -> bool {
    let kind = content_type.split(|&byte| byte == b';').next();
    kind.unwrap_or_default()
        .trim_ascii()
        .eq_ignore_ascii_case(b"multipart/form-data")
}

/// Returns the boundary of a form from its Content-Type.
///
/// # Errors
/// [`FormError::Boundary`] or [`FormError::Charset`].
pub fn boundary(content_type: &[u8]) -> Result<&[u8], FormError> {
    let mut boundary = None;
    for (name, value) in params(content_type).ok_or(FormError::Boundary)? {
        if name.eq_ignore_ascii_case(b"boundary") {
            let is_valid = (1..=BOUNDARY_BYTES_MAX).contains(&value.len())
                && value.iter().all(|&byte| is_boundary_byte(byte));
            if boundary.is_some() || !is_valid {
                return Err(FormError::Boundary);
            }
            boundary = Some(value);
        } else if name.eq_ignore_ascii_case(b"charset") {
            if !value.eq_ignore_ascii_case(b"utf-8") {
                return Err(FormError::Charset);
            }
        } else if is_encoded(name) {
            return Err(FormError::Boundary);
        }
    }
    boundary.ok_or(FormError::Boundary)
}

/// Returns the name of a part from its header, the lines up to and including the empty one.
///
/// # Errors
/// [`FormError::PartHead`] or [`FormError::PartName`].
pub fn part_name(head: &[u8]) -> Result<&[u8], FormError> {
    let lines = head.strip_suffix(b"\r\n\r\n").ok_or(FormError::PartHead)?;
    let mut disposition = None;
    let mut rest = Some(lines);
    while let Some(lines) = rest {
        let (line, after) = match memmem::find(lines, b"\r\n") {
            Some(at) => (&lines[..at], Some(&lines[at + 2..])),
            None => (lines, None),
        };
        rest = after;
        let colon = line.iter().position(|&byte| byte == b':');
        let (name, value) = line.split_at(colon.ok_or(FormError::PartHead)?);
        let is_plain = |&byte: &u8| byte == b'\t' || byte >= b' ' && byte != 0x7f;
        if !is_token(name) || !value.iter().all(is_plain) {
            return Err(FormError::PartHead);
        }
        if name.eq_ignore_ascii_case(b"content-disposition")
            && disposition.replace(&value[1..]).is_some()
        {
            return Err(FormError::PartName);
        }
    }
    let disposition = disposition.ok_or(FormError::PartName)?;
    let mut found = None;
    for (name, value) in params(disposition).ok_or(FormError::PartName)? {
        if name.eq_ignore_ascii_case(b"name") {
            // Parsers differ in what a backslash means.
            if value.contains(&b'\\') || found.replace(value).is_some() {
                return Err(FormError::PartName);
            }
        } else if is_encoded(name) && !name.eq_ignore_ascii_case(b"filename*") {
            return Err(FormError::PartName);
        }
    }
    found.ok_or(FormError::PartName)
}

/// Returns whether a parameter has an encoded or continued value (RFC 2231).
fn is_encoded(name: &[u8]) -> bool {
    name.contains(&b'*')
}

const fn is_boundary_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(
            byte,
            b'\'' | b'(' | b')' | b'+' | b'_' | b',' | b'-' | b'.' | b'/' | b':' | b'=' | b'?'
        )
}

/// Returns the parameters of a field value, each as its name and its value without quotes. Returns
/// `None` if they are not valid. An escaped quote does not end a value, and stays escaped.
fn params(value: &[u8]) -> Option<Vec<(&[u8], &[u8])>> {
    let mut found = Vec::new();
    let mut rest = match value.iter().position(|&byte| byte == b';') {
        Some(at) => &value[at + 1..],
        None => return Some(found),
    };
    loop {
        rest = rest.trim_ascii();
        if rest.is_empty() {
            return Some(found);
        }
        let equals = rest.iter().position(|&byte| byte == b'=')?;
        let name = rest[..equals].trim_ascii();
        if !is_token(name) {
            return None;
        }
        rest = rest[equals + 1..].trim_ascii();
        let (value, after) = match rest.strip_prefix(b"\"") {
            Some(quoted) => {
                let end = quote(quoted)?;
                (&quoted[..end], quoted[end + 1..].trim_ascii())
            }
            None => {
                let end = rest.iter().position(|&byte| byte == b';');
                let (value, after) = rest.split_at(end.unwrap_or(rest.len()));
                let value = value.trim_ascii();
                if value.contains(&b'"') {
                    return None;
                }
                (value, after)
            }
        };
        found.push((name, value));
        rest = match after {
            [] => return Some(found),
            [b';', after @ ..] => after,
            _ => return None,
        };
    }
}

/// Returns the position of the quote that ends a quoted text.
fn quote(text: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        match text.get(at)? {
            b'"' => return Some(at),
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_form_has_one_boundary() {
        for (text, want) in [
            ("multipart/form-data; boundary=abc", Ok("abc")),
            (
                "Multipart/Form-Data ;Boundary=\"a'b:c\" ; charset=UTF-8",
                Ok("a'b:c"),
            ),
            (
                "multipart/form-data; boundary=----WebKitFormBoundary7MA4",
                Ok("----WebKitFormBoundary7MA4"),
            ),
            ("multipart/form-data", Err(FormError::Boundary)),
            ("multipart/form-data; boundary=", Err(FormError::Boundary)),
            (
                "multipart/form-data; boundary=a; boundary=b",
                Err(FormError::Boundary),
            ),
            (
                "multipart/form-data; boundary*=utf-8''a",
                Err(FormError::Boundary),
            ),
            (
                "multipart/form-data; boundary=\"a b\"",
                Err(FormError::Boundary),
            ),
            (
                "multipart/form-data; boundary=\"a",
                Err(FormError::Boundary),
            ),
            (
                "multipart/form-data; boundary=a\"b\"",
                Err(FormError::Boundary),
            ),
            (
                "multipart/form-data; boundary=\"a\"b",
                Err(FormError::Boundary),
            ),
            ("multipart/form-data; boundary", Err(FormError::Boundary)),
            (
                "multipart/form-data; boundary=a; charset=utf-7",
                Err(FormError::Charset),
            ),
            (
                "multipart/form-data; boundary=a; charset*=utf-7",
                Err(FormError::Boundary),
            ),
        ] {
            assert!(is_form(text.as_bytes()), "{text}");
            assert_eq!(boundary(text.as_bytes()), want.map(str::as_bytes), "{text}");
        }
        let long = format!("multipart/form-data; boundary={}", "a".repeat(71));
        assert_eq!(boundary(long.as_bytes()), Err(FormError::Boundary));
        for other in ["multipart/mixed; boundary=a", "application/json", ""] {
            assert!(!is_form(other.as_bytes()), "{other}");
        }
    }

    #[test]
    fn a_part_has_one_plain_name() {
        for (head, want) in [
            (
                "Content-Disposition: form-data; name=\"model\"",
                Ok("model"),
            ),
            (
                "content-type: a/b\r\ncontent-disposition:form-data;name=a",
                Ok("a"),
            ),
            (
                "Content-Disposition: form-data; name=\"file\"; filename=\"a;name=b \\\"c\"",
                Ok("file"),
            ),
            (
                "Content-Disposition: form-data; filename*=utf-8''x; name=f",
                Ok("f"),
            ),
            ("Content-Disposition: form-data", Err(FormError::PartName)),
            (
                "Content-Disposition: form-data; name=a; name=b",
                Err(FormError::PartName),
            ),
            (
                "Content-Disposition: form-data; name=a; Name=b",
                Err(FormError::PartName),
            ),
            (
                "Content-Disposition: form-data; name=a; name*=utf-8''b",
                Err(FormError::PartName),
            ),
            (
                "Content-Disposition: form-data; name*0=a; name*1=b",
                Err(FormError::PartName),
            ),
            (
                "Content-Disposition: form-data; name=\"a\\b\"",
                Err(FormError::PartName),
            ),
            (
                "Content-Disposition: form-data; name=a\r\nContent-Disposition: form-data; name=b",
                Err(FormError::PartName),
            ),
            ("X: y", Err(FormError::PartName)),
            (
                "Content-Disposition: form-data;\r\n name=a",
                Err(FormError::PartHead),
            ),
            (
                "Content-Disposition : form-data; name=a",
                Err(FormError::PartHead),
            ),
            (
                "Content-Disposition: form-data; name=a\nX: y",
                Err(FormError::PartHead),
            ),
            (
                "Content-Disposition: form-data; name=a\r",
                Err(FormError::PartHead),
            ),
            ("no colon", Err(FormError::PartHead)),
        ] {
            let head = format!("{head}\r\n\r\n");
            assert_eq!(
                part_name(head.as_bytes()),
                want.map(str::as_bytes),
                "{head}"
            );
        }
        assert_eq!(part_name(b"\r\n"), Err(FormError::PartHead));
    }
}
