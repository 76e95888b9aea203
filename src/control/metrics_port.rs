//! The additional server of `/metrics` (`--metrics-port`), with or without TLS.

use std::future::ready;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;

use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::certificate::{self, Renewal};
use super::page_listener::PageListener;
use crate::admin;
use crate::cli::Exit;
use crate::config::{ListenAddress, MetricsConfig, TlsVersion};
use crate::net::tls::server_config;
use crate::sys;

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
                None => {
                    let pages = PageListener::start(listener, |stream| ready(Ok(stream)));
                    admin::serve_metrics(pages, text).await
                }
                Some(tls) => {
                    let pages = PageListener::start(listener, move |stream| tls.accept(stream));
                    admin::serve_metrics(pages, text).await
                }
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
