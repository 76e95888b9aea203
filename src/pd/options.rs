//! Settings of the connectors.

use std::time::Duration;

use crate::fleet::MoriHosts;

/// How an encoder's output is passed to the engines that compute the prompt
/// (`docs/pd-sidecar.md#encoders`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EcConnector {
    /// The encoder's output is passed through a store; the encoder's response is discarded.
    Example,
    /// The encoder's output is passed through NIXL: the prefill and decode legs carry the
    /// `ec_transfer_params` of the encoders' responses.
    Nixl,
}

impl EcConnector {
    /// Returns the connector's name, which is its value of `--ec-connector`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Example => "ec-example",
            Self::Nixl => "ec-nixl",
        }
    }
}

/// Ports on which engines listen in addition to their HTTP port: those of bootstrap servers and P2P
/// tiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectorPorts {
    /// Port of the Mooncake bootstrap server of a prefiller.
    pub mooncake_bootstrap: u16,
    /// Port of the `SGLang` bootstrap server of a prefiller.
    pub sglang_bootstrap: u16,
    /// Port of the P2P tier (`OffloadingConnector`) of the engine with rank 0; that of rank r
    /// listens on this port + r.
    pub p2p: u16,
}

/// Settings of AMD's `MoRI-IO`, a mode of `nixlv2` (`docs/pd-sidecar.md#moriio`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MoriConfig {
    /// Whether the prefiller writes into the decoder's memory. Otherwise only `dp_size` and
    /// `dp_size_local` have an effect.
    pub write_mode: bool,
    /// If set, the legs are concurrent, and this is the time limit for the prefiller's response,
    /// from the start of the prefill leg to the response head. The decode response is withheld
    /// until the prefiller has responded. `None` means that the legs are serial.
    pub parallel_wait: Option<Duration>,
    /// Address of the pod of this proxy and its decoder, which is sent to prefillers. Always set if
    /// `write_mode` is.
    pub local_pod_ip: String,
    /// Port on which decoders receive `MoRI-IO` notifications.
    pub decode_notify_port: u16,
    /// Port on which prefillers receive `MoRI-IO` notifications.
    pub prefill_notify_port: u16,
    /// Port on which decoders accept `MoRI-IO` handshakes.
    pub decode_handshake_port: u16,
    /// Port on which prefillers accept `MoRI-IO` handshakes.
    pub prefill_handshake_port: u16,
    /// Tensor-parallel size of the engines.
    pub tp_size: u32,
    /// Number of data-parallel ranks over all pods of one role.
    pub dp_size: u32,
    /// Number of data-parallel ranks in one pod. `None` if it is not configured; then it is
    /// `dp_size`.
    pub dp_size_local: Option<u32>,
    /// The pods, as configured.
    pub hosts: MoriHosts,
    /// Interval at which the names in `hosts` are resolved again.
    pub resolve_ttl: Duration,
    /// Time limit for resolving one of these names.
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
            hosts: MoriHosts::default(),
            resolve_ttl: Duration::from_secs(30),
            resolve_timeout: Duration::from_secs(5),
        }
    }
}
