//! The alternative executor (feature `monoio`): monoio as the source of readiness, and plain
//! non-blocking system calls.
//!
//! Only this module and its submodules use the monoio crate. They use a single operation of it, a
//! one-shot poll, and never pass it a buffer. Accepting, connecting, deadlines and wake-ups from
//! other threads are all waits until a descriptor is readable or writable.

mod conn;
mod handle;
mod hangup;

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use super::clock::{Alarm, clock};
use super::notifier::{Notifier, notifier};
use super::pipe::{Pipe, Pipes};
use super::probe::{COMPLETIONS, Driver, RING_ENTRIES};
use super::random::Random;
use super::turn;
use super::{Accepted, Address, Instant, Net, Timer, Wheel, socket};
use crate::sys::Silence;
pub use conn::Socket;
use handle::Handle;
use hangup::Hangups;

/// The executor of one shard. Clones share it; it is confined to its thread.
#[derive(Clone)]
pub struct Runtime {
    inner: Rc<Inner>,
}

struct Inner {
    wheel: Wheel,
    hangups: Rc<Hangups>,
    random: Random,
    pipes: Pipes,
    /// An eventfd that was notified once and is never drained, so it is always readable.
    /// `give_way` waits for it, which makes monoio poll the kernel.
    always: Handle,
    on_panic: RefCell<Option<Box<dyn Fn()>>>,
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runtime").finish_non_exhaustive()
    }
}

/// Runs `main` on this thread until it returns, on io_uring or on epoll.
///
/// # Errors
/// `Unsupported` if `busy_poll` is set, because monoio always sleeps. Also fails if the driver
/// cannot be set up or the executor's own descriptors cannot be opened.
pub fn run<F, T>(driver: Driver, busy_poll: Option<Duration>, main: F) -> io::Result<T>
where
    F: AsyncFnOnce(Runtime) -> T,
{
    if busy_poll.is_some() {
        let text = "--busy-poll: this build uses monoio, which does not support busy polling";
        return Err(io::Error::new(io::ErrorKind::Unsupported, text));
    }
    let task = async move {
        let net = Runtime::new()?;
        Ok(main(net).await)
    };
    match driver {
        Driver::Uring => ::monoio::RuntimeBuilder::<::monoio::IoUringDriver>::new()
            .uring_builder(ring_builder())
            .with_entries(RING_ENTRIES)
            .build()?
            .block_on(task),
        Driver::Epoll => ::monoio::RuntimeBuilder::<::monoio::LegacyDriver>::new()
            .build()?
            .block_on(task),
    }
}

/// Returns the settings of [`ring_builder`](super::probe::ring_builder) in the version of the crate
/// that monoio uses.
fn ring_builder() -> io_uring_06::Builder {
    let mut builder = io_uring_06::IoUring::builder();
    builder
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .setup_cqsize(COMPLETIONS);
    builder
}

impl Runtime {
    fn new() -> io::Result<Self> {
        let wheel = Wheel::new(clock());
        let hangups = Hangups::start()?;
        let (counter, notifier) = notifier()?;
        notifier.notify();
        let always = Handle::watch(counter)?;
        let inner = Inner {
            wheel,
            hangups,
            random: Random::new()?,
            pipes: Pipes::default(),
            always,
            on_panic: RefCell::new(None),
        };
        let net = Self {
            inner: Rc::new(inner),
        };
        net.start_wheel()?;
        Ok(net)
    }

    /// Starts the task that advances the timer wheel whenever the shard's timer descriptor becomes
    /// readable. The descriptor is set only when the earliest deadline has moved earlier or has
    /// been reached.
    fn start_wheel(&self) -> io::Result<()> {
        let alarm = Alarm::new()?;
        let handle = Handle::watch(alarm.watched()?)?;
        let wheel = self.inner.wheel.clone();
        let earlier = alarm.clone();
        wheel.on_rearm(move |instant| earlier.set(instant));
        ::monoio::spawn(async move {
            loop {
                handle.readable().await;
                handle.drain_counter();
                if let Some(instant) = wheel.advance(clock()) {
                    alarm.set(instant);
                }
            }
        });
        Ok(())
    }

    /// Takes ownership of an accepted connection.
    ///
    /// # Errors
    /// Fails if the socket cannot be watched (out of memory, epoll limit).
    pub fn adopt(&self, accepted: Accepted) -> io::Result<Socket> {
        let Accepted { socket, peer } = accepted;
        Socket::new(socket, peer, Rc::clone(&self.inner.hangups))
    }

    /// Watches a listening socket.
    ///
    /// # Errors
    /// Fails if the socket cannot be watched.
    pub fn listener(&self, socket: std::net::TcpListener) -> io::Result<Listener> {
        Ok(Listener {
            handle: Handle::watch(OwnedFd::from(socket))?,
        })
    }

