//! The form of a response's text: numbered words, a JSON value, or the arguments of a tool call, as
//! `tools`, `tool_choice` and `response_format` require.
//!
//! The mock calls a tool only if it must: with the tool choice `auto`, it responds with words. A
//! response that its token limit cuts is incomplete JSON, as that of a real engine is.

use serde_json::{Value, json};

use crate::api::{Kind, Refusal};
use crate::json::Fields;
use crate::schema::{instance, spaced};
use crate::token;

/// Maximum number of words in the text of [`Form::Object`], which is built in memory.
const OBJECT_WORDS_MAX: u32 = 65_536;

/// The form of a response's text.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Form {
    /// As many numbered words as there are tokens.
    Words,
    /// An object with a text of this many words.
    Object(u32),
    /// A value that conforms to the schema.
    Schema(Value),
    /// A call of the function `name`, whose arguments conform to `schema`.
    Call {
        name: String,
        schema: Value,
        /// Whether the tool choice names the function. The finish reason is then `stop`, otherwise
        /// `tool_calls`: those are the reasons of vLLM 0.32.
        named: bool,
    },
}

impl Form {
    /// Returns the tokens of the text, or `None` for words.
    pub(crate) fn pieces(&self, tag: &str) -> Option<Vec<String>> {
        let text = match self {
            Self::Words => return None,
            Self::Object(words) => {
                let text = token::text_from(tag, 0, *words);
                spaced(&json!({"text": text.trim_ascii_end()}))
            }
            Self::Schema(schema) | Self::Call { schema, .. } => {
                spaced(&instance(schema, tag).unwrap_or_default())
            }
        };
        Some(token::pieces(&text).map(str::to_owned).collect())
    }
}

/// Returns the form that a request requires. `words` is the number of tokens that a response of
/// words has.
pub(crate) fn form(kind: Kind, fields: &Fields<'_>, words: u32) -> Result<Form, Refusal> {
    if kind == Kind::Chat
        && let Some(call) = call(fields)?
    {
        return Ok(call);
    }
    match kind {
        Kind::Chat | Kind::Completions => format(fields, words),
        Kind::Responses | Kind::Messages | Kind::Generate => Ok(Form::Words),
    }
}

/// Returns the tool call that a request requires, if it requires one.
fn call(fields: &Fields<'_>) -> Result<Option<Form>, Refusal> {
    let choice = value(fields, "tool_choice")?;
    let tools = value(fields, "tools")?;
    let tools = match &tools {
        Some(Value::Array(tools)) if tools.is_empty() => {
            let message = "`tools` must not be an empty array. Either provide at least one tool \
                           or omit the field entirely.";
            return Err(Refusal::bad("tools", message));
        }
        Some(Value::Array(tools)) => tools.as_slice(),
        Some(_) => return Err(Refusal::bad("tools", "Input should be a valid list")),
        None => &[],
    };
    let named = match &choice {
        None => return Ok(None),
        Some(Value::String(choice)) if choice == "none" => return Ok(None),
        Some(_) if tools.is_empty() => {
            let message = "When using `tool_choice`, `tools` must be set.";
            return Err(Refusal::bad("tool_choice", message));
        }
        Some(Value::String(choice)) if choice == "auto" => return Ok(None),
        Some(Value::String(choice)) if choice == "required" => None,
        Some(Value::Object(choice)) => {
            let name = choice.get("function").and_then(|named| named.get("name"));
            Some(name.and_then(Value::as_str).unwrap_or_default())
        }
        Some(other) => {
            let message = format!(
                "Invalid value for `tool_choice`: {}! Only named tools, \"none\", \"auto\" or \
                 \"required\" are supported.",
                other.as_str().unwrap_or("not a string")
            );
            return Err(Refusal::bad("tool_choice", message));
        }
    };
    let name_of = |tool: &Value| Some(tool.pointer("/function/name")?.as_str()?.to_owned());
    let tool = tools
        .iter()
        .find(|tool| named.is_none() || name_of(tool).as_deref() == named);
    let Some(tool) = tool else {
        let message =
            "The tool specified in `tool_choice` does not match any of the specified `tools`";
        return Err(Refusal::bad("tool_choice", message));
    };
    let Some(name) = name_of(tool) else {
        return Err(Refusal::bad("tools", "a tool without function.name"));
    };
    let schema = tool.pointer("/function/parameters").cloned();
    let schema = schema.unwrap_or_else(|| json!({"type": "object"}));
    match instance(&schema, "") {
        Some(Value::Object(_)) => Ok(Some(Form::Call {
            name,
            schema,
            named: named.is_some(),
        })),
        Some(_) => Err(Refusal::bad("tools", "the parameters are not an object")),
        None => Err(too_large("tools")),
    }
}

