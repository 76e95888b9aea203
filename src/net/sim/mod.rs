//! A seeded simulation of the traits of `net`, without kernel, threads or real waiting.
//!
//! The seed decides the order in which tasks run, how connections split, delay and lose data, and
//! when waits end. The same seed produces the same run, which can be verified with
//! [`Finished::trace`]. Time is virtual and advances to the next event when no task is runnable. If
//! no event is pending either, the run is stuck and fails with an error that contains the seed.
//!
//! ```
//! use ringside::net::sim::SimNet;
//! use ringside::net::Net;
//!
//! let net = SimNet::new(7);
//! let (near, far) = net.pair();
//! net.spawn(async move {
//!     let _ = far.send(b"hello").await;
//! });
//! let received = net.run(async move {
//!     let mut received = Vec::new();
//!     while let Ok(1..) = near.recv(&mut received, 64).await {}
//!     received
//! });
//! assert_eq!(received.map(|run| run.value), Ok(b"hello".to_vec()));
//! ```
//!
//! The simulation covers the behaviour that is visible through the traits [`Net`] and
//! [`Conn`](super::Conn) (see `link`). Congestion, retransmission and the like are modelled as
//! delays.

mod chance;
mod conn;
mod link;
mod listen;
#[cfg(test)]
mod tests;
mod world;

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

pub use conn::{SimConn, SimPipe};
use link::{Connect, Link};
pub use link::{Flow, LinkBehaviour};
pub use listen::{ConnectBehaviour, SimListener};
use world::{Action, Turn, World};

use super::{Address, Instant, Net, Timer};

/// Maximum number of polls of tasks in one run. A run that needs more is assumed to loop endlessly.
const POLLS_MAX: u64 = 20_000_000;

/// A simulated executor. Clones share it.
#[derive(Clone)]
pub struct SimNet {
    world: Rc<World>,
    seed: u64,
    manner: Rc<Cell<Option<LinkBehaviour>>>,
}

impl std::fmt::Debug for SimNet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimNet")
            .field("seed", &self.seed)
            .finish_non_exhaustive()
    }
}

/// The result of a run that finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished<T> {
    /// The value that the main task returned.
    pub value: T,
    /// A hash over all events and their times: equal for two runs that took the same course.
    pub trace: u64,
    /// Number of polls of tasks.
    pub polls: u64,
    /// Number of tasks that ended in a panic.
    pub panics: u64,
    /// Virtual time at the end of the run.
    pub ended: Instant,
}

/// Reason why a run did not finish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stuck {
    /// No task can run and no event or timer is pending, but the main task has not returned.
    Deadlock {
        /// The seed of the run.
        seed: u64,
        /// Virtual time at which nothing more could happen.
        at: Instant,
    },
    /// The run exceeded `POLLS_MAX` polls of tasks, which indicates an endless loop.
    Endless {
        /// The seed of the run.
        seed: u64,
    },
    /// The main task panicked.
    Panicked {
        /// The seed of the run.
        seed: u64,
    },
}

impl std::fmt::Display for Stuck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Deadlock { seed, at } => {
                write!(f, "seed {seed}: deadlock after {} ns", at.0)
            }
            Self::Endless { seed } => write!(f, "seed {seed}: unfinished after {POLLS_MAX} polls"),
            Self::Panicked { seed } => write!(f, "seed {seed}: the main task panicked"),
        }
    }
}

impl std::error::Error for Stuck {}

