//! The tasks of a thread and the order in which they are polled.
//!
//! A waker holds a task number, which it pushes to the thread's queue; it owns neither the task nor
//! a buffer. A waker that outlives its task may wake a later task with the same number, which costs
//! one spurious poll. So task numbers need no generation, and no unsafe code is needed.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use crate::net::turn::{self, Class};

/// The woken tasks of each class, in order.
struct Woken([VecDeque<u32>; 3]);

impl Woken {
    fn of(&mut self, class: Class) -> &mut VecDeque<u32> {
        &mut self.0[class as usize]
    }
}

thread_local! {
    /// The woken tasks of this thread. A waker that is used on another thread has no effect here:
    /// only a `Notifier` works across threads.
    static WOKEN: RefCell<Woken> = const {
        RefCell::new(Woken([VecDeque::new(), VecDeque::new(), VecDeque::new()]))
    };
}

/// The number of the main future, which is passed to [`super::run`].
pub(super) const MAIN: u32 = 0;

/// The states of a task.
const WAITING: u8 = 0;
const QUEUED: u8 = 1;
const POLLED: u8 = 2;
/// The task is being polled and has been woken meanwhile. It is queued after the poll, which
/// decides its class.
const POLLED_AND_WOKEN: u8 = 3;

/// A waker that queues the task `number`.
pub(super) struct TaskWaker {
    number: u32,
    /// One of the states above. Used only on its own thread, so `Relaxed` is enough.
    state: AtomicU8,
    /// The [`Class`] of the task's last poll.
    class: AtomicU8,
}

impl TaskWaker {
    pub(super) fn new(number: u32) -> Arc<Self> {
        Arc::new(Self {
            number,
            state: AtomicU8::new(WAITING),
            class: AtomicU8::new(Class::Relay as u8),
        })
    }

    fn wake_task(&self) {
        match self.state.load(Ordering::Relaxed) {
            WAITING => self.queue(),
            POLLED => self.state.store(POLLED_AND_WOKEN, Ordering::Relaxed),
            _ => {}
        }
    }

    fn queue(&self) {
        self.state.store(QUEUED, Ordering::Relaxed);
        let class = usize::from(self.class.load(Ordering::Relaxed));
        WOKEN.with_borrow_mut(|woken| woken.0[class].push_back(self.number));
    }

    /// Starts a poll of the task, and with it a turn.
    pub(super) fn begin(&self) {
        self.state.store(POLLED, Ordering::Relaxed);
        turn::begin();
    }

    /// Ends a poll after which the task is not complete, and queues it in the class `class` now, if
    /// it was woken during the poll, or when it is woken.
    pub(super) fn end(&self, class: Class) {
        self.class.store(class as u8, Ordering::Relaxed);
        if self.state.load(Ordering::Relaxed) == POLLED_AND_WOKEN {
            self.queue();
        } else {
            self.state.store(WAITING, Ordering::Relaxed);
        }
    }
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_task();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.wake_task();
    }
}

/// Returns the number of tasks of a class that are woken and not yet polled.
pub(super) fn woken(class: Class) -> usize {
    WOKEN.with_borrow_mut(|woken| woken.of(class).len())
}

/// Returns whether a task of any class is woken and not yet polled.
pub(super) fn is_any_woken() -> bool {
    WOKEN.with_borrow(|woken| woken.0.iter().any(|tasks| !tasks.is_empty()))
}

/// Removes and returns the number of the next task of a class to poll, or `None` if none is woken.
pub(super) fn next_woken(class: Class) -> Option<u32> {
    WOKEN.with_borrow_mut(|woken| woken.of(class).pop_front())
}

/// Empties the queues of woken tasks, which an earlier run on this thread may have left.
pub(super) fn clear_woken() {
    WOKEN.with_borrow_mut(|woken| woken.0.iter_mut().for_each(VecDeque::clear));
}

/// The consequence of a panic in a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Panic {
    /// The panic is caught, and only the task ends.
    EndsTask,
    /// The panic unwinds the thread.
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
    /// Tasks by number. `None` for a free number, for [`MAIN`], and while the task is being polled.
    tasks: Vec<Option<Task>>,
    free: Vec<u32>,
    is_closed: bool,
}

impl Tasks {
    pub(super) fn new() -> Self {
        let table = Table {
            // Number 0 is reserved for the main future.
            tasks: vec![None],
            ..Table::default()
        };
        Self {
            table: RefCell::new(table),
        }
    }

    /// Adds a task and wakes it. After [`Tasks::close`] a new task is dropped immediately.
    pub(super) fn spawn(&self, future: Pin<Box<dyn Future<Output = ()>>>, panic: Panic) {
        let mut table = self.table.borrow_mut();
        if table.is_closed {
            drop(table);
            drop(future);
            return;
        }
        let number = table.free.pop().unwrap_or_else(|| {
            table.tasks.push(None);
            // Nearly every task owns a descriptor, so their number stays far below `u32::MAX`.
            u32::try_from(table.tasks.len() - 1).unwrap_or(u32::MAX)
        });
        let flag = TaskWaker::new(number);
        flag.wake_task();
        let waker = Waker::from(Arc::clone(&flag));
        table.tasks[number as usize] = Some(Task {
            future,
            flag,
            waker,
            panic,
        });
    }

    /// Polls the task with this number, if it exists. Returns `false` if the task, or its drop,
    /// panicked.
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
            task.flag.end(turn::class());
            self.table.borrow_mut().tasks[number as usize] = Some(task);
            return true;
        }
        // A second panic, during the drop of the task, must not escape either.
        let dropped = std::panic::catch_unwind(AssertUnwindSafe(|| drop(task)));
        self.table.borrow_mut().free.push(number);
        polled.is_ok() && dropped.is_ok()
    }

    /// Drops every task. Tasks that are spawned or woken by these drops do not run.
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
