//! Forms in `multipart/form-data` (RFC 7578), as far as it takes to find a part by its name.
//!
//! This module refuses all that parsers read in different ways: encoded names, repeated parameters,
//! folded lines. A form of a browser or an HTTP library has none of these.

use memchr::memmem;

use super::syntax::{is_ows, is_token, is_token_byte, is_value_byte};

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

/// Returns the boundary of a form from its Content-Type; `None` if that is not of a form.
///
/// # Errors
/// [`FormError::Boundary`] or [`FormError::Charset`].
pub fn boundary(content_type: &[u8]) -> Result<Option<&[u8]>, FormError> {
    let lower = content_type.to_ascii_lowercase();
    // Python's parser removes white space beyond ASCII around the type.
    if memmem::find(&lower, b"form-data").is_none() && content_type.is_ascii() {
        return Ok(None);
    }
    let params = params(content_type, b"multipart/form-data").ok_or(FormError::Boundary)?;
    let charset = params.value(b"charset").unwrap_or(b"utf-8");
    if !charset.eq_ignore_ascii_case(b"utf-8") {
        return Err(FormError::Charset);
    }
    let boundary = params.value(b"boundary").filter(|value| {
        (1..=BOUNDARY_BYTES_MAX).contains(&value.len())
            && value.iter().all(|&byte| is_boundary_byte(byte))
    });
    boundary.map(Some).ok_or(FormError::Boundary)
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
        if !is_token(name) || !value.iter().all(|&byte| is_value_byte(byte)) {
            return Err(FormError::PartHead);
        }
        if name.eq_ignore_ascii_case(b"content-disposition")
            && disposition.replace(&value[1..]).is_some()
        {
            return Err(FormError::PartName);
        }
    }
    let disposition = disposition.ok_or(FormError::PartName)?;
    let params = params(disposition, b"form-data").ok_or(FormError::PartName)?;
    let name = params.value(b"name").ok_or(FormError::PartName)?;
    // Every name of the engines' APIs, and none that some parser decodes.
    let is_plain = |byte: &u8| {
        byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.' | b'[' | b']')
    };
    if name.is_empty() || !name.iter().all(is_plain) {
        return Err(FormError::PartName);
    }
    Ok(name)
}

const fn is_boundary_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(
            byte,
            b'\'' | b'(' | b')' | b'+' | b'_' | b',' | b'-' | b'.' | b'/' | b':' | b'=' | b'?'
        )
}

/// The parameters of a field value, each as its name and its value without quotes.
struct Params<'a>(Vec<(&'a [u8], &'a [u8])>);

impl<'a> Params<'a> {
    fn value(&self, name: &[u8]) -> Option<&'a [u8]> {
        let found = self
            .0
            .iter()
            .find(|(one, _)| one.eq_ignore_ascii_case(name));
        found.map(|(_, value)| *value)
    }
}

/// Returns the parameters of a field value that begins with `kind`. Returns `None` if parsers could
/// find others.
///
/// RFC 9110 and Python's `email` differ in backslashes, of which only those before a quote are
/// accepted, in quotes outside of values, in bytes beyond ASCII, and in repeated, encoded and
/// continued parameters (RFC 2231), of which only `filename*` is common.
fn params<'a>(value: &'a [u8], kind: &[u8]) -> Option<Params<'a>> {
    let value = trim(value);
    let (found, mut rest) = value.split_at_checked(kind.len())?;
    if !found.eq_ignore_ascii_case(kind) {
        return None;
    }
    let mut params = Params(Vec::new());
    loop {
        rest = trim(rest);
        if rest.is_empty() {
            return Some(params);
        }
        rest = trim(rest.strip_prefix(b";")?);
        let equals = rest.iter().position(|&byte| byte == b'=')?;
        let name = &rest[..equals];
        let is_encoded = name.contains(&b'*') && !name.eq_ignore_ascii_case(b"filename*");
        if !is_token(name) || is_encoded || params.value(name).is_some() {
            return None;
        }
        rest = &rest[equals + 1..];
        let is_file = rest.starts_with(b"\"") && name.eq_ignore_ascii_case(b"filename");
        let value;
        (value, rest) = match rest.strip_prefix(b"\"") {
            Some(quoted) => quoted_value(quoted)?,
            None => {
                let end = rest.iter().position(|&byte| byte == b';');
                let (value, after) = rest.split_at(end.unwrap_or(rest.len()));
                (trim(value), after)
            }
        };
        // Values without quotes are tokens, but for a boundary.
        let is_plain = |&byte: &u8| is_token_byte(byte) || is_boundary_byte(byte);
        let is_simple = value
            .iter()
            .all(|byte| is_plain(byte) || matches!(byte, b'[' | b']'));
        if !is_simple && !is_file {
            return None;
        }
        params.0.push((name, value));
    }
}

/// Returns the value that ends with the next quote, and the rest after that. `\"` is a quote in the
/// value; there must be no other backslash.
fn quoted_value(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut at = 0;
    loop {
        match text.get(at..)? {
            [b'"', rest @ ..] => return Some((&text[..at], rest)),
            [b'\\', b'"', ..] => at += 2,
            [] | [b'\\', ..] => return None,
            _ => at += 1,
        }
    }
}

