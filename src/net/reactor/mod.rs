//! The shards' own executor: tasks on one thread, woken by descriptors becoming ready.
//!
//! The kernel is asked for one thing, "tell me when this changes": a multishot poll per
//! connection on a ring (`uring`), or an edge-triggered epoll set (`epoll`). Bytes move in
//! plain non-blocking calls that name their buffer, so nothing the kernel holds can outlive a
//! dropped future. A turn of the loop takes what the kernel told, wakes tasks in that order, and
//! runs each to its next wait: the first chunk of an engine's step has left before the second is
//! looked at. `docs/engine.md` has the measurements behind it.

mod conn;
mod epoll;
mod slot;
mod source;
mod task;
#[cfg(test)]
mod tests;
mod uring;

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::net::IpAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::clock::{Alarm, Random, clock};
use super::notifier::{Notifier, notifier};
use super::pipe::{Pipe, Pipes};
use super::probe::Driver;
use super::socket;
use super::{Address, Instant, Net, Timer, Wheel};
pub use conn::Socket;
use slot::{Readiness, Slot};
use source::{Event, Source, WRITE_KEY};
use task::{MAIN, Panic, TaskWaker, Tasks};

/// The executor of one shard. Clones share it; it stays on its thread.
#[derive(Clone)]
pub struct Runtime {
    inner: Rc<Inner>,
}

struct Inner {
    tasks: Tasks,
    source: RefCell<Source>,
    watches: RefCell<Watches>,
    wheel: Wheel,
    random: Random,
    pipes: Pipes,
    on_panic: RefCell<Option<Box<dyn Fn()>>>,
    /// How long to look for events after the last one before sleeping.
    busy_poll: Option<Duration>,
    last_event: Cell<Instant>,
    /// Read when it is first asked for in a turn.
    turn_began: Cell<Option<Instant>>,
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runtime").finish_non_exhaustive()
    }
}

/// Runs `main` on this thread until it returns, on a ring or on epoll; the tasks it has spawned
/// end with it. With `busy_poll` the thread looks for events that long after the last one before
/// it sleeps.
///
/// # Errors
/// When the driver could not be built, the reactor's own descriptors could not be opened, or the
/// kernel refuses to wait.
pub fn run<F, T>(driver: Driver, busy_poll: Option<Duration>, main: F) -> io::Result<T>
where
    F: AsyncFnOnce(Runtime) -> T,
{
    task::clear_woken();
    let runtime = Runtime::open(driver, busy_poll)?;
    let _close = Close(&runtime.inner);
    runtime.start_wheel()?;
    let mut main = pin!(main(runtime.clone()));
    let flag = TaskWaker::new(MAIN);
    let waker = Waker::from(std::sync::Arc::clone(&flag));
    waker.wake_by_ref();
    let mut events = Vec::new();
    loop {
        // Tasks woken from here on wait for the next turn: the kernel is looked at in between.
        for _ in 0..task::woken() {
            let Some(number) = task::next_woken() else {
                break;
            };
            if number != MAIN {
                runtime.poll_task(number);
                continue;
            }
            flag.begin();
            if let Poll::Ready(value) = main.as_mut().poll(&mut Context::from_waker(&waker)) {
                return Ok(value);
            }
        }
        runtime.inner.turn(&mut events)?;
    }
}

/// Ends all tasks when `run` returns or unwinds. They hold the executor that holds them.
struct Close<'a>(&'a Rc<Inner>);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.tasks.close();
        // What they held is closed when the kernel has taken its watches back.
        let turned = self.0.source.borrow_mut().turn(false, &mut Vec::new());
        drop(turned);
    }
}

impl Runtime {
    fn open(driver: Driver, busy_poll: Option<Duration>) -> io::Result<Self> {
        let inner = Inner {
            tasks: Tasks::new(),
            source: RefCell::new(Source::open(driver)?),
            watches: RefCell::default(),
            wheel: Wheel::new(clock()),
            random: Random::new(),
            pipes: Pipes::default(),
            on_panic: RefCell::new(None),
            busy_poll,
            last_event: Cell::new(clock()),
            turn_began: Cell::new(None),
        };
        Ok(Self {
            inner: Rc::new(inner),
        })
    }

