//! Messages from the control plane, and clients from other shards, to a shard.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::net::{Accepted, Notifier};
use crate::proxy::places::Place;
use crate::upstream::Resolved;

/// An accepted client connection, which a shard is to serve.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) accepted: Accepted,
    /// Index of the rank whose listener accepted it.
    pub(super) rank: u16,
    pub(super) place: Place,
}

/// A message to a shard.
#[derive(Debug)]
pub(super) enum Message {
    /// Result of a name look-up that the shard requested.
    Resolved(Resolved),
    /// The drain has started. The message only wakes the shard, which then reads the shared
    /// `draining` flag.
    CheckDrain,
    /// The deadline of the drain has passed: the shard ends, and cuts the requests that are open.
    Cut,
}

/// The queue of messages to one shard. Usable from any thread; the shard's own thread takes the
/// messages.
#[derive(Clone, Debug)]
pub(super) struct Inbox {
    waiting: Arc<Mutex<Waiting>>,
    notifier: Notifier,
    /// How often the shard has taken its messages.
    beats: Arc<AtomicU64>,
    /// Whether the shard must close idle client connections, for a client of another shard.
    must_close_idle: Arc<AtomicBool>,
}

#[derive(Debug, Default)]
struct Waiting {
    messages: VecDeque<Message>,
    /// Clients that other shards have accepted. Each has a place.
    clients: VecDeque<Client>,
    /// Whether the shard takes no more clients.
    is_closed: bool,
}

impl Inbox {
    /// The value of [`Inbox::beats`] once the shard has ended.
    pub(super) const ENDED: u64 = u64::MAX;

    pub(super) fn new(notifier: Notifier) -> Self {
        Self {
            waiting: Arc::default(),
            notifier,
            beats: Arc::default(),
            must_close_idle: Arc::default(),
        }
    }

    /// Returns whether this is the inbox of the same shard.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.waiting, &other.waiting)
    }

    /// Queues a message and wakes the shard. The queue is bounded: it contains at most the results
    /// of the look-ups that the shard has requested, one [`Message::CheckDrain`] and one
    /// [`Message::Cut`].
    pub(super) fn send(&self, message: Message) {
        self.lock().messages.push_back(message);
        self.notifier.notify();
    }

    /// Hands a client over to the shard.
    ///
    /// # Errors
    /// Returns the client if the shard takes no more clients.
    pub(super) fn hand_over(&self, client: Client) -> Result<(), Client> {
        let mut waiting = self.lock();
        if waiting.is_closed {
            return Err(client);
        }
        let is_first = waiting.clients.is_empty();
        waiting.clients.push_back(client);
        drop(waiting);
        if is_first {
            // Otherwise an earlier client has woken the shard, or is about to, and it takes all.
            self.notifier.notify();
        }
        Ok(())
    }

    /// The lock is held for a push or a swap only. The shard takes it after a notification, not
    /// while it handles a request.
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the shard without a message.
    pub(super) fn ping(&self) {
        self.notifier.notify();
    }

    /// Makes the shard close some of its idle client connections.
    pub(super) fn close_idle(&self) {
        self.must_close_idle.store(true, Ordering::Relaxed);
        self.notifier.notify();
    }

    /// Returns whether the shard must close idle client connections, and resets that.
    pub(super) fn must_close_idle(&self) -> bool {
        self.must_close_idle.swap(false, Ordering::Relaxed)
    }

    /// Returns how often the shard has taken its messages, which it does after each notification.
    pub(super) fn beats(&self) -> u64 {
        self.beats.load(Ordering::Relaxed)
    }

    /// Records that the shard takes no more messages or clients, and closes the connections of the
    /// clients that are left.
    pub(super) fn end(&self) {
        self.beats.store(Self::ENDED, Ordering::Relaxed);
        let mut waiting = self.lock();
        waiting.is_closed = true;
        let left = std::mem::take(&mut waiting.clients);
        drop(waiting);
        drop(left);
    }

    /// Makes the shard take no more clients, unless one is waiting. Returns whether it takes none.
    pub(super) fn close(&self) -> bool {
        let mut waiting = self.lock();
        waiting.is_closed |= waiting.clients.is_empty();
        waiting.is_closed
    }

    /// Returns up to `count_max` clients, and wakes the shard again if more are waiting.
    pub(super) fn take_clients(&self, count_max: usize) -> Vec<Client> {
        let mut waiting = self.lock();
        let count = waiting.clients.len().min(count_max);
        let taken = waiting.clients.drain(..count).collect();
        let are_more = !waiting.clients.is_empty();
        drop(waiting);
        if are_more {
            self.notifier.notify();
        }
        taken
    }

    /// Returns all queued messages and empties the queue.
    pub(super) fn take(&self) -> VecDeque<Message> {
        self.beats.fetch_add(1, Ordering::Relaxed);
        std::mem::take(&mut self.lock().messages)
    }
}
