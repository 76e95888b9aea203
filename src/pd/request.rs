//! A request as input for its legs.

use std::rc::Rc;

use super::decode_chunks::Progress;
use super::edits::{Caps, Edits};
use super::leg::{Leg, Role, Take};
use super::options::MoriConfig;
use super::push::PushIdentity;
use super::uuid::Uuid;
use crate::api::Api;
use crate::budget::Kept;
use crate::fleet::MoriHosts;
use crate::json::{Document, EditError, JsonError, Kind, Level, Member, Watch, validate};

/// Every member of a request body that is read or edited to build a leg.
pub const WATCH: Watch = &[
    (Level::Top, "max_tokens"),
    (Level::Top, "max_completion_tokens"),
    (Level::Top, "max_output_tokens"),
    (Level::Top, "min_tokens"),
    (Level::Top, "stream"),
    (Level::Top, "stream_options"),
    (Level::Top, "n"),
    (Level::Top, "best_of"),
    (Level::Top, "prompt"),
    (Level::Top, "messages"),
    (Level::Top, "model"),
    (Level::Top, "sampling_params"),
    (Level::Top, "kv_transfer_params"),
    (Level::Top, "ec_transfer_params"),
    (Level::Top, "cache_hit_threshold"),
    (Level::Top, "data_parallel_rank"),
    (Level::Top, "bootstrap_host"),
    (Level::Top, "bootstrap_port"),
    (Level::Top, "bootstrap_room"),
    (Level::Top, "bootstrap_pair_key"),
    (Level::Top, "disagg_prefill_dp_rank"),
    (Level::Top, "decode_tp_size"),
    (Level::Top, "do_remote_decode"),
    (Level::Top, "do_remote_prefill"),
    (Level::Top, "remote_block_ids"),
    (Level::Top, "remote_engine_id"),
    (Level::Top, "remote_host"),
    (Level::Top, "remote_port"),
    (Level::Top, "continue_final_message"),
    (Level::Top, "add_generation_prompt"),
    (Level::Top, "tools"),
    (Level::Top, "logprobs"),
    (Level::Top, "prompt_logprobs"),
    (Level::Top, "echo"),
    (Level::Top, "response_format"),
    (Level::Top, "return_token_ids"),
    (Level::Top, "structured_outputs"),
    (Level::Top, "stop"),
    (Level::Top, "use_beam_search"),
    (Level::Top, "truncate_prompt_tokens"),
    (Level::Top, "prompt_embeds"),
    (Level::Top, "background"),
    (Level::Top, "previous_response_id"),
    (Level::Top, "truncation"),
    (Level::Top, "thinking"),
    (Level::Top, "tool_choice"),
    (Level::Top, "features"),
    (Level::Top, "content_parts"),
    (Level::Top, "store"),
    (Level::Top, "request_id"),
    (Level::SamplingParams, "max_tokens"),
    (Level::SamplingParams, "min_tokens"),
    (Level::SamplingParams, "n"),
    (Level::SamplingParams, "best_of"),
    (Level::SamplingParams, "prompt_logprobs"),
    (Level::SamplingParams, "prompt_logprob_start"),
    (Level::SamplingParams, "prompt_logprob_token_ids"),
    (Level::SamplingParams, "skip_reading_prefix_cache"),
    (Level::ExtraArgs, "kv_transfer_params"),
    (Level::ExtraArgs, "ec_transfer_params"),
    (Level::Xargs, "kv_transfer_params"),
    (Level::Xargs, "ec_transfer_params"),
];

/// Members that must never pass from a client to an engine. An untrusted block list can make a
/// decoder exit or read another request's KV cache (`docs/engines.md#client-supplied-parameters`).
pub const CLIENT_OWNED_KV: Watch = &[
    (Level::Top, "kv_transfer_params"),
    (Level::Top, "ec_transfer_params"),
    (Level::ExtraArgs, "kv_transfer_params"),
    (Level::ExtraArgs, "ec_transfer_params"),
    (Level::Xargs, "kv_transfer_params"),
    (Level::Xargs, "ec_transfer_params"),
];

/// Returns [`CLIENT_OWNED_KV`] and `own`, the further members of a connector. `N` is the number of
/// both.
pub(super) const fn with_kv<const N: usize>(own: Watch) -> [(Level, &'static str); N] {
    let mut all = [CLIENT_OWNED_KV[0]; N];
    let mut at = 0;
    while at < N {
        all[at] = if at < CLIENT_OWNED_KV.len() {
            CLIENT_OWNED_KV[at]
        } else {
            own[at - CLIENT_OWNED_KV.len()]
        };
        at += 1;
    }
    all
}

/// Members that legs read and pass on, but never replace. They can be large.
const PASSED: [&str; 11] = [
    "content_parts",
    "features",
    "messages",
    "model",
    "prompt",
    "prompt_embeds",
    "response_format",
    "structured_outputs",
    "thinking",
    "tool_choice",
    "tools",
];

/// Checks the values that a leg may replace. A leg without the client's invalid value would be
/// served, while the engine of the other leg refuses it.
///
/// # Errors
/// The first invalid value.
pub fn check_edited(document: &Document, body: &[u8]) -> Result<(), JsonError> {
    let members = document.members().iter();
    members
        .filter(|member| !PASSED.contains(&member.name))
        .try_for_each(|member| check(member, body))
}

/// Checks the values of `messages`, which the legs to encoders replace.
///
/// # Errors
/// The first invalid value.
pub fn check_messages(document: &Document, body: &[u8]) -> Result<(), JsonError> {
    let members = document.members().iter();
    members
        .filter(|member| member.name == "messages")
        .try_for_each(|member| check(member, body))
}

fn check(member: &Member, body: &[u8]) -> Result<(), JsonError> {
    // The scan has checked the other kinds completely.
    if !matches!(member.kind, Kind::Object | Kind::Array | Kind::String) {
        return Ok(());
    }
    validate(member.value.of(body)).map_err(|error| error.after(member.value.start))
}

/// Returns the number of members in `owned` that the body sets to a value other than `null`. Every
/// leg omits them.
#[must_use]
pub fn client_owned(document: &Document, owned: Watch) -> u64 {
    let is_owned = |member: &&Member| owned.contains(&(member.level, member.name));
    let owned = document.members().iter().filter(is_owned);
    owned.filter(|member| member.kind != Kind::Null).count() as u64
}

/// The result of an encoder stage, which every later leg carries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The merged `ec_transfer_params`, a JSON object; `None` if the encoders returned none.
    pub params: Option<Rc<Kept>>,
}

