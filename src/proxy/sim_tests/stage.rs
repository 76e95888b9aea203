//! What all scripts of a run share: the proxy, the engines' addresses, and the log to judge by.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde_json::Value;

use crate::config::{
    AccessLog, BodyLimits, Config, ConnectorPorts, Cores, DrainConfig, KvConnector, ListenAddress,
    LogConfig, LogFormat, LogLevel, MoriConfig, OnDecodeKvError, OnMissingKv, OnPrefillFailure,
    PdConfig, RankConfig, Timeouts, TlsConfig, UpstreamConfig,
};
use crate::fault::LABELS;
use crate::fleet::Target;
use crate::metrics::ShardMetrics;
use crate::net::sim::SimNet;
use crate::net::{Instant, Net};
use crate::pd::Role;
use crate::proxy::Budget;
use crate::proxy::shard::{Decoder, Parts, Shard};

pub(super) const DECODER: &str = "192.0.2.10:8200";
pub(super) const PREFILLERS: [&str; 2] = ["192.0.2.20:8000", "192.0.2.21:8000"];

/// How the legs of a run are connected: one connector for each order of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Wiring {
    /// One after the other, with a handoff: nixlv2.
    #[default]
    Serial,
    /// Side by side: sglang.
    Concurrent,
    /// One after the other by way of a store, and the decoder first for some: shared-storage.
    Store,
}

/// What a run is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Plot {
    /// Engines close, reset, stall and talk nonsense while they answer.
    pub(super) engines_fail: bool,
    /// Engines close idle connections, or speak on them.
    pub(super) idle_ends: bool,
    /// Clients leave in the middle.
    pub(super) clients_leave: bool,
    /// Engines are not always there.
    pub(super) connects_fail: bool,
    /// The process drains at some moment.
    pub(super) drains: bool,
    /// How the legs are connected.
    pub(super) wiring: Wiring,
}

impl Plot {
    /// Whether a request may end in an error of the proxy's own.
    pub(super) const fn may_fail(self) -> bool {
        self.engines_fail || self.connects_fail
    }
}

/// What a client asked for.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) body: Vec<u8>,
    /// The same as the engine should read it, for an API's body.
    pub(super) json: Option<Value>,
    pub(super) is_split: bool,
}

/// A request as an engine received it.
#[derive(Clone, Debug)]
pub(super) struct Received {
    pub(super) role: Role,
    pub(super) id: String,
    pub(super) body: Vec<u8>,
}

/// An answer an engine has set out to send.
#[derive(Clone, Debug)]
pub(super) struct Responded {
    pub(super) role: Role,
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
    /// It was sent to its end.
    pub(super) complete: bool,
}

#[derive(Default)]
pub(super) struct Log {
    pub(super) asked: BTreeMap<String, Asked>,
    pub(super) received: Vec<Received>,
    pub(super) responded: BTreeMap<String, Vec<Responded>>,
    /// Cached tokens the last prefiller told for a request.
    pub(super) cached: BTreeMap<String, u64>,
    /// Handoff ids in the order an engine saw them, whole request or not.
    pub(super) handoffs_seen: Vec<String>,
    /// When a client left.
    pub(super) left: BTreeMap<String, Instant>,
    /// When the last engine work on a request ended; `None` while it goes on.
    pub(super) engine_ended: BTreeMap<String, Option<Instant>>,
    pub(super) complete: u64,
    pub(super) refused: u64,
    pub(super) cut: u64,
}

/// Everything of one run.
pub(super) struct Stage {
    pub(super) net: SimNet,
    pub(super) shard: Rc<Shard<SimNet>>,
    pub(super) budget: Arc<Budget>,
    pub(super) draining: Arc<AtomicBool>,
    pub(super) plot: Plot,
    pub(super) log: RefCell<Log>,
    pub(super) clients_left: Cell<usize>,
    pub(super) drain_begun: Cell<bool>,
}

