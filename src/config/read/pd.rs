//! Checks the prefill/decode settings: connectors, their ports, retries and the handoff.

use std::time::Duration;

use super::super::Source;
use super::super::flag_table;
use super::super::units;
use super::super::{
    ConnectorPorts, EcConnector, KvConnector, MoriConfig, OnDecodeKvError, OnMissingKv,
    OnPrefillFailure, PdConfig,
};
use super::reader::Reader;
use crate::pd::connector::{self, PrefixPull};

/// Maximum number of prefill retries. More would only prolong an outage.
const PREFILL_RETRIES_MAX: u32 = 100;
/// Time for which vLLM's NIXL connector keeps the blocks of a handoff. After it, the blocks may
/// contain another prompt's KV cache (`docs/engines.md#handoffs`).
const ENGINE_LEASE: Duration = Duration::from_secs(30);
/// Default port of the bootstrap server of `SGLang` engines. pd-sidecar has no flag for it.
const SGLANG_BOOTSTRAP_PORT: u16 = 8998;
/// Maximum of `--atom-dp-size`.
const ATOM_RANKS_MAX: u32 = 65_535;
/// Maximum of `--decode-chunk-size`, in tokens. The context of any engine is shorter than this.
const CHUNK_TOKENS_MAX: u32 = 1 << 30;

