//! A leg that runs as a separate task, concurrently with its exchange.
//!
//! Concurrent legs each need their own deadline and their own lifetime: a prefill leg may have to
//! continue after its client has disconnected (`pd::connector::Rules`), and the failure of
//! one encode leg cancels the others.
//!
//! The exchange holds a [`LegTask`], through which it receives the leg's result. The
//! [`OnDisconnect`] rule given at the start decides what dropping the [`LegTask`] does to the leg.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::call::{Call, CallEnd, Deadlines};
use super::connection::Connection;
use super::error::CallError;
use super::scope::{Scope, Stage};
use super::upstreams::{TaskGuard, Upstreams};
use super::wait::{Deadline, Timeout, Waited};
use crate::fault::Fault;
use crate::fleet::Target;
use crate::limits::DETACHED_LEG_SECS_MAX;
use crate::metrics::Phase;
use crate::net::{Instant, Net, Timer};
use crate::pd::{Leg, OnDisconnect, Role};
use crate::trace::LegTrace;

/// State shared between a [`LegTask`] and its running task.
struct TaskState<T> {
    /// The leg's result; `None` until the task has finished, and again after the owner has taken
    /// it.
    result: RefCell<Option<T>>,
    /// The task has received the head of a successful (2xx) response.
    has_succeeded: Cell<bool>,
    /// The status of the leg's response, or the label of its error.
    recorded: Cell<Option<Result<u16, &'static str>>>,
    /// The task has finished or panicked, or was dropped.
    has_ended: Cell<bool>,
    /// Wakes the owner when `has_succeeded` or `has_ended` changes.
    owner: RefCell<Waker>,
    /// Wakes the task when its owner is dropped.
    task: RefCell<Waker>,
    /// For a prefill leg: the first body byte of the decode leg's response has arrived, so the
    /// transfer between the two engines has finished. With `OnDisconnect::UntilFirstByte`, dropping
    /// the owner then cancels this leg.
    first_byte_seen: Cell<bool>,
    /// Whether the owner was dropped and the task must stop.
    is_abandoned: Cell<bool>,
    /// The time until which the task may continue after its owner was dropped; `None` while the
    /// owner exists, or if the task must stop.
    orphan_until: Cell<Option<Instant>>,
}

/// The exchange's handle of a leg that runs as a task. Dropping it applies the leg's
/// [`OnDisconnect`] rule.
pub(crate) struct LegTask<N: Net, T> {
    upstreams: Rc<Upstreams<N>>,
    state: Rc<TaskState<T>>,
    on_disconnect: OnDisconnect,
}

/// The context in which the leg of a task runs. Its waits fail when the leg is no longer needed.
pub(crate) struct TaskContext<N: Net, T> {
    upstreams: Rc<Upstreams<N>>,
    state: Rc<TaskState<T>>,
    timer: Timer,
    phase: Cell<Phase>,
    trace: Cell<LegTrace>,
}

impl<N: Net, T: 'static> LegTask<N, T> {
    /// Starts `leg` as a task of the shard and returns the handle of it. `trace` has the spans of
    /// the leg.
    pub(crate) fn begin<F>(
        upstreams: &Rc<Upstreams<N>>,
        on_disconnect: OnDisconnect,
        trace: LegTrace,
        leg: impl FnOnce(Rc<TaskContext<N, T>>) -> F,
    ) -> Self
    where
        F: Future<Output = T> + 'static,
    {
        let state = Rc::new(TaskState {
            result: RefCell::new(None),
            has_succeeded: Cell::new(false),
            recorded: Cell::new(None),
            has_ended: Cell::new(false),
            owner: RefCell::new(Waker::noop().clone()),
            task: RefCell::new(Waker::noop().clone()),
            first_byte_seen: Cell::new(false),
            is_abandoned: Cell::new(false),
            orphan_until: Cell::new(None),
        });
        let context = Rc::new(TaskContext {
            upstreams: Rc::clone(upstreams),
            state: Rc::clone(&state),
            timer: upstreams.net.timer(),
            phase: Cell::new(Phase::Prefill),
            trace: Cell::new(trace),
        });
        let end = TaskEnd::new(&context);
        let leg = leg(context);
        upstreams.net.spawn(async move {
            let result = leg.await;
            end.finish(result);
        });
        Self {
            upstreams: Rc::clone(upstreams),
            state,
            on_disconnect,
        }
    }

    /// Returns the task's result once it has finished. `Err` means that the task panicked, or that
    /// the result was already taken.
    pub(crate) fn poll(&self, cx: &mut Context<'_>) -> Poll<Result<T, Fault>> {
        if self.state.has_ended.get() {
            let result = self.state.result.borrow_mut().take();
            return Poll::Ready(result.ok_or(Fault::Bug("a leg task ended without a result")));
        }
        self.state.owner.borrow_mut().clone_from(cx.waker());
        Poll::Pending
    }

    /// Records that the first body byte of the decode leg's response has arrived. From now on
    /// `OnDisconnect::UntilFirstByte` cancels this leg instead of letting it continue.
    pub(crate) fn record_first_byte(&self) {
        self.state.first_byte_seen.set(true);
    }

    /// Replaces the rule that applies when this handle is dropped.
    pub(crate) const fn on_drop(&mut self, on_disconnect: OnDisconnect) {
        self.on_disconnect = on_disconnect;
    }

    /// Returns the status of the leg's response, or the label of its error, once there is one.
    pub(crate) fn recorded(&self) -> Option<Result<u16, &'static str>> {
        self.state.recorded.get()
    }

    /// Returns whether the task has received the head of a successful (2xx) response. If not, the
    /// owner is woken once it has.
    pub(crate) fn has_succeeded(&self, cx: &mut Context<'_>) -> bool {
        let has_succeeded = self.state.has_succeeded.get();
        if !has_succeeded {
            self.state.owner.borrow_mut().clone_from(cx.waker());
        }
        has_succeeded
    }
}

