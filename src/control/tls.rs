//! The TLS state that all shards share, built from the configuration.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::certificate::{self, Identity, Pem, Renewal};
use super::handshakes::Handshakes;
use crate::cli::Exit;
use crate::config::{Config, ListenAddress, TlsConfig, UpstreamTls};
use crate::fleet::{Address, Target};
use crate::metrics::{ShardMetrics, TlsPeer};
use crate::net::Conn;
use crate::net::tls::{Acceptor, Dialer, Outcome, Trust, Wire, client_config, server_config};
use crate::pd::Role;
use crate::upstream::SecureUpstream;

/// The name that the certificate of a decoder on a Unix socket must be valid for.
const SOCKET_HOST: &str = "localhost";

/// The TLS configurations for clients and for each kind of engine; `None` is plain text.
pub(super) struct TlsContext {
    server: Option<Arc<ServerConfig>>,
    accepts_plain_text: bool,
    prefill: Option<ClientConfig>,
    pub(super) decode: Option<Arc<ClientConfig>>,
    encode: Option<ClientConfig>,
    handshakes: Handshakes,
}

impl TlsContext {
    /// Reads the configured files, or generates a self-signed certificate. If the certificate comes
    /// from a directory, also returns the [`Renewal`] that keeps it up to date.
    ///
    /// # Errors
    /// Returns the reason for the first problem: with exit code 3 if a file cannot be used or root
    /// certificates are missing, and with exit code 1 if TLS or the self-signed certificate cannot
    /// be set up.
    pub(super) fn load(config: &Config) -> Result<(Self, Option<Renewal>), Exit> {
        let tls = &config.tls;
        let (mut server, mut renewal) = (None, None);
        if let Some(listener) = &tls.listener {
            let certificate = match &listener.cert_dir {
                Some(folder) => {
                    let loaded = certificate::load(folder).map_err(|error| {
                        wrong(format!(
                            "--cert-path: {error}; it must be a directory with tls.crt and tls.key (PEM)"
                        ))
                    })?;
                    renewal = Some(loaded.1);
                    loaded.0
                }
                None => self_signed(config)?,
            };
            let (version, suites) = (listener.min_version, &listener.cipher_suites);
            let made = server_config(certificate, version, suites).map_err(unusable)?;
            server = Some(Arc::new(made));
        }
        let upstream = Upstream::read(tls)?;
        let listener = tls.listener.as_ref();
        let context = Self {
            server,
            accepts_plain_text: listener.is_some_and(|listener| listener.accepts_plain_text),
            prefill: upstream.config("prefiller", tls.prefiller)?,
            decode: upstream.config("decoder", tls.decoder)?.map(Arc::new),
            encode: upstream.config("encoder", tls.encoder)?,
            handshakes: Handshakes::start(),
        };
        Ok((context, renewal))
    }

    /// Returns the acceptor for a shard's client connections; `None` serves plain text.
    pub(super) fn acceptor(&self, metrics: &Arc<ShardMetrics>) -> Option<Acceptor> {
        let server = self.server.as_ref()?;
        let expected = if self.accepts_plain_text {
            Outcome::PlainText
        } else {
            Outcome::Ok
        };
        let report = self.handshakes.report(TlsPeer::Client, metrics, expected);
        Some(Acceptor::new(Arc::clone(server), report))
    }

    /// Returns the function that starts TLS on a shard's new connections to engines. For roles
    /// without TLS it returns the connection unchanged.
    pub(super) fn upstream<C: Conn>(&self, metrics: &Arc<ShardMetrics>) -> SecureUpstream<Wire<C>> {
        let dialer = |peer, config: Option<&ClientConfig>| {
            let report = || self.handshakes.report(peer, metrics, Outcome::Ok);
            config.map(|config| Dialer::new(config, report()))
        };
        let prefill = dialer(TlsPeer::Prefill, self.prefill.as_ref());
        let decode = dialer(TlsPeer::Decode, self.decode.as_deref());
        let encode = dialer(TlsPeer::Encode, self.encode.as_ref());
        Box::new(move |wire, role, target| {
            let dialer = match role {
                Role::Prefill => &prefill,
                Role::Decode => &decode,
                Role::Encode => &encode,
                // Mooncake's bootstrap servers use plain HTTP.
                Role::Bootstrap => &None,
            };
            match (wire, dialer) {
                (Wire::Plain(conn), Some(dialer)) => dialer.dial(conn, &host(target)),
                (wire, _) => wire,
            }
        })
    }
}

/// Returns the host that an engine's certificate must be valid for: the target's name or IP
/// address, or `localhost` for a Unix socket.
pub(super) fn host(target: &Target) -> String {
    match (target.name(), target.address()) {
        // Names in certificates have no trailing dot.
        (Some((name, _)), _) => name.trim_end_matches('.').to_owned(),
        (None, Some(Address::Tcp(address))) => address.ip().to_string(),
        (None, Some(Address::Unix(_)) | None) => SOCKET_HOST.to_owned(),
    }
}

