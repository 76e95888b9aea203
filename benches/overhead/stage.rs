//! The processes and threads of a benchmark: engines, and ringside in front of them.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use mock_engine::{Engine, EngineConfig, Tls};
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::chunks::ChunkEngine;

/// The protocol of all connections of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wire {
    Plain,
    Tls,
}

impl Wire {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Tls => "tls",
        }
    }
}

/// Engines and proxies that are ready.
pub(crate) struct Stage {
    pub(crate) wire: Wire,
    pub(crate) identity: Identity,
    pub(crate) prefiller: Engine,
    pub(crate) decoder: Engine,
    pub(crate) chunks: ChunkEngine,
    /// Forwards bodies without inspecting them.
    pub(crate) passing: Proxy,
    /// Inspects bodies, and splits requests that name a prefiller.
    pub(crate) inspecting: Proxy,
    /// In front of `chunks`.
    pub(crate) streaming: Proxy,
}

impl Stage {
    pub(crate) fn start(wire: Wire) -> Self {
        let identity = Identity::new(wire);
        let config = EngineConfig {
            tls: (wire == Wire::Tls).then(|| identity.engine()),
            keep_json: false,
            keep_body_bytes: 0,
            log_requests_max: 2,
            ..EngineConfig::default()
        };
        let start = |name: &str| {
            let config = EngineConfig {
                name: name.to_owned(),
                ..config.clone()
            };
            Engine::start(config, 0).unwrap()
        };
        let (prefiller, decoder) = (start("prefill"), start("decode"));
        let chunks = ChunkEngine::start((wire == Wire::Tls).then(|| identity.server()));
        let proxy = |port, args: &[&str]| Proxy::start(&identity, port, args);
        Self {
            passing: proxy(decoder.port(), &["--trust-client-kv"]),
            inspecting: proxy(decoder.port(), &[]),
            streaming: proxy(chunks.port(), &[]),
            wire,
            prefiller,
            decoder,
            chunks,
            identity,
        }
    }
}

/// A running ringside with one shard.
pub(crate) struct Proxy {
    child: Child,
    pub(crate) port: u16,
}

impl Proxy {
    fn start(identity: &Identity, decoder_port: u16, args: &[&str]) -> Self {
        let port = free_port();
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringside"));
        command
            .arg("sidecar")
            .arg(format!("--port={port}"))
            .arg(format!("--model-server-port={decoder_port}"))
            .args(["--admin-address=off", "--cores=any"])
            .args(["--check-handoff-versions=false"])
            .args(args)
            .args(identity.proxy_args());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut text = String::new();
        while !text.contains(" is ready") {
            let count = log.read_line(&mut text).unwrap();
            assert!(count > 0, "ringside has not started: {text}");
        }
        // Read on, so that the log does not fill the pipe.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Self { child, port }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// A self-signed certificate that every server of a stage uses, with its key. Written to a folder
/// that is removed at the end.
pub(crate) struct Identity {
    wire: Wire,
    chain: String,
    key: String,
    folder: PathBuf,
}

impl Identity {
    fn new(wire: Wire) -> Self {
        let signed = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let (chain, key) = (signed.cert.pem(), signed.signing_key.serialize_pem());
        let name = format!("ringside-overhead-{}-{}", std::process::id(), wire.name());
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("tls.crt"), &chain).unwrap();
        std::fs::write(folder.join("tls.key"), &key).unwrap();
        Self {
            wire,
            chain,
            key,
            folder,
        }
    }

    fn engine(&self) -> Tls {
        Tls::new(self.chain.as_bytes(), self.key.as_bytes()).unwrap()
    }

    fn certificate(&self) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(self.chain.as_bytes()).unwrap()
    }

    /// Returns the TLS parameters of a client that trusts only this certificate.
    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()));
        let builder = builder.with_safe_default_protocol_versions().unwrap();
        Arc::new(builder.with_root_certificates(roots).with_no_client_auth())
    }

    fn server(&self) -> Arc<ServerConfig> {
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap();
        let builder = ServerConfig::builder_with_provider(Arc::new(default_provider()));
        let builder = builder.with_safe_default_protocol_versions().unwrap();
        let builder = builder.with_no_client_auth();
        Arc::new(
            builder
                .with_single_cert(vec![self.certificate()], key)
                .unwrap(),
        )
    }

    fn proxy_args(&self) -> Vec<String> {
        match self.wire {
            Wire::Plain => vec!["--secure-proxy=false".to_owned()],
            Wire::Tls => vec![
                "--secure-proxy=true".to_owned(),
                format!("--cert-path={}", self.folder.display()),
                "--enable-tls=prefiller,decoder".to_owned(),
                "--tls-insecure-skip-verify=prefiller,decoder".to_owned(),
            ],
        }
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
