//! The default executor of a shard: tasks on one thread, woken when descriptors become ready.
//!
//! The driver is used for one purpose, to report changes of readiness: io_uring with one multishot
//! poll per connection (`uring`), or an edge-triggered epoll set (`epoll`). Bytes move in plain
//! non-blocking calls that borrow their buffer, so nothing the kernel holds can outlive a dropped
//! future.
//!
//! One iteration of the event loop collects the reported events, wakes tasks in the order of the
//! events, and polls each task once. An engine produces a token for all its streams in one step, so
//! many connections become ready together. With this order, the chunk of the first stream has been
//! sent before that of the second stream is read. Tasks that move bulk data, then those that accept
//! or perform handshakes, come after them and share a limited time (`turn`). `docs/executor.md`
//! contains the measurements that led to this design.

mod conn;
mod epoll;
mod slot;
mod source;
mod task;
#[cfg(test)]
mod tests;
mod uring;
mod vanished;

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::clock::{Alarm, clock};
use super::notifier::{Notifier, notifier};
use super::pipe::{Pipe, Pipes};
use super::probe::Driver;
use super::random::Random;
use super::socket;
use super::turn::{self, Class};
use super::{Accepted, Address, Instant, Net, Timer, Wheel};
use crate::limits::TURN_MICROS_MAX;
pub use conn::Socket;
use slot::{Readiness, Slot};
use source::{Event, Source, WRITE_KEY};
use task::{MAIN, Panic, TaskWaker, Tasks};

/// The executor of one shard. Clones share it; it is confined to its thread.
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
    /// How long the thread polls for events after the last one before it sleeps. `None`: it sleeps
    /// immediately.
    busy_poll: Option<Duration>,
    last_event: Cell<Instant>,
    /// Time of the current iteration of the event loop. `None` until `now` is first called in this
    /// iteration, which reads the clock.
    turn_began: Cell<Option<Instant>>,
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runtime").finish_non_exhaustive()
    }
}

/// Runs `main` on this thread until it returns, on io_uring or on epoll. The tasks it has spawned
/// are dropped then. With `busy_poll` the thread polls for events for that long after the last one
/// before it sleeps.
///
/// # Errors
/// Fails if the driver cannot be set up, the reactor's own descriptors cannot be opened, or the
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
        // The count is read once: tasks woken from here on run in the next iteration, after the
        // kernel has been polled.
        for _ in 0..task::woken(Class::Relay) {
            let Some(number) = task::next_woken(Class::Relay) else {
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
            flag.end(Class::Relay);
        }
        runtime.poll_lower_classes();
        runtime.inner.turn(&mut events)?;
    }
}

/// Drops all tasks when `run` returns or unwinds. Needed because tasks hold the executor, which
/// holds the tasks.
struct Close<'a>(&'a Rc<Inner>);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.tasks.close();
        // The kernel closes their descriptors once it has processed the cancelled watches.
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
            random: Random::new()?,
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

    /// Starts the task that advances the timer wheel whenever the shard's timer descriptor becomes
    /// readable.
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

    /// Polls tasks that move bulk data for at most `TURN_MICROS_MAX`, then those that accept or
    /// perform handshakes for what is left of it. At least one of each kind is polled, so neither
    /// starves, and each at most once, so that the kernel is polled in between.
    fn poll_lower_classes(&self) {
        let queued = [Class::Bulk, Class::Background].map(|class| (class, task::woken(class)));
        if queued.iter().all(|(_, count)| *count == 0) {
            return;
        }
        let until = clock().after(Duration::from_micros(u64::from(TURN_MICROS_MAX)));
        for (class, count) in queued {
            for _ in 0..count {
                let Some(number) = task::next_woken(class) else {
                    break;
                };
                self.poll_task(number);
                if clock() >= until {
                    break;
                }
            }
        }
    }

    fn poll_task(&self, number: u32) {
        if !self.inner.tasks.poll(number)
            && let Some(record) = &*self.inner.on_panic.borrow()
        {
            record();
        }
    }

    /// Watches a descriptor that the thread cannot work without: `run` fails if the kernel stops
    /// watching it.
    fn watch_vital(&self, fd: OwnedFd) -> io::Result<Handle> {
        self.watch_slot(Slot::new(fd, Readiness::default(), true))
    }

    /// Watches the socket of a connection, which is assumed to be ready for `ready`.
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

    /// Takes ownership of an accepted connection.
    ///
    /// # Errors
    /// Fails if the socket cannot be watched (out of memory, epoll limit).
    pub fn adopt(&self, accepted: Accepted) -> io::Result<Socket> {
        let handle = self.watch(accepted.socket, Readiness::WRITE)?;
        Ok(Socket::new(handle, accepted.peer))
    }

    /// Watches a listening socket.
    ///
    /// # Errors
    /// Fails if the socket cannot be watched.
    pub fn listener(&self, socket: std::net::TcpListener) -> io::Result<Listener> {
        Ok(Listener {
            handle: self.watch_vital(OwnedFd::from(socket))?,
        })
    }

    /// Returns a receiver that this shard can wait on, and the notifier that wakes it from any
    /// thread.
    ///
    /// # Errors
    /// Fails if a descriptor cannot be opened or watched.
    pub fn notifier(&self) -> io::Result<(NotifyReceiver, Notifier)> {
        let (event, notifier) = notifier()?;
        let handle = self.watch_vital(event)?;
        Ok((NotifyReceiver { handle }, notifier))
    }

    /// Sets a callback that is called whenever a task started with [`Net::spawn`] has ended in a
    /// panic.
    pub fn on_panic(&self, record: impl Fn() + 'static) {
        *self.inner.on_panic.borrow_mut() = Some(Box::new(record));
    }

    /// Returns how many events the kernel has lost because it had no memory to keep them; always 0
    /// on epoll.
    #[must_use]
    pub fn events_lost(&self) -> u32 {
        self.inner.source.borrow_mut().lost()
    }

    /// Wakes every task that waits on a timer (see [`Wheel::nudge_all`]).
    pub fn nudge_all(&self) {
        self.inner.wheel.nudge_all();
    }
}

