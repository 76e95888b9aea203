//! Messages from the control plane to a shard.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::net::Notifier;
use crate::upstream::Resolved;

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

/// The queue of messages from the control plane to one shard. Usable from any thread; the shard's
/// own thread takes the messages.
#[derive(Clone, Debug)]
pub(super) struct Inbox {
    waiting: Arc<Mutex<VecDeque<Message>>>,
    notifier: Notifier,
    /// How often the shard has taken its messages.
    beats: Arc<AtomicU64>,
    /// Whether the shard must close idle client connections, for a client of another shard.
    must_close_idle: Arc<AtomicBool>,
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
        // The lock is held for a push or a swap only. The shard takes it after a notification, not
        // while it handles a request.
        self.waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(message);
        self.notifier.notify();
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

    /// Records that the shard takes no more messages.
    pub(super) fn end(&self) {
        self.beats.store(Self::ENDED, Ordering::Relaxed);
    }

    /// Returns all queued messages and empties the queue.
    pub(super) fn take(&self) -> VecDeque<Message> {
        self.beats.fetch_add(1, Ordering::Relaxed);
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