/// Removes spaces and tabs around `text`.
fn trim(text: &[u8]) -> &[u8] {
    let is_blank = |byte: &u8| is_ows(*byte);
    let start = text.iter().position(|byte| !is_blank(byte));
    let end = text.iter().rposition(|byte| !is_blank(byte));
    match (start, end) {
        (Some(start), Some(end)) => &text[start..=end],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Boundary = Result<Option<&'static str>, FormError>;
    type Name = Result<&'static str, FormError>;

    const NO_BOUNDARY: Boundary = Err(FormError::Boundary);
    const NO_NAME: Name = Err(FormError::PartName);
    const NO_HEAD: Name = Err(FormError::PartHead);

    #[rustfmt::skip]
    const BOUNDARIES: &[(&str, Boundary)] = &[
        ("multipart/form-data; boundary=abc", Ok(Some("abc"))),
        (" Multipart/Form-Data ;Boundary=\"a'b:c\" ; charset=UTF-8 ", Ok(Some("a'b:c"))),
        ("multipart/form-data; boundary=----WebKitFormBoundary7MA4", Ok(Some("----WebKitFormBoundary7MA4"))),
        ("multipart/mixed; boundary=a", Ok(None)),
        ("application/json", Ok(None)),
        ("application/x-www-form-urlencoded", Ok(None)),
        ("", Ok(None)),
        ("multipart/form-data", NO_BOUNDARY),
        ("multipart/form-data; boundary=", NO_BOUNDARY),
        ("multipart/form-data; boundary=a; boundary=b", NO_BOUNDARY),
        ("multipart/form-data; boundary=a; x=1; X=2", NO_BOUNDARY),
        ("multipart/form-data; boundary*=utf-8''a", NO_BOUNDARY),
        ("multipart/form-data; boundary=\"a b\"", NO_BOUNDARY),
        ("multipart/form-data; boundary=\"a", NO_BOUNDARY),
        ("multipart/form-data; boundary=a\"b\"", NO_BOUNDARY),
        ("multipart/form-data; boundary=\"a\"b", NO_BOUNDARY),
        ("multipart/form-data; boundary", NO_BOUNDARY),
        ("multipart/form-data; boundary =a", NO_BOUNDARY),
        ("multipart/form-data\"; boundary=a", NO_BOUNDARY),
        ("multipart/form-data, x; boundary=a", NO_BOUNDARY),
        ("multipart/form-data\u{a0}; boundary=a", NO_BOUNDARY),
        ("multipart/x\u{a0}; boundary=a", NO_BOUNDARY),
        ("multipart/form-data; boundary=A; a=\"\\\\\"; b=\"; boundary=A--; c=\"", NO_BOUNDARY),
        ("multipart/form-data; boundary=a; charset*=utf-7", NO_BOUNDARY),
        ("multipart/form-data; boundary=a; charset=utf-7", Err(FormError::Charset)),
    ];

    #[rustfmt::skip]
    const NAMES: &[(&str, Name)] = &[
        ("Content-Disposition: form-data; name=\"model\"", Ok("model")),
        ("content-type: a/b\r\ncontent-disposition:form-data;name=a", Ok("a")),
        ("Content-Disposition: form-data; name=\"timestamp_granularities[]\"", Ok("timestamp_granularities[]")),
        ("Content-Disposition: form-data; name=\"file\"; filename=\"a;name=b \\\"\u{e9}\"", Ok("file")),
        ("Content-Disposition: form-data; filename*=utf-8''x; name=f", Ok("f")),
        ("Content-Disposition: form-data", NO_NAME),
        ("Content-Disposition: form-data; name=\"\"", NO_NAME),
        ("Content-Disposition: form-data; name=a; name=b", NO_NAME),
        ("Content-Disposition: form-data; name=a; Name=b", NO_NAME),
        ("Content-Disposition: form-data; name=a; filename=b; filename=c", NO_NAME),
        ("Content-Disposition: form-data; name=a; name*=utf-8''b", NO_NAME),
        ("Content-Disposition: form-data; name*0=a; name*1=b", NO_NAME),
        ("Content-Disposition: form-data; name=\"a\\b\"", NO_NAME),
        ("Content-Disposition: form-data; name=\"f\"; a=\"\\\\\"; b=\"; name=vllm_xargs; c=\"", NO_NAME),
        ("Content-Disposition: form-data; name=f; filename=\"\\\\\"; b=\"; name=vllm_xargs; c=\"", NO_NAME),
        ("Content-Disposition: form-data\"; name=\"f\"; b=\"; name=vllm_xargs; c=\"", NO_NAME),
        ("Content-Disposition: form-data; name=f; filename=a\"b", NO_NAME),
        ("Content-Disposition: x form-data; name=f", NO_NAME),
        ("Content-Disposition: attachment; name=f", NO_NAME),
        ("Content-Disposition: form-data; name=<vllm_xargs>", NO_NAME),
        ("Content-Disposition: form-data; name=\"<vllm_xargs>\"", NO_NAME),
        ("Content-Disposition: form-data; name=vllm_xargs\u{a0}", NO_NAME),
        ("Content-Disposition: form-data; name=\"vllm%5Fxargs\"", NO_NAME),
        ("Content-Disposition: form-data; name=a\r\nContent-Disposition: form-data; name=b", NO_NAME),
        ("X: y", NO_NAME),
        ("Content-Disposition: form-data;\r\n name=a", NO_HEAD),
        ("Content-Disposition : form-data; name=a", NO_HEAD),
        ("Content-Disposition: form-data; name=a\nX: y", NO_HEAD),
        ("Content-Disposition: form-data; name=a\r", NO_HEAD),
        ("no colon", NO_HEAD),
    ];

    #[test]
    fn a_form_has_one_boundary() {
        for (text, want) in BOUNDARIES {
            let want = want.map(|boundary| boundary.map(str::as_bytes));
            assert_eq!(boundary(text.as_bytes()), want, "{text}");
        }
        let long = format!("multipart/form-data; boundary={}", "a".repeat(71));
        assert_eq!(boundary(long.as_bytes()), Err(FormError::Boundary));
    }

    #[test]
    fn a_part_has_one_plain_name() {
        for (head, want) in NAMES {
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
