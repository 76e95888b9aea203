//! Virtual time, events and tasks of one simulation.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use super::chance::{Dice, mix};
use super::link::{Event, Link};
use super::listen::{Arrival, Listeners};
use crate::net::{Instant, Wheel, turn};

/// Upper bound, exclusive, on the random virtual time in nanoseconds that one poll of a task takes,
/// so that work advances time.
const POLL_NS_MAX: u64 = 2_000;

/// Something that is scheduled to happen at a virtual time.
pub(super) enum Action {
    Wake(Waker),
    Notify(Rc<RefCell<Link>>, usize, Event),
    Deliver(Rc<RefCell<Link>>, usize),
    Reset(Rc<RefCell<Link>>, usize),
    Arrive(Arrival),
}

impl Action {
    const fn code(&self) -> u64 {
        match self {
            Self::Wake(_) => 10,
            Self::Notify(_, side, event) => 20 + 4 * (*side as u64) + *event as u64,
            Self::Deliver(_, side) => 30 + *side as u64,
            Self::Reset(_, side) => 40 + *side as u64,
            Self::Arrive(_) => 50,
        }
    }
}

/// Sort key of a scheduled event: time in nanoseconds, random number, serial number. Events due at
/// the same time happen in an order decided by the seed.
type Key = (u64, u64, u64);

struct Due {
    key: Key,
    what: Action,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.key == other.key
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key.cmp(&other.key)
    }
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Indices of runnable tasks. A mutex because wakers must be `Send`; there is no contention.
#[derive(Default)]
struct Runnable {
    tasks: Mutex<Vec<usize>>,
}

struct TaskWaker {
    task: usize,
    is_queued: AtomicBool,
    runnable: Arc<Runnable>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.is_queued.swap(true, Ordering::Relaxed) {
            let tasks = &self.runnable.tasks;
            tasks
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(self.task);
        }
    }
}

struct Slot {
    task: Option<Task>,
    waker: Arc<TaskWaker>,
}

/// Whether one step of the simulation did anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    Worked,
    /// No task is runnable and no event or timer is pending.
    Stuck,
}

