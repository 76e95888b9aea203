//! Checks of individual members, from which the contracts are built. Each error names the member.

use crate::api::{Kind, Refusal};
use crate::json::Fields;

/// Returns the 400 response to a request that violates a contract; `message` names the violation.
pub(crate) fn broken(message: impl Into<String>) -> Refusal {
    Refusal::bad("kv_contract", message)
}

/// Checks that `name` is present once, with a value whose bytes are exactly `want`.
pub(crate) fn is(fields: &Fields<'_>, name: &str, want: &str) -> Result<(), Refusal> {
    once(fields, name)?;
    match fields.raw(name) {
        Some(have) if have == want => Ok(()),
        Some(have) => Err(broken(format!("{name}: want {want}, got {have}"))),
        None => Err(broken(format!("{name}: want {want}, got absent"))),
    }
}

/// Checks like [`is`], but also accepts a request without `name`.
pub(crate) fn is_or_absent(fields: &Fields<'_>, name: &str, want: &str) -> Result<(), Refusal> {
    if fields.has(name) {
        is(fields, name, want)
    } else {
        Ok(())
    }
}

/// Checks that `name` is absent.
pub(crate) fn absent(fields: &Fields<'_>, name: &str) -> Result<(), Refusal> {
    match fields.raw(name) {
        None => Ok(()),
        Some(have) => Err(broken(format!("{name}: must be absent, got {have}"))),
    }
}

fn once(fields: &Fields<'_>, name: &str) -> Result<(), Refusal> {
    match fields.count(name) {
        0 | 1 => Ok(()),
        _ => Err(broken(format!("{name}: given more than once"))),
    }
}

/// Returns the value of `name`, which must be a string that is not empty.
pub(crate) fn text(fields: &Fields<'_>, name: &str) -> Result<String, Refusal> {
    once(fields, name)?;
    fields
        .string(name)
        .filter(|text| !text.is_empty())
        .ok_or_else(|| {
            let have = fields.raw(name).unwrap_or("absent");
            broken(format!("{name}: want a string, got {have}"))
        })
}

/// Returns the value of `name`, which must be a whole number written as plain digits.
pub(crate) fn number(fields: &Fields<'_>, name: &str) -> Result<u64, Refusal> {
    once(fields, name)?;
    let have = fields.raw(name).unwrap_or("absent");
    let digits = have.bytes().all(|byte| byte.is_ascii_digit());
    have.parse()
        .ok()
        .filter(|_| digits)
        .ok_or_else(|| broken(format!("{name}: want a whole number, got {have}")))
}

/// Returns the value of `name`, which must be a TCP port other than 0.
pub(crate) fn port(fields: &Fields<'_>, name: &str) -> Result<u16, Refusal> {
    let number = number(fields, name)?;
    match u16::try_from(number) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(broken(format!("{name}: {number} is not a port"))),
    }
}

/// Returns the value of `name`, which must be a list of strings.
pub(crate) fn texts(fields: &Fields<'_>, name: &str) -> Result<Vec<String>, Refusal> {
    let have = fields.raw(name).unwrap_or("absent");
    serde_json::from_str(have).map_err(|_| broken(format!("{name}: want strings, got {have}")))
}

/// Returns the members of the value of `name`, which must be an object.
pub(crate) fn object<'a>(fields: &Fields<'a>, name: &str) -> Result<Fields<'a>, Refusal> {
    once(fields, name)?;
    let have = fields.raw(name).unwrap_or("absent");
    Fields::parse(have.as_bytes())
        .map_err(|_| broken(format!("{name}: want an object, got {have}")))
}

/// Checks that an object has exactly the members `names`, each once. `place` is the object's name
/// in error messages.
pub(crate) fn exactly(fields: &Fields<'_>, place: &str, names: &[&str]) -> Result<(), Refusal> {
    for name in names {
        if fields.count(name) != 1 {
            let count = fields.count(name);
            return Err(broken(format!("{place}.{name}: given {count} times")));
        }
    }
    match fields.names().find(|name| !names.contains(name)) {
        Some(name) => Err(broken(format!("{place}.{name}: not part of the contract"))),
        None => Ok(()),
    }
}

/// Specifies how a member that limits the number of tokens is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cap {
    /// The limit must be present with the value 1.
    Set,
    /// The limit may be absent, but must be 1 if present.
    IfGiven,
    /// The limit is not checked.
    Free,
}

