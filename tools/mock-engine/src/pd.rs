//! Split requests with NIXL version 2: checks prefill requests, issues handoffs in prefill
//! responses, and verifies the handoffs that decode requests carry.
//!
//! A proxy must treat a handoff as opaque. This module therefore formats each one by hand, with
//! numbers, escapes and whitespace that no JSON library reproduces, and compares the returned
//! handoff byte for byte.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;
use serde_json::value::RawValue;

use crate::api::Kind;
use crate::config::HandoffShape;
use crate::json::Fields;
use crate::sync::Guarded;

/// Maximum number of handoffs that a [`HandoffRegistry`] keeps; beyond it, the oldest is dropped.
const HANDOFFS_MAX: usize = 65_536;

/// The leg that a request is, according to its `kv_transfer_params`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leg {
    /// No leg of a split request: `kv_transfer_params` is absent or `null`.
    Local,
    /// A prefill leg: `do_remote_decode` is `true` and `do_remote_prefill` is not.
    Prefill,
    /// A decode leg: `do_remote_prefill` is `true` and `do_remote_decode` is not.
    Decode,
    /// A `kv_transfer_params` that crashes a real engine: an object in which neither or both of
    /// `do_remote_decode` and `do_remote_prefill` are `true`, or a value that is not an object.
    Poison,
}

/// Determines the leg from the `kv_transfer_params` of a request.
pub(crate) fn leg(params: Option<&RawValue>) -> Leg {
    let Some(raw) = params.filter(|raw| raw.get() != "null") else {
        return Leg::Local;
    };
    let Ok(fields) = Fields::parse(raw.get().as_bytes()) else {
        return Leg::Poison;
    };
    let flag = |name| fields.raw(name) == Some("true");
    match (flag("do_remote_decode"), flag("do_remote_prefill")) {
        (true, false) => Leg::Prefill,
        (false, true) => Leg::Decode,
        (true, true) | (false, false) => Leg::Poison,
    }
}

/// The required members of a prefill request's `kv_transfer_params` and their values.
const CONTRACT: [(&str, &str); 6] = [
    ("do_remote_decode", "true"),
    ("do_remote_prefill", "false"),
    ("remote_engine_id", "null"),
    ("remote_block_ids", "null"),
    ("remote_host", "null"),
    ("remote_port", "null"),
];

/// Checks a prefill leg, whose `kv_transfer_params` are `params`. The error names the first member
/// that violates the contract.
pub(crate) fn check_contract(
    kind: Kind,
    body: &Fields<'_>,
    params: &RawValue,
) -> Result<(), String> {
    let fields = Fields::parse(params.get().as_bytes())
        .map_err(|_| "kv_transfer_params: not an object".to_owned())?;
    for (name, want) in CONTRACT {
        let have = fields.raw(name).unwrap_or("absent");
        if have != want {
            return Err(format!(
                "kv_transfer_params.{name}: want {want}, got {have}"
            ));
        }
    }
    for name in fields.names() {
        if name != "remote_kv_source" && CONTRACT.iter().all(|(known, _)| *known != name) {
            return Err(format!(
                "kv_transfer_params.{name}: not part of the contract"
            ));
        }
    }
    if fields.len() > fields.names_distinct() {
        return Err("kv_transfer_params: a member is given more than once".to_owned());
    }
    expect(body, "", "stream", "false")?;
    if body.has("stream_options") {
        return Err("stream_options: must be absent".to_owned());
    }
    match kind {
        Kind::Chat | Kind::Completions | Kind::Messages => {
            for name in ["max_tokens", "max_completion_tokens", "min_tokens"] {
                expect(body, "", name, "1")?;
            }
        }
        Kind::Responses => expect(body, "", "max_output_tokens", "1")?,
        Kind::Generate => {
            let raw = body.raw("sampling_params").unwrap_or("null");
            let sampling = Fields::parse(raw.as_bytes())
                .map_err(|_| "sampling_params: not an object".to_owned())?;
            for name in ["max_tokens", "min_tokens"] {
                expect(&sampling, "sampling_params.", name, "1")?;
            }
        }
    }
    Ok(())
}

