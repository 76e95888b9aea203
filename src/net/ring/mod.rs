//! The real engine: monoio as a source of readiness, and plain non-blocking system calls.
//!
//! This is the only place that names the runtime. It uses one operation of it, a one-shot poll,
//! and never hands it a buffer (design 4.1). Accepting, connecting, deadlines and wake-ups from
//! other threads are all "wait until this descriptor is readable or writable".

mod conn;
mod handle;
mod hangup;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::probe::{Driver, RING_ENTRIES, ring_builder};
use super::{Moment, Net, Timer, Wheel};
use crate::sys::set_keepalive;
pub use conn::RingConn;
use handle::Handle;
use hangup::Hangups;

/// The engine of one shard. Clones share it; it stays on its thread.
#[derive(Clone)]
pub struct RingNet {
    inner: Rc<Inner>,
}

struct Inner {
    wheel: Wheel,
    hangups: Rc<Hangups>,
    random: Cell<u64>,
    on_panic: RefCell<Option<Box<dyn Fn()>>>,
}

impl std::fmt::Debug for RingNet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RingNet").finish_non_exhaustive()
    }
}

/// Runs `main` on this thread until it returns, on a ring or on epoll.
///
/// # Errors
/// When the driver could not be built, or the engine's own descriptors could not be opened.
pub fn run<F, T>(driver: Driver, main: F) -> io::Result<T>
where
    F: AsyncFnOnce(RingNet) -> T,
{
    let task = async move {
        let net = RingNet::new()?;
        Ok(main(net).await)
    };
    match driver {
        Driver::Uring => monoio::RuntimeBuilder::<monoio::IoUringDriver>::new()
            .uring_builder(ring_builder())
            .with_entries(RING_ENTRIES)
            .build()?
            .block_on(task),
        Driver::Epoll => monoio::RuntimeBuilder::<monoio::LegacyDriver>::new()
            .build()?
            .block_on(task),
    }
}

impl RingNet {
    fn new() -> io::Result<Self> {
        let wheel = Wheel::new(clock());
        let hangups = Hangups::start()?;
        let inner = Inner {
            wheel,
            hangups,
            random: Cell::new(seed()),
            on_panic: RefCell::new(None),
        };
        let net = Self {
            inner: Rc::new(inner),
        };
        net.start_wheel()?;
        Ok(net)
    }

    /// Drives the wheel by one timer descriptor, which is set only when the next deadline moved
    /// earlier or has been reached.
    fn start_wheel(&self) -> io::Result<()> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer: Rc<OwnedFd> = Rc::new(timerfd_create(TimerfdClockId::Monotonic, flags)?);
        let handle = Handle::watch(timer.try_clone()?)?;
        let wheel = self.inner.wheel.clone();
        let rearm_timer = Rc::clone(&timer);
        wheel.on_rearm(move |moment| set_timer(&rearm_timer, moment));
        monoio::spawn(async move {
            loop {
                handle.readable().await;
                handle.drain_counter();
                if let Some(moment) = wheel.advance(clock()) {
                    set_timer(&timer, moment);
                }
            }
        });
        Ok(())
    }

    /// Takes over an accepted connection.
    ///
    /// # Errors
    /// When the engine cannot watch the socket (out of memory, epoll limit).
    pub fn adopt(&self, socket: OwnedFd, peer_ip: Option<IpAddr>) -> io::Result<RingConn> {
        RingConn::new(socket, peer_ip, Rc::clone(&self.inner.hangups))
    }

    /// Watches a listening socket.
    ///
    /// # Errors
    /// When the engine cannot watch the socket.
    pub fn listener(&self, socket: std::net::TcpListener) -> io::Result<RingListener> {
        Ok(RingListener {
            handle: Handle::watch(OwnedFd::from(socket))?,
            net: self.clone(),
        })
    }

    /// A wake-up that other threads may ring.
    ///
    /// # Errors
    /// When no descriptor could be opened.
    pub fn bell(&self) -> io::Result<(Bell, Ringer)> {
        let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let ringer = Ringer {
            event: Arc::new(event.try_clone()?),
        };
        Ok((
            Bell {
                handle: Handle::watch(event)?,
            },
            ringer,
        ))
    }

    /// Calls `note` whenever a spawned task ended in a panic.
    pub fn on_panic(&self, note: impl Fn() + 'static) {
        *self.inner.on_panic.borrow_mut() = Some(Box::new(note));
    }

    /// Wakes every task that waits with a deadline (see [`Wheel::nudge_all`]).
    pub fn nudge_all(&self) {
        self.inner.wheel.nudge_all();
    }
}

