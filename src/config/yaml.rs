//! Parsing of a YAML (or JSON) document into entries with their positions.
//!
//! The only module that uses the YAML library. `document` interprets the keys. Plain scalars are
//! kept as text: `off` and `yes` are not converted to booleans, and numbers become decimal.

use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

/// A key with its position and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) key: String,
    /// Line of the key in the document, starting at 1.
    pub(super) line: u64,
    /// Column of the key in characters, starting at 1.
    pub(super) column: u64,
    pub(super) value: Value,
}

/// The value of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    /// The value is empty or `null`.
    Nothing,
    Text(String),
    /// The value is a list of scalars, each kept as text.
    List(Vec<String>),
    /// The value is a map, or a list that contains anything but scalars.
    Nested,
}

/// Reason why a text is not a valid document, and the position of the problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Malformed {
    pub(super) text: String,
    pub(super) line: u64,
    pub(super) column: u64,
}

/// Parses one document. An empty document has no entries.
///
/// # Errors
/// Returns the first problem: invalid YAML, a document that is not a map, a duplicate key, or a
/// second document.
pub(super) fn read(text: &str) -> Result<Vec<Entry>, Malformed> {
    let options = serde_saphyr::options! { strict_booleans: true, with_snippet: false };
    match serde_saphyr::from_str_with_options::<Document>(text, options) {
        Ok(Document(entries)) => Ok(entries),
        Err(error) => Err(malformed(&error)),
    }
}

fn malformed(error: &serde_saphyr::Error) -> Malformed {
    use serde_saphyr::Error;
    let (line, column) = error
        .location()
        .map_or((1, 1), |at| (at.line(), at.column()));
    let text = match error.without_snippet() {
        Error::DuplicateMappingKey { key, .. } => match key {
            Some(key) => format!("`{key}` is given twice; remove one"),
            None => "the key is given twice; remove one".to_owned(),
        },
        Error::MultipleDocuments { .. } => {
            "a second document starts here; give only one".to_owned()
        }
        other => {
            // The position is removed here because it is reported separately.
            let text = other.to_string();
            let (text, _) = text.rsplit_once(" at line ").unwrap_or((&text, ""));
            text.to_owned()
        }
    };
    Malformed { text, line, column }
}

struct Document(Vec<Entry>);

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(DocumentVisitor)
    }
}

struct DocumentVisitor;

impl<'de> Visitor<'de> for DocumentVisitor {
    type Value = Document;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("lines of `key: value`")
    }

    fn visit_unit<E>(self) -> Result<Document, E> {
        Ok(Document(Vec::new()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Document, A::Error> {
        let mut entries = Vec::new();
        while let Some((key, value)) = map.next_entry::<Spanned<String>, Value>()? {
            entries.push(Entry {
                line: key.referenced.line(),
                column: key.referenced.column(),
                key: key.value,
                value,
            });
        }
        Ok(Document(entries))
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Text(value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Text(value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Text(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Text(value.to_string()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Nothing)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Nothing)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        let mut nested = false;
        while let Some(item) = sequence.next_element()? {
            match item {
                Value::Text(text) => items.push(text),
                Value::Nothing | Value::List(_) | Value::Nested => nested = true,
            }
        }
        Ok(if nested {
            Value::Nested
        } else {
            Value::List(items)
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Value::Nested)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(text: &str) -> Vec<(String, u64, u64, Value)> {
        let entries = read(text).unwrap_or_else(|error| panic!("{text:?}: {error:?}"));
        let parts = |entry: Entry| (entry.key, entry.line, entry.column, entry.value);
        entries.into_iter().map(parts).collect()
    }

    #[test]
    fn scalars_are_kept_as_text() {
        for (written, want) in [
            ("8000", "8000"),
            ("-1", "-1"),
            ("'8000'", "8000"),
            ("200ms", "200ms"),
            ("off", "off"),
            ("yes", "yes"),
            ("true", "true"),
            ("1.5", "1.5"),
            ("10.0.0.0/8:8000", "10.0.0.0/8:8000"),
            ("127.0.0.1:9890", "127.0.0.1:9890"),
            ("\"a b\"", "a b"),
        ] {
            let got = values(&format!("# first\nkey: {written}\n"));
            let want = ("key".to_owned(), 2, 1, Value::Text(want.to_owned()));
            assert_eq!(got, [want], "{written}");
        }
    }

    #[test]
    fn documents() {
        assert_eq!(values(""), []);
        assert_eq!(values("# nothing\n"), []);
        let list = |items: &[&str]| Value::List(items.iter().map(|&item| item.into()).collect());
        let text = "a: [x, 1]\nb:\n  - y\nc:\nd: {e: f}\ng: [[1]]\nh: &h z\ni: *h\nj: []\n";
        let got = values(text);
        let want = [
            ("a", 1, list(&["x", "1"])),
            ("b", 2, list(&["y"])),
            ("c", 4, Value::Nothing),
            ("d", 5, Value::Nested),
            ("g", 6, Value::Nested),
            ("h", 7, Value::Text("z".to_owned())),
            ("i", 8, Value::Text("z".to_owned())),
            ("j", 9, list(&[])),
        ];
        let want = want.map(|(key, line, value)| (key.to_owned(), line, 1, value));
        assert_eq!(got, want);
        let json = values(r#"{"port": 9, "enable-tls": ["decoder"]}"#);
        assert_eq!((json[1].1, json[1].2), (1, 13));
    }

    #[test]
    fn malformed_documents_report_a_position() {
        for (text, line, column, want) in [
            ("port: [1", 1, 7, "unclosed bracket"),
            ("port: 1\nport: 2\n", 2, 1, "`port` is given twice"),
            ("- port\n", 1, 1, "sequence, expected lines of `key: value`"),
            (
                "port",
                1,
                1,
                "string \"port\", expected lines of `key: value`",
            ),
            ("a: 1\n---\nb: 2\n", 3, 1, "a second document"),
            ("a: 1\n b: 2\n", 2, 3, "mapping values are not allowed"),
            ("a: *b\n", 1, 4, "anchor"),
        ] {
            let error = read(text).unwrap_err();
            assert_eq!((error.line, error.column), (line, column), "{text:?}");
            assert!(error.text.contains(want), "{text:?}: {error:?}");
            assert!(!error.text.contains("line "), "{error:?}");
        }
    }
}
