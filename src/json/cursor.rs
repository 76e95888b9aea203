//! Iteration over a JSON value that is completely in memory: the elements of an array or the
//! members of an object, as slices of the value.
//!
//! Connectors use this for the few small or rare values that they must inspect: the items of a
//! multimodal message, and the responses of encoders and bootstrap servers. Values are located but
//! never converted.
//!
//! The input may be arbitrary bytes. Malformed input ends the iteration; [`Items::is_whole`]
//! distinguishes this from the regular end. A caller that forwards a value must check it with
//! [`validate`](super::validate()) first.

use memchr::memchr2;

use super::grammar::unescape;

/// A member of an object or an element of an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item<'a> {
    /// The member name as received, including its quotes; empty for an element of an array.
    pub key: &'a [u8],
    /// The value as received, without surrounding whitespace.
    pub value: &'a [u8],
}

impl Item<'_> {
    /// Returns whether the unescaped name of this member is `name`, which must be ASCII.
    #[must_use]
    pub fn is(&self, name: &str) -> bool {
        string_is(self.key, name)
    }
}

/// Iterator over the members of one object or the elements of one array.
#[derive(Clone, Debug)]
pub struct Items<'a> {
    bytes: &'a [u8],
    at: usize,
    close: u8,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    First,
    Next,
    Whole,
    Broken,
}

/// Returns the members of an object; no members for any other value.
#[must_use]
pub fn members(object: &[u8]) -> Items<'_> {
    Items::new(object, b'{', b'}')
}

/// Returns the elements of an array; no elements for any other value.
#[must_use]
pub fn elements(array: &[u8]) -> Items<'_> {
    Items::new(array, b'[', b']')
}

/// Returns the value of the member `name` of an object, or `None` if there is no such member. If
/// the member is repeated, this is the last value, which is also the one that the engines use.
#[must_use]
pub fn member<'a>(object: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let found = members(object).filter(|item| item.is(name)).last();
    found.map(|item| item.value)
}

/// Returns whether a JSON string, passed with its quotes, equals `text` after unescaping. `text`
/// must be ASCII.
#[must_use]
pub fn string_is(string: &[u8], text: &str) -> bool {
    let Some(inner) = inner(string) else {
        return false;
    };
    let mut wanted = text.bytes();
    let mut at = 0;
    while let Some((byte, len)) = character(&inner[at..]) {
        if wanted.next() != Some(byte) {
            return false;
        }
        at += len;
    }
    at == inner.len() && wanted.next().is_none()
}

/// Returns the bytes between the quotes of a JSON string, or `None` if a quote is missing.
#[must_use]
pub fn inner(string: &[u8]) -> Option<&[u8]> {
    string.strip_prefix(b"\"")?.strip_suffix(b"\"")
}

/// Unescapes the first character of `bytes`, the content of a JSON string. Returns the character
/// and its length in `bytes`, or `None` if it is not a valid ASCII character.
fn character(bytes: &[u8]) -> Option<(u8, usize)> {
    match *bytes {
        [b'\\', b'u', a, b, c, d, ..] => {
            let digits = [a, b, c, d];
            let text = std::str::from_utf8(&digits).ok()?;
            let code = u16::from_str_radix(text, 16).ok()?;
            let byte = u8::try_from(code).ok().filter(u8::is_ascii)?;
            Some((byte, 6))
        }
        [b'\\', escaped, ..] => unescape(escaped).map(|byte| (byte, 2)),
        [byte, ..] if byte.is_ascii() => Some((byte, 1)),
        _ => None,
    }
}

impl<'a> Items<'a> {
    fn new(bytes: &'a [u8], open: u8, close: u8) -> Self {
        let bytes = bytes.trim_ascii();
        let state = if bytes.first() == Some(&open) {
            State::First
        } else {
            State::Broken
        };
        Self {
            bytes,
            at: 1,
            close,
            state,
        }
    }

    /// Returns whether the container was read up to its closing bracket and only whitespace follows
    /// it.
    ///
    /// Always `false` until `next` has returned `None`.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.state == State::Whole
    }

    fn blanks(&mut self) -> Option<u8> {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.bytes.get(self.at) {
            self.at += 1;
        }
        self.bytes.get(self.at).copied()
    }

    fn step(&mut self) -> Option<Item<'a>> {
        let first = self.state == State::First;
        self.state = State::Broken;
        let mut byte = self.blanks()?;
        if byte == self.close {
            self.at += 1;
            if self.at == self.bytes.len() {
                self.state = State::Whole;
            }
            return None;
        }
        if !first {
            if byte != b',' {
                return None;
            }
            self.at += 1;
            byte = self.blanks()?;
        }
        let mut key: &[u8] = &[];
        if self.close == b'}' {
            if byte != b'"' {
                return None;
            }
            key = self.value()?;
            if self.blanks()? != b':' {
                return None;
            }
            self.at += 1;
            self.blanks()?;
        }
        let value = self.value()?;
        self.state = State::Next;
        Some(Item { key, value })
    }

    /// Consumes and returns the value that begins at the current position. Returns `None` if no
    /// value begins there, or if it is a string or container that does not end.
    fn value(&mut self) -> Option<&'a [u8]> {
        let start = self.at;
        self.at = value_end(self.bytes, start)?;
        #[cfg(test)]
        crate::work::count(self.at - start);
        Some(&self.bytes[start..self.at])
    }
}

