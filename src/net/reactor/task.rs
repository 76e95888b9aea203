//! Tasks: who is to be polled, and in which order.
//!
//! A waker is a number that is pushed to the thread's queue; it owns no task and no buffer. A
//! waker that outlives its task may wake the task that got its number later, which only polls
//! once in vain. So nothing here needs a generation, and nothing is unsafe.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

thread_local! {
    /// The tasks of this thread that were woken, in order. A waker used on another thread wakes
    /// nobody here: only a `Notifier` crosses threads.
    static WOKEN: RefCell<VecDeque<u32>> = const { RefCell::new(VecDeque::new()) };
}

/// The number of the future that [`super::run`] was given.
pub(super) const MAIN: u32 = 0;

/// Wakes the task with this number.
pub(super) struct TaskWaker {
    number: u32,
    /// In the queue already. Only its own thread uses it, so no order of memory matters.
    is_queued: AtomicBool,
}

impl TaskWaker {
    pub(super) fn new(number: u32) -> Arc<Self> {
        Arc::new(Self {
            number,
            is_queued: AtomicBool::new(false),
        })
    }

    fn queue(&self) {
        if self.is_queued.load(Ordering::Relaxed) {
            return;
        }
        self.is_queued.store(true, Ordering::Relaxed);
        WOKEN.with_borrow_mut(|woken| woken.push_back(self.number));
    }

    /// From here on the task is woken anew.
    pub(super) fn begin(&self) {
        self.is_queued.store(false, Ordering::Relaxed);
    }
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.queue();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.queue();
    }
}

/// Tasks woken and not yet polled.
pub(super) fn woken() -> usize {
    WOKEN.with_borrow(VecDeque::len)
}

/// The next task to poll.
pub(super) fn next_woken() -> Option<u32> {
    WOKEN.with_borrow_mut(VecDeque::pop_front)
}

/// Forgets who was woken: what an earlier run on this thread has left behind.
pub(super) fn clear_woken() {
    WOKEN.with_borrow_mut(VecDeque::clear);
}

/// What a panic in a task ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Panic {
    /// The task.
    EndsTask,
    /// The thread.
    EndsThread,
}

struct Task {
    future: Pin<Box<dyn Future<Output = ()>>>,
    flag: Arc<TaskWaker>,
    waker: Waker,
    panic: Panic,
}

/// The tasks of one thread.
pub(super) struct Tasks {
    table: RefCell<Table>,
}

#[derive(Default)]
struct Table {
    /// By number. Empty where none is, and while one is being polled.
    tasks: Vec<Option<Task>>,
    free: Vec<u32>,
    is_closed: bool,
}

impl Tasks {
    pub(super) fn new() -> Self {
        let table = Table {
            // The number of the main future is taken.
            tasks: vec![None],
            ..Table::default()
        };
        Self {
            table: RefCell::new(table),
        }
    }

    /// Adds a task, to be polled in its turn. Once the tasks are being dropped, a new one is too.
    pub(super) fn spawn(&self, future: Pin<Box<dyn Future<Output = ()>>>, panic: Panic) {
        let mut table = self.table.borrow_mut();
        if table.is_closed {
            drop(table);
            drop(future);
            return;
        }
        let number = table.free.pop().unwrap_or_else(|| {
            table.tasks.push(None);
            // Every task has a descriptor or is one of a handful, so they do not come near this.
            u32::try_from(table.tasks.len() - 1).unwrap_or(u32::MAX)
        });
        let flag = TaskWaker::new(number);
        flag.queue();
        let waker = Waker::from(Arc::clone(&flag));
        table.tasks[number as usize] = Some(Task {
            future,
            flag,
            waker,
            panic,
        });
    }

    /// Polls one task, if there is one with this number; `false` when it panicked.
    pub(super) fn poll(&self, number: u32) -> bool {
        let taken = self.table.borrow_mut().tasks[number as usize].take();
        let Some(mut task) = taken else { return true };
        task.flag.begin();
        let mut cx = Context::from_waker(&task.waker);
        let polled = match task.panic {
            Panic::EndsThread => Ok(task.future.as_mut().poll(&mut cx)),
            Panic::EndsTask => {
                std::panic::catch_unwind(AssertUnwindSafe(|| task.future.as_mut().poll(&mut cx)))
            }
        };
        if matches!(polled, Ok(Poll::Pending)) {
            self.table.borrow_mut().tasks[number as usize] = Some(task);
            return true;
        }
        // A second panic, while the pieces are dropped, must not escape either.
        let dropped = std::panic::catch_unwind(AssertUnwindSafe(|| drop(task)));
        self.table.borrow_mut().free.push(number);
        polled.is_ok() && dropped.is_ok()
    }

    /// Drops every task, also those that these spawn or wake while they are dropped.
    pub(super) fn close(&self) {
        let mut table = self.table.borrow_mut();
        table.is_closed = true;
        let tasks = std::mem::take(&mut table.tasks);
        table.free.clear();
        drop(table);
        for task in tasks {
            drop(std::panic::catch_unwind(AssertUnwindSafe(|| drop(task))));
        }
        clear_woken();
    }
}
