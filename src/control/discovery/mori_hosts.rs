//! Resolves the pod names of a `MoRI-IO` deployment.
//!
//! The engines are sent addresses, not names. Names are looked up at the start, where a failure
//! ends the process, and then by a task every `MORIIO_DNS_RESOLVE_TTL_SECONDS`. No request waits
//! for a look-up. If a later look-up fails, the last known address remains in use.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::cli::Exit;
use crate::config::{Config, MoriConfig};
use crate::control::publish::{Changes, Publisher};
use crate::fleet::{Change, MoriHosts};
use crate::metrics::DnsCounters;

/// The pods of a `MoRI-IO` deployment, some of which are configured by name.
pub(in crate::control) struct MoriPods {
    written: MoriConfig,
    known: MoriHosts,
    counters: Arc<DnsCounters>,
}

impl MoriPods {
    /// Resolves the pods' names and publishes the addresses. Returns `None` if write mode is off or
    /// all hosts are addresses.
    ///
    /// # Errors
    /// A name does not resolve.
    pub(in crate::control) async fn resolve(
        config: &Config,
        counters: &Arc<DnsCounters>,
        publisher: &mut Publisher,
    ) -> Result<Option<Self>, Exit> {
        let written = config.pd.mori.clone();
        if !written.write_mode || names(&written.hosts).next().is_none() {
            return Ok(None);
        }
        let known = refresh(&written, &written.hosts, counters).await;
        if let Some(name) = names(&known).next() {
            return Err(Exit::config(format!(
                "ringside: MoRI-IO host `{name}` does not resolve; correct --moriio-remote-hosts \
                 or --moriio-decode-hosts, or give IP addresses"
            )));
        }
        publisher.apply(Change::Mori(known.clone()));
        Ok(Some(Self {
            written,
            known,
            counters: Arc::clone(counters),
        }))
    }

    /// Resolves the names again at each interval and publishes addresses that have changed. Never
    /// returns.
    pub(in crate::control) async fn follow(mut self, changes: Changes) {
        loop {
            tokio::time::sleep(self.written.resolve_ttl).await;
            self.counters.reresolved();
            let fresh = refresh(&self.written, &self.known, &self.counters).await;
            if fresh != self.known {
                self.counters.changed();
                tracing::info!(
                    prefill = ?fresh.prefill,
                    decode = ?fresh.decode,
                    "addresses of the MoRI-IO pods changed"
                );
                changes.apply(Change::Mori(fresh.clone())).await;
                self.known = fresh;
            }
        }
    }
}

/// Returns the prefill and decode hosts that are names, not IP addresses.
fn names(hosts: &MoriHosts) -> impl Iterator<Item = &String> {
    let hosts = hosts.prefill.iter().chain(&hosts.decode);
    hosts.filter(|host| host.parse::<IpAddr>().is_err())
}

/// Returns the hosts of `written` with every name replaced by its address. A name that does not
/// resolve is replaced by the host at the same position in `known`.
async fn refresh(written: &MoriConfig, known: &MoriHosts, counters: &DnsCounters) -> MoriHosts {
    let mut fresh = written.hosts.clone();
    let lists = [
        (&mut fresh.prefill, &known.prefill),
        (&mut fresh.decode, &known.decode),
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
            hosts: MoriHosts {
                prefill: list(prefill),
                decode: list(decode),
            },
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
        let fresh = runtime.block_on(refresh(&written, &known.hosts, &counters));
        assert_eq!(fresh.prefill, ["10.4.0.7", "127.0.0.1"]);
        assert_eq!(
            fresh.decode,
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