impl SimNet {
    /// Creates a simulation decided by `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            world: Rc::new(World::new(seed)),
            seed,
            manner: Rc::default(),
        }
    }

    /// Returns the seed of the simulation.
    #[must_use]
    pub const fn seed(&self) -> u64 {
        self.seed
    }

    /// Sets the behaviour of connections created from now on. With `None`, each is drawn from the
    /// seed.
    pub fn set_manner(&self, manner: Option<LinkBehaviour>) {
        self.manner.set(manner);
    }

    /// Runs `main` and every spawned task until `main` returns; then all tasks are dropped.
    ///
    /// # Errors
    /// Fails if `main` panicked, can never return, or has not returned after `POLLS_MAX` polls of
    /// tasks. The error contains the seed.
    pub fn run<T: 'static>(
        &self,
        main: impl Future<Output = T> + 'static,
    ) -> Result<Finished<T>, Stuck> {
        let value = Rc::new(RefCell::new(None));
        let slot = Rc::clone(&value);
        let task = self.world.spawn(Box::pin(async move {
            let returned = main.await;
            *slot.borrow_mut() = Some(returned);
        }));
        let turned = self.turn_until_ended(task);
        let finished = turned.and_then(|()| {
            let value = value.borrow_mut().take();
            let value = value.ok_or(Stuck::Panicked { seed: self.seed })?;
            Ok(Finished {
                value,
                trace: self.world.trace_hash(),
                polls: self.world.polls(),
                panics: self.world.panics(),
                ended: self.now(),
            })
        });
        self.world.clear();
        finished
    }

    fn turn_until_ended(&self, task: usize) -> Result<(), Stuck> {
        let (seed, world) = (self.seed, &self.world);
        while !world.has_ended(task) {
            if world.turn() == Turn::Stuck {
                let at = self.now();
                return Err(Stuck::Deadlock { seed, at });
            }
            if world.polls() > POLLS_MAX {
                return Err(Stuck::Endless { seed });
            }
        }
        Ok(())
    }

    /// Returns an established connection: the connecting end and the accepting end.
    #[must_use]
    pub fn pair(&self) -> (SimConn, SimConn) {
        let link = self.link(Connect::Established);
        (
            SimConn::new(&self.world, &link, 0),
            SimConn::new(&self.world, &link, 1),
        )
    }

    /// Makes connects to `address` succeed, unless [`SimListener::on_connect`] changes this, and
    /// returns the listener that accepts them.
    #[must_use]
    pub fn listen(&self, address: impl Into<Address>) -> SimListener {
        self.world.listeners.listen(address.into())
    }

    /// Waits for `wait` of virtual time, with nanosecond precision.
    pub async fn sleep(&self, wait: Duration) {
        let until = self.now().after(wait);
        let mut is_armed = false;
        poll_fn(|cx| {
            if self.now() >= until {
                return Poll::Ready(());
            }
            if !is_armed {
                is_armed = true;
                self.world.push(until.0, Action::Wake(cx.waker().clone()));
            }
            Poll::Pending
        })
        .await;
    }

    /// Returns a random number below `bound`, decided by the seed, or 0 if `bound` is 0.
    #[must_use]
    pub fn below(&self, bound: u64) -> u64 {
        self.world.below(bound)
    }

    /// Returns `true` in about one of `in_n` calls, decided by the seed.
    #[must_use]
    pub fn once_in(&self, in_n: u64) -> bool {
        self.world.below(in_n) == 0
    }

    /// Returns the number of tasks that have ended in a panic.
    #[must_use]
    pub fn panics(&self) -> u64 {
        self.world.panics()
    }

    /// Returns the number of bytes that have arrived at open connections and were not received.
    #[must_use]
    pub fn unread(&self) -> usize {
        let links = self.world.links.borrow();
        let alive = links.iter().filter_map(std::rc::Weak::upgrade);
        alive.map(|link| link.borrow().unread()).sum()
    }

    /// Wakes every task that waits on a timer (see [`super::Wheel::nudge_all`]).
    pub fn nudge_all(&self) {
        self.world.wheel.nudge_all();
    }

    fn link(&self, connect: Connect) -> Rc<RefCell<Link>> {
        let manner = self.manner.get();
        let manner = manner.unwrap_or_else(|| LinkBehaviour::draw(&self.world));
        let link = Link::new(manner, connect);
        self.world.links.borrow_mut().push(Rc::downgrade(&link));
        link
    }
}

impl Net for SimNet {
    type Conn = SimConn;

    /// The smallest allowed value, so that many bodies in a simulation are spliced. A smaller body
    /// must not be spliced, because it is kept to be sent again if the request is repeated.
    const SPLICE_BYTES_MIN: u64 = crate::limits::REPLAY_BYTES_MAX as u64;

    fn connect(&self, address: &Address) -> io::Result<SimConn> {
        let listeners = &self.world.listeners;
        if let ConnectBehaviour::Fail(error) = listeners.greeting(address) {
            return Err(error.into());
        }
        let link = self.link(Connect::Pending);
        let server = || SimConn::new(&self.world, &link, 1);
        listeners.begin(&self.world, address, &link, server);
        Ok(SimConn::new(&self.world, &link, 0))
    }

    fn pipe(&self) -> Option<SimPipe> {
        // Sometimes reports that no pipe is available.
        (!self.once_in(4)).then(SimPipe::default)
    }

    fn give_way(&self) -> impl Future<Output = ()> {
        super::give_way()
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.world.spawn(Box::pin(task));
    }

    fn now(&self) -> Instant {
        Instant(self.world.now())
    }

    fn clock(&self) -> Instant {
        Instant(self.world.now())
    }

    fn timer(&self) -> Timer {
        self.world.wheel.timer()
    }

    fn random(&self) -> u64 {
        self.world.dice.next()
    }
}
