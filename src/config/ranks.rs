//! The local ranks: the listening address and the decoder of each.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::read::Reader;
use super::{Config, Key, ListenAddress, Listener, PoolConfig, flag_table};
use crate::fleet::{Address, SocketPath, Target};

/// Placeholder for the rank number in the path of the decoder's socket.
const RANK: &str = "{rank}";

impl Reader<'_> {
    /// Reads the local ranks: one listener and one pool of one decoder each.
    pub(super) fn ranks(&mut self, size: u32) -> (Vec<Listener>, Vec<PoolConfig>) {
        let port = self.port_range(&flag_table::PORT, self.text(&flag_table::PORT), size);
        let decoders = match self.raw.given(&flag_table::MODEL_SERVER_SOCKET) {
            Some(path) => self.decoder_sockets(path, size),
            None => self.decoder_ports(size),
        };
        let host = self.listen_host();
        if !self.problems.is_empty() {
            return (Vec::new(), Vec::new());
        }
        (0..)
            .zip((port..=u16::MAX).zip(decoders))
            .map(|(pool, (port, decoder))| {
                let address = match host {
                    Some(host) => ListenAddress::Address(SocketAddr::new(host, port)),
                    None => ListenAddress::DualStack(port),
                };
                let endpoints = vec![decoder];
                (Listener { address, pool }, PoolConfig { endpoints })
            })
            .unzip()
    }

    /// Reads the number of local ranks, `--data-parallel-size`.
    pub(super) fn data_parallel_size(&mut self) -> u32 {
        let key = &flag_table::DATA_PARALLEL_SIZE;
        match self.text(key).parse::<i64>() {
            Ok(size) if (1..=i64::from(u16::MAX)).contains(&size) => {
                u32::try_from(size).unwrap_or(1)
            }
            _ => {
                self.wanted(key, "a number of ranks from 1 to 65535");
                1
            }
        }
    }

    /// Returns one decoder per rank, on consecutive ports; none if the host is not valid, which is
    /// recorded as a problem.
    fn decoder_ports(&mut self, size: u32) -> Vec<Target> {
        let key = self.model_server_port();
        let port = self.port_range(key, self.text(key), size);
        let host = self.text(&flag_table::MODEL_SERVER_HOST);
        // `Target` accepts IP addresses and host names, and nothing else.
        let decoder = |port| Target::new(host, port);
        let decoders = (0..size)
            .zip(port..=u16::MAX)
            .map(|(_, port)| decoder(port));
        decoders.collect::<Result<_, _>>().unwrap_or_else(|_| {
            self.wanted(
                &flag_table::MODEL_SERVER_HOST,
                "a host name or IP address, without scheme or port",
            );
            Vec::new()
        })
    }

    /// Returns one decoder per rank, each on the Unix socket `path` with `{rank}` replaced by the
    /// rank's number; none if a path is not valid, which is recorded as a problem.
    fn decoder_sockets(&mut self, path: &str, size: u32) -> Vec<Target> {
        let key = &flag_table::MODEL_SERVER_SOCKET;
        let others = [
            &flag_table::MODEL_SERVER_PORT,
            &flag_table::VLLM_PORT,
            &flag_table::MODEL_SERVER_HOST,
        ];
        let given = others.iter().filter(|key| self.raw.given(key).is_some());
        let given: Vec<_> = given.map(|key| format!("--{}", key.name)).collect();
        if !given.is_empty() {
            let text = format!(
                "is given together with {}: the decoder uses either a socket or a port; \
                 give only one of them",
                given.join(" and ")
            );
            self.problem(key, &text);
        }
        if size > 1 && !path.contains(RANK) {
            let text = format!(
                "`{path}` is a single socket for {size} ranks; write {RANK} where the rank's \
                 number goes, such as /run/vllm-{RANK}.sock"
            );
            self.problem(key, &text);
            return Vec::new();
        }
        let decoders = (0..size).map(|rank| {
            let path = path.replace(RANK, &rank.to_string());
            let socket = SocketPath::parse(&path);
            socket.map(Target::from).map_err(|error| (path, error))
        });
        decoders
            .collect::<Result<_, _>>()
            .unwrap_or_else(|(path, error)| {
                self.problem(key, &format!("`{path}`: {}", error.text()));
                Vec::new()
            })
    }

    /// Returns the key that specifies the decoder's port. Adds a warning if the deprecated
    /// `--vllm-port` is given.
    fn model_server_port(&mut self) -> &'static Key {
        if self.is_given(&flag_table::VLLM_PORT) {
            self.warnings.push(
                "--vllm-port is deprecated; use --model-server-port, which takes precedence if both are set"
                    .to_owned(),
            );
        }
        self.raw.model_server_port()
    }

    /// Parses `text`, the value of `key`, as the first of `size` consecutive ports. Records a
    /// problem if it is not a port or the last port would be above 65535.
    pub(super) fn port_range(&mut self, key: &Key, text: &str, size: u32) -> u16 {
        let Some(port) = text.parse::<u16>().ok().filter(|port| *port != 0) else {
            let text = format!("`{text}` is not a port; give a number from 1 to 65535");
            self.problem(key, &text);
            return 1;
        };
        if u32::from(port) + size - 1 > u32::from(u16::MAX) {
            let text = format!(
                "port {port} with --data-parallel-size {size} needs ports up to {}, above 65535; \
                 choose a lower port",
                u32::from(port) + size - 1
            );
            self.problem(key, &text);
        }
        port
    }

    fn listen_host(&mut self) -> Option<IpAddr> {
        let text = self.raw.given(&flag_table::HOST)?;
        let host = ip(text);
        if host.is_none() {
            self.wanted(
                &flag_table::HOST,
                "an IP address, such as 0.0.0.0, ::1 or 10.0.0.7",
            );
        }
        host
    }

    /// Records a problem for ports that conflict: a listener of this process on the address of one
    /// of its decoders, or two listeners on one port. A decoder on a Unix socket cannot conflict,
    /// because the listeners are TCP.
    pub(super) fn check_overlaps(&mut self, config: &Config) {
        let (Some(rank), Some(last)) = (config.listeners.first(), config.listeners.last()) else {
            return;
        };
        let ours = rank.address.port()..=last.address.port();
        let pod = config.pod_ip.as_deref();
        let decoder = host_and_port(&config.pools[rank.pool].endpoints[0])
            .map(|(host, port)| (host, port..=port.saturating_add(ours.end() - ours.start())));
        let is_decoders = |listen, port| {
            let there = decoder.as_ref();
            there.filter(|(host, ports)| ports.contains(&port) && reaches(listen, host, pod))
        };
        // Both ranges are contiguous and equally long, so if they overlap, they overlap at the
        // higher start.
        let first = decoder.as_ref().map_or(0, |(_, ports)| *ports.start());
        let overlap = rank.address.port().max(first);
        if ours.contains(&overlap)
            && let Some((host, _)) = is_decoders(rank.address, overlap)
        {
            let text = format!(
                "port {overlap} would be both a listening port and the decoder's port on {host}, so \
                 requests would loop; change one of them"
            );
            self.problem(&flag_table::PORT, &text);
        }
        let admin = config.admin.map(|admin| admin.address);
        let metrics = config.metrics.as_ref().map(|metrics| metrics.address);
        let own = [
            (&flag_table::ADMIN_ADDRESS, admin),
            (&flag_table::METRICS_PORT, metrics),
        ];
        for (key, address) in own {
            let Some(address) = address else { continue };
            let listen = ListenAddress::Address(address);
            let what = if ours.contains(&address.port()) {
                "a listening port for clients"
            } else if is_decoders(listen, address.port()).is_some() {
                "the decoder's port"
            } else if key.name == flag_table::METRICS_PORT.name
                && admin.is_some_and(|admin| admin.port() == address.port())
            {
                "the admin server's port, which already serves /metrics"
            } else {
                continue;
            };
            let text = format!("port {} is {what}; choose another", address.port());
            self.problem(key, &text);
        }
    }
}

