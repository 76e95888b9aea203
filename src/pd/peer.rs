//! The engines that transfer parameters refer to: a request's prefiller, and a peer to pull a
//! cached prefix from.

use super::bootstrap::BootstrapEngine;
use super::uuid::Uuid;
use crate::fleet::Target;
use crate::json::Quoted;

/// The properties of a prefiller that transfer parameters contain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Host and HTTP port of the prefiller.
    pub target: Target,
    /// Port of the prefiller's P2P tier (`OffloadingConnector`).
    pub p2p_port: u16,
    /// Port of the prefiller's bootstrap server (Mooncake, `SGLang`).
    pub bootstrap_port: u16,
    /// The engine chosen from the response of the prefiller's bootstrap server. `None` for
    /// connectors other than Mooncake.
    pub engine: Option<BootstrapEngine>,
    /// The engine from which the prefiller pulls a cached prefix, if any.
    pub source: Option<Box<KvSource>>,
}

impl Peer {
    /// Returns the prefiller's host as written in a URL: an IPv6 address has brackets.
    pub(super) fn url_host(&self) -> String {
        let host = self.host();
        if host.contains(':') {
            format!("[{host}]")
        } else {
            host
        }
    }

    /// Returns the prefiller's host. An IPv6 address has no brackets.
    pub(super) fn host(&self) -> String {
        self.target.host()
    }
}

/// A peer that has a prefix of the prompt cached (`x-kv-cache-source-host-port`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvSource {
    /// Identifies the transfer of the cached prefix to the engines; sent as `kv_request_id`.
    pub uuid: Uuid,
    /// Host of the peer. An IPv6 address has no brackets.
    pub host: String,
    /// Port of the peer's P2P tier.
    pub port: u16,
}

impl KvSource {
    /// Returns the JSON object that is the value of `remote_kv_source` in transfer parameters.
    pub(super) fn object(&self) -> String {
        let (host, port) = (Quoted(&self.host), self.port);
        let uuid = self.uuid;
        format!(r#"{{"kv_request_id":"{uuid}","remote_host":{host},"remote_port":{port}}}"#)
    }

    /// Returns the transfer parameters of a request that has a source but no prefiller.
    #[must_use]
    pub fn params(&self) -> Vec<u8> {
        format!(r#"{{"remote_kv_source":{}}}"#, self.object()).into_bytes()
    }
}

/// Returns the port of the P2P tier of the engine at `target`: `base`, the port of rank 0, plus the
/// rank of the engine.
///
/// The ranks of a pod listen on consecutive ports, so the rank is the distance of the target's port
/// from `listen_port`, the port of this proxy's rank 0. A target outside the range of the ranks
/// counts as rank 0, as in pd-sidecar (`docs/pd-sidecar.md#offloading`).
#[must_use]
pub fn p2p_port(target: &Target, base: u16, listen_port: u16, ranks: usize) -> u16 {
    let distance = target.port().and_then(|port| port.checked_sub(listen_port));
    match distance {
        Some(rank) if usize::from(rank) < ranks => base.saturating_add(rank),
        Some(_) | None => base,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p10_the_p2p_port_follows_the_rank() {
        let cases = [
            ("10.0.0.1:8000", 1, 7777),
            ("10.0.0.1:8000", 4, 7777),
            ("10.0.0.1:8002", 4, 7779),
            ("http://10.0.0.1:8003", 4, 7780),
            ("10.0.0.1:7999", 4, 7777),
            ("10.0.0.1:8004", 4, 7777),
            ("10.0.0.1", 4, 7777),
        ];
        for (target, ranks, want) in cases {
            let target = Target::parse(target.as_bytes()).unwrap();
            assert_eq!(p2p_port(&target, 7777, 8000, ranks), want, "{target}");
        }
    }
}
