//! A listener for the pages of the control plane: with limits on connections and times, so that no
//! client of these ports can use up descriptors or keep others out.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, Sleep, sleep};

use crate::limits::{
    PAGE_ACCEPT_PAUSE_MS, PAGE_CONNECTIONS_MAX, PAGE_HANDSHAKE_SECS, PAGE_HEAD_SECS,
    PAGE_IDLE_SECS, PAGE_WRITE_SECS,
};

/// Connections that are ready for requests. Handshakes run in separate tasks, so that a silent
/// client delays no other.
pub(super) struct PageListener<S> {
    address: io::Result<SocketAddr>,
    opened: mpsc::Receiver<(Timed<S>, SocketAddr)>,
}

impl<S: Send + 'static> PageListener<S> {
    /// Spawns the task that accepts connections. `open` performs the handshake of one.
    pub(super) fn start<F>(
        listener: TcpListener,
        open: impl Fn(TcpStream) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = io::Result<S>> + Send + 'static,
    {
        let address = listener.local_addr();
        let (sender, opened) = mpsc::channel(PAGE_CONNECTIONS_MAX);
        tokio::spawn(async move {
            let mut places = Places::new();
            loop {
                let Ok((stream, peer)) = listener.accept().await else {
                    sleep(Duration::from_millis(PAGE_ACCEPT_PAUSE_MS)).await;
                    continue;
                };
                let place = places.take().await;
                tokio::spawn(begin(open(stream), peer, place, sender.clone()));
            }
        });
        Self { address, opened }
    }
}

async fn begin<S>(
    opening: impl Future<Output = io::Result<S>>,
    peer: SocketAddr,
    mut place: Place,
    sender: mpsc::Sender<(Timed<S>, SocketAddr)>,
) {
    let wait = Duration::from_secs(PAGE_HANDSHAKE_SECS);
    let opened = tokio::select! {
        opened = tokio::time::timeout(wait, opening) => opened,
        _ = &mut place.revoked => return,
    };
    match opened {
        Ok(Ok(stream)) => drop(sender.send((Timed::new(stream, place), peer)).await),
        Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake of a page failed"),
        Err(_) => tracing::debug!(%peer, "TLS handshake of a page timed out"),
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Listener for PageListener<S> {
    type Io = Timed<S>;
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

/// The places for connections. When all are taken, a new connection gets that of the oldest one: a
/// client that only holds connections must not keep probes out.
struct Places {
    free: Arc<Semaphore>,
    /// One for each connection, and for some that have ended, oldest first.
    taken: VecDeque<oneshot::Sender<()>>,
}

struct Place {
    /// Ready when another connection gets the place.
    revoked: oneshot::Receiver<()>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Places {
    fn new() -> Self {
        Self {
            free: Arc::new(Semaphore::new(PAGE_CONNECTIONS_MAX)),
            taken: VecDeque::new(),
        }
    }

    async fn take(&mut self) -> Place {
        if self.free.available_permits() == 0
            && let Some(oldest) = self.taken.pop_front()
        {
            // It has ended in the meantime if this fails.
            let _ = oldest.send(());
        }
        let permit = Arc::clone(&self.free).acquire_owned().await;
        self.taken.retain(|revoke| !revoke.is_closed());
        let (revoke, revoked) = oneshot::channel();
        self.taken.push_back(revoke);
        Place {
            revoked,
            // The semaphore is never closed.
            _permit: permit.ok(),
        }
    }
}

/// A connection with time limits. Its input ends when a request head is late, when no request
/// comes, or when another connection gets its place; its output fails when the peer reads nothing.
pub(super) struct Timed<S> {
    stream: S,
    read_limit: Pin<Box<Sleep>>,
    /// Whether bytes of a request have arrived since the last response.
    has_begun: bool,
    write_limit: Option<Pin<Box<Sleep>>>,
    is_revoked: bool,
    place: Place,
}

impl<S> Timed<S> {
    fn new(stream: S, place: Place) -> Self {
        Self {
            stream,
            read_limit: Box::pin(sleep(Duration::from_secs(PAGE_HEAD_SECS))),
            has_begun: true,
            write_limit: None,
            is_revoked: false,
            place,
        }
    }

    /// Returns whether another connection has got the place.
    fn is_revoked(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.is_revoked {
            self.is_revoked = Pin::new(&mut self.place.revoked).poll(cx).is_ready();
        }
        self.is_revoked
    }

    fn limit_read(&mut self, secs: u64) {
        let until = Instant::now() + Duration::from_secs(secs);
        self.read_limit.as_mut().reset(until);
    }

    /// Applies the time limit of writes to a write with this result.
    fn limit_write<T>(
        &mut self,
        cx: &mut Context<'_>,
        polled: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if self.is_revoked(cx) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        if polled.is_ready() {
            self.write_limit = None;
            return polled;
        }
        let limit = self
            .write_limit
            .get_or_insert_with(|| Box::pin(sleep(Duration::from_secs(PAGE_WRITE_SECS))));
        limit
            .as_mut()
            .poll(cx)
            .map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Timed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.is_revoked(cx) {
            return Poll::Ready(Ok(()));
        }
        let polled = Pin::new(&mut this.stream).poll_read(cx, buffer);
        if polled.is_ready() {
            if !this.has_begun {
                this.has_begun = true;
                this.limit_read(PAGE_HEAD_SECS);
            }
            return polled;
        }
        this.read_limit.as_mut().poll(cx).map(Ok)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Timed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, bytes);
        if polled.is_ready() {
            self.has_begun = false;
            self.limit_read(PAGE_IDLE_SECS);
        }
        self.limit_write(cx, polled)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_flush(cx);
        self.limit_write(cx, polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.limit_write(cx, polled)
    }
}