    /// Returns a receiver that this shard can wait on, and the notifier that wakes it from any
    /// thread.
    ///
    /// # Errors
    /// Fails if a descriptor cannot be opened or watched.
    pub fn notifier(&self) -> io::Result<(NotifyReceiver, Notifier)> {
        let (event, notifier) = notifier()?;
        let handle = Handle::watch(event)?;
        Ok((NotifyReceiver { handle }, notifier))
    }

    /// Sets a callback that is called whenever a task started with [`Net::spawn`] has ended in a
    /// panic.
    pub fn on_panic(&self, note: impl Fn() + 'static) {
        *self.inner.on_panic.borrow_mut() = Some(Box::new(note));
    }

    /// Always 0: monoio does not report lost events.
    #[must_use]
    pub const fn events_lost(&self) -> u32 {
        0
    }

    /// Resets nothing: on monoio, a peer that has vanished is noticed only by the kernel.
    pub fn reset_vanished(&self, _: Silence) -> impl Future<Output = u64> {
        std::future::ready(0)
    }

    /// Wakes every task that waits on a timer (see [`Wheel::nudge_all`]).
    pub fn nudge_all(&self) {
        self.inner.wheel.nudge_all();
    }
}

impl Net for Runtime {
    type Conn = Socket;

    fn connect(&self, address: &Address) -> io::Result<Socket> {
        let socket = socket::connect(address)?;
        Socket::new(socket, address.tcp(), Rc::clone(&self.inner.hangups))
    }

    fn pipe(&self) -> Option<Pipe> {
        self.inner.pipes.take()
    }

    async fn give_way(&self) {
        turn::charge(0);
        if !turn::is_over() {
            return;
        }
        // A task that wakes itself would keep monoio from polling the ring. Waiting for a
        // descriptor that is always readable goes through the ring.
        self.inner.always.readable().await;
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let contained = Contained {
            task: Some(Box::pin(task)),
            net: self.clone(),
        };
        drop(::monoio::spawn(contained));
    }

    fn spawn_vital(&self, task: impl Future<Output = ()> + 'static) {
        // Not wrapped in `Contained`: a panic unwinds the thread, which ends the process.
        let mut task = Box::pin(task);
        drop(::monoio::spawn(poll_fn(move |cx| {
            turn::begin();
            task.as_mut().poll(cx)
        })));
    }

    fn now(&self) -> Instant {
        clock()
    }

    fn clock(&self) -> Instant {
        clock()
    }

    fn timer(&self) -> Timer {
        self.inner.wheel.timer()
    }

    fn random(&self) -> u64 {
        self.inner.random.next()
    }
}

/// A task whose panic ends only that task. The future is polled inside `catch_unwind`, and is
/// dropped (which closes its sockets) when it panics.
struct Contained<T> {
    task: Option<Pin<Box<T>>>,
    net: Runtime,
}

impl<T: Future<Output = ()>> Future for Contained<T> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Some(task) = &mut self.task else {
            return Poll::Ready(());
        };
        turn::begin();
        let polled = std::panic::catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(cx)));
        match polled {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(())) => self.task = None,
            Err(_) => {
                let task = self.task.take();
                // A second panic, during the drop of the task, must not escape either.
                drop(std::panic::catch_unwind(AssertUnwindSafe(|| drop(task))));
                self.net.record_panic();
            }
        }
        Poll::Ready(())
    }
}

impl Runtime {
    fn record_panic(&self) {
        if let Some(note) = &*self.inner.on_panic.borrow() {
            note();
        }
    }
}

/// A listening socket of this shard.
pub struct Listener {
    handle: Handle,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").finish_non_exhaustive()
    }
}

impl Listener {
    /// Waits until a connection can be accepted.
    pub async fn readable(&self) {
        self.handle.readable().await;
    }

    /// Returns whether a connection is in the accept queue, without accepting it.
    #[must_use]
    pub fn has_pending(&self) -> bool {
        socket::has_pending(self.handle.fd())
    }

    /// Accepts the next connection in the accept queue.
    ///
    /// # Errors
    /// `WouldBlock` if the accept queue is empty. On `EMFILE`, `ENFILE`, `ENOBUFS` and `ENOMEM` the
    /// caller should pause: the connection remains in the queue and the socket remains readable.
    pub fn try_accept(&self) -> io::Result<Accepted> {
        socket::accept(self.handle.fd())
    }
}

/// Waits for notifications that other threads send with the [`Notifier`] created with it.
pub struct NotifyReceiver {
    handle: Handle,
}

impl std::fmt::Debug for NotifyReceiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NotifyReceiver").finish_non_exhaustive()
    }
}

impl NotifyReceiver {
    /// Waits until a notification has arrived since the last call. Several notifications count as
    /// one.
    pub async fn notified(&self) {
        self.handle.readable().await;
        self.handle.drain_counter();
    }
}
