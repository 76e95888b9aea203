//! The `LMCache` contract of the first llm-d sidecar: the prefill leg differs from the client's
//! request only in its token limits, and the decode leg is the client's request.

use super::fields::{Cap, one_token};
use super::{Admitted, Call, is_prefill_engine};
use crate::api::Refusal;

pub(super) fn admit(call: &Call<'_>) -> Result<Admitted, Refusal> {
    if is_prefill_engine(call) {
        one_token(call.fields, call.kind, Cap::Set, Cap::Free)?;
    }
    Ok(Admitted {
        is_prefill: is_prefill_engine(call),
        ..Admitted::default()
    })
}
