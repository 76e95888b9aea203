//! The prefiller of a request as the connectors name it to the decoder, and peers to pull from.

use super::uuid::Uuid;
use crate::fleet::Target;
use crate::json::Quoted;

/// A prefiller, as far as transfer parameters name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Where it is.
    pub target: Target,
    /// Port of its P2P tier.
    pub p2p_port: u16,
    /// Port of its bootstrap server.
    pub bootstrap_port: u16,
    /// The engine behind it that was picked, where the connector asks for one.
    pub engine: Option<BootstrapEngine>,
    /// A peer that it is to pull a cached prefix from.
    pub source: Option<Box<KvSource>>,
}

/// One engine of a prefiller, as its bootstrap server names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootstrapEngine {
    /// Data-parallel rank.
    pub rank: u32,
    /// Engine id, as a JSON string with its quotes.
    pub id: Box<[u8]>,
}

impl Peer {
    /// The host as part of a URL.
    pub(super) fn url_host(&self) -> String {
        let host = self.host();
        if host.contains(':') {
            format!("[{host}]")
        } else {
            host
        }
    }

    /// Its host, an IPv6 address without brackets.
    pub(super) fn host(&self) -> String {
        self.target.host()
    }
}

/// A peer that has a prefix of the prompt cached (`x-kv-cache-source-host-port`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvSource {
    /// Names the pull.
    pub uuid: Uuid,
    /// Its host.
    pub host: String,
    /// Port of its P2P tier.
    pub port: u16,
}

impl KvSource {
    /// The value of `remote_kv_source`.
    pub(super) fn object(&self) -> String {
        let (host, port) = (Quoted(&self.host), self.port);
        let uuid = self.uuid;
        format!(r#"{{"kv_request_id":"{uuid}","remote_host":{host},"remote_port":{port}}}"#)
    }

    /// The transfer parameters of a request that is decoded without a prefiller.
    #[must_use]
    pub fn params(&self) -> Vec<u8> {
        format!(r#"{{"remote_kv_source":{}}}"#, self.object()).into_bytes()
    }
}

/// The P2P port of the engine behind `target`: ranks of one pod listen on consecutive ports, so the
/// target's distance from our rank 0 tells its rank. A target outside our ranks is rank 0's
/// (reference 6.5).
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