impl Reader<'_> {
    /// Reads the prefill/decode settings for `size` data-parallel ranks.
    pub(in crate::config) fn pd(&mut self, size: u32) -> PdConfig {
        let kv_connector = self.kv_connector();
        let (prefill_retries_max, prefill_retry_backoff) = self.retries();
        PdConfig {
            kv_connector,
            encoder: self.encoder(),
            ports: self.connector_ports(kv_connector, size),
            p2p_pull: self.p2p_pull(kv_connector),
            speculative_prefill: self.switch(&flag_table::ENABLE_SPECULATIVE_PREFILL),
            mori: self.mori(kv_connector),
            atom_dp_size: self.atom_dp_size(kv_connector),
            decode_chunk_tokens: self.decode_chunk_tokens(),
            on_prefill_failure: self.choice(
                &flag_table::ON_PREFILL_FAILURE,
                &[
                    ("error", OnPrefillFailure::Error),
                    ("decode", OnPrefillFailure::Decode),
                ],
            ),
            trust_client_kv: self.switch(&flag_table::TRUST_CLIENT_KV),
            release_stranded_kv: self.switch(&flag_table::RELEASE_STRANDED_KV),
            prefiller_sampling: self.switch(&flag_table::ENABLE_PREFILLER_SAMPLING),
            prefill_retries_max,
            prefill_retry_backoff,
            prefill_timeout: self.timeout(&flag_table::PREFILL_TIMEOUT),
            on_missing_kv: self.choice(
                &flag_table::ON_MISSING_KV,
                &[
                    ("decode", OnMissingKv::Decode),
                    ("error", OnMissingKv::Error),
                ],
            ),
            handoff_age_max: self.handoff_age_max(),
            hide_prefill_errors: self.switch(&flag_table::HIDE_PREFILL_ERRORS),
            on_decode_kv_error: self.choice(
                &flag_table::ON_DECODE_KV_ERROR,
                &[
                    ("recompute", OnDecodeKvError::Recompute),
                    ("error", OnDecodeKvError::Error),
                ],
            ),
            prefill_response_bytes_max: usize::try_from(
                self.size(&flag_table::MAX_PREFILL_RESPONSE),
            )
            .unwrap_or(usize::MAX),
            check_handoff_versions: self.switch(&flag_table::CHECK_HANDOFF_VERSIONS),
        }
    }

    fn kv_connector(&mut self) -> KvConnector {
        let all = KvConnector::ALL.map(|connector| (connector.name(), connector));
        self.choice(&flag_table::KV_CONNECTOR, &all)
    }

    fn encoder(&mut self) -> Option<EcConnector> {
        let key = &flag_table::EC_CONNECTOR;
        let all = [EcConnector::Example, EcConnector::Nixl];
        match self.text(key) {
            "" => None,
            _ => Some(self.choice(key, &all.map(|connector| (connector.name(), connector)))),
        }
    }

    fn connector_ports(&mut self, kind: KvConnector, size: u32) -> ConnectorPorts {
        let p2p = &flag_table::P2P_CONNECTOR_PORT;
        self.expect_connector(p2p, kind, &[KvConnector::Offloading, KvConnector::Nixlv2]);
        let bootstrap = &flag_table::MOONCAKE_BOOTSTRAP_PORT;
        self.expect_connector(bootstrap, kind, &[KvConnector::Mooncake]);
        ConnectorPorts {
            mooncake_bootstrap: self.port(bootstrap),
            sglang_bootstrap: self.variable(
                "SGLANG_BOOTSTRAP_PORT",
                SGLANG_BOOTSTRAP_PORT,
                "a port from 1 to 65535",
                |text| text.parse().ok().filter(|port| *port != 0),
            ),
            p2p: self.port_range(p2p, self.text(p2p), size),
        }
    }

    fn p2p_pull(&mut self, kind: KvConnector) -> bool {
        let key = &flag_table::ENABLE_P2P_PULL;
        let on = self.switch(key);
        let rules = connector::connector(kind, &MoriConfig::default()).rules();
        if on && rules.prefix_pull != PrefixPull::IfEnabled {
            let text = format!(
                "requires --kv-connector nixlv2, not {}; change one of them",
                kind.name()
            );
            self.problem(key, &text);
        }
        on
    }

    /// Warns of a flag that has no effect with this connector.
    fn expect_connector(
        &mut self,
        key: &flag_table::Key,
        kind: KvConnector,
        wanted: &[KvConnector],
    ) {
        // A variable may be set for every program of a pod.
        let is_set = matches!(
            self.raw.source(key),
            Source::Flag(_) | Source::Document { .. }
        );
        if is_set && !wanted.contains(&kind) {
            let names: Vec<_> = wanted.iter().map(|kind| kind.name()).collect();
            let text = format!(
                "--{} has no effect without --kv-connector={}",
                key.name,
                names.join(" or ")
            );
            self.warnings.push(text);
        }
    }

    fn atom_dp_size(&mut self, kind: KvConnector) -> u32 {
        let key = &flag_table::ATOM_DP_SIZE;
        self.expect_connector(key, kind, &[KvConnector::Atom]);
        self.count(key, 1, ATOM_RANKS_MAX)
    }

    fn decode_chunk_tokens(&mut self) -> Option<u32> {
        let tokens = self.count(&flag_table::DECODE_CHUNK_SIZE, 0, CHUNK_TOKENS_MAX);
        (tokens != 0).then_some(tokens)
    }

    /// Reads the number of prefill retries and the pause before each.
    fn retries(&mut self) -> (u32, Duration) {
        let retries = self.count(&flag_table::PREFILL_MAX_RETRIES, 0, PREFILL_RETRIES_MAX);
        let backoff = self.duration(&flag_table::PREFILL_RETRY_BACKOFF);
        if retries > 0 && backoff.is_zero() {
            self.problem(
                &flag_table::PREFILL_RETRY_BACKOFF,
                "must be above zero, because --prefill-max-retries enables retries",
            );
        }
        (retries, backoff)
    }

    fn handoff_age_max(&mut self) -> Duration {
        let handoff_age_max = self.positive(&flag_table::HANDOFF_MAX_AGE);
        if handoff_age_max >= ENGINE_LEASE {
            self.warnings.push(format!(
                "--handoff-max-age is {}: a handoff older than the engine's lease (vLLM: {}) can \
                 return another prompt's text; set it below the lease",
                units::format_duration(handoff_age_max),
                units::format_duration(ENGINE_LEASE),
            ));
        }
        handoff_age_max
    }
}