/// Checks that the request is limited to one token.
///
/// The main limit of the API must be 1: `max_output_tokens` for the responses API, otherwise
/// `max_tokens`. `completion` specifies how `max_completion_tokens` is checked, and `least` how
/// `min_tokens` is, for the APIs that have these members.
pub(crate) fn one_token(
    fields: &Fields<'_>,
    kind: Kind,
    completion: Cap,
    least: Cap,
) -> Result<(), Refusal> {
    let cap = |fields: &Fields<'_>, name, cap| match cap {
        Cap::Set => is(fields, name, "1"),
        Cap::IfGiven => is_or_absent(fields, name, "1"),
        Cap::Free => Ok(()),
    };
    match kind {
        Kind::Chat | Kind::Completions | Kind::Messages => {
            is(fields, "max_tokens", "1")?;
            cap(fields, "max_completion_tokens", completion)?;
            cap(fields, "min_tokens", least)
        }
        Kind::Responses => is(fields, "max_output_tokens", "1"),
        Kind::Generate => {
            let sampling = object(fields, "sampling_params")?;
            is(&sampling, "max_tokens", "1")?;
            cap(&sampling, "min_tokens", least)
        }
    }
}

/// Checks that `stream` is present with the value `false` and that `stream_options` is absent.
pub(crate) fn not_streamed(fields: &Fields<'_>) -> Result<(), Refusal> {
    is(fields, "stream", "false")?;
    absent(fields, "stream_options")
}

/// Checks that `text` is a version 4 UUID in lower case.
pub(crate) fn uuid4(name: &str, text: &str) -> Result<(), Refusal> {
    uuid(name, text)?;
    let variant = text.as_bytes().get(19).copied().unwrap_or_default();
    if text.as_bytes().get(14) == Some(&b'4') && matches!(variant, b'8' | b'9' | b'a' | b'b') {
        Ok(())
    } else {
        Err(broken(format!("{name}: {text} is not a version 4 UUID")))
    }
}

/// Checks that `text` is a UUID in lower case.
pub(crate) fn uuid(name: &str, text: &str) -> Result<(), Refusal> {
    let is_uuid = text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
        });
    if is_uuid {
        Ok(())
    } else {
        Err(broken(format!("{name}: {text} is not a UUID")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_names_its_member() {
        let fields = Fields::parse(br#"{"a":1,"b":"x","c":{"d":1},"e":1,"e":1,"f":1.0}"#).unwrap();
        let sub = object(&fields, "c").unwrap();
        let failures = [
            (is(&fields, "a", "2"), "a: want 2, got 1"),
            (is(&fields, "z", "2"), "z: want 2, got absent"),
            (is(&fields, "e", "1"), "e: given more than once"),
            (absent(&fields, "b"), "b: must be absent"),
            (text(&fields, "a").map(drop), "a: want a string"),
            (number(&fields, "f").map(drop), "f: want a whole"),
            (number(&fields, "b").map(drop), "b: want a whole"),
            (object(&fields, "a").map(drop), "a: want an object"),
            (exactly(&sub, "c", &[]), "c.d: not part"),
            (exactly(&sub, "c", &["d", "x"]), "c.x: given 0"),
            (uuid4("u", "x"), "u: x is not a UUID"),
            (
                uuid4("u", "00000000-0000-1000-8000-000000000000"),
                "not a version 4",
            ),
        ];
        for (got, want) in failures {
            let message = got.unwrap_err().message;
            assert!(message.contains(want), "{message} / {want}");
        }
        assert_eq!(port(&fields, "a"), Ok(1));
        assert_eq!(uuid4("u", "6ba7b810-9dad-41d1-80b4-00c04fd430c8"), Ok(()));
        assert_eq!(is_or_absent(&fields, "z", "1"), Ok(()));
        assert_eq!(exactly(&sub, "c", &["d"]), Ok(()));
    }

    #[test]
    fn token_limits_are_checked_in_each_apis_members() {
        let check = |text: &str, kind, completion, least| {
            let fields = Fields::parse(text.as_bytes()).unwrap();
            one_token(&fields, kind, completion, least).map_err(|refusal| refusal.message)
        };
        let chat = |text, completion| check(text, Kind::Chat, completion, Cap::IfGiven);
        assert_eq!(chat(r#"{"max_tokens":1}"#, Cap::IfGiven), Ok(()));
        let missing = chat(r#"{"max_tokens":1}"#, Cap::Set).unwrap_err();
        assert!(missing.starts_with("max_completion_tokens"), "{missing}");
        let least = chat(r#"{"max_tokens":1,"min_tokens":5}"#, Cap::IfGiven).unwrap_err();
        assert!(least.starts_with("min_tokens"), "{least}");
        let generate = r#"{"max_tokens":1,"sampling_params":{"max_tokens":9}}"#;
        assert!(check(generate, Kind::Generate, Cap::Free, Cap::Free).is_err());
        let responses = r#"{"max_tokens":9,"max_output_tokens":1}"#;
        assert_eq!(
            check(responses, Kind::Responses, Cap::Free, Cap::Free),
            Ok(())
        );
    }
}