impl Net for Runtime {
    type Conn = Socket;

    fn connect(&self, address: &Address) -> io::Result<Socket> {
        let connected = match address {
            Address::Tcp(_) => Readiness::default(),
            // The connect has already succeeded, otherwise `socket::connect` would have failed.
            Address::Unix(_) => Readiness::WRITE,
        };
        let handle = self.watch(socket::connect(address)?, connected)?;
        Ok(Socket::new(handle, address.tcp()))
    }

    fn pipe(&self) -> Option<Pipe> {
        self.inner.pipes.take()
    }

    fn give_way(&self) -> impl Future<Output = ()> {
        // A task that is woken during an iteration runs in the next one.
        super::give_way()
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
    /// Collects the kernel's events once, and wakes the tasks that wait for them. Sleeps until an
    /// event if no task can run and the time of busy polling is over.
    fn turn(&self, events: &mut Vec<Event>) -> io::Result<()> {
        let wait = !task::is_any_woken() && !self.spin_for_events();
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

    /// Spins until there may be events, for as long as busy polling allows. Returns `true` if there
    /// may be events, so that the caller must not sleep.
    fn spin_for_events(&self) -> bool {
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
            // The failure is not the connection's, but no further event would be reported for it.
            socket::end(slot.fd());
        } else if is_over {
            // The completion queue was full and the kernel ended the poll, so arm it again. Arming
            // checks the socket, so no event is lost.
            self.source.borrow_mut().watch(slot.fd(), slot.key())?;
        }
        slot.record(event.ready);
        Ok(())
    }
}

/// Every descriptor that the kernel watches for this thread, by key.
///
/// A key consists of an index in `places` and the generation of that entry. The generation changes
/// when the entry is freed, so that a late event of an earlier descriptor matches nothing.
#[derive(Default)]
struct Watches {
    places: Vec<Watch>,
    free: Vec<u32>,
}

#[derive(Default)]
struct Watch {
    slot: Option<Rc<Slot>>,
    generation: u32,
    /// Whether the kernel may still report events for the read watch (`is_reading`) or the write
    /// watch (`is_writing`) of this entry.
    is_reading: bool,
    is_writing: bool,
}

impl Watches {
    fn add(&mut self, slot: Rc<Slot>) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.places.push(Watch::default());
            // At most one entry per descriptor, and descriptors are numbered by an `i32`.
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

    /// Frees the entry of a key that the kernel no longer uses.
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

    /// Updates the entry that an event belongs to. Returns its slot, and whether the kernel has
    /// ended the slot's read watch although the descriptor is still in use. Returns `None` for an
    /// unknown key or a dropped descriptor, whose entry is freed with its last event.
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

/// Owns a watched descriptor. Dropping it ends the watch and closes the descriptor.
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
        // Cleared before the read: a notification that arrives in between is reported again.
        self.slot.clear(Readiness::READ);
        socket::drain_counter(self.fd());
    }

    /// Requests an event for when the socket becomes writable, unless one is already requested. If
    /// that fails, the connection is shut down.
    fn request_write(&self) {
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
            // No memory to change the watch, so no further event would be reported for this
            // connection.
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
        if !source.reports_last_event() || !(is_reading || is_writing) {
            watches.forget(key);
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

impl Drop for Listener {
    fn drop(&mut self) {
        // A ring holds the socket until the end of its watch has been processed, which at the exit
        // of the process happens after its end has been reported. Its port is free now.
        socket::end(self.handle.fd());
    }
}

impl Listener {
    /// Waits until a connection can be accepted. Even if one already can, all other runnable tasks
    /// run first.
    pub async fn readable(&self) {
        turn::end();
        poll_fn(|cx| {
            turn::set_background();
            self.handle.slot().poll_read(cx)
        })
        .await;
    }

    /// Returns whether a connection is in the accept queue, without accepting it.
    #[must_use]
    pub fn has_pending(&self) -> bool {
        let has_pending = socket::has_pending(self.handle.fd());
        if !has_pending {
            self.handle.slot().clear(Readiness::READ);
        }
        has_pending
    }

    /// Accepts the next connection in the accept queue.
    ///
    /// # Errors
    /// `WouldBlock` if the accept queue is empty. On `EMFILE`, `ENFILE`, `ENOBUFS` and `ENOMEM` the
    /// caller should pause: the connection remains in the queue and the socket remains readable.
    pub fn try_accept(&self) -> io::Result<Accepted> {
        socket::accept(self.handle.fd()).inspect_err(|error| {
            if super::would_block(error) {
                self.handle.slot().clear(Readiness::READ);
            }
        })
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
