//! Detects that a peer has closed its sending side while received bytes are still unread.
//!
//! A plain wait for readability is ready immediately if there are unread bytes, which hides an end
//! that follows them. monoio has no operation that waits for the end only. So each shard keeps a
//! small epoll set with `EPOLLRDHUP` for the few connections in that state, and waits until the set
//! itself is readable.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use super::handle::Handle;

/// Maximum number of events that one call of `epoll_wait` collects; further ones are collected by
/// the next call.
const EVENTS_MAX: usize = 64;

/// The epoll set of one shard, with the connections that wait for their peer to close its sending
/// side.
pub(super) struct Hangups {
    set: OwnedFd,
    waiting: RefCell<HashMap<u64, Rc<State>>>,
    next_key: Cell<u64>,
}

#[derive(Default)]
struct State {
    gone: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Hangups {
    /// Opens the epoll set and starts the task that collects its events.
    pub(super) fn start() -> io::Result<Rc<Self>> {
        let set = epoll::create(CreateFlags::CLOEXEC)?;
        let handle = Handle::watch(set.try_clone()?)?;
        let hangups = Rc::new(Self {
            set,
            waiting: RefCell::new(HashMap::new()),
            next_key: Cell::new(0),
        });
        let listening = Rc::clone(&hangups);
        ::monoio::spawn(async move {
            loop {
                handle.readable().await;
                listening.collect();
            }
        });
        Ok(hangups)
    }

    /// Adds a connection to the epoll set. Dropping the returned value removes it.
    pub(super) fn watch(self: &Rc<Self>, fd: BorrowedFd<'_>) -> io::Result<Watch> {
        let key = self.next_key.get();
        self.next_key.set(key + 1);
        // The set gets a duplicate of the descriptor. The kernel removes a closed file from a set
        // only with its last descriptor, and the connection's own may be closed before this watch
        // is dropped.
        let member = fd.try_clone_to_owned()?;
        let flags = EventFlags::RDHUP | EventFlags::ONESHOT;
        epoll::add(&self.set, &member, EventData::new_u64(key), flags)?;
        let state = Rc::new(State::default());
        self.waiting.borrow_mut().insert(key, Rc::clone(&state));
        Ok(Watch {
            hangups: Rc::clone(self),
            key,
            state,
            member,
        })
    }

    fn collect(&self) {
        let mut events = [const { std::mem::MaybeUninit::<epoll::Event>::uninit() }; EVENTS_MAX];
        let no_wait = rustix::time::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let Ok((events, _)) = epoll::wait(&self.set, &mut events, Some(&no_wait)) else {
            return;
        };
        for event in events.iter() {
            let key = { event.data }.u64();
            let state = self.waiting.borrow().get(&key).cloned();
            let Some(state) = state else { continue };
            state.gone.set(true);
            let waker = state.waker.borrow_mut().take();
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

/// A connection in the epoll set. Dropping it removes the connection from the set.
pub(super) struct Watch {
    hangups: Rc<Hangups>,
    key: u64,
    state: Rc<State>,
    member: OwnedFd,
}

impl Watch {
    pub(super) fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.state.gone.get() {
            return Poll::Ready(());
        }
        let mut waker = self.state.waker.borrow_mut();
        match &mut *waker {
            Some(waker) if waker.will_wake(cx.waker()) => {}
            waker => *waker = Some(cx.waker().clone()),
        }
        Poll::Pending
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = epoll::delete(&self.hangups.set, &self.member);
        self.hangups.waiting.borrow_mut().remove(&self.key);
    }
}
