//! The additional server of `/metrics` (`--metrics-port`), with or without TLS.

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::time::Duration;

use axum::serve::Listener;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::certificate::{self, Renewal};
use crate::admin;
use crate::cli::Exit;
use crate::config::{ListenAddress, MetricsConfig, TlsVersion};
use crate::net::tls::server_config;
use crate::sys;

/// TLS handshakes in progress at the same time. Scrapers open one connection each.
const HANDSHAKES_MAX: usize = 16;
/// Time limit of one TLS handshake.
const HANDSHAKE_WAIT: Duration = Duration::from_secs(10);
/// Pause after an accept failed, for example because the process has no descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A bound listener that does not serve yet.
pub(super) struct MetricsPort {
    listener: StdListener,
    tls: Option<TlsAcceptor>,
}

impl MetricsPort {
    /// Binds the port and reads the certificate. Also returns the [`Renewal`] that keeps the
    /// certificate up to date, if there is one.
    pub(super) fn bind(config: &MetricsConfig) -> Result<(Self, Option<Renewal>), Exit> {
        let (mut tls, mut renewal) = (None, None);
        if let Some(folder) = &config.cert_dir {
            let wrong = |error: &dyn std::fmt::Display| {
                Exit::config(format!(
                    "ringside: --metrics-cert-dir: {error}; it must be a directory with tls.crt \
                     and tls.key (PEM)"
                ))
            };
            let (certificate, kept) = certificate::load(folder).map_err(|error| wrong(&error))?;
            let made = server_config(certificate, TlsVersion::Tls12, &[]);
            tls = Some(TlsAcceptor::from(Arc::new(
                made.map_err(|error| wrong(&error))?,
            )));
            renewal = Some(kept);
        }
        let listener = sys::bind_alone(listen_address(config.address))?;
        Ok((Self { listener, tls }, renewal))
    }

    /// Spawns the task that serves the page `text` until the process ends.
    pub(super) fn serve(self, text: admin::MetricsText) -> io::Result<()> {
        self.listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(self.listener)?;
        tokio::spawn(async move {
            let served = match self.tls {
                None => admin::serve_metrics(listener, text).await,
                Some(tls) => admin::serve_metrics(TlsListener::start(listener, tls), text).await,
            };
            if let Err(error) = served {
                tracing::error!(%error, "metrics server stopped: --metrics-port is unavailable until a restart");
            }
        });
        Ok(())
    }
}

/// All addresses are one socket for IPv4 and IPv6, as for clients.
const fn listen_address(address: SocketAddr) -> ListenAddress {
    if address.ip().is_unspecified() && address.is_ipv6() {
        ListenAddress::DualStack(address.port())
    } else {
        ListenAddress::Address(address)
    }
}

/// A listener whose connections have finished their TLS handshake. Handshakes run in separate
/// tasks, so that a silent client delays no other.
struct TlsListener {
    address: io::Result<SocketAddr>,
    opened: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
}

impl TlsListener {
    fn start(listener: TcpListener, tls: TlsAcceptor) -> Self {
        let address = listener.local_addr();
        let (sender, opened) = mpsc::channel(HANDSHAKES_MAX);
        tokio::spawn(async move {
            let places = Arc::new(Semaphore::new(HANDSHAKES_MAX));
            while let Ok(place) = Arc::clone(&places).acquire_owned().await {
                let Ok((stream, peer)) = listener.accept().await else {
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                };
                let (tls, sender) = (tls.clone(), sender.clone());
                tokio::spawn(async move {
                    let handshake = tokio::time::timeout(HANDSHAKE_WAIT, tls.accept(stream));
                    match handshake.await {
                        Ok(Ok(stream)) => drop(sender.send((stream, peer)).await),
                        Ok(Err(error)) => {
                            tracing::debug!(%peer, %error, "metrics port: TLS handshake failed");
                        }
                        Err(_) => tracing::debug!(%peer, "metrics port: TLS handshake timed out"),
                    }
                    drop(place);
                });
            }
        });
        Self { address, opened }
    }
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.opened.recv().await {
            Some(opened) => opened,
            // The task that accepts never ends.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        match &self.address {
            Ok(address) => Ok(*address),
            Err(error) => Err(error.kind().into()),
        }
    }
}