fn expect(fields: &Fields<'_>, prefix: &str, name: &str, want: &str) -> Result<(), String> {
    match fields.count(name) {
        0 => return Err(format!("{prefix}{name}: want {want}, got absent")),
        1 => {}
        _ => return Err(format!("{prefix}{name}: given more than once")),
    }
    let have = fields.raw(name).unwrap_or("absent");
    if have == want {
        Ok(())
    } else {
        Err(format!("{prefix}{name}: want {want}, got {have}"))
    }
}

/// The result of verifying a handoff that a decode request carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The handoff is known, unaltered, used for the first time, and for the prompt it was issued
    /// for.
    Good,
    /// The handoff has been used before.
    Reused,
    /// The handoff was issued for another prompt.
    Foreign,
    /// The `remote_request_id` is known, but the handoff differs from the bytes issued with that
    /// id.
    Altered,
    /// The handoff has no `remote_request_id`, or one that is not in the registry.
    Unknown,
}

#[derive(Debug)]
struct Issued {
    raw: Box<str>,
    prompt_sha256: String,
    uses: u32,
}

#[derive(Debug, Default)]
struct Book {
    issued: HashMap<String, Issued>,
    order: VecDeque<String>,
}

/// A registry of the NIXL version 2 handoffs that a group of engines has issued.
///
/// Clones share their contents. Give clones of one registry to the prefill and decode engines of a
/// test.
#[derive(Clone, Debug, Default)]
pub struct HandoffRegistry {
    book: Arc<Guarded<Book>>,
}

impl HandoffRegistry {
    /// Returns an empty registry.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the number of handoffs in the registry.
    #[must_use]
    pub fn len(&self) -> usize {
        self.book.lock().issued.len()
    }

    /// Returns whether the registry is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the number of handoffs in the registry that were never used.
    #[must_use]
    pub fn unused(&self) -> usize {
        let book = self.book.lock();
        book.issued
            .values()
            .filter(|issued| issued.uses == 0)
            .count()
    }

    /// Returns the raw bytes of all handoffs in the registry, in the order of issue.
    #[must_use]
    pub fn issued(&self) -> Vec<String> {
        let book = self.book.lock();
        book.order
            .iter()
            .filter_map(|id| book.issued.get(id))
            .map(|issued| issued.raw.to_string())
            .collect()
    }

    /// Records the handoff `raw`, issued with the `remote_request_id` `id` for the given prompt.
    pub(crate) fn issue(&self, id: String, raw: &str, prompt_sha256: &str) {
        let mut book = self.book.lock();
        if book.order.len() >= HANDOFFS_MAX
            && let Some(oldest) = book.order.pop_front()
        {
            book.issued.remove(&oldest);
        }
        book.order.push_back(id.clone());
        book.issued.insert(
            id,
            Issued {
                raw: raw.into(),
                prompt_sha256: prompt_sha256.to_owned(),
                uses: 0,
            },
        );
    }

    /// Verifies the handoff `raw`, which a decode leg for the given prompt contains. Counts the use
    /// of a handoff that is known and unaltered.
    pub(crate) fn redeem(&self, raw: &str, prompt_sha256: &str) -> Verdict {
        let id = Fields::parse(raw.as_bytes())
            .ok()
            .and_then(|fields| fields.string("remote_request_id"));
        let mut book = self.book.lock();
        let Some(issued) = id.and_then(|id| book.issued.get_mut(&id)) else {
            return Verdict::Unknown;
        };
        if &*issued.raw != raw {
            return Verdict::Altered;
        }
        issued.uses += 1;
        if issued.uses > 1 {
            Verdict::Reused
        } else if issued.prompt_sha256 != prompt_sha256 {
            Verdict::Foreign
        } else {
            Verdict::Good
        }
    }
}

/// Number of the next handoff, counted over all engines: an engine that is started again on the
/// same port must not repeat its predecessor's ids.
static NEXT_HANDOFF: AtomicU64 = AtomicU64::new(0);

/// Issues the handoffs of one engine and remembers the last one for [`HandoffShape::Stale`].
#[derive(Debug, Default)]
pub(crate) struct Issuer {
    last: Guarded<Option<String>>,
}

/// The values that a fresh handoff contains or is recorded with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms<'a> {
    pub(crate) engine_id: &'a str,
    pub(crate) port: u16,
    pub(crate) prompt_sha256: &'a str,
    pub(crate) prompt_tokens: u64,
    pub(crate) cached_tokens: u64,
}

