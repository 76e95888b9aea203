//! A request as input for its legs, and the edits that turn the client's body into a leg's body.

use super::chunked::Progress;
use super::leg::{Leg, Role, Take};
use super::options::MoriConfig;
use super::route::Api;
use super::uuid::Uuid;
use crate::fleet::MoriHosts;
use crate::json::{Document, Edit, EditError, Kind, Level, Member, Watch};

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
    (Level::Top, "sampling_params"),
    (Level::Top, "kv_transfer_params"),
    (Level::Top, "ec_transfer_params"),
    (Level::Top, "cache_hit_threshold"),
    (Level::Top, "bootstrap_host"),
    (Level::Top, "bootstrap_port"),
    (Level::Top, "bootstrap_room"),
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
    (Level::SamplingParams, "max_tokens"),
    (Level::SamplingParams, "min_tokens"),
    (Level::SamplingParams, "n"),
    (Level::SamplingParams, "best_of"),
    (Level::SamplingParams, "prompt_logprobs"),
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
    pub params: Option<Vec<u8>>,
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
    /// A random number, from which the number of `SGLang`'s bootstrap room is made.
    pub random: u64,
    /// The members that clients must not set; empty if clients are trusted.
    pub owned: Watch,
    /// The result of the encoder stage, if there was one.
    pub encoded: Option<&'a Encoded>,
    /// Settings of `MoRI-IO`.
    pub mori: &'a MoriConfig,
    /// The pods of `MoRI-IO`, with names resolved.
    pub hosts: &'a MoriHosts,
    /// State of a response that is generated in chunks; a decode leg then requests the next chunk.
    /// `None` if the response is not generated in chunks.
    pub chunk: Option<&'a Progress>,
}

/// The token limits that a prefill leg sets to 1. The variants differ in the limits that are set
/// even if the client did not send them.
///
/// The names are those of chat completions. The generate API has `max_tokens` and `min_tokens`
/// inside `sampling_params`. The responses API has only `max_output_tokens`, which is always set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caps {
    /// `max_tokens`, `max_completion_tokens` and `min_tokens` are always set, because engines have
    /// defaults for them.
    All,
    /// The limits of [`Caps::All`] and `max_output_tokens` are always set.
    Every,
    /// `max_tokens` and `max_completion_tokens` are always set. `min_tokens` is set only if the
    /// client sent it, because engines refuse a minimum above the maximum.
    Maxima,
    /// `max_tokens` is always set, the other limits only if the client sent them.
    Sent,
}

/// The edits of one leg. A later edit of a member replaces an earlier one.
#[derive(Debug)]
pub(super) struct Edits<'a> {
    document: &'a Document,
    list: Vec<Edit<'a>>,
}

impl<'a> Edits<'a> {
    pub(super) fn set(&mut self, level: Level, name: &'static str, value: &'a [u8]) {
        self.push(Edit::Set { level, name, value });
    }

    pub(super) fn remove(&mut self, level: Level, name: &'static str) {
        self.list
            .retain(|earlier| earlier.target() != (level, name));
        let mut members = self.document.members().iter();
        // Most bodies have none of the members to remove, and a removal without effect costs as
        // much as any other edit.
        if members.any(|member| member.level == level && member.name == name) {
            self.list.push(Edit::Remove { level, name });
        }
    }

    /// Appends `text` after the last element of the top-level array `name`. The text begins with
    /// the comma that separates the elements.
    pub(super) fn append(&mut self, name: &'static str, text: &'a [u8]) {
        let level = Level::Top;
        self.push(Edit::Append { level, name, text });
    }

    fn push(&mut self, edit: Edit<'a>) {
        self.list
            .retain(|earlier| earlier.target() != edit.target());
        self.list.push(edit);
    }

