//! What the legs of one request are made of: the client's body, and edits of it.

use super::chunked::Progress;
use super::options::{KvConnector, MoriConfig};
use super::plan::{Leg, Role, Take};
use super::route::Api;
use super::uuid::Uuid;
use crate::json::{Document, Edit, EditError, Kind, Level, Member, Watch};

/// Every member that some plan reads or edits.
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

/// The members a client must never reach an engine with: a foreign block list kills a decoder, or
/// reads another request's KV cache (reference `vllm-api` 4.2).
pub const CLIENT_OWNED_KV: Watch = &[
    (Level::Top, "kv_transfer_params"),
    (Level::Top, "ec_transfer_params"),
    (Level::ExtraArgs, "kv_transfer_params"),
    (Level::ExtraArgs, "ec_transfer_params"),
    (Level::Xargs, "kv_transfer_params"),
    (Level::Xargs, "ec_transfer_params"),
];

/// The same where engines read NIXL's first parameters, which sit at the top of the body.
const CLIENT_OWNED_KV_NIXL: Watch = &[
    (Level::Top, "kv_transfer_params"),
    (Level::Top, "ec_transfer_params"),
    (Level::Top, "do_remote_decode"),
    (Level::Top, "do_remote_prefill"),
    (Level::Top, "remote_block_ids"),
    (Level::Top, "remote_engine_id"),
    (Level::Top, "remote_host"),
    (Level::Top, "remote_port"),
    (Level::ExtraArgs, "kv_transfer_params"),
    (Level::ExtraArgs, "ec_transfer_params"),
    (Level::Xargs, "kv_transfer_params"),
    (Level::Xargs, "ec_transfer_params"),
];

/// What a connector's engines read and clients must not write.
#[must_use]
pub const fn owned(connector: KvConnector) -> Watch {
    match connector {
        KvConnector::Nixl => CLIENT_OWNED_KV_NIXL,
        KvConnector::Nixlv2
        | KvConnector::SharedStorage
        | KvConnector::Sglang
        | KvConnector::Mooncake
        | KvConnector::Offloading
        | KvConnector::Lmcache => CLIENT_OWNED_KV,
    }
}

/// How many members of `owned` a body has: every plan leaves them out.
#[must_use]
pub fn client_owned(document: &Document, owned: Watch) -> u64 {
    let is_owned = |member: &&Member| owned.contains(&(member.level, member.name));
    let owned = document.members().iter().filter(is_owned);
    owned.filter(|member| member.kind != Kind::Null).count() as u64
}

/// What an encoder stage adds to every later leg.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The merged `ec_transfer_params`, an object; `None`: the encoders gave none.
    pub params: Option<Vec<u8>>,
}

/// One request, as its legs are made of it.
#[derive(Clone, Copy, Debug)]
pub struct PdRequest<'a> {
    /// The body's shape.
    pub api: Api,
    /// Where the body's members are.
    pub document: &'a Document,
    /// The body as the client sent it.
    pub body: &'a [u8],
    /// The request's name between engines.
    pub uuid: Uuid,
    /// A random number, from which rooms are made.
    pub random: u64,
    /// The members that clients must not write; none where they are trusted.
    pub owned: Watch,
    /// What an encoder stage came to, if there was one.
    pub encoded: Option<&'a Encoded>,
    /// `MoRI-IO`.
    pub mori: &'a MoriConfig,
    /// The chunk to ask the decoder for, where the answer is cut.
    pub chunk: Option<&'a Progress>,
}

/// Which limits a prefill leg sets to one token, and whether also where the client did not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caps {
    /// `max_tokens`, `max_completion_tokens` and `min_tokens`, sent or not: engines have defaults.
    All,
    /// The same, and `max_output_tokens`.
    Every,
    /// Both maxima, sent or not; `min_tokens` where sent (above the cap it is refused).
    Maxima,
    /// `max_tokens`, sent or not; the others where sent.
    Sent,
}

/// The edits of one leg. A later one of the same member replaces an earlier one.
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
        // Most bodies have none of what legs go without: an edit of nothing costs as much as one.
        if members.any(|member| member.level == level && member.name == name) {
            self.list.push(Edit::Remove { level, name });
        }
    }

    /// Puts `text` behind the last element of an array.
    pub(super) fn append(&mut self, name: &'static str, text: &'a [u8]) {
        let level = Level::Top;
        self.push(Edit::Append { level, name, text });
    }

    fn push(&mut self, edit: Edit<'a>) {
        self.list
            .retain(|earlier| earlier.target() != edit.target());
        self.list.push(edit);
    }

    /// Sets every limit of the API's to one token.
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
            // The whole parent is replaced, and whatever an earlier duplicate of it held with it.
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

    /// A prefill leg that is read by the proxy must not stream; and an engine refuses stream
    /// options on a request that does not.
    pub(super) fn whole_response(&mut self) {
        self.set(Level::Top, "stream", b"false");
        self.remove(Level::Top, "stream_options");
    }
}

impl<'a> PdRequest<'a> {
    /// The edits every leg has: without the client's own transfer parameters, with the encoders'.
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

    /// A leg of these edits.
    pub(super) fn leg(&self, role: Role, edits: &Edits<'_>, take: Take) -> Result<Leg, EditError> {
        Ok(Leg {
            role,
            body: self.document.edit(&edits.list)?,
            take,
            rank: None,
            request_id: None,
        })
    }

    /// The decode leg of a request that no prefiller is used for.
    ///
    /// # Errors
    /// When the body needs more edits than allowed.
    pub fn local_leg(&self) -> Result<Leg, EditError> {
        let take = match self.chunk {
            // Chunks are read here, so they must not come encoded.
            Some(_) => Take::Whole,
            None => Take::Response(None),
        };
        self.leg(Role::Decode, &self.edits(), take)
    }

    /// The same with transfer parameters that name a peer to pull a cached prefix from.
    ///
    /// # Errors
    /// When the body needs more edits than allowed.
    pub fn source_leg(&self, params: &[u8]) -> Result<Leg, EditError> {
        self.decode_leg(params, Take::Response(None))
    }

    /// The prefill leg of most connectors: these transfer parameters, and nothing but one token.
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

    /// The decode leg of most connectors: the client's body with these transfer parameters.
    pub(super) fn decode_leg(&self, params: &[u8], take: Take) -> Result<Leg, EditError> {
        let mut edits = self.edits();
        edits.set(Level::Top, "kv_transfer_params", params);
        self.leg(Role::Decode, &edits, take)
    }
}