/// One request, as input for its legs.
#[derive(Clone, Copy, Debug)]
pub struct PdRequest<'a> {
    /// The API, which determines the shape of the body.
    pub api: Api,
    /// Positions of the watched members in the body.
    pub document: &'a Document,
    /// The body as the client sent it.
    pub body: &'a [u8],
    /// Identifies the request to the engines, for example in transfer ids.
    pub uuid: Uuid,
    /// The members that clients must not set; empty if clients are trusted.
    pub owned: Watch,
    /// The result of the encoder stage, if there was one.
    pub encoded: Option<&'a Encoded>,
    /// Settings of `MoRI-IO`.
    pub mori: &'a MoriConfig,
    /// The pods of `MoRI-IO`, with names resolved.
    pub hosts: &'a MoriHosts,
    /// Number of data-parallel ranks of ATOM engines.
    pub atom_dp_size: u32,
    /// State of a response that is generated in chunks; a decode leg then requests the next chunk.
    /// `None` if the response is not generated in chunks.
    pub chunk: Option<&'a Progress>,
}

impl<'a> PdRequest<'a> {
    /// Returns the edits that every leg has. They remove the client's transfer parameters and, in a
    /// chunked decode, request the next chunk. After an encoder stage, they add the encoders'
    /// parameters and set `cache_hit_threshold` to 0.
    pub(super) fn edits(&self) -> Edits<'a> {
        let mut edits = Edits::of(self.document);
        for (level, name) in self.owned {
            edits.remove(*level, name);
        }
        if let Some(chunk) = self.chunk {
            chunk.edit(&mut edits);
        }
        if let Some(encoded) = self.encoded {
            edits.set(Level::Top, "cache_hit_threshold", b"0");
            if let Some(params) = &encoded.params {
                edits.set_kept("ec_transfer_params", params);
            }
        }
        edits
    }

    /// Builds a leg whose body is the client's body with `edits` applied. `take` is the part of the
    /// leg's response that is used.
    pub(super) fn leg(&self, role: Role, edits: &Edits<'_>, take: Take) -> Result<Leg, EditError> {
        Ok(Leg {
            role,
            body: edits.splices()?,
            take,
            rank: None,
            request_id: None,
        })
    }

    /// Returns a decode leg without transfer parameters.
    ///
    /// # Errors
    /// If the body needs more than `JSON_EDITS_MAX` edits.
    pub fn local_leg(&self) -> Result<Leg, EditError> {
        let take = match self.chunk {
            // The proxy reads chunks itself, so no content encoding may be requested.
            Some(_) => Take::Whole,
            None => Take::Response(None),
        };
        self.leg(Role::Decode, &self.edits(), take)
    }

    /// Returns a decode leg whose transfer parameters, `params`, specify a peer from which the
    /// decoder pulls a cached prefix.
    ///
    /// # Errors
    /// If the body needs more than `JSON_EDITS_MAX` edits.
    pub fn source_leg(&self, params: &[u8]) -> Result<Leg, EditError> {
        self.decode_leg(params, Take::Response(None))
    }

    /// Returns the decode leg that is sent together with the prefill leg to a prefiller that
    /// pushes. It has the request's UUID as its request id, and so must the prefill leg.
    ///
    /// # Errors
    /// If the body needs more than `JSON_EDITS_MAX` edits.
    pub fn push_leg(&self, prefiller: &PushIdentity) -> Result<Leg, EditError> {
        let take = Take::Response(self.api.usage_shape());
        let mut leg = self.decode_leg(&prefiller.params(self.uuid), take)?;
        leg.request_id = Some(self.uuid);
        Ok(leg)
    }

    /// Returns the prefill leg of most connectors: the client's body with `params` as its
    /// `kv_transfer_params`, token limits of 1 and no streaming.
    pub(super) fn prefill_leg(
        &self,
        params: &[u8],
        caps: Caps,
        take: Take,
    ) -> Result<Leg, EditError> {
        let mut edits = self.edits();
        edits.set(Level::Top, "kv_transfer_params", params);
        edits.cap(self.api, caps);
        edits.whole_response();
        self.leg(Role::Prefill, &edits, take)
    }

    /// Returns the client's body with the prefiller's handoff as its `kv_transfer_params`, which
    /// are not copied if they are large.
    pub(super) fn handoff_leg(&self, handoff: &Rc<Kept>, take: Take) -> Result<Leg, EditError> {
        let mut edits = self.edits();
        edits.set_kept("kv_transfer_params", handoff);
        self.leg(Role::Decode, &edits, take)
    }

    /// Returns the decode leg of most connectors: the client's body with `params` as its
    /// `kv_transfer_params`.
    pub(super) fn decode_leg(&self, params: &[u8], take: Take) -> Result<Leg, EditError> {
        let mut edits = self.edits();
        edits.set(Level::Top, "kv_transfer_params", params);
        self.leg(Role::Decode, &edits, take)
    }
}