impl Issuer {
    /// Returns the members for a prefill response in the given shape, each with a leading comma:
    /// `kv_transfer_params`, preceded by `metadata` for [`HandoffShape::Decoys`]. Returns an empty
    /// string for [`HandoffShape::Omit`]. A new handoff is recorded in `registry`.
    pub(crate) fn members(
        &self,
        shape: HandoffShape,
        registry: &HandoffRegistry,
        terms: Terms<'_>,
    ) -> String {
        let fresh = |blocks| self.fresh(blocks, registry, terms);
        let value = match shape {
            HandoffShape::Fresh => fresh(NESTED),
            HandoffShape::Flat => fresh(FLAT),
            HandoffShape::Omit => return String::new(),
            HandoffShape::Null => "null".to_owned(),
            HandoffShape::Empty => "{}".to_owned(),
            HandoffShape::Text => "\"not an object\"".to_owned(),
            HandoffShape::List => "[{\"do_remote_prefill\":true}]".to_owned(),
            HandoffShape::Stale => {
                let last = self.last.lock().clone();
                last.unwrap_or_else(|| fresh(NESTED))
            }
            HandoffShape::Decoys => {
                let value = fresh(NESTED);
                return format!(
                    ",\"metadata\":{{\"kv_transfer_params\":{{\"do_remote_prefill\":true}},\
                     \"note\":\"\\\"kv_transfer_params\\\":{{\"}},\"kv_transfer_params\":{value}"
                );
            }
        };
        format!(",\"kv_transfer_params\":{value}")
    }

    /// Returns a new, unique handoff with the given `remote_block_ids`, and records it in
    /// `registry`.
    fn fresh(&self, blocks: &str, registry: &HandoffRegistry, terms: Terms<'_>) -> String {
        let nth = NEXT_HANDOFF.fetch_add(1, Ordering::Relaxed);
        let id = format!("{}-{}-{nth:x}", terms.engine_id, terms.port);
        let raw = format!(
            "{{ \"do_remote_prefill\" : true,\"do_remote_decode\":false ,\n  \
             \"remote_block_ids\":{blocks},\t\"remote_engine_id\":{engine},\
             \"remote_request_id\":{quoted},\"remote_host\":\"127.0.0.1\",\"remote_port\":{port},\
             \"tp_size\":1,\"remote_num_tokens\":{tokens},\
             \"remote_prefill_cached_tokens\":{cached} , {ODDITIES}\r\n}}",
            engine = Value::from(terms.engine_id),
            quoted = Value::from(id.as_str()),
            port = terms.port,
            tokens = terms.prompt_tokens,
            cached = terms.cached_tokens,
        );
        registry.issue(id, &raw, terms.prompt_sha256);
        *self.last.lock() = Some(raw.clone());
        raw
    }
}

/// The `remote_block_ids` of a handoff: one list of block ids per KV-cache group. The last id
/// cannot be represented exactly as a double, so a proxy that parses the ids as doubles changes it.
const NESTED: &str = "[[1, 2,3 ,9007199254740993]]";

/// The `remote_block_ids` of a handoff as a flat list, as older vLLM releases sent them.
const FLAT: &str = "[1, 2,3 ,9007199254740993]";