impl<'a> Iterator for Items<'a> {
    type Item = Item<'a>;

    fn next(&mut self) -> Option<Item<'a>> {
        match self.state {
            State::First | State::Next => self.step(),
            State::Whole | State::Broken => None,
        }
    }
}

/// Returns the offset after the value that begins at `start`, or `None` if no value begins there or
/// if it is a string or container that does not end.
fn value_end(bytes: &[u8], start: usize) -> Option<usize> {
    match bytes.get(start)? {
        b'"' => string_end(bytes, start),
        b'{' | b'[' => container_end(bytes, start),
        b'-' | b'0'..=b'9' | b't' | b'f' | b'n' => {
            let behind =
                |byte: &u8| matches!(byte, b',' | b'}' | b']' | b' ' | b'\t' | b'\n' | b'\r');
            let len = bytes[start..].iter().position(behind);
            Some(len.map_or(bytes.len(), |len| start + len))
        }
        _ => None,
    }
}

fn string_end(bytes: &[u8], start: usize) -> Option<usize> {
    let mut at = start + 1;
    loop {
        at += memchr2(b'"', b'\\', bytes.get(at..)?)?;
        if bytes[at] == b'"' {
            return Some(at + 1);
        }
        at += 2;
    }
}

/// Returns the offset after the container that begins at `start`, or `None` if it is not closed.
///
/// Brackets are counted but not matched by kind, because values are validated before they are
/// forwarded.
fn container_end(bytes: &[u8], start: usize) -> Option<usize> {
    let mut depth = 0_usize;
    let mut at = start;
    loop {
        match bytes.get(at)? {
            b'"' => {
                at = string_end(bytes, at)?;
                continue;
            }
            b'{' | b'[' => depth += 1,
            b'}' | b']' => {
                depth -= 1;
                if depth == 0 {
                    return Some(at + 1);
                }
            }
            _ => {}
        }
        at += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(text: &str) -> (Vec<(&str, &str)>, bool) {
        let as_text = |bytes| std::str::from_utf8(bytes).unwrap();
        let mut walk = if text.trim_start().starts_with('[') {
            elements(text.as_bytes())
        } else {
            members(text.as_bytes())
        };
        let mut found = Vec::new();
        for item in &mut walk {
            found.push((as_text(item.key), as_text(item.value)));
        }
        (found, walk.is_whole())
    }

    #[test]
    fn items_are_returned_verbatim() {
        let cases = [
            ("{}", vec![], true),
            (" [ ] ", vec![], true),
            (
                "[1, \"a]\\\"\" ,{\"x\":[1,2]}]",
                vec![("", "1"), ("", "\"a]\\\"\""), ("", "{\"x\":[1,2]}")],
                true,
            ),
            (
                "{\"a\" : 1e5 ,\"b\":[{}]}",
                vec![("\"a\"", "1e5"), ("\"b\"", "[{}]")],
                true,
            ),
            ("{\"a\":tru", vec![("\"a\"", "tru")], false),
            ("[1,]", vec![("", "1")], false),
            ("[1 2]", vec![("", "1")], false),
            ("[1]x", vec![("", "1")], false),
            ("{1:2}", vec![], false),
            ("{\"a\" 1}", vec![], false),
            ("\"text\"", vec![], false),
            ("", vec![], false),
            ("[[1]", vec![("", "[1]")], false),
            ("[\"a", vec![], false),
        ];
        for (text, want, whole) in cases {
            assert_eq!(items(text), (want, whole), "{text}");
        }
    }

    #[test]
    fn member_returns_the_last_occurrence_regardless_of_escapes() {
        let object = br#"{"a":1,"\u0061":2,"\u00e4":3,"b":4}"#;
        assert_eq!(member(object, "a"), Some(&b"2"[..]));
        assert_eq!(member(object, "b"), Some(&b"4"[..]));
        assert_eq!(member(object, "c"), None);
        assert_eq!(member(b"[1]", "a"), None);
        assert!(string_is(br#""a\/b""#, "a/b"));
        assert!(!string_is(br#""ab""#, "a"));
        assert!(!string_is(br#""a""#, "ab"));
        assert!(!string_is(b"a", "a"));
    }

    /// The iteration must find the same members as `serde_json`, and must not panic on incomplete
    /// input.
    #[test]
    fn iteration_agrees_with_a_parser_on_every_prefix() {
        let text = r#" {"a":[1,{"b":"x\\\"]"},null],"c":{"d":-1.5e3,"e":[]},"f":"\ud83d\ude00"} "#;
        let value: serde_json::Value = serde_json::from_str(text).unwrap();
        let mut walk = members(text.as_bytes());
        for (item, (name, wanted)) in (&mut walk).zip(value.as_object().unwrap()) {
            assert!(item.is(name));
            let found: serde_json::Value = serde_json::from_slice(item.value).unwrap();
            assert_eq!(&found, wanted);
        }
        assert_eq!(walk.next(), None);
        assert!(walk.is_whole());
        for end in 0..text.len() {
            if let Some(prefix) = text.get(..end) {
                let mut walk = members(prefix.as_bytes());
                for item in &mut walk {
                    let _ = elements(item.value).count();
                }
                assert_eq!(
                    walk.is_whole(),
                    end == text.len() - 1 || end == text.trim_end().len()
                );
            }
        }
    }
}