    /// Sets the token limits of the request's API to 1. `caps` selects the limits that are set even
    /// if the client did not send them.
    pub(super) fn cap(&mut self, request: &PdRequest<'_>, caps: Caps) {
        match request.api {
            Api::Chat | Api::Completions | Api::Messages | Api::Invocations | Api::Unsplit => {
                self.cap_chat(request, caps);
            }
            Api::Responses => self.set(Level::Top, "max_output_tokens", b"1"),
            Api::Generate => self.cap_generate(request, caps),
        }
    }

    fn cap_chat(&mut self, request: &PdRequest<'_>, caps: Caps) {
        let sent = |name| request.document.last(Level::Top, name).is_some();
        self.set(Level::Top, "max_tokens", b"1");
        if caps != Caps::Sent || sent("max_completion_tokens") {
            self.set(Level::Top, "max_completion_tokens", b"1");
        }
        if matches!(caps, Caps::All | Caps::Every) || sent("min_tokens") {
            self.set(Level::Top, "min_tokens", b"1");
        }
        if caps == Caps::Every {
            self.set(Level::Top, "max_output_tokens", b"1");
        }
    }

    fn cap_generate(&mut self, request: &PdRequest<'_>, caps: Caps) {
        let document = request.document;
        let min_too = matches!(caps, Caps::All | Caps::Every);
        if !document.has_object(Level::SamplingParams) {
            // `sampling_params` is replaced as a whole, which includes every earlier duplicate.
            // Edits inside one of them would conflict with that.
            self.list.retain(|edit| {
                !matches!(edit.target().0, Level::SamplingParams | Level::ExtraArgs)
            });
            let value: &[u8] = if min_too {
                br#"{"max_tokens":1,"min_tokens":1}"#
            } else {
                br#"{"max_tokens":1}"#
            };
            self.set(Level::Top, "sampling_params", value);
            return;
        }
        self.set(Level::SamplingParams, "max_tokens", b"1");
        if min_too || document.last(Level::SamplingParams, "min_tokens").is_some() {
            self.set(Level::SamplingParams, "min_tokens", b"1");
        }
    }

    /// Disables streaming. `stream_options` is removed, because engines refuse it on a request that
    /// does not stream.
    pub(super) fn whole_response(&mut self) {
        self.set(Level::Top, "stream", b"false");
        self.remove(Level::Top, "stream_options");
    }
}

impl<'a> PdRequest<'a> {
    /// Returns the edits that every leg has. They remove the client's transfer parameters and, in a
    /// chunked decode, request the next chunk. After an encoder stage, they add the encoders'
    /// parameters and set `cache_hit_threshold` to 0.
    pub(super) fn edits(&self) -> Edits<'a> {
        let mut edits = Edits {
            document: self.document,
            list: Vec::with_capacity(16),
        };
        for (level, name) in self.owned {
            edits.remove(*level, name);
        }
        if let Some(chunk) = self.chunk {
            chunk.edit(&mut edits);
        }
        if let Some(encoded) = self.encoded {
            edits.set(Level::Top, "cache_hit_threshold", b"0");
            if let Some(params) = &encoded.params {
                edits.set(Level::Top, "ec_transfer_params", params);
            }
        }
        edits
    }

    /// Builds a leg whose body is the client's body with `edits` applied. `take` is the part of the
    /// leg's response that is used.
    pub(super) fn leg(&self, role: Role, edits: &Edits<'_>, take: Take) -> Result<Leg, EditError> {
        Ok(Leg {
            role,
            body: self.document.edit(&edits.list)?,
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
        edits.cap(self, caps);
        edits.whole_response();
        self.leg(Role::Prefill, &edits, take)
    }

    /// Returns the decode leg of most connectors: the client's body with `params` as its
    /// `kv_transfer_params`.
    pub(super) fn decode_leg(&self, params: &[u8], take: Take) -> Result<Leg, EditError> {
        let mut edits = self.edits();
        edits.set(Level::Top, "kv_transfer_params", params);
        self.leg(Role::Decode, &edits, take)
    }
}
