//! A leg that runs beside its exchange, as a task of its own.
//!
//! Legs that run side by side need a deadline and an owner each: a prefiller's leg may have to go
//! on after its client has left (`pd::connector::departures`), and one encoder's failure ends its
//! siblings. The exchange holds a [`Job`] and hears of the leg's end through it; what dropping the
//! job means to the leg is said when it begins.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::client::{Limit, Watch};
use super::leg::Waits;
use super::shard::{JobGuard, Shard};
use crate::fault::Fault;
use crate::limits::ORPHAN_SECS_MAX;
use crate::metrics::Phase;
use crate::net::{Moment, Net, Timer};
use crate::pd::Departure;

/// What passes between a job and its task.
struct Desk<T> {
    /// What the task came to.
    result: RefCell<Option<T>>,
    /// The task has seen the head of a successful answer.
    is_good: Cell<bool>,
    /// The task has ended, whether or not it left a result.
    has_ended: Cell<bool>,
    /// Who waits for any of these.
    owner: RefCell<Waker>,
    /// The task, to be woken when its owner leaves.
    task: RefCell<Waker>,
    /// The engines have met: what `Departure::FirstByte` waits for.
    have_met: Cell<bool>,
    /// The owner has left and wants the task to end.
    is_abandoned: Cell<bool>,
    /// The owner has left, and the task may go on until then.
    orphan_until: Cell<Option<Moment>>,
}

/// The owner's side. Dropping it is the owner's departure.
pub(super) struct Job<N: Net, T> {
    shard: Rc<Shard<N>>,
    desk: Rc<Desk<T>>,
    departure: Departure,
}

/// The task's side: its waits end when nobody wants its answer.
pub(super) struct Aside<N: Net, T> {
    shard: Rc<Shard<N>>,
    desk: Rc<Desk<T>>,
    timer: Timer,
    phase: Cell<Phase>,
}

impl<N: Net, T: 'static> Job<N, T> {
    /// Begins `work` as a task.
    pub(super) fn begin<F>(
        shard: &Rc<Shard<N>>,
        departure: Departure,
        work: impl FnOnce(Rc<Aside<N, T>>) -> F,
    ) -> Self
    where
        F: Future<Output = T> + 'static,
    {
        let desk = Rc::new(Desk {
            result: RefCell::new(None),
            is_good: Cell::new(false),
            has_ended: Cell::new(false),
            owner: RefCell::new(Waker::noop().clone()),
            task: RefCell::new(Waker::noop().clone()),
            have_met: Cell::new(false),
            is_abandoned: Cell::new(false),
            orphan_until: Cell::new(None),
        });
        let aside = Rc::new(Aside {
            shard: Rc::clone(shard),
            desk: Rc::clone(&desk),
            timer: shard.net.timer(),
            phase: Cell::new(Phase::Prefill),
        });
        let ending = Ending::new(&aside);
        let work = work(aside);
        shard.net.spawn(async move {
            let result = work.await;
            ending.leave(result);
        });
        Self {
            shard: Rc::clone(shard),
            desk,
            departure,
        }
    }

    /// The task's result, when it has ended. `Err`: it met a defect and left none, or it has been
    /// taken.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<Result<T, Fault>> {
        if self.desk.has_ended.get() {
            let result = self.desk.result.borrow_mut().take();
            return Poll::Ready(result.ok_or(Fault::Bug("a leg ended without a result")));
        }
        self.desk.owner.borrow_mut().clone_from(cx.waker());
        Poll::Pending
    }

    /// The other engine's answer has begun, so it needs this leg no longer.
    pub(super) fn note_met(&self) {
        self.desk.have_met.set(true);
    }

    /// Changes what dropping the job means to the leg.
    pub(super) const fn on_drop(&mut self, departure: Departure) {
        self.departure = departure;
    }

    /// Whether the task has seen the head of a successful answer; if not, its owner is woken when
    /// it has.
    pub(super) fn is_good(&self, cx: &mut Context<'_>) -> bool {
        let is_good = self.desk.is_good.get();
        if !is_good {
            self.desk.owner.borrow_mut().clone_from(cx.waker());
        }
        is_good
    }
}

impl<N: Net, T> Drop for Job<N, T> {
    fn drop(&mut self) {
        if self.desk.has_ended.get() {
            return;
        }
        match self.departure {
            Departure::End => self.desk.is_abandoned.set(true),
            Departure::FirstByte if self.desk.have_met.get() => self.desk.is_abandoned.set(true),
            Departure::FirstByte | Departure::RunOn => {
                let wait = Duration::from_secs(ORPHAN_SECS_MAX);
                let until = self.shard.net.now().after(wait);
                self.desk.orphan_until.set(Some(until));
            }
        }
        self.desk.task.borrow().wake_by_ref();
    }
}

/// Marks the end of a task, also of one that panics.
struct Ending<N: Net, T> {
    aside: Rc<Aside<N, T>>,
    _counted: JobGuard<N>,
}

impl<N: Net, T> Ending<N, T> {
    fn new(aside: &Rc<Aside<N, T>>) -> Self {
        Self {
            aside: Rc::clone(aside),
            _counted: aside.shard.count_job(),
        }
    }

    fn leave(self, result: T) {
        *self.aside.desk.result.borrow_mut() = Some(result);
    }
}

impl<N: Net, T> Drop for Ending<N, T> {
    fn drop(&mut self) {
        let desk = &self.aside.desk;
        desk.has_ended.set(true);
        desk.owner.borrow().wake_by_ref();
    }
}

impl<N: Net, T> Aside<N, T> {
    /// The head of a successful answer is there.
    fn set_good(&self) {
        self.desk.is_good.set(true);
        self.desk.owner.borrow().wake_by_ref();
    }
}

impl<N: Net, T> Waits<N> for Rc<Aside<N, T>> {
    fn shard(&self) -> &Rc<Shard<N>> {
        &self.shard
    }

    fn phase(&self) -> &Cell<Phase> {
        &self.phase
    }

    fn early_watch(&self) -> Watch {
        Watch::Ahead
    }

    fn note_good(&self) {
        self.set_good();
    }

    async fn until<U>(
        &self,
        _: Watch,
        limit: Limit,
        mut ready: impl FnMut(&mut Context<'_>) -> Poll<U>,
    ) -> Result<U, Fault> {
        let mut armed = None;
        let result = poll_fn(|cx| {
            if self.desk.is_abandoned.get() {
                return Poll::Ready(Err(Fault::ClientGone));
            }
            if let Poll::Ready(value) = ready(cx) {
                return Poll::Ready(Ok(value));
            }
            self.desk.task.borrow_mut().clone_from(cx.waker());
            let now = self.shard.net.now();
            let orphan = self.desk.orphan_until.get();
            let orphan = orphan.map(|until| until.since(now));
            let limit = limit.or_sooner(Limit::of(now, orphan, Fault::ClientGone));
            let Some(until) = limit.until() else {
                return Poll::Pending;
            };
            if armed != Some(until) {
                armed = Some(until);
                self.timer.set(now, Some(until.since(now)));
            }
            self.timer.poll(cx).map(|()| Err(limit.fault()))
        })
        .await;
        if armed.is_some() {
            self.timer.set(Moment(0), None);
        }
        result
    }
}
