//! The NIXL version 1 contract: its members are at the top level of the request and response
//! bodies, and a handoff consists of four of them.

use std::collections::HashMap;
use std::sync::Arc;

use super::fields::{absent, broken, is, not_streamed};
use super::{Admitted, Call};
use crate::api::Refusal;
use crate::config::{HandoffShape, Role};
use crate::sync::Guarded;

/// The body members that make up a NIXL version 1 handoff.
const MEMBERS: [&str; 4] = [
    "remote_block_ids",
    "remote_engine_id",
    "remote_host",
    "remote_port",
];
/// Maximum number of handoffs that a [`BlockBook`] keeps. When it is reached, all of them are
/// dropped.
const ISSUED_MAX: usize = 65_536;

#[derive(Debug)]
struct Issued {
    values: [String; 4],
    prompt_sha256: String,
    used: bool,
}

#[derive(Debug, Default)]
struct Inner {
    /// The issued handoffs, by the bytes of their `remote_block_ids`, which are unique.
    issued: HashMap<String, Issued>,
    count: u64,
}

/// The NIXL version 1 handoffs that prefill engines have issued. Clones share their contents.
#[derive(Clone, Debug, Default)]
pub struct BlockBook {
    inner: Arc<Guarded<Inner>>,
    /// Whether handoffs are not verified because another process has issued them.
    apart: bool,
}

impl BlockBook {
    /// Returns a record without handoffs.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns a record that does not verify handoffs, for engines in separate processes.
    pub(crate) fn apart() -> Self {
        Self {
            apart: true,
            ..Self::default()
        }
    }

    /// Returns the number of handoffs that have been used at least once.
    #[must_use]
    pub fn used(&self) -> usize {
        let inner = self.inner.lock();
        inner.issued.values().filter(|issued| issued.used).count()
    }

    fn issue(&self, call: &Call<'_>) -> [String; 4] {
        let mut inner = self.inner.lock();
        if inner.issued.len() >= ISSUED_MAX {
            inner.issued.clear();
        }
        let nth = inner.count;
        inner.count += 1;
        let values = [
            format!("[{nth}, 9007199254740993]"),
            format!("\"v1-{}\"", call.port),
            "\"127.0.0.1\"".to_owned(),
            call.port.to_string(),
        ];
        let issued = Issued {
            values: values.clone(),
            prompt_sha256: call.prompt_sha256.to_owned(),
            used: false,
        };
        inner.issued.insert(values[0].clone(), issued);
        values
    }
}

pub(super) fn admit(book: &BlockBook, call: &Call<'_>) -> Result<Admitted, Refusal> {
    let flag = |name| call.fields.has(name);
    match (
        flag("do_remote_decode"),
        flag("do_remote_prefill"),
        call.role,
    ) {
        (true, false, Role::Prefill | Role::Both) => prefill(book, call),
        (false, true, Role::Decode | Role::Both) => decode(book, call),
        (false, false, Role::Decode | Role::Both) => Ok(Admitted::default()),
        (decode, prefill, role) => Err(broken(format!(
            "do_remote_decode given: {decode}, do_remote_prefill given: {prefill}, at {role:?} engine"
        ))),
    }
}

fn prefill(book: &BlockBook, call: &Call<'_>) -> Result<Admitted, Refusal> {
    is(call.fields, "do_remote_decode", "true")?;
    not_streamed(call.fields)?;
    let mut members = String::new();
    if call.shape != HandoffShape::Omit {
        for (name, value) in MEMBERS.iter().zip(book.issue(call)) {
            members += &format!(",\"{name}\":{value}");
        }
    }
    Ok(Admitted {
        members,
        is_prefill: true,
        ..Admitted::default()
    })
}

fn decode(book: &BlockBook, call: &Call<'_>) -> Result<Admitted, Refusal> {
    is(call.fields, "do_remote_prefill", "true")?;
    absent(call.fields, "do_remote_decode")?;
    for name in MEMBERS {
        if call.fields.count(name) != 1 {
            let count = call.fields.count(name);
            return Err(broken(format!("{name}: given {count} times")));
        }
    }
    let values = MEMBERS.map(|name| call.fields.raw(name).unwrap_or_default());
    if book.apart || values == ["null"; 4] {
        return Ok(Admitted::default());
    }
    let mut inner = book.inner.lock();
    let Some(issued) = inner.issued.get_mut(values[0]) else {
        return Err(Refusal::internal("handoff unknown or altered"));
    };
    if issued.values != values {
        return Err(Refusal::internal("handoff altered"));
    }
    let foreign = issued.used || issued.prompt_sha256 != call.prompt_sha256;
    issued.used = true;
    Ok(Admitted {
        foreign,
        ..Admitted::default()
    })
}
