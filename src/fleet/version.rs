//! The version of an engine.

use std::fmt;

use crate::json::{inner, member};

/// The version of an engine, as its `/version` states it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineVersion(String);

/// Longest version that is kept, in bytes. Development builds have about 40.
const VERSION_BYTES_MAX: usize = 128;

impl EngineVersion {
    /// Reads the version from the body of a response to `GET /version`: `{"version":"0.18.0"}`.
    /// Returns `None` if it contains none.
    #[must_use]
    pub fn read(response: &[u8]) -> Option<Self> {
        let text = inner(member(response, "version")?)?;
        let text = std::str::from_utf8(text).ok()?;
        let fits = !text.is_empty() && text.len() <= VERSION_BYTES_MAX;
        (fits && text.bytes().all(|byte| byte.is_ascii_graphic())).then(|| Self(text.to_owned()))
    }

    /// Returns the three numbers of the release, and whether this is the release itself rather than
    /// a build before it (PEP 440). Returns `None` if the version does not begin with numbers.
    #[must_use]
    pub fn release(&self) -> Option<([u32; 3], bool)> {
        let mut numbers = [0; 3];
        let mut rest = self.0.as_str();
        for (index, number) in numbers.iter_mut().enumerate() {
            if index > 0 {
                rest = rest.strip_prefix('.')?;
            }
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            *number = rest[..digits].parse().ok()?;
            rest = &rest[digits..];
        }
        let is_exact = rest.is_empty() || rest.starts_with('+') || rest.starts_with(".post");
        Some((numbers, is_exact))
    }
}

impl fmt::Display for EngineVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_from_any_response_with_one() {
        let read = |text: &str| EngineVersion::read(text.as_bytes()).map(|found| found.to_string());
        assert_eq!(read(r#"{"version":"0.32.0"}"#).as_deref(), Some("0.32.0"));
        assert_eq!(read(r#"{"a":[1],"version" : "x"}"#).as_deref(), Some("x"));
        for text in [
            "",
            "{}",
            "[]",
            r#"{"version":7}"#,
            r#"{"version":""}"#,
            "Not Found",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
        assert_eq!(
            read(&format!(r#"{{"version":"{}"}}"#, "1".repeat(129))),
            None
        );
    }
}
