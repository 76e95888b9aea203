//! A leg that runs beside its exchange, as a task of its own.
//!
//! Legs that run side by side need a deadline and an owner each: a prefiller's leg may have to go
//! on after its client has left (`pd::connector::on_disconnect`), and one encoder's failure ends its
//! siblings. The exchange holds a [`LegTask`] and hears of the leg's end through it; what dropping the
//! job means to the leg is said when it begins.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::client::{Limit, Watch};
use super::leg::Waits;
use super::shard::{Shard, TaskGuard};
use crate::fault::Fault;
use crate::limits::ORPHAN_SECS_MAX;
use crate::metrics::Phase;
use crate::net::{Instant, Net, Timer};
use crate::pd::OnDisconnect;

/// What passes between a job and its task.
struct TaskState<T> {
    /// What the task came to.
    result: RefCell<Option<T>>,
    /// The task has seen the head of a successful answer.
    has_succeeded: Cell<bool>,
    /// The task has ended, whether or not it left a result.
    has_ended: Cell<bool>,
    /// Who waits for any of these.
    owner: RefCell<Waker>,
    /// The task, to be woken when its owner leaves.
    task: RefCell<Waker>,
    /// The engines have met: what `OnDisconnect::UntilFirstByte` waits for.
    first_byte_seen: Cell<bool>,
    /// The owner has left and wants the task to end.
    is_abandoned: Cell<bool>,
    /// The owner has left, and the task may go on until then.
    orphan_until: Cell<Option<Instant>>,
}

/// The owner's side. Dropping it is the owner's departure.
pub(super) struct LegTask<N: Net, T> {
    shard: Rc<Shard<N>>,
    state: Rc<TaskState<T>>,
    on_disconnect: OnDisconnect,
}

/// The task's side: its waits end when nobody wants its answer.
pub(super) struct TaskContext<N: Net, T> {
    shard: Rc<Shard<N>>,
    state: Rc<TaskState<T>>,
    timer: Timer,
    phase: Cell<Phase>,
}

impl<N: Net, T: 'static> LegTask<N, T> {
    /// Begins `leg` as a task.
    pub(super) fn begin<F>(
        shard: &Rc<Shard<N>>,
        on_disconnect: OnDisconnect,
        leg: impl FnOnce(Rc<TaskContext<N, T>>) -> F,
    ) -> Self
    where
        F: Future<Output = T> + 'static,
    {
        let state = Rc::new(TaskState {
            result: RefCell::new(None),
            has_succeeded: Cell::new(false),
            has_ended: Cell::new(false),
            owner: RefCell::new(Waker::noop().clone()),
            task: RefCell::new(Waker::noop().clone()),
            first_byte_seen: Cell::new(false),
            is_abandoned: Cell::new(false),
            orphan_until: Cell::new(None),
        });
        let context = Rc::new(TaskContext {
            shard: Rc::clone(shard),
            state: Rc::clone(&state),
            timer: shard.net.timer(),
            phase: Cell::new(Phase::Prefill),
        });
        let end = TaskEnd::new(&context);
        let leg = leg(context);
        shard.net.spawn(async move {
            let result = leg.await;
            end.finish(result);
        });
        Self {
            shard: Rc::clone(shard),
            state,
            on_disconnect,
        }
    }

    /// The task's result, when it has ended. `Err`: it met a defect and left none, or it has been
    /// taken.
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<Result<T, Fault>> {
        if self.state.has_ended.get() {
            let result = self.state.result.borrow_mut().take();
            return Poll::Ready(result.ok_or(Fault::Bug("a leg ended without a result")));
        }
        self.state.owner.borrow_mut().clone_from(cx.waker());
        Poll::Pending
    }

    /// The other engine's answer has begun, so it needs this leg no longer.
    pub(super) fn record_first_byte(&self) {
        self.state.first_byte_seen.set(true);
    }

    /// Changes what dropping the job means to the leg.
    pub(super) const fn on_drop(&mut self, on_disconnect: OnDisconnect) {
        self.on_disconnect = on_disconnect;
    }

    /// Whether the task has seen the head of a successful answer; if not, its owner is woken when
    /// it has.
    pub(super) fn has_succeeded(&self, cx: &mut Context<'_>) -> bool {
        let has_succeeded = self.state.has_succeeded.get();
        if !has_succeeded {
            self.state.owner.borrow_mut().clone_from(cx.waker());
        }
        has_succeeded
    }
}

impl<N: Net, T> Drop for LegTask<N, T> {
    fn drop(&mut self) {
        if self.state.has_ended.get() {
            return;
        }
        match self.on_disconnect {
            OnDisconnect::Cancel => self.state.is_abandoned.set(true),
            OnDisconnect::UntilFirstByte if self.state.first_byte_seen.get() => {
                self.state.is_abandoned.set(true)
            }
            OnDisconnect::UntilFirstByte | OnDisconnect::RunToEnd => {
                let wait = Duration::from_secs(ORPHAN_SECS_MAX);
                let until = self.shard.net.now().after(wait);
                self.state.orphan_until.set(Some(until));
            }
        }
        self.state.task.borrow().wake_by_ref();
    }
}

/// Marks the end of a task, also of one that panics.
struct TaskEnd<N: Net, T> {
    context: Rc<TaskContext<N, T>>,
    _counted: TaskGuard<N>,
}

impl<N: Net, T> TaskEnd<N, T> {
    fn new(context: &Rc<TaskContext<N, T>>) -> Self {
        Self {
            context: Rc::clone(context),
            _counted: context.shard.count_task(),
        }
    }

    fn finish(self, result: T) {
        *self.context.state.result.borrow_mut() = Some(result);
    }
}

impl<N: Net, T> Drop for TaskEnd<N, T> {
    fn drop(&mut self) {
        let state = &self.context.state;
        state.has_ended.set(true);
        state.owner.borrow().wake_by_ref();
    }
}

impl<N: Net, T> TaskContext<N, T> {
    /// The head of a successful answer is there.
    fn set_succeeded(&self) {
        self.state.has_succeeded.set(true);
        self.state.owner.borrow().wake_by_ref();
    }
}

impl<N: Net, T> Waits<N> for Rc<TaskContext<N, T>> {
    fn shard(&self) -> &Rc<Shard<N>> {
        &self.shard
    }

    fn phase(&self) -> &Cell<Phase> {
        &self.phase
    }

    fn early_watch(&self) -> Watch {
        Watch::Ahead
    }

    fn on_success(&self) {
        self.set_succeeded();
    }

    async fn until<U>(
        &self,
        _: Watch,
        limit: Limit,
        mut ready: impl FnMut(&mut Context<'_>) -> Poll<U>,
    ) -> Result<U, Fault> {
        let mut armed = None;
        let result = poll_fn(|cx| {
            if self.state.is_abandoned.get() {
                return Poll::Ready(Err(Fault::ClientGone));
            }
            if let Poll::Ready(value) = ready(cx) {
                return Poll::Ready(Ok(value));
            }
            self.state.task.borrow_mut().clone_from(cx.waker());
            let now = self.shard.net.now();
            let orphan = self.state.orphan_until.get();
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
            self.timer.set(Instant(0), None);
        }
        result
    }
}