/// The TLS settings that are common to all engines: the root certificates and the client
/// certificate.
struct Upstream<'a> {
    tls: &'a TlsConfig,
    roots: Arc<RootCertStore>,
    identity: Option<Identity>,
}

impl<'a> Upstream<'a> {
    fn read(tls: &'a TlsConfig) -> Result<Self, Exit> {
        let stages = [tls.prefiller, tls.decoder, tls.encoder];
        let mut stages = stages.into_iter().flatten();
        let is_any = stages.clone().next().is_some();
        let roots = if stages.any(|stage| stage.verify) {
            roots(tls.ca_file.as_deref())?
        } else {
            RootCertStore::empty()
        };
        let identity = match &tls.client_identity {
            Some(identity) if is_any => Some(client_identity(identity)?),
            Some(_) | None => None,
        };
        Ok(Self {
            tls,
            roots: Arc::new(roots),
            identity,
        })
    }

    fn config(&self, stage: &str, with: Option<UpstreamTls>) -> Result<Option<ClientConfig>, Exit> {
        let Some(with) = with else { return Ok(None) };
        let trust = if with.verify {
            Trust::Roots(Arc::clone(&self.roots))
        } else {
            tracing::warn!(
                "--tls-insecure-skip-verify: certificates of the {stage} are not verified; the \
                 connection is open to man-in-the-middle attacks"
            );
            Trust::AnyCertificate
        };
        let identity = self.identity.as_ref();
        let identity = identity.map(|(chain, key)| (chain.clone(), key.clone_key()));
        let made =
            client_config(trust, identity).map_err(|error| match &self.tls.client_identity {
                Some(identity) => wrong(format!(
                    "--tls-client-cert: {} cannot be used with {}: {error}",
                    identity.cert_file.display(),
                    identity.key_file.display()
                )),
                None => unusable(error),
            })?;
        Ok(Some(made))
    }
}

/// Returns the system's root certificates and those of `ca_file`. Fails if the file cannot be used,
/// or if there is neither a file nor a system root.
fn roots(ca_file: Option<&Path>) -> Result<RootCertStore, Exit> {
    let mut roots = RootCertStore::empty();
    let system = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(system.certs);
    let Some(file) = ca_file else {
        if roots.is_empty() {
            return Err(wrong(
                "--enable-tls: this system has no root certificates; set --tls-ca-file, or install \
                 them (ca-certificates)"
                    .to_owned(),
            ));
        }
        return Ok(roots);
    };
    let chain = certificate::read_chain(file);
    for root in chain.map_err(|error| wrong(format!("--tls-ca-file: {error}")))? {
        roots.add(root).map_err(|error| {
            wrong(format!(
                "--tls-ca-file: {}: a certificate in the file cannot be used: {error}",
                file.display()
            ))
        })?;
    }
    Ok(roots)
}

fn client_identity(identity: &crate::config::Identity) -> Result<Identity, Exit> {
    Pem::read(&identity.cert_file, &identity.key_file)
        .and_then(|pem| pem.identity())
        .map_err(|error| wrong(format!("--tls-client-cert, --tls-client-key: {error}")))
}

fn self_signed(config: &Config) -> Result<Arc<crate::net::tls::Certificate>, Exit> {
    let names = names(config, rustix::system::uname().nodename().to_str().ok());
    let made = certificate::make(&names);
    let made =
        made.map_err(|error| Exit::runtime(format!("no self-signed certificate: {error}")))?;
    tracing::info!(
        "serving TLS with a self-signed certificate for {}; set --cert-path to use your own",
        names.join(", ")
    );
    Ok(made)
}

/// Returns the names for the self-signed certificate: the names and addresses by which clients may
/// connect to this process. `host` is the host name of this machine, if known.
fn names(config: &Config, host: Option<&str>) -> Vec<String> {
    let mut names: Vec<String> = ["localhost", "127.0.0.1", "::1"].map(Into::into).into();
    let listen = match config.listeners[0].address {
        ListenAddress::Address(address) if !address.ip().is_unspecified() => {
            Some(address.ip().to_string())
        }
        ListenAddress::Address(_) | ListenAddress::DualStack(_) => None,
    };
    let pod = config.pod_ip.clone();
    let pod = pod.map(|pod| pod.parse::<IpAddr>().map_or(pod, |ip| ip.to_string()));
    for name in [host.map(Into::into), pod, listen].into_iter().flatten() {
        if !name.is_empty() && !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn wrong(text: String) -> Exit {
    Exit::config(format!("ringside: {text}"))
}

fn unusable(error: rustls::Error) -> Exit {
    Exit::runtime(format!("TLS cannot be used: {error}"))
}
