//! Messages from the control plane to a shard.

use std::collections::VecDeque;
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
}

/// The queue of messages from the control plane to one shard. Usable from any thread; the shard's
/// own thread takes the messages.
#[derive(Clone, Debug)]
pub(super) struct Inbox {
    waiting: Arc<Mutex<VecDeque<Message>>>,
    notifier: Notifier,
}

impl Inbox {
    pub(super) fn new(notifier: Notifier) -> Self {
        Self {
            waiting: Arc::default(),
            notifier,
        }
    }

    /// Returns whether this is the inbox of the same shard.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.waiting, &other.waiting)
    }

    /// Queues a message and wakes the shard. The queue is bounded: it contains at most the results
    /// of the look-ups that the shard has requested, and one [`Message::CheckDrain`].
    pub(super) fn send(&self, message: Message) {
        // The lock is held for a push or a swap only. The shard takes it after a notification, not
        // while it handles a request.
        self.waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(message);
        self.notifier.notify();
    }

    /// Returns all queued messages and empties the queue.
    pub(super) fn take(&self) -> VecDeque<Message> {
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