    /// Drives the wheel by one alarm.
    fn start_wheel(&self) -> io::Result<()> {
        let alarm = Alarm::new()?;
        let handle = self.watch_vital(alarm.watched()?)?;
        let wheel = self.inner.wheel.clone();
        let earlier = alarm.clone();
        wheel.on_rearm(move |instant| earlier.set(instant));
        self.spawn_vital(async move {
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

    fn poll_task(&self, number: u32) {
        if !self.inner.tasks.poll(number)
            && let Some(record) = &*self.inner.on_panic.borrow()
        {
            record();
        }
    }

    /// Watches what the thread cannot do without.
    fn watch_vital(&self, fd: OwnedFd) -> io::Result<Handle> {
        self.watch_slot(Slot::new(fd, Readiness::default(), true))
    }

    /// Watches a connection.
    fn watch(&self, fd: OwnedFd, ready: Readiness) -> io::Result<Handle> {
        self.watch_slot(Slot::new(fd, ready, false))
    }

    fn watch_slot(&self, slot: Slot) -> io::Result<Handle> {
        let slot = Rc::new(slot);
        let key = self.inner.watches.borrow_mut().add(Rc::clone(&slot));
        slot.set_key(key);
        let watched = self.inner.source.borrow_mut().watch(slot.fd(), key);
        if let Err(error) = watched {
            self.inner.watches.borrow_mut().forget(key);
            return Err(error);
        }
        Ok(Handle {
            slot,
            inner: Rc::clone(&self.inner),
        })
    }

    /// Takes over an accepted connection.
    ///
    /// # Errors
    /// When the socket cannot be watched (out of memory, epoll limit).
    pub fn adopt(&self, socket: OwnedFd, peer_ip: Option<IpAddr>) -> io::Result<Socket> {
        Ok(Socket::new(self.watch(socket, Readiness::WRITE)?, peer_ip))
    }

    /// Watches a listening socket.
    ///
    /// # Errors
    /// When the socket cannot be watched.
    pub fn listener(&self, socket: std::net::TcpListener) -> io::Result<Listener> {
        Ok(Listener {
            handle: self.watch_vital(OwnedFd::from(socket))?,
            net: self.clone(),
        })
    }

    /// A wake-up that other threads may ring.
    ///
    /// # Errors
    /// When no descriptor could be opened.
    pub fn notifier(&self) -> io::Result<(NotifyReceiver, Notifier)> {
        let (event, notifier) = notifier()?;
        let handle = self.watch_vital(event)?;
        Ok((NotifyReceiver { handle }, notifier))
    }

    /// Calls `record` whenever a spawned task ended in a panic.
    pub fn on_panic(&self, record: impl Fn() + 'static) {
        *self.inner.on_panic.borrow_mut() = Some(Box::new(record));
    }

    /// Wakes every task that waits with a deadline (see [`Wheel::nudge_all`]).
    pub fn nudge_all(&self) {
        self.inner.wheel.nudge_all();
    }
}

impl Net for Runtime {
    type Conn = Socket;

    fn connect(&self, address: &Address) -> io::Result<Socket> {
        let connected = match address {
            Address::Tcp(_) => Readiness::default(),
            // It has ended well already, or there would be no socket.
            Address::Unix(_) => Readiness::WRITE,
        };
        let handle = self.watch(socket::connect(address)?, connected)?;
        Ok(Socket::new(handle, address.ip()))
    }

    fn pipe(&self) -> Option<Pipe> {
        self.inner.pipes.take()
    }

    fn yield_now(&self) -> impl Future<Output = ()> {
        // Tasks woken in a turn run in the next one.
        super::next_turn()
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.inner.tasks.spawn(Box::pin(task), Panic::EndsTask);
    }

    fn spawn_vital(&self, task: impl Future<Output = ()> + 'static) {
        self.inner.tasks.spawn(Box::pin(task), Panic::EndsThread);
    }

    fn now(&self) -> Instant {
        let turn = &self.inner.turn_began;
        turn.get().unwrap_or_else(|| {
            let now = clock();
            turn.set(Some(now));
            now
        })
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

impl Inner {
    /// One look at the kernel: sleeps only when no task can run.
    fn turn(&self, events: &mut Vec<Event>) -> io::Result<()> {
        let wait = task::woken() == 0 && !self.looks_on();
        self.source.borrow_mut().turn(wait, events)?;
        self.turn_began.set(None);
        if self.busy_poll.is_some() && !events.is_empty() {
            self.last_event.set(clock());
        }
        for event in events.drain(..) {
            self.record(event)?;
        }
        Ok(())
    }

    /// Looks for events for as long as busy polling allows. `true`: do not sleep yet.
    fn looks_on(&self) -> bool {
        let Some(window) = self.busy_poll else {
            return false;
        };
        let until = self.last_event.get().after(window);
        let mut source = self.source.borrow_mut();
        while clock() < until {
            if source.may_have_events() {
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    fn record(&self, event: Event) -> io::Result<()> {
        let noted = self.watches.borrow_mut().record(event);
        let Some((slot, is_over)) = noted else {
            return Ok(());
        };
        if event.has_failed && slot.is_vital() {
            return Err(io::Error::other("the kernel stopped watching a descriptor"));
        }
        if event.has_failed {
            // Not the connection's fault, but nothing would be heard of it any more.
            socket::end(slot.fd());
        } else if is_over {
            // The completion queue was full: ask again. Asking looks at the socket anew.
            self.source.borrow_mut().watch(slot.fd(), slot.key())?;
        }
        slot.record(event.ready);
        Ok(())
    }
}

/// Every descriptor the kernel watches for this thread, by key.
///
/// A key is a place in the table and how often that place was used before, so that an event of an
/// earlier descriptor finds nothing.
#[derive(Default)]
struct Watches {
    places: Vec<Watch>,
    free: Vec<u32>,
}

#[derive(Default)]
struct Watch {
    slot: Option<Rc<Slot>>,
    generation: u32,
    /// The kernel still has the watch, or the wait for writing.
    is_reading: bool,
    is_writing: bool,
}

impl Watches {
    fn add(&mut self, slot: Rc<Slot>) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.places.push(Watch::default());
            // As many as there are descriptors, which are numbered by an `i32`.
            u32::try_from(self.places.len() - 1).unwrap_or(u32::MAX)
        });
        let place = &mut self.places[index as usize];
        place.slot = Some(slot);
        place.is_reading = true;
        place.is_writing = false;
        u64::from(place.generation) << 32 | u64::from(index)
    }

    fn place(&mut self, key: u64) -> Option<(u32, &mut Watch)> {
        let index = u32::try_from(key & u64::from(u32::MAX)).ok()?;
        let place = self.places.get_mut(index as usize)?;
        (u64::from(place.generation) == (key & !WRITE_KEY) >> 32).then_some((index, place))
    }

    /// Frees the place of a key: the kernel knows it no more.
    fn forget(&mut self, key: u64) {
        if let Some((index, place)) = self.place(key) {
            *place = Watch {
                // 31 bits: the highest bit of a key is `WRITE_KEY`.
                generation: place.generation.wrapping_add(1) & (u32::MAX >> 1),
                ..Watch::default()
            };
            self.free.push(index);
        }
    }

    /// The slot an event is for, and whether its watch is over although it is still wanted.
    fn record(&mut self, event: Event) -> Option<(Rc<Slot>, bool)> {
        let is_write = event.key & WRITE_KEY != 0;
        let (_, place) = self.place(event.key)?;
        if event.is_last && is_write {
            place.is_writing = false;
        } else if event.is_last {
            place.is_reading = false;
        }
        let Some(slot) = place.slot.clone() else {
            if !place.is_reading && !place.is_writing {
                self.forget(event.key);
            }
            return None;
        };
        let is_over = event.is_last && !is_write;
        place.is_reading |= is_over && !event.has_failed;
        Some((slot, is_over))
    }
}

/// A watched descriptor and its owner's right to it. Dropping it ends the watch and closes.
struct Handle {
    slot: Rc<Slot>,
    inner: Rc<Inner>,
}

impl Handle {
    fn slot(&self) -> &Slot {
        &self.slot
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.slot.fd()
    }

    /// Waits until the descriptor is readable.
    async fn readable(&self) {
        poll_fn(|cx| self.slot.poll_read(cx)).await;
    }

    fn drain_counter(&self) {
        // Before the read: a ring in between is told again.
        self.slot.clear(Readiness::READ);
        socket::drain_counter(self.fd());
    }

    /// Asks to be told when the socket can be written to.
    fn want_write(&self) {
        let key = self.slot.key();
        {
            let mut watches = self.inner.watches.borrow_mut();
            let Some((_, place)) = watches.place(key) else {
                return;
            };
            if std::mem::replace(&mut place.is_writing, true) {
                return;
            }
        }
        let watched = self.inner.source.borrow_mut().watch_write(self.fd(), key);
        if watched.is_err() {
            // No memory for a changed watch, so nothing would be heard of this connection again.
            socket::end(self.fd());
            self.slot.record(Readiness::ALL);
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let key = self.slot.key();
        let mut watches = self.inner.watches.borrow_mut();
        let mut source = self.inner.source.borrow_mut();
        let Some((_, place)) = watches.place(key) else {
            return;
        };
        place.slot = None;
        let (is_reading, is_writing) = (place.is_reading, place.is_writing);
        source.unwatch(self.slot.fd(), key, is_writing);
        if !source.tells_the_last() || !(is_reading || is_writing) {
            watches.forget(key);
        }
    }
}

/// A listening socket of this shard.
pub struct Listener {
    handle: Handle,
    net: Runtime,
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listener").finish_non_exhaustive()
    }
}

impl Listener {
    /// Waits until a connection may be taken; everybody else who can run goes first.
    pub async fn readable(&self) {
        self.handle.slot().yield_once();
        self.handle.readable().await;
    }

    /// Takes the next waiting connection, if one is there.
    ///
    /// # Errors
    /// `WouldBlock` when none waits. `EMFILE`, `ENFILE`, `ENOBUFS` and `ENOMEM` mean that the
    /// caller should pause: the connection stays in the queue and the socket stays readable.
    pub fn try_accept(&self) -> io::Result<Socket> {
        match socket::accept(self.handle.fd()) {
            Ok((socket, peer_ip)) => self.net.adopt(socket, peer_ip),
            Err(error) => {
                if super::would_block(&error) {
                    self.handle.slot().clear(Readiness::READ);
                }
                Err(error)
            }
        }
    }
}

/// The receiving end of a wake-up from other threads.
pub struct NotifyReceiver {
    handle: Handle,
}

impl std::fmt::Debug for NotifyReceiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NotifyReceiver").finish_non_exhaustive()
    }
}

impl NotifyReceiver {
    /// Waits until it was rung since the last call. Rings in between count once.
    pub async fn notified(&self) {
        self.handle.readable().await;
        self.handle.drain_counter();
    }
}
