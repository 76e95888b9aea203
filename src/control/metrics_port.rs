//! The additional server of `/metrics` (`--metrics-port`), with or without TLS.

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;

use super::certificate::{self, Renewal};
use crate::admin;
use crate::cli::Exit;
use crate::config::{ListenAddress, MetricsConfig, TlsVersion};
use crate::net::tls::server_config;
use crate::sys;

/// Connections at the same time. Scrapers open one each.
const CONNECTIONS_MAX: usize = 64;
/// Time limit of one TLS handshake.
const HANDSHAKE_WAIT: Duration = Duration::from_secs(10);
/// Time for which requests are read from one connection. A scraper then opens another one.
const CONNECTION_WAIT: Duration = Duration::from_secs(60);
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
                None => {
                    let ready = Ready::start(listener, |stream| std::future::ready(Ok(stream)));
                    admin::serve_metrics(ready, text).await
                }
                Some(tls) => {
                    let ready = Ready::start(listener, move |stream| tls.accept(stream));
                    admin::serve_metrics(ready, text).await
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

/// A listener whose connections are ready for requests. Handshakes run in separate tasks, so that a
/// silent client delays no other.
struct Ready<S> {
    address: io::Result<SocketAddr>,
    opened: mpsc::Receiver<(Held<S>, SocketAddr)>,
}

impl<S: Send + 'static> Ready<S> {
    /// Spawns the task that accepts connections. `open` performs the handshake of one.
    fn start<F>(listener: TcpListener, open: impl Fn(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = io::Result<S>> + Send + 'static,
    {
        let address = listener.local_addr();
        let (sender, opened) = mpsc::channel(CONNECTIONS_MAX);
        tokio::spawn(async move {
            let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
            while let Ok(place) = Arc::clone(&places).acquire_owned().await {
                let Ok((stream, peer)) = listener.accept().await else {
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                };
                let (opening, sender) = (open(stream), sender.clone());
                tokio::spawn(async move {
                    match tokio::time::timeout(HANDSHAKE_WAIT, opening).await {
                        Ok(Ok(stream)) => {
                            let held = Held {
                                stream,
                                until: Box::pin(tokio::time::sleep(CONNECTION_WAIT)),
                                _place: place,
                            };
                            drop(sender.send((held, peer)).await);
                        }
                        Ok(Err(error)) => {
                            tracing::debug!(%peer, %error, "metrics port: TLS handshake failed");
                        }
                        Err(_) => tracing::debug!(%peer, "metrics port: TLS handshake timed out"),
                    }
                });
            }
        });
        Self { address, opened }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Listener for Ready<S> {
    type Io = Held<S>;
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

/// A connection that occupies one of the places, and whose input ends after `CONNECTION_WAIT`.
struct Held<S> {
    stream: S,
    until: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
}

impl<S: AsyncRead + Unpin> AsyncRead for Held<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.until.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Held<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