/// A call that owns its parts, so that it can run as a separate task.
pub(crate) struct OwnedCall<N: Net, B> {
    pub(crate) target: Target,
    /// The leg's request head, including the blank line.
    pub(crate) head: Vec<u8>,
    pub(crate) leg: Leg,
    /// The client's request body, to which the leg's edits apply.
    pub(crate) body: Rc<B>,
    /// The connection on which the request is first sent; `None` connects.
    pub(crate) begun: Option<Connection<N>>,
    pub(crate) deadlines: Deadlines,
    /// Whether the metrics of legs count the call.
    pub(crate) is_counted: bool,
}

/// A call that runs as a separate task.
pub(crate) type CallTask<N> = LegTask<N, Result<CallEnd<N>, CallError>>;

impl<N: Net> CallTask<N> {
    /// Starts a call as a task of the shard and returns the handle of it.
    pub(crate) fn call<B: AsRef<[u8]> + 'static>(
        upstreams: &Rc<Upstreams<N>>,
        on_disconnect: OnDisconnect,
        trace: LegTrace,
        call: OwnedCall<N, B>,
    ) -> Self {
        Self::begin(upstreams, on_disconnect, trace, async move |context| {
            let OwnedCall {
                target,
                head,
                leg,
                body,
                mut begun,
                deadlines,
                is_counted,
            } = call;
            let upstreams = context.upstreams();
            let call = Call {
                engine: upstreams.engine(leg.role, &target),
                head: &head,
                leg: &leg,
                body: (*body).as_ref(),
                is_counted,
            };
            upstreams
                .call(&context, &call, Some(&mut begun), &deadlines)
                .await
        })
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
                let wait = Duration::from_secs(DETACHED_LEG_SECS_MAX);
                let until = self.upstreams.net.now().after(wait);
                self.state.orphan_until.set(Some(until));
            }
        }
        self.state.task.borrow().wake_by_ref();
    }
}

/// Marks the task as finished when dropped, so that this also happens after a panic.
struct TaskEnd<N: Net, T> {
    context: Rc<TaskContext<N, T>>,
    _counted: TaskGuard<N>,
}

impl<N: Net, T> TaskEnd<N, T> {
    fn new(context: &Rc<TaskContext<N, T>>) -> Self {
        Self {
            context: Rc::clone(context),
            _counted: context.upstreams.count_task(),
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
    pub(crate) const fn upstreams(&self) -> &Rc<Upstreams<N>> {
        &self.upstreams
    }

    /// Records that the head of a successful (2xx) response has arrived, and wakes the owner.
    fn set_succeeded(&self) {
        self.state.has_succeeded.set(true);
        self.state.owner.borrow().wake_by_ref();
    }
}

impl<N: Net, T> Scope<N> for Rc<TaskContext<N, T>> {
    fn phase(&self) -> &Cell<Phase> {
        &self.phase
    }

    fn on_success(&self) {
        self.set_succeeded();
    }

    fn record_leg(&self, _: Role, ended: Result<u16, &'static str>) {
        self.state.recorded.set(Some(ended));
        self.trace
            .replace(LegTrace::NONE)
            .end(&self.upstreams.net, ended);
    }

    async fn until<U>(
        &self,
        _: Stage,
        deadline: Deadline,
        mut ready: impl FnMut(&mut Context<'_>) -> Poll<U>,
    ) -> Waited<U> {
        let mut armed = None;
        let result = poll_fn(|cx| {
            if self.state.is_abandoned.get() {
                return Poll::Ready(Waited::Disconnected);
            }
            if let Poll::Ready(value) = ready(cx) {
                return Poll::Ready(Waited::Ready(value));
            }
            self.state.task.borrow_mut().clone_from(cx.waker());
            let now = self.upstreams.net.now();
            let orphan = self.state.orphan_until.get();
            let orphan = orphan.map(|until| until.since(now));
            let deadline = deadline.or_sooner(Deadline::of(now, orphan, Timeout::Detached));
            let Some(at) = deadline.at() else {
                return Poll::Pending;
            };
            if armed != Some(at) {
                armed = Some(at);
                self.timer.set(now, Some(at.since(now)));
            }
            self.timer.poll(cx).map(|()| match deadline.timeout() {
                Timeout::Detached => Waited::Disconnected,
                timeout => Waited::TimedOut(timeout),
            })
        })
        .await;
        if armed.is_some() {
            self.timer.set(Instant(0), None);
        }
        result
    }
}
