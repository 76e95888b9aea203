//! Checks the `MoRI-IO` flags and variables, including the numbers of pods and ranks.

use std::time::Duration;

use super::super::flag_table::{self, Key};
use super::super::{KvConnector, MoriConfig, units};
use super::reader::Reader;
use crate::fleet::{MoriHosts, Target};

/// Upper limit of tensor- and data-parallel sizes. A larger value can only be a typing error.
const PARALLEL_SIZE_MAX: u32 = 65_536;

impl Reader<'_> {
    pub(in crate::config) fn mori(&mut self, connector: KvConnector) -> MoriConfig {
        let write_mode = self.switch(&flag_table::MORIIO_WRITE_MODE);
        let defaults = MoriConfig::default();
        let mori = MoriConfig {
            write_mode,
            parallel_wait: self.parallel_wait(write_mode),
            local_pod_ip: self.local_pod_ip(write_mode),
            decode_notify_port: self.port(&flag_table::MORIIO_DECODE_NOTIFY_PORT),
            prefill_notify_port: self.port(&flag_table::MORIIO_PREFILL_NOTIFY_PORT),
            decode_handshake_port: self.port(&flag_table::MORIIO_DECODE_HANDSHAKE_PORT),
            prefill_handshake_port: self.port(&flag_table::MORIIO_PREFILL_HANDSHAKE_PORT),
            tp_size: self.count(&flag_table::MORIIO_TP_SIZE, 1, PARALLEL_SIZE_MAX),
            dp_size: self.count(&flag_table::MORIIO_DP_SIZE, 1, PARALLEL_SIZE_MAX),
            dp_size_local: self.dp_size_local(),
            hosts: MoriHosts {
                prefill: self.hosts(&flag_table::MORIIO_REMOTE_HOSTS),
                decode: self.hosts(&flag_table::MORIIO_DECODE_HOSTS),
            },
            resolve_ttl: self.seconds("MORIIO_DNS_RESOLVE_TTL_SECONDS", defaults.resolve_ttl),
            resolve_timeout: self.seconds(
                "MORIIO_DNS_RESOLVE_TIMEOUT_SECONDS",
                defaults.resolve_timeout,
            ),
        };
        if write_mode && !connector.has_write_mode() {
            self.warnings.push(format!(
                "--moriio-write-mode has no effect with --kv-connector {}: it requires nixlv2",
                connector.name()
            ));
        }
        self.check_pods(&flag_table::MORIIO_REMOTE_HOSTS, &mori, &mori.hosts.prefill);
        self.check_pods(&flag_table::MORIIO_DECODE_HOSTS, &mori, &mori.hosts.decode);
        mori
    }

    fn parallel_wait(&mut self, write_mode: bool) -> Option<Duration> {
        let wait = self.timeout(&flag_table::MORIIO_PARALLEL_DECODE_WAIT_TIMEOUT);
        if !self.switch(&flag_table::MORIIO_PARALLEL_DISPATCH) {
            return None;
        }
        if !write_mode {
            self.problem(
                &flag_table::MORIIO_PARALLEL_DISPATCH,
                "requires --moriio-write-mode",
            );
        }
        Some(wait.unwrap_or(units::DURATION_MAX))
    }

    fn local_pod_ip(&mut self, write_mode: bool) -> String {
        let key = &flag_table::MORIIO_LOCAL_POD_IP;
        let text = self.text(key);
        if text.is_empty() {
            if write_mode {
                self.problem(
                    key,
                    "is required with --moriio-write-mode; give the address of this pod, or set POD_IP",
                );
            }
        } else if write_mode && Target::new(text, 1).is_err() {
            self.wanted(key, "an IP address");
        }
        text.to_owned()
    }

    fn dp_size_local(&mut self) -> Option<u32> {
        let size = self.count(&flag_table::MORIIO_DP_SIZE_LOCAL, 0, PARALLEL_SIZE_MAX);
        (size != 0).then_some(size)
    }

    fn hosts(&mut self, key: &Key) -> Vec<String> {
        let hosts: Vec<_> = self.list(key).map(str::to_owned).collect();
        if let Some(host) = hosts.iter().find(|host| Target::new(host, 1).is_err()) {
            let text = format!("`{host}` is neither a host name nor an IP address");
            self.problem(key, &text);
        }
        hosts
    }

    fn seconds(&mut self, variable: &str, default: Duration) -> Duration {
        self.variable(variable, default, "a number of seconds above 0", |text| {
            let seconds = text.parse().ok().map(Duration::from_secs)?;
            (!seconds.is_zero() && seconds <= units::DURATION_MAX).then_some(seconds)
        })
    }

    /// Checks that the pods in `hosts`, if there are several, share the data-parallel ranks evenly.
    /// Otherwise the pod of a rank could not be determined.
    fn check_pods(&mut self, key: &Key, mori: &MoriConfig, hosts: &[String]) {
        if hosts.len() < 2 {
            return;
        }
        let Some(local) = mori.dp_size_local else {
            let text = format!(
                "names {} pods, which requires --moriio-dp-size-local, the ranks per pod",
                hosts.len()
            );
            return self.problem(key, &text);
        };
        if !mori.dp_size.is_multiple_of(local) {
            let text = format!(
                "{local} does not divide --moriio-dp-size {}; all pods must have the same number of ranks",
                mori.dp_size
            );
            self.problem(&flag_table::MORIIO_DP_SIZE_LOCAL, &text);
        } else if u32::try_from(hosts.len()) != Ok(mori.dp_size / local) {
            let text = format!(
                "names {} pods, but --moriio-dp-size {} with {local} ranks per pod requires {}",
                hosts.len(),
                mori.dp_size,
                mori.dp_size / local
            );
            self.problem(key, &text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::check::tests::{Given, checked, checked_in, problems};

    const WRITE: (&Key, &str) = (&flag_table::MORIIO_WRITE_MODE, "true");
    const POD: (&Key, &str) = (&flag_table::MORIIO_LOCAL_POD_IP, "10.0.0.3");

    #[test]
    fn g2_moriio() {
        let hosts = (&flag_table::MORIIO_REMOTE_HOSTS, "p0,p1");
        let dp = |size| (&flag_table::MORIIO_DP_SIZE, size);
        let local = |size| (&flag_table::MORIIO_DP_SIZE_LOCAL, size);
        let table: &[(Given<'_>, &str)] = &[
            (
                &[WRITE],
                "--moriio-local-pod-ip: is required with --moriio-write-mode",
            ),
            (
                &[WRITE, (&flag_table::MORIIO_LOCAL_POD_IP, "a b")],
                "--moriio-local-pod-ip: `a b`",
            ),
            (
                &[(&flag_table::MORIIO_PARALLEL_DISPATCH, "true")],
                "--moriio-parallel-dispatch: requires --moriio-write-mode",
            ),
            (
                &[hosts],
                "--moriio-remote-hosts: names 2 pods, which requires --moriio-dp-size-local",
            ),
            (
                &[hosts, dp("6"), local("4")],
                "--moriio-dp-size-local: 4 does not divide --moriio-dp-size 6",
            ),
            (
                &[hosts, dp("12"), local("4")],
                "--moriio-remote-hosts: names 2 pods, but --moriio-dp-size 12 with 4 ranks per pod requires 3",
            ),
            (
                &[
                    (&flag_table::MORIIO_DECODE_HOSTS, "a,b,c"),
                    dp("4"),
                    local("2"),
                ],
                "--moriio-decode-hosts: names 3 pods, but --moriio-dp-size 4 with 2 ranks per pod requires 2",
            ),
            (
                &[(&flag_table::MORIIO_REMOTE_HOSTS, "http://p0")],
                "--moriio-remote-hosts: `http://p0` is neither a host name nor an IP address",
            ),
            (&[dp("0")], "--moriio-dp-size: `0`"),
            (&[local("-1")], "--moriio-dp-size-local: `-1`"),
            (
                &[(&flag_table::MORIIO_TP_SIZE, "0")],
                "--moriio-tp-size: `0`",
            ),
            (
                &[(&flag_table::MORIIO_DECODE_NOTIFY_PORT, "0")],
                "--moriio-decode-notify-port: `0`",
            ),
        ];
        for (given, want) in table {
            let got = problems(given);
            assert_eq!(got.len(), 1, "{given:?}: {got:?}");
            assert!(got[0].starts_with(want), "{given:?}: {got:?}");
        }
        let fits: &[Given<'_>] = &[
            &[hosts, dp("8"), local("4")],
            &[(&flag_table::MORIIO_REMOTE_HOSTS, "p0"), dp("8")],
            &[
                (&flag_table::MORIIO_REMOTE_HOSTS, "10.0.0.1, fd00::1"),
                dp("2"),
                local("1"),
            ],
        ];
        for given in fits {
            checked(given);
        }
    }

    #[test]
    fn modes() {
        assert_eq!(checked(&[]).config.pd.mori, MoriConfig::default());
        let parallel = (&flag_table::MORIIO_PARALLEL_DISPATCH, "true");
        let wait = |text| (&flag_table::MORIIO_PARALLEL_DECODE_WAIT_TIMEOUT, text);
        let mori = |given: Given<'_>| checked(given).config.pd.mori;
        assert_eq!(mori(&[WRITE, POD]).parallel_wait, None);
        for (text, want) in [
            ("30s", Duration::from_secs(30)),
            ("5s", Duration::from_secs(5)),
            ("off", units::DURATION_MAX),
        ] {
            let mori = mori(&[WRITE, POD, parallel, wait(text)]);
            assert_eq!(mori.parallel_wait, Some(want));
            assert_eq!(mori.local_pod_ip, "10.0.0.3");
        }
        let sglang = (&flag_table::KV_CONNECTOR, "sglang");
        let warnings = checked(&[WRITE, POD, sglang]).warnings;
        assert!(warnings[0].contains("has no effect"), "{warnings:?}");
    }

    #[test]
    fn variables() {
        let mori = |environment: &[(&str, &str)], given: Given<'_>| {
            let checked = checked_in(environment, given);
            (checked.config.pd.mori, checked.warnings.len())
        };
        let pod = [("POD_IP", "10.9.9.9")];
        assert_eq!(mori(&pod, &[WRITE]).0.local_pod_ip, "10.9.9.9");
        assert_eq!(mori(&pod, &[WRITE, POD]).0.local_pod_ip, "10.0.0.3");
        for (ttl, timeout, want) in [
            ("60", "1", (60, 1, 0)),
            ("", "", (30, 5, 0)),
            ("soon", "0", (30, 5, 2)),
            ("-1", "1.5", (30, 5, 2)),
        ] {
            let environment = [
                ("MORIIO_DNS_RESOLVE_TTL_SECONDS", ttl),
                ("MORIIO_DNS_RESOLVE_TIMEOUT_SECONDS", timeout),
            ];
            let (mori, warnings) = mori(&environment, &[]);
            let got = (
                mori.resolve_ttl.as_secs(),
                mori.resolve_timeout.as_secs(),
                warnings,
            );
            assert_eq!(got, want, "{ttl} {timeout}");
        }
    }
}
