//! Handling of inference requests: the checks that a vLLM server makes, the legs of split requests,
//! and the resulting response.

use std::sync::atomic::Ordering;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::api::{self, Ask, Kind, Refusal, Route};
use crate::config::{CACHED_BY_ROLE, HandoffShape, Role};
use crate::events::Events;
use crate::exchange::Exchange;
use crate::fault::Fault;
use crate::json::Fields;
use crate::kv::{self, Admitted, Call, KvContract};
use crate::pd::{self, Leg, Terms, Verdict};
use crate::response::{Response, ResponseInputs};
use crate::stats::{CachedBy, Observation};
use crate::wire::Plan;

/// Returns the time in seconds since the Unix epoch.
pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.as_secs())
}

impl Exchange<'_> {
    /// Checks an inference request and returns the response to send.
    pub(crate) fn infer(
        &mut self,
        route: Route,
        fields: &Fields<'_>,
        prompt: Option<(String, u64)>,
        fault: Option<&Fault>,
    ) -> Result<Plan, Refusal> {
        // vLLM's responses route does not read the header with the rank.
        self.check_head(route != Route::Api(Kind::Responses))?;
        let ask = api::check(route, fields, prompt, &self.shared.config)?;
        let admitted = self.admit(&ask, fields, fault)?;
        let has_transfer = pd::leg(fields.value("kv_transfer_params")) == Leg::Decode;
        let cached = match (self.shared.config.look_alike, has_transfer) {
            (true, true) => ask.prompt_tokens,
            (true, false) => self.configured_cached().unwrap_or(0).min(ask.prompt_tokens),
            (false, _) => self.cached(admitted.is_prefill),
        };
        let cached_by = match has_transfer {
            true => CachedBy::Transfer,
            false => CachedBy::Prefix,
        };
        self.observed = Some(Observation::new(&ask, cached, cached_by));
        let response = Response::new(
            &ask,
            &self.shared.config,
            ResponseInputs {
                id: self.id(ask.kind, fields),
                created: now(),
                foreign: admitted.foreign,
                cold: admitted.cold,
                cached,
                handoff: admitted.members,
                pad_bytes: match fault {
                    Some(Fault::LargeJson { bytes }) => *bytes,
                    _ => 0,
                },
            },
        );
        let mut plan = if ask.stream {
            Plan::stream(Events::new(response))
        } else {
            let tokens = response.tokens();
            Plan::generated(response.whole(), tokens)
        };
        plan.wait = admitted.wait;
        if self.shared.config.request_id_header {
            let sent = self.head.header("x-request-id");
            let id = sent.map_or_else(|| format!("{:032x}", self.seq), str::to_owned);
            plan = plan.with("x-request-id", id);
        }
        Ok(plan)
    }

    /// Checks the head of a request with a JSON body. `reads_rank` is whether its route reads
    /// `x-data-parallel-rank`.
    pub(crate) fn check_head(&self, reads_rank: bool) -> Result<(), Refusal> {
        let media = self.head.header("content-type").unwrap_or_default();
        let media = media.split(';').next().unwrap_or_default().trim();
        if !media.eq_ignore_ascii_case("application/json") {
            let message = "Unsupported Media Type: Only 'application/json' is allowed";
            return Err(Refusal::bad("content-type", message));
        }
        let wanted = self.shared.config.authorization.as_deref();
        if wanted.is_some() && self.head.header("authorization") != wanted {
            return Err(Refusal::plain(401, "Unauthorized"));
        }
        let rank = self.head.header("x-data-parallel-rank");
        let rank: Option<i64> = rank.and_then(|rank| rank.trim().parse().ok());
        let size = i64::from(self.shared.config.data_parallel_size);
        match rank {
            Some(rank) if reads_rank && !(0..size).contains(&rank) => {
                let message = format!("data_parallel_rank {rank} is out of range [0, {size}).");
                Err(Refusal::bad("data_parallel_rank", message))
            }
            _ => Ok(()),
        }
    }

    /// Checks an inference request against the contract of an encoder or of the configured KV
    /// connector, and returns how the request affects its response.
    fn admit(
        &self,
        ask: &Ask,
        fields: &Fields<'_>,
        fault: Option<&Fault>,
    ) -> Result<Admitted, Refusal> {
        let config = &self.shared.config;
        let shape = match fault {
            Some(Fault::Handoff(shape)) => *shape,
            _ if config.flat_blocks && config.handoff == HandoffShape::Fresh => HandoffShape::Flat,
            _ => config.handoff,
        };
        let call = Call {
            role: config.role,
            kind: ask.kind,
            fields,
            head: self.head,
            prompt_sha256: &ask.prompt_sha256,
            shape,
            port: self.shared.port,
        };
        let admitted = match (&config.contract, config.role) {
            (_, Role::Encoder) => kv::admit_item(&call),
            (KvContract::Nixlv2, _) => self.nixlv2(ask, fields, shape),
            (contract, _) => contract.admit(&call),
        };
        admitted.inspect_err(|refusal| {
            if refusal.status == 400 {
                self.shared
                    .log
                    .count(|counters| counters.contract_broken += 1);
            }
        })
    }

    /// Checks a request against the contract of NIXL version 2. Issues a handoff for a prefill leg
    /// and verifies the handoff of a decode leg.
    fn nixlv2(
        &self,
        ask: &Ask,
        fields: &Fields<'_>,
        shape: HandoffShape,
    ) -> Result<Admitted, Refusal> {
        let log = &self.shared.log;
        let params = fields.value("kv_transfer_params");
        let leg = pd::leg(params);
        match (leg, self.shared.config.role) {
            (Leg::Local, _) => Ok(Admitted::default()),
            // The `kv_transfer_params` of some other connectors have neither flag.
            (Leg::Poison, _) if !self.shared.config.strict => Ok(Admitted::default()),
            (Leg::Poison, _) => {
                log.count(|counters| counters.poisoned += 1);
                Err(Refusal::internal(
                    "EngineCore encountered an issue. See stack trace (above) for the root cause.",
                ))
            }
            (Leg::Prefill, Role::Decode)
            | (Leg::Decode, Role::Prefill)
            | (Leg::Prefill | Leg::Decode, Role::Encoder) => {
                log.count(|counters| counters.wrong_role += 1);
                Err(Refusal::internal("Internal server error"))
            }
            (Leg::Prefill, Role::Prefill | Role::Both) => {
                if let Some(params) = params.filter(|_| self.shared.config.strict) {
                    pd::check_contract(ask.kind, fields, params)
                        .map_err(|message| Refusal::bad("kv_transfer_params", message))?;
                }
                Ok(Admitted {
                    members: self.issue_handoff(ask, shape),
                    is_prefill: true,
                    ..Admitted::default()
                })
            }
            (Leg::Decode, Role::Decode | Role::Both) => {
                let raw = params.map_or("", serde_json::value::RawValue::get);
                Ok(Admitted {
                    foreign: self.redeem(ask, raw)?,
                    ..Admitted::default()
                })
            }
        }
    }

    fn issue_handoff(&self, ask: &Ask, shape: HandoffShape) -> String {
        // The only streams that carry a handoff are those of the responses API, in the last event.
        if ask.stream && ask.kind != Kind::Responses {
            return String::new();
        }
        let config = &self.shared.config;
        match shape {
            HandoffShape::Fresh | HandoffShape::Flat | HandoffShape::Decoys => {
                self.shared
                    .log
                    .count(|counters| counters.handoff_issued += 1);
            }
            HandoffShape::Omit
            | HandoffShape::Null
            | HandoffShape::Empty
            | HandoffShape::Text
            | HandoffShape::List
            | HandoffShape::Stale => {}
        }
        let terms = Terms {
            engine_id: &config.name,
            port: self.shared.port,
            prompt_sha256: &ask.prompt_sha256,
            prompt_tokens: ask.prompt_tokens,
            cached_tokens: self.cached(true),
        };
        self.shared
            .issuer
            .members(shape, &self.shared.registry, terms)
    }

    /// Verifies the handoff of a decode leg, if verification is on. Returns whether the response
    /// must contain another prompt's text, as a real engine's does, because the handoff was used
    /// before or was issued for another prompt. An altered or unknown handoff is an error (500).
    fn redeem(&self, ask: &Ask, raw: &str) -> Result<bool, Refusal> {
        let config = &self.shared.config;
        if !config.strict || config.verify_handoff.is_none() {
            return Ok(false);
        }
        let verdict = self.shared.registry.redeem(raw, &ask.prompt_sha256);
        self.shared.log.count(|counters| match verdict {
            Verdict::Good => counters.handoff_used += 1,
            Verdict::Reused => counters.handoff_reused += 1,
            Verdict::Foreign => counters.handoff_foreign += 1,
            Verdict::Altered => counters.handoff_altered += 1,
            Verdict::Unknown => counters.handoff_unknown += 1,
        });
        match verdict {
            Verdict::Good => Ok(false),
            Verdict::Reused | Verdict::Foreign => Ok(true),
            Verdict::Altered => Err(Refusal::internal("Internal server error (handoff altered)")),
            Verdict::Unknown => Err(Refusal::internal("Internal server error (handoff unknown)")),
        }
    }

    /// Returns the configured number of cached tokens, or `None` for [`CACHED_BY_ROLE`].
    fn configured_cached(&self) -> Option<u64> {
        let configured = self.shared.config.cached_tokens;
        (configured != CACHED_BY_ROLE).then_some(configured)
    }

    fn cached(&self, is_prefill: bool) -> u64 {
        let by_role = if is_prefill { 7 } else { 49 };
        self.configured_cached().unwrap_or(by_role)
    }

    fn id(&self, kind: Kind, fields: &Fields<'_>) -> String {
        let nth = self.shared.responses.fetch_add(1, Ordering::Relaxed);
        let sent = self.head.header("x-request-id").map(str::to_owned);
        let id = sent
            .or_else(|| fields.string("request_id"))
            .unwrap_or_else(|| format!("{nth:016x}"));
        match kind {
            Kind::Chat | Kind::Messages => format!("chatcmpl-{id}"),
            Kind::Completions => format!("cmpl-{id}"),
            Kind::Generate => format!("generate-tokens-{id}"),
            Kind::Responses => format!("resp_{nth:016x}"),
        }
    }
}