pub(super) fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Limits that only matter where something is wrong. Where nothing is, they are out of reach: a
/// wait that was never ended shows as a run that takes too long.
pub(super) fn config(plot: Plot) -> Config {
    let limit = |n| Some(ms(if plot.may_fail() { n } else { 3_600_000 }));
    Config {
        ranks: vec![RankConfig {
            rank: 0,
            listen: ListenAddress::DualStack(8000),
            decoder: Target::parse(DECODER.as_bytes()).unwrap(),
        }],
        pod_ip: None,
        pd: PdConfig {
            connector: match plot.wiring {
                Wiring::Serial => KvConnector::Nixlv2,
                Wiring::Concurrent => KvConnector::Sglang,
                Wiring::Store => KvConnector::SharedStorage,
            },
            encoder: None,
            ports: ConnectorPorts {
                mooncake_bootstrap: 8998,
                sglang_bootstrap: 8998,
                p2p: 7777,
            },
            p2p_pull: false,
            mori: MoriConfig::default(),
            decode_chunk_tokens: None,
            on_prefill_failure: OnPrefillFailure::Error,
            trust_client_kv: false,
            release_stranded_kv: false,
            prefiller_sampling: false,
            prefill_retries_max: 1,
            prefill_retry_backoff: ms(20),
            prefill_timeout: limit(1000),
            on_missing_kv: OnMissingKv::Decode,
            handoff_age_max: ms(20_000),
            hide_prefill_errors: false,
            on_decode_kv_error: OnDecodeKvError::Recompute,
            prefill_response_bytes_max: 1 << 20,
            allow_flat_blocks: false,
        },
        tls: TlsConfig::default(),
        allowlist: None,
        tracing: None,
        metrics: None,
        timeouts: Timeouts {
            connect: limit(300),
            head: limit(2000),
            body: limit(2000),
            client_stall: limit(1000),
            keepalive: limit(5000),
            first_byte: limit(800),
        },
        upstream: UpstreamConfig {
            idle: ms(4000),
            idle_per_rank_max: 8,
        },
        limits: BodyLimits {
            body_bytes_max: 1 << 20,
            body_budget_bytes: 4 << 20,
        },
        cores: Cores::Auto,
        busy_poll: None,
        admin: None,
        log: LogConfig {
            level: LogLevel::Error,
            format: LogFormat::Text,
            access: AccessLog::Off,
        },
        drain: DrainConfig {
            timeout: None,
            settle: Duration::ZERO,
        },
    }
}

impl Stage {
    pub(super) fn new(net: &SimNet, plot: Plot, config: Config) -> Rc<Self> {
        Self::with_own_listeners(net, plot, config, Box::new(|_| false))
    }

    /// A proxy with a defect: it panics when it asks whether a prefiller is itself.
    pub(super) fn with_defect(net: &SimNet) -> Rc<Self> {
        let plot = Plot::default();
        let defect = Box::new(|_: &SocketAddr| panic!("a defect"));
        Self::with_own_listeners(net, plot, config(plot), defect)
    }

    fn with_own_listeners(
        net: &SimNet,
        plot: Plot,
        config: Config,
        is_own_listener: Box<dyn Fn(&SocketAddr) -> bool>,
    ) -> Rc<Self> {
        let budget = Budget::new(config.limits.body_budget_bytes);
        let draining = Arc::new(AtomicBool::new(false));
        let parts = Parts {
            config: Arc::new(config),
            metrics: Arc::new(ShardMetrics::new(LABELS.len())),
            budget: Arc::clone(&budget),
            draining: Arc::clone(&draining),
            unhealthy: Arc::default(),
            decoders: vec![Decoder {
                target: Target::parse(DECODER.as_bytes()).unwrap(),
                addresses: vec![DECODER.parse::<SocketAddr>().unwrap().into()],
            }],
            is_own_listener,
            resolver: Box::new(|_| false),
            mori: None,
            allowlist: None,
            on_socket_failed: Box::new(|_, _| ()),
            access: None,
            secure: Box::new(|conn, _, _| conn),
            traces: None,
        };
        Rc::new(Self {
            shard: Shard::new(net.clone(), parts),
            net: net.clone(),
            budget,
            draining,
            plot,
            log: RefCell::default(),
            clients_left: Cell::new(0),
            drain_begun: Cell::new(false),
        })
    }

    /// A random text that cannot be mistaken for another's.
    pub(super) fn text(&self, id: &str) -> String {
        let words = 1 + self.net.below(if self.net.once_in(8) { 40 } else { 6 });
        let word = |_| format!("{id}-{:x} ", self.net.random());
        (0..words).map(word).collect()
    }

    /// A short time, of a seeded order of magnitude.
    pub(super) fn random_delay(&self) -> Duration {
        let scales_us = [0, 20, 300, 3_000, 20_000];
        let scale = scales_us[self.net.below(5) as usize];
        Duration::from_micros(self.net.below(scale + 1))
    }

    /// Asserts with the run's seed in the message.
    #[track_caller]
    pub(super) fn check(&self, holds: bool, what: impl std::fmt::Display) {
        assert!(holds, "seed {}: {what}", self.net.seed());
    }
}