/// Members of a handoff whose bytes change if a proxy parses and prints them again.
const ODDITIES: &str = "\"remote_blocks_expiry_time\":null,\"transfer_mode\":\"pull\",\
     \"mock_nonce\":12345678901234567890,\"mock_floats\":[1.0,1e5,0.1e-7,-0.0],\
     \"mock_escapes\":\"\\u003c\\u00e9\\/\\ud83d\\ude00\",\"mock_text\":\"é漢字🙂\",\
     \"mock_trap\":\"}]\\\"{ \\\\\",\"mock_nested\":{ \"z\":[ ],\"a\":{\t} }";

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms<'_> = Terms {
        engine_id: "e",
        port: 5600,
        prompt_sha256: "aa",
        prompt_tokens: 3,
        cached_tokens: 7,
    };

    fn fresh(issuer: &Issuer, registry: &HandoffRegistry) -> String {
        issuer.members(HandoffShape::Fresh, registry, TERMS)[",\"kv_transfer_params\":".len()..]
            .to_owned()
    }

    #[test]
    fn a_handoff_is_json_and_differs_from_its_reserialization() {
        let raw = fresh(&Issuer::default(), &HandoffRegistry::new());
        let value: Value = serde_json::from_str(&raw).unwrap();
        assert_eq!(value["do_remote_prefill"], true);
        assert_eq!(value["mock_nonce"].to_string(), "12345678901234567890");
        assert_ne!(value.to_string(), raw);
    }

    #[test]
    fn the_registry_verifies_handoffs() {
        let (issuer, registry) = (Issuer::default(), HandoffRegistry::new());
        let first = fresh(&issuer, &registry);
        let second = fresh(&issuer, &registry);
        assert_ne!(first, second);
        assert_eq!(registry.unused(), 2);
        let reprint = serde_json::from_str::<Value>(&first).unwrap().to_string();
        assert_eq!(registry.redeem(&reprint, "aa"), Verdict::Altered);
        assert_eq!(registry.redeem(&first, "aa"), Verdict::Good);
        assert_eq!(registry.redeem(&first, "aa"), Verdict::Reused);
        assert_eq!(registry.redeem(&second, "bb"), Verdict::Foreign);
        assert_eq!(registry.redeem("{}", "aa"), Verdict::Unknown);
        assert_eq!(registry.issued(), [first, second]);
    }

    #[test]
    fn every_handoff_shape_is_valid_json() {
        let (issuer, registry) = (Issuer::default(), HandoffRegistry::new());
        for shape in [
            HandoffShape::Fresh,
            HandoffShape::Flat,
            HandoffShape::Omit,
            HandoffShape::Null,
            HandoffShape::Empty,
            HandoffShape::Text,
            HandoffShape::List,
            HandoffShape::Stale,
            HandoffShape::Decoys,
        ] {
            let members = issuer.members(shape, &registry, TERMS);
            let text = format!("{{\"a\":1{members}}}");
            let value: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(
                value.get("kv_transfer_params").is_none(),
                shape == HandoffShape::Omit,
                "{shape:?}"
            );
        }
    }

    #[test]
    fn contract_errors_name_the_member() {
        let good = r#"{"messages":[],"stream":false,"max_tokens":1,"max_completion_tokens":1,
            "min_tokens":1,"kv_transfer_params":{"do_remote_decode":true,"do_remote_prefill":false,
            "remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}}"#;
        let cases = [
            (good.to_owned(), None),
            (good.replace("\"stream\":false,", ""), Some("stream")),
            (
                good.replace(":false,\"max_t", ":true,\"max_t"),
                Some("stream"),
            ),
            (
                good.replace("\"min_tokens\":1", "\"min_tokens\":2"),
                Some("min_tokens"),
            ),
            (
                good.replace("max_completion_tokens", "x"),
                Some("max_completion_tokens"),
            ),
            (
                good.replace("\"remote_port\":null", "\"remote_port\":1"),
                Some("remote_port"),
            ),
            (
                good.replace("\"remote_port\":null", "\"remote_port\":null,\"y\":1"),
                Some(".y"),
            ),
            (
                good.replace(
                    "\"remote_port\":null",
                    "\"remote_port\":null,\"remote_kv_source\":1",
                ),
                None,
            ),
            (
                good.replace("\"messages\"", "\"stream_options\":{},\"messages\""),
                Some("stream_opt"),
            ),
            (
                good.replace("\"messages\"", "\"stream\":false,\"messages\""),
                Some("more than once"),
            ),
        ];
        for (text, want) in cases {
            let body = Fields::parse(text.as_bytes()).unwrap();
            let params = body.value("kv_transfer_params").unwrap();
            let got = check_contract(Kind::Chat, &body, params);
            match (got, want) {
                (Ok(()), None) => {}
                (Err(got), Some(want)) => assert!(got.contains(want), "{got} / {want}"),
                (got, want) => panic!("{got:?} / {want:?}: {text}"),
            }
        }
    }

    #[test]
    fn the_leg_follows_the_flags() {
        for (text, want) in [
            ("null", Leg::Local),
            ("{}", Leg::Poison),
            ("[]", Leg::Poison),
            (r#"{"do_remote_decode":true}"#, Leg::Prefill),
            (r#"{"do_remote_prefill" : true }"#, Leg::Decode),
            (
                r#"{"do_remote_prefill":true,"do_remote_decode":true}"#,
                Leg::Poison,
            ),
        ] {
            let raw: &RawValue = serde_json::from_str(text).unwrap();
            assert_eq!(leg(Some(raw)), want, "{text}");
        }
        assert_eq!(leg(None), Leg::Local);
    }
}
