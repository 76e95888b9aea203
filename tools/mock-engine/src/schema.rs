//! A JSON value that conforms to a JSON schema.
//!
//! It follows types, `properties`, `required`, `items`, `enum`, `const`, local `$ref`s, the first
//! of `anyOf`, `oneOf` and `allOf`, and the limits of numbers, lengths and item counts. It ignores
//! everything else, such as `pattern`. Sizes are bounded: a schema whose value would be too large
//! has none.

use serde_json::{Map, Number, Value};

/// Maximum number of values in a result. A copied value counts once for each 16 bytes.
const VALUES_MAX: usize = 4_096;
/// Maximum depth of a result, with references counted as a level.
const DEPTH_MAX: usize = 32;
/// Maximum number of characters that `minLength` can require.
const LENGTH_MAX: u64 = 4_096;

/// Returns a value that conforms to `schema`, or `None` if it would be too large. Its strings are
/// words that contain `tag`.
pub(crate) fn instance(schema: &Value, tag: &str) -> Option<Value> {
    let mut maker = Maker {
        root: schema,
        tag,
        strings: 0,
        left: VALUES_MAX,
    };
    maker.value(schema, DEPTH_MAX)
}

/// Formats a value in one line, with a space after each colon and comma, as Python does.
pub(crate) fn spaced(value: &Value) -> String {
    let mut text = String::new();
    write_spaced(value, &mut text);
    text
}

fn write_spaced(value: &Value, text: &mut String) {
    match value {
        Value::Object(members) => {
            text.push('{');
            for (at, (name, member)) in members.iter().enumerate() {
                text.push_str(if at == 0 { "" } else { ", " });
                text.push_str(&Value::from(name.as_str()).to_string());
                text.push_str(": ");
                write_spaced(member, text);
            }
            text.push('}');
        }
        Value::Array(items) => {
            text.push('[');
            for (at, item) in items.iter().enumerate() {
                text.push_str(if at == 0 { "" } else { ", " });
                write_spaced(item, text);
            }
            text.push(']');
        }
        scalar => text.push_str(&scalar.to_string()),
    }
}

struct Maker<'a> {
    root: &'a Value,
    tag: &'a str,
    /// Number of strings and numbers made so far; each contains its number.
    strings: i64,
    /// Number of values that may still be made.
    left: usize,
}

impl Maker<'_> {
    fn value(&mut self, schema: &Value, depth: usize) -> Option<Value> {
        self.left = self.left.checked_sub(1)?;
        let depth = depth.checked_sub(1)?;
        if let Some(target) = schema.get("$ref").and_then(Value::as_str) {
            let root = self.root;
            let target = target
                .strip_prefix('#')
                .and_then(|path| root.pointer(path))?;
            return self.value(target, depth);
        }
        let listed = schema.get("enum").and_then(|values| values.get(0));
        if let Some(fixed) = schema.get("const").or(listed) {
            self.left = self.left.checked_sub(fixed.to_string().len() / 16)?;
            return Some(fixed.clone());
        }
        for combined in ["anyOf", "oneOf", "allOf"] {
            if let Some(first) = schema.get(combined).and_then(|all| all.get(0)) {
                return self.value(first, depth);
            }
        }
        match kind(schema) {
            "object" => self.object(schema, depth),
            "array" => self.array(schema, depth),
            "integer" => Some(self.integer(schema)),
            "number" => Some(self.number(schema)),
            "boolean" => Some(Value::Bool(true)),
            "null" => Some(Value::Null),
            _ => self.string(schema),
        }
    }

    fn object(&mut self, schema: &Value, depth: usize) -> Option<Value> {
        let mut members = Map::new();
        for (name, member) in schema
            .get("properties")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
        {
            self.left = self.left.checked_sub(name.len() / 16)?;
            members.insert(name.clone(), self.value(member, depth)?);
        }
        for name in schema
            .get("required")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            if let Some(name) = name.as_str().filter(|name| !members.contains_key(*name)) {
                self.left = self.left.checked_sub(name.len() / 16)?;
                members.insert(name.to_owned(), self.value(&Value::Null, depth)?);
            }
        }
        Some(Value::Object(members))
    }

    fn array(&mut self, schema: &Value, depth: usize) -> Option<Value> {
        let limit = |name| schema.get(name).and_then(Value::as_u64);
        let most = limit("maxItems").unwrap_or(u64::MAX);
        let count = limit("minItems").unwrap_or(0).max(1).min(most);
        let item = schema.get("items").unwrap_or(&Value::Null);
        (0..count).map(|_| self.value(item, depth)).collect()
    }

    fn string(&mut self, schema: &Value) -> Option<Value> {
        let limit = |name| schema.get(name).and_then(Value::as_u64);
        let fixed = match schema.get("format").and_then(Value::as_str) {
            Some("date-time") => Some("2026-01-02T03:04:05Z"),
            Some("date") => Some("2026-01-02"),
            Some("time") => Some("03:04:05Z"),
            Some("email") => Some("mock@example.com"),
            Some("uri") => Some("http://example.com/mock"),
            Some("uuid") => Some("00000000-0000-4000-8000-000000000000"),
            _ => None,
        };
        let number = self.next();
        let mut text = fixed.map_or_else(|| format!("t{number}-{}", self.tag), str::to_owned);
        let least = limit("minLength").unwrap_or(0);
        if least > LENGTH_MAX {
            return None;
        }
        // All of these texts are ASCII.
        let missing = (least as usize).saturating_sub(text.len());
        text.push_str(&"x".repeat(missing));
        text.truncate(limit("maxLength").map_or(usize::MAX, |most| most as usize));
        Some(Value::from(text))
    }

    fn integer(&mut self, schema: &Value) -> Value {
        let limit = |name| schema.get(name).and_then(Value::as_i64);
        let above = limit("exclusiveMinimum").map(|least| least.saturating_add(1));
        let below = limit("exclusiveMaximum").map(|most| most.saturating_sub(1));
        let least = limit("minimum").or(above).unwrap_or(i64::MIN);
        let most = limit("maximum").or(below).unwrap_or(i64::MAX);
        let value = self.next().max(least).min(most);
        let step = limit("multipleOf").filter(|step| *step > 0).unwrap_or(1);
        let past = value.rem_euclid(step);
        let rounded = if past == 0 {
            value
        } else {
            value.saturating_add(step - past)
        };
        Value::from(rounded)
    }

    fn number(&mut self, schema: &Value) -> Value {
        let limit = |name| schema.get(name).and_then(Value::as_f64);
        let value = self.next() as f64 + 0.5;
        let (least, most) = (limit("minimum"), limit("maximum"));
        let value = match (limit("exclusiveMinimum"), limit("exclusiveMaximum")) {
            (Some(above), Some(below)) => f64::midpoint(above, below),
            (Some(above), None) => value.max(above + 1.0),
            (None, Some(below)) => value.min(below - 1.0),
            (None, None) => value,
        };
        let value = value
            .max(least.unwrap_or(f64::MIN))
            .min(most.unwrap_or(f64::MAX));
        Number::from_f64(value).map_or(Value::from(0), Value::Number)
    }

    fn next(&mut self) -> i64 {
        self.strings += 1;
        self.strings - 1
    }
}