/// Returns the host and port of a decoder, or `None` if it uses a Unix socket.
fn host_and_port(decoder: &Target) -> Option<(String, u16)> {
    match (decoder.address(), decoder.name()) {
        (Some(Address::Tcp(address)), _) => Some((address.ip().to_string(), address.port())),
        (_, Some((name, port))) => Some((name.to_owned(), port)),
        (Some(Address::Unix(_)) | None, None) => None,
    }
}

/// Parses an IP address, with or without brackets. `localhost` is the IPv4 loopback address.
/// Returns `None` for any other name.
fn ip(text: &str) -> Option<IpAddr> {
    if text == "localhost" {
        return Some(IpAddr::V4(Ipv4Addr::LOCALHOST));
    }
    let inner = text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(text);
    inner.parse().ok()
}

/// Returns whether a connection to `host` on the port of `listen` would reach that listener.
/// `pod_ip` is an address of this machine. Names other than `localhost` are not resolved; the
/// result for them is `false`.
fn reaches(listen: ListenAddress, host: &str, pod_ip: Option<&str>) -> bool {
    let local = |address: IpAddr| address.is_loopback() || address.is_unspecified();
    let host = ip(host);
    let pod = pod_ip.and_then(ip);
    match (listen, host) {
        (_, None) => false,
        (ListenAddress::DualStack(_), Some(host)) => local(host) || Some(host) == pod,
        (ListenAddress::Address(address), Some(host)) if address.ip().is_unspecified() => {
            local(host) || Some(host) == pod
        }
        (ListenAddress::Address(address), Some(host)) => {
            address.ip() == host || (address.ip().is_loopback() && local(host))
        }
    }
}