/// The complete state of a simulation.
pub(super) struct World {
    pub(super) wheel: Wheel,
    pub(super) listeners: Listeners,
    pub(super) dice: Dice,
    pub(super) links: RefCell<Vec<Weak<RefCell<Link>>>>,
    now: Cell<u64>,
    events: RefCell<BinaryHeap<Reverse<Due>>>,
    serial: Cell<u64>,
    slots: RefCell<Vec<Slot>>,
    runnable: Arc<Runnable>,
    trace: Cell<u64>,
    polls: Cell<u64>,
    panics: Cell<u64>,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            wheel: Wheel::new(Instant(0)),
            listeners: Listeners::default(),
            dice: Dice::new(mix(seed)),
            links: RefCell::default(),
            now: Cell::new(0),
            events: RefCell::default(),
            serial: Cell::new(0),
            slots: RefCell::default(),
            runnable: Arc::default(),
            trace: Cell::new(0),
            polls: Cell::new(0),
            panics: Cell::new(0),
        }
    }

    pub(super) fn now(&self) -> u64 {
        self.now.get()
    }

    pub(super) fn trace_hash(&self) -> u64 {
        self.trace.get()
    }

    pub(super) fn polls(&self) -> u64 {
        self.polls.get()
    }

    pub(super) fn panics(&self) -> u64 {
        self.panics.get()
    }

    pub(super) fn below(&self, bound: u64) -> u64 {
        self.dice.below(bound)
    }

    pub(super) fn hits(&self, in_256: u8) -> bool {
        self.dice.hits(in_256)
    }

    pub(super) fn below_duration(&self, bound: Duration) -> u64 {
        self.below(u64::try_from(bound.as_nanos()).unwrap_or(u64::MAX))
    }

    /// Mixes an event into the trace hash: its `kind`, a `value` that describes it, and the current
    /// virtual time.
    pub(super) fn trace(&self, kind: u64, value: u64) {
        let seen = self.trace.get() ^ kind.wrapping_mul(0x1000_0000_01b3) ^ value;
        self.trace.set(mix(seen.wrapping_add(self.now.get())));
    }

    /// Schedules `what` for the virtual time `at` in nanoseconds.
    pub(super) fn push(&self, at: u64, what: Action) {
        let serial = self.serial.get();
        self.serial.set(serial + 1);
        let key = (at.max(self.now.get()), self.dice.next(), serial);
        self.events.borrow_mut().push(Reverse(Due { key, what }));
    }

    /// Adds a task, immediately runnable. Returns its index.
    pub(super) fn spawn(&self, task: Task) -> usize {
        let mut slots = self.slots.borrow_mut();
        let waker = Arc::new(TaskWaker {
            task: slots.len(),
            is_queued: AtomicBool::new(false),
            runnable: Arc::clone(&self.runnable),
        });
        waker.wake_by_ref();
        slots.push(Slot {
            task: Some(task),
            waker,
        });
        slots.len() - 1
    }

    /// Returns whether a task has returned or panicked.
    pub(super) fn has_ended(&self, task: usize) -> bool {
        let slots = self.slots.borrow();
        slots.get(task).is_none_or(|slot| slot.task.is_none())
    }

    /// Takes one step: handles an event that is due, otherwise polls a runnable task, otherwise
    /// advances time to the next event or timer.
    pub(super) fn turn(&self) -> Turn {
        if self.happen_due() {
            return Turn::Worked;
        }
        if let Some(task) = self.pick() {
            self.run(task);
            return Turn::Worked;
        }
        let next_event = self.events.borrow().peek().map(|due| due.0.key.0);
        let next_timer = self.wheel.next_wake().map(|instant| instant.0);
        let Some(next) = [next_event, next_timer].into_iter().flatten().min() else {
            return Turn::Stuck;
        };
        self.now.set(next.max(self.now.get()));
        Turn::Worked
    }

    /// Fires the timers that are due; otherwise handles one event that is due. Returns `false` if
    /// neither is due.
    fn happen_due(&self) -> bool {
        let now = self.now.get();
        if self.wheel.next_wake().is_some_and(|at| at.0 <= now) {
            self.wheel.advance(Instant(now));
            self.trace(1, 0);
            return true;
        }
        let mut events = self.events.borrow_mut();
        if events.peek().is_none_or(|due| due.0.key.0 > now) {
            return false;
        }
        let due = events.pop();
        drop(events);
        if let Some(Reverse(due)) = due {
            self.trace(2, due.what.code());
            self.happen(due.what);
        }
        true
    }

    fn happen(&self, what: Action) {
        match what {
            Action::Wake(waker) => waker.wake(),
            Action::Notify(link, side, event) => {
                let waker = link.borrow_mut().notify(side, event);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            Action::Deliver(link, side) => link.borrow_mut().deliver(self, side),
            Action::Reset(link, side) => link.borrow_mut().reset(self, side),
            Action::Arrive(arrival) => arrival.happen(self),
        }
    }

    fn pick(&self) -> Option<usize> {
        let tasks = &self.runnable.tasks;
        let mut tasks = tasks.lock().unwrap_or_else(PoisonError::into_inner);
        if tasks.is_empty() {
            return None;
        }
        let index = usize::try_from(self.below(tasks.len() as u64)).unwrap_or(0);
        Some(tasks.swap_remove(index))
    }

    /// Polls a task. A panic ends only that task.
    fn run(&self, index: usize) {
        let taken = {
            let mut slots = self.slots.borrow_mut();
            let Some(slot) = slots.get_mut(index) else {
                return;
            };
            slot.waker.is_queued.store(false, Ordering::Relaxed);
            slot.task.take().map(|task| (task, Arc::clone(&slot.waker)))
        };
        let Some((mut task, waker)) = taken else {
            return;
        };
        self.now.set(self.now.get() + self.below(POLL_NS_MAX));
        self.polls.set(self.polls.get() + 1);
        self.trace(5, index as u64);
        // Some polls have hardly any turn, so that every loop is interrupted everywhere.
        turn::begin();
        if self.hits(32) {
            turn::charge(usize::try_from(self.below(1 << 20)).unwrap_or(0));
        }
        let waker = Waker::from(waker);
        let mut cx = Context::from_waker(&waker);
        let polled = std::panic::catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(&mut cx)));
        match polled {
            Ok(Poll::Pending) => {
                if let Some(slot) = self.slots.borrow_mut().get_mut(index) {
                    slot.task = Some(task);
                }
            }
            Ok(Poll::Ready(())) => drop(task),
            Err(_) => {
                // A second panic, during the drop of the task, must not escape either.
                drop(std::panic::catch_unwind(AssertUnwindSafe(|| drop(task))));
                self.panics.set(self.panics.get() + 1);
            }
        }
    }

    /// Drops all tasks and events. They hold references to the world, so it would otherwise never
    /// be freed.
    pub(super) fn clear(&self) {
        let slots = std::mem::take(&mut *self.slots.borrow_mut());
        drop(slots);
        // The drops of connections have scheduled more events.
        let events = std::mem::take(&mut *self.events.borrow_mut());
        drop(events);
        self.listeners.clear();
        let events = std::mem::take(&mut *self.events.borrow_mut());
        drop(events);
    }
}