/// Returns the form that `response_format` requires.
fn format(fields: &Fields<'_>, words: u32) -> Result<Form, Refusal> {
    let Some(format) = value(fields, "response_format")? else {
        return Ok(Form::Words);
    };
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(Form::Words),
        // The member's name is a token, too.
        Some("json_object") => {
            let words = words.saturating_sub(1).clamp(1, OBJECT_WORDS_MAX);
            Ok(Form::Object(words))
        }
        Some("json_schema") => {
            let Some(schema) = format.pointer("/json_schema/schema") else {
                let message = "When response_format type is 'json_schema', the 'json_schema' \
                               field must be provided.";
                return Err(Refusal::bad("response_format", message));
            };
            match instance(schema, "") {
                Some(_) => Ok(Form::Schema(schema.clone())),
                None => Err(too_large("response_format")),
            }
        }
        _ => {
            let message = "type: Input should be 'text', 'json_object' or 'json_schema'";
            Err(Refusal::bad("response_format", message))
        }
    }
}

fn too_large(param: &'static str) -> Refusal {
    Refusal::bad(param, "the mock engine cannot make a value for this schema")
}

/// Returns the value of a member; `None` if it is absent or `null`.
fn value(fields: &Fields<'_>, name: &'static str) -> Result<Option<Value>, Refusal> {
    fields
        .some(name)
        .map(serde_json::from_str)
        .transpose()
        .map_err(|error| Refusal::bad(name, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(body: &Value) -> Result<Form, String> {
        let text = body.to_string();
        let fields = Fields::parse(text.as_bytes()).unwrap();
        form(Kind::Chat, &fields, 4).map_err(|refusal| refusal.message)
    }

    fn tools() -> Value {
        let parameters = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
        json!([
            {"type": "function", "function": {"name": "f"}},
            {"type": "function", "function": {"name": "g", "parameters": parameters}},
        ])
    }

    #[test]
    fn a_tool_is_called_if_the_choice_requires_it() {
        for choice in [json!(null), json!("auto"), json!("none")] {
            let body = json!({"tools": tools(), "tool_choice": choice});
            assert_eq!(of(&body), Ok(Form::Words), "{body}");
        }
        let call = of(&json!({"tools": tools(), "tool_choice": "required"})).unwrap();
        assert_eq!(call.pieces("ab").unwrap().concat(), "{}");
        let choice = json!({"type": "function", "function": {"name": "g"}});
        let call = of(&json!({"tools": tools(), "tool_choice": choice})).unwrap();
        assert_eq!(call.pieces("ab").unwrap(), [r#"{"a": "#, "0}"]);
        assert!(matches!(call, Form::Call { named: true, .. }));
        for (body, part) in [
            (json!({"tool_choice": "required"}), "`tools` must be set"),
            (json!({"tools": []}), "must not be an empty array"),
            (
                json!({"tools": tools(), "tool_choice": "x"}),
                "`tool_choice`: x!",
            ),
            (
                json!({"tools": tools(), "tool_choice": {"function": {"name": "h"}}}),
                "does not match",
            ),
        ] {
            let error = of(&body).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn formats_are_json() {
        let form = of(&json!({"response_format": {"type": "json_object"}})).unwrap();
        let pieces = form.pieces("ab").unwrap();
        assert_eq!(pieces.len(), 4);
        let value: Value = serde_json::from_str(&pieces.concat()).unwrap();
        assert_eq!(value, json!({"text": "t0-ab t1-ab t2-ab"}));
        let schema = json!({"type": "object", "properties": {"a": {"type": "boolean"}}});
        let format = json!({"type": "json_schema", "json_schema": {"schema": schema}});
        let form = of(&json!({"response_format": format})).unwrap();
        assert_eq!(form.pieces("ab").unwrap().concat(), r#"{"a": true}"#);
        for (format, part) in [
            (json!({"type": "x"}), "'json_object'"),
            (json!({"type": "json_schema"}), "must be provided"),
            (
                json!({"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}),
                "cannot make",
            ),
        ] {
            let error = of(&json!({"response_format": format})).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
