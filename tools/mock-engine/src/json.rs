//! The top-level members of a JSON object, with their values as received.
//!
//! Hashes and handoffs depend on the exact bytes, so a value is only decoded when requested. If
//! a name is repeated, all its values are kept, and look-ups return the last one, as Python does.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// The members of an object, in order.
#[derive(Debug, Default)]
pub(crate) struct Fields<'a>(Vec<(String, &'a RawValue)>);

impl<'a> Fields<'a> {
    /// Parses an object.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }

    /// Returns the value of the last member called `name`.
    pub(crate) fn value(&self, name: &str) -> Option<&'a RawValue> {
        self.0
            .iter()
            .rev()
            .find(|(have, _)| have == name)
            .map(|(_, value)| *value)
    }

    /// Returns the bytes of the value of the last member called `name`.
    pub(crate) fn raw(&self, name: &str) -> Option<&'a str> {
        self.value(name).map(RawValue::get)
    }

    /// Returns the bytes of the value of the last member called `name`. Returns `None` if the value
    /// is `null` or there is no such member.
    pub(crate) fn some(&self, name: &str) -> Option<&'a str> {
        self.raw(name).filter(|raw| *raw != "null")
    }

    /// Returns whether `name` is present, even if its value is `null`.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.count(name) > 0
    }

    /// Returns how many members are called `name`.
    pub(crate) fn count(&self, name: &str) -> usize {
        self.0.iter().filter(|(have, _)| have == name).count()
    }

    /// Returns whether the value of the last member called `name` is the literal `true`.
    pub(crate) fn is_true(&self, name: &str) -> bool {
        self.raw(name) == Some("true")
    }

    /// Returns the value of the last member called `name`, decoded as a string. Returns `None` if
    /// it is absent or not a string.
    pub(crate) fn string(&self, name: &str) -> Option<String> {
        serde_json::from_str(self.raw(name)?).ok()
    }

    /// Returns the names of all members, in order.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// Returns the number of distinct member names.
    pub(crate) fn names_distinct(&self) -> usize {
        let mut names: Vec<&str> = self.names().collect();
        names.sort_unstable();
        names.dedup();
        names.len()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(FieldsVisitor)
    }
}

struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields = Vec::with_capacity(16);
        while let Some(entry) = map.next_entry::<String, &'de RawValue>()? {
            fields.push(entry);
        }
        Ok(Fields(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_keep_their_bytes_and_the_last_one_wins() {
        let fields = Fields::parse(br#" {"a": 1.0 ,"b":[ 1 ],"a": 1e5, "c":null}"#).unwrap();
        assert_eq!(fields.raw("a"), Some("1e5"));
        assert_eq!(fields.raw("b"), Some("[ 1 ]"));
        assert_eq!(fields.some("c"), None);
        assert!(fields.has("c"));
        assert_eq!((fields.len(), fields.names_distinct()), (4, 3));
    }

    #[test]
    fn parsing_anything_but_an_object_fails() {
        for text in ["", "[]", "{", "{}x", "{\"a\":}"] {
            assert!(Fields::parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
