//! How KV cache travels between engines, and what an operator says about each way.

use std::time::Duration;

/// How KV cache is handed over between a prefiller and a decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvConnector {
    /// NIXL, protocol version 2. With [`MoriConfig::write_mode`], `MoRI-IO` in its place.
    Nixlv2,
    /// A store both engines read: files, `LMCache`.
    SharedStorage,
    /// `SGLang`'s bootstrap rooms; both legs at once.
    Sglang,
    /// Mooncake's transfer engine; both legs at once.
    Mooncake,
    /// vLLM's offloading connector with its P2P tier; both legs at once.
    Offloading,
    /// NIXL, protocol version 1, of engines from before mid-2025.
    Nixl,
    /// `LMCache` as the first llm-d sidecar spoke to it.
    Lmcache,
}

impl KvConnector {
    /// Every connector, in the order of the help.
    pub const ALL: [Self; 7] = [
        Self::Nixlv2,
        Self::SharedStorage,
        Self::Sglang,
        Self::Mooncake,
        Self::Offloading,
        Self::Nixl,
        Self::Lmcache,
    ];

    /// The name operators write.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nixlv2 => "nixlv2",
            Self::SharedStorage => "shared-storage",
            Self::Sglang => "sglang",
            Self::Mooncake => "mooncake",
            Self::Offloading => "offloading",
            Self::Nixl => "nixl",
            Self::Lmcache => "lmcache",
        }
    }
}

/// How an encoder's output is handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EcConnector {
    /// By a store; the encoder's answer is not needed.
    Example,
    /// By NIXL: the answers' `ec_transfer_params` go with the request.
    Nixl,
}

impl EcConnector {
    /// The name operators write.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Example => "ec-example",
            Self::Nixl => "ec-nixl",
        }
    }
}

/// Ports of the engines' own servers, beside HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectorPorts {
    /// Mooncake's bootstrap server on a prefiller.
    pub mooncake_bootstrap: u16,
    /// `SGLang`'s bootstrap server on a prefiller.
    pub sglang_bootstrap: u16,
    /// The offloading connector's P2P tier of rank 0; rank r is on this port + r.
    pub p2p: u16,
}

/// `MoRI-IO` (AMD), a mode of nixlv2 (reference 6.6).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MoriConfig {
    /// The prefiller writes into the decoder's memory. Without it only `dp_size` has an effect.
    pub write_mode: bool,
    /// Both legs at once; how long an answer may be held back for the prefiller's. `None`: one
    /// after the other.
    pub parallel_wait: Option<Duration>,
    /// This pod as prefillers reach it. Set whenever `write_mode` is.
    pub local_pod_ip: String,
    /// Notification port of decoders.
    pub decode_notify_port: u16,
    /// Notification port of prefillers.
    pub prefill_notify_port: u16,
    /// Handshake port of decoders.
    pub decode_handshake_port: u16,
    /// Handshake port of prefillers.
    pub prefill_handshake_port: u16,
    /// Tensor-parallel size of the engines.
    pub tp_size: u32,
    /// Data-parallel size of the engines, over all pods.
    pub dp_size: u32,
    /// Data-parallel ranks of one pod; `None` when not told.
    pub dp_size_local: Option<u32>,
    /// The prefill pods, addresses or names; may be empty.
    pub prefill_hosts: Vec<String>,
    /// The decode pods, addresses or names; may be empty.
    pub decode_hosts: Vec<String>,
    /// How long a resolved name of a pod is used.
    pub resolve_ttl: Duration,
    /// How long resolving one may take.
    pub resolve_timeout: Duration,
}

impl Default for MoriConfig {
    fn default() -> Self {
        Self {
            write_mode: false,
            parallel_wait: None,
            local_pod_ip: String::new(),
            decode_notify_port: 61005,
            prefill_notify_port: 61005,
            decode_handshake_port: 6301,
            prefill_handshake_port: 6301,
            tp_size: 1,
            dp_size: 1,
            dp_size_local: None,
            prefill_hosts: Vec::new(),
            decode_hosts: Vec::new(),
            resolve_ttl: Duration::from_secs(30),
            resolve_timeout: Duration::from_secs(5),
        }
    }
}