/// Returns the type that `schema` requires, the first one if it permits several.
fn kind(schema: &Value) -> &str {
    match schema.get("type") {
        Some(Value::String(kind)) => kind,
        Some(Value::Array(kinds)) => kinds.first().and_then(Value::as_str).unwrap_or_default(),
        _ if schema.get("properties").is_some() || schema.get("required").is_some() => "object",
        _ if schema.get("items").is_some() => "array",
        _ => "string",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_conform_to_their_schema() {
        for (schema, want) in [
            (json!({"type": "boolean"}), json!(true)),
            (json!({"type": ["integer", "null"], "minimum": 3}), json!(3)),
            (json!({"type": "integer", "maximum": -2}), json!(-2)),
            (
                json!({"type": "integer", "exclusiveMinimum": 4, "multipleOf": 3}),
                json!(6),
            ),
            (json!({"type": "number", "minimum": 2}), json!(2.0)),
            (json!({"enum": ["x", "y"]}), json!("x")),
            (json!({"const": [1]}), json!([1])),
            (json!({}), json!("t0-ab")),
            (json!({"type": "string", "maxLength": 2}), json!("t0")),
            (json!({"type": "string", "minLength": 7}), json!("t0-abxx")),
            (json!({"anyOf": [{"type": "null"}, {}]}), json!(null)),
            (json!({"type": "array", "maxItems": 0}), json!([])),
            (
                json!({"items": {"$ref": "#/$defs/a"}, "$defs": {"a": {"type": "integer"}}}),
                json!([0]),
            ),
            (
                json!({
                    "type": "object",
                    "properties": {"b": {"type": "string"}, "a": {"type": "integer"}},
                    "required": ["a", "c"],
                }),
                json!({"b": "t0-ab", "a": 1, "c": "t2-ab"}),
            ),
        ] {
            assert_eq!(instance(&schema, "ab"), Some(want), "{schema}");
        }
    }

    #[test]
    fn values_are_bounded() {
        let wide = |items: u64| json!({"type": "array", "minItems": items});
        assert!(instance(&wide(4_000), "ab").is_some());
        for schema in [
            wide(u64::MAX),
            json!({"type": "string", "minLength": u64::MAX}),
            json!({"$ref": "#"}),
            json!({"items": {"$ref": "#"}}),
            json!({"minItems": 100, "items": {"minItems": 100, "items": {}}}),
            json!({"minItems": 100, "items": {"const": "x".repeat(1_000)}}),
        ] {
            assert_eq!(instance(&schema, "ab"), None, "{schema}");
        }
    }

    #[test]
    fn values_have_spaces_between_their_words() {
        let value = json!({"a": [1, "b c"], "d": {}});
        assert_eq!(spaced(&value), r#"{"a": [1, "b c"], "d": {}}"#);
    }
}
