//! Resolves the pod names of a `MoRI-IO` deployment.
//!
//! The engines are sent addresses, not names. Names are looked up at the start, where a failure
//! ends the process, and then by a task every `MORIIO_DNS_RESOLVE_TTL_SECONDS`. No request waits
//! for a look-up. If a later look-up fails, the last known address remains in use.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::cli::Exit;
use crate::config::{Config, MoriConfig};
use crate::metrics::DnsCounters;

/// The `MoRI-IO` configuration with host names replaced by addresses. The control plane replaces it
/// when an address changes, and the shards read it.
pub(super) type Hosts = Arc<ArcSwap<MoriConfig>>;

/// Resolves the pods' names and spawns the task that resolves them again. Returns `None` if write
/// mode is off or all hosts are addresses.
///
/// # Errors
/// Returns an error if a name does not resolve.
pub(super) async fn resolve(
    config: &Config,
    counters: &Arc<DnsCounters>,
) -> Result<Option<Hosts>, Exit> {
    let written = config.pd.mori.clone();
    let has_names = names(&written).next().is_some();
    if !written.write_mode || !has_names {
        return Ok(None);
    }
    let first = refresh(&written, &written, counters).await;
    if let Some(name) = names(&first).next() {
        return Err(Exit::config(format!(
            "ringside: MoRI-IO host `{name}` does not resolve; correct --moriio-remote-hosts or \
             --moriio-decode-hosts, or give IP addresses"
        )));
    }
    let hosts = Arc::new(ArcSwap::from_pointee(first));
    tokio::spawn(keep(written, Arc::clone(&hosts), Arc::clone(counters)));
    Ok(Some(hosts))
}

async fn keep(written: MoriConfig, hosts: Hosts, counters: Arc<DnsCounters>) {
    loop {
        tokio::time::sleep(written.resolve_ttl).await;
        counters.reresolved();
        let known = hosts.load_full();
        let fresh = refresh(&written, &known, &counters).await;
        if fresh != *known {
            counters.changed();
            tracing::info!(
                prefill = ?fresh.prefill_hosts,
                decode = ?fresh.decode_hosts,
                "addresses of the MoRI-IO pods changed"
            );
            hosts.store(Arc::new(fresh));
        }
    }
}

/// Returns the configured prefill and decode hosts that are names, not IP addresses.
fn names(mori: &MoriConfig) -> impl Iterator<Item = &String> {
    let hosts = mori.prefill_hosts.iter().chain(&mori.decode_hosts);
    hosts.filter(|host| host.parse::<IpAddr>().is_err())
}

/// Returns `written` with every host name replaced by its address. A name that does not resolve is
/// replaced by the host at the same position in `known`.
async fn refresh(written: &MoriConfig, known: &MoriConfig, counters: &DnsCounters) -> MoriConfig {
    let mut fresh = written.clone();
    let lists = [
        (&mut fresh.prefill_hosts, &known.prefill_hosts),
        (&mut fresh.decode_hosts, &known.decode_hosts),
    ];
    for (hosts, known) in lists {
        for (host, known) in hosts.iter_mut().zip(known) {
            if host.parse::<IpAddr>().is_ok() {
                continue;
            }
            let looked_up = tokio::net::lookup_host((host.as_str(), 0));
            let found = tokio::time::timeout(written.resolve_timeout, looked_up).await;
            let addresses = found.ok().and_then(Result::ok);
            *host = match addresses.and_then(preferred) {
                Some(address) => address.to_string(),
                None => {
                    counters.failed();
                    tracing::warn!(%host, "MoRI-IO host does not resolve; its last known address, if any, remains in use");
                    known.clone()
                }
            };
        }
    }
    fresh
}

/// Returns the first IPv4 address, otherwise the first IPv6 address, or `None` if there is no
/// address. IPv4 is preferred because engines listen on it by default.
fn preferred(addresses: impl Iterator<Item = SocketAddr>) -> Option<IpAddr> {
    addresses
        .map(|address| address.ip())
        .min_by_key(IpAddr::is_ipv6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mori(prefill: &[&str], decode: &[&str]) -> MoriConfig {
        let list = |hosts: &[&str]| hosts.iter().map(|host| (*host).to_owned()).collect();
        MoriConfig {
            prefill_hosts: list(prefill),
            decode_hosts: list(decode),
            ..MoriConfig::default()
        }
    }

    #[test]
    fn d1_names_are_resolved_and_a_failure_keeps_the_last_known_address() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let counters = DnsCounters::default();
        // RFC 6761 6.4: a name below `invalid` never resolves.
        let written = mori(&["10.4.0.7", "localhost"], &["no.such.invalid"]);
        let known = mori(&["10.4.0.7", "10.4.0.8"], &["10.4.0.9"]);
        let fresh = runtime.block_on(refresh(&written, &known, &counters));
        assert_eq!(fresh.prefill_hosts, ["10.4.0.7", "127.0.0.1"]);
        assert_eq!(
            fresh.decode_hosts,
            ["10.4.0.9"],
            "a stale address is better than a name"
        );
        assert_eq!(counters.values(), [0, 0, 1]);
        assert_eq!(names(&fresh).count(), 0);
    }

    #[test]
    fn d1_ipv4_is_preferred() {
        let addresses = ["[fd00::1]:0", "10.0.0.1:0"].map(|text| text.parse().unwrap());
        assert_eq!(preferred(addresses.into_iter()), "10.0.0.1".parse().ok());
        assert_eq!(
            preferred(addresses.into_iter().take(1)),
            "fd00::1".parse().ok()
        );
        assert_eq!(preferred(std::iter::empty()), None);
    }
}