impl Net for RingNet {
    type Conn = RingConn;

    fn connect(&self, address: SocketAddr) -> io::Result<RingConn> {
        let family = match address {
            SocketAddr::V4(_) => AddressFamily::INET,
            SocketAddr::V6(_) => AddressFamily::INET6,
        };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        rustix::net::sockopt::set_tcp_nodelay(&socket, true)?;
        set_keepalive(&socket)?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        RingConn::new(socket, Some(address.ip()), Rc::clone(&self.inner.hangups))
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        let contained = Contained {
            task: Some(Box::pin(task)),
            net: self.clone(),
        };
        drop(monoio::spawn(contained));
    }

    fn spawn_vital(&self, task: impl Future<Output = ()> + 'static) {
        // Uncontained: the panic unwinds the thread, which ends the process.
        drop(monoio::spawn(task));
    }

    fn now(&self) -> Moment {
        clock()
    }

    fn timer(&self) -> Timer {
        self.inner.wheel.timer()
    }

    fn random(&self) -> u64 {
        // splitmix64: one addition and a mix per number, seeded by the operating system.
        let state = self.inner.random.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.inner.random.set(state);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// A task whose panic ends itself and nothing else: the future is polled inside `catch_unwind`
/// and dropped (which closes its sockets) when it panics.
struct Contained<T> {
    task: Option<Pin<Box<T>>>,
    net: RingNet,
}

impl<T: Future<Output = ()>> Future for Contained<T> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Some(task) = &mut self.task else {
            return Poll::Ready(());
        };
        let polled = std::panic::catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(cx)));
        match polled {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(())) => self.task = None,
            Err(_) => {
                let task = self.task.take();
                // A second panic while the pieces are dropped must not escape either.
                drop(std::panic::catch_unwind(AssertUnwindSafe(|| drop(task))));
                self.net.note_panic();
            }
        }
        Poll::Ready(())
    }
}

impl RingNet {
    fn note_panic(&self) {
        if let Some(note) = &*self.inner.on_panic.borrow() {
            note();
        }
    }
}

/// A listening socket of this shard.
pub struct RingListener {
    handle: Handle,
    net: RingNet,
}

impl std::fmt::Debug for RingListener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RingListener").finish_non_exhaustive()
    }
}

impl RingListener {
    /// Waits until a connection may be taken.
    pub async fn readable(&self) {
        self.handle.readable().await;
    }

    /// Takes the next waiting connection, if one is there.
    ///
    /// # Errors
    /// `WouldBlock` when none waits. `EMFILE`, `ENFILE`, `ENOBUFS` and `ENOMEM` mean that the
    /// caller should pause: the connection stays in the queue and the socket stays readable.
    pub fn try_accept(&self) -> io::Result<RingConn> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (socket, address) = rustix::net::acceptfrom_with(self.handle.fd(), flags)?;
        let peer = address.and_then(|any| SocketAddr::try_from(any).ok());
        self.net
            .adopt(socket, peer.map(|address| address.ip().to_canonical()))
    }
}

/// The receiving end of a wake-up from other threads.
pub struct Bell {
    handle: Handle,
}

impl std::fmt::Debug for Bell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bell").finish_non_exhaustive()
    }
}

impl Bell {
    /// Waits until it was rung since the last call. Rings in between count once.
    pub async fn rung(&self) {
        self.handle.readable().await;
        self.handle.drain_counter();
    }
}

/// Rings a [`Bell`]; may be used from any thread.
#[derive(Clone, Debug)]
pub struct Ringer {
    event: Arc<OwnedFd>,
}

impl Ringer {
    /// Wakes the shard.
    pub fn ring(&self) {
        // The counter cannot overflow by ones in practice; a full one means "already rung".
        let _ = rustix::io::write(&*self.event, &1_u64.to_ne_bytes());
    }
}

fn clock() -> Moment {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
    Moment(seconds * 1_000_000_000 + nanos)
}

fn set_timer(timer: &OwnedFd, moment: Moment) {
    let wait = Duration::from_nanos(moment.0.max(1));
    let value = Timespec {
        tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(wait.subsec_nanos()),
    };
    let zero = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let setting = Itimerspec {
        it_interval: zero,
        it_value: value,
    };
    let set = timerfd_settime(timer, TimerfdTimerFlags::ABSTIME, &setting);
    debug_assert!(set.is_ok(), "the kernel refused a valid time");
}

fn seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The standard library seeds its hasher from the operating system.
    let mut hasher = std::collections::hash_map::RandomState::new().build_hasher();
    hasher.write_u64(clock().0);
    hasher.finish()
}
