//! Messages from the control plane to a shard.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use crate::net::Notifier;
use crate::proxy::Resolved;

/// What a shard is told.
#[derive(Debug)]
pub(super) enum Message {
    /// A name it asked for.
    Resolved(Resolved),
    /// The drain state has changed: look at it.
    Look,
}

/// The sending side; one per shard, usable from any thread.
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

    /// Adds a message and wakes the shard. Bounded by what the shard asks for.
    pub(super) fn send(&self, message: Message) {
        // Taken for a push or a swap, by this thread and when the shard was rung: never on a
        // request's way.
        self.waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(message);
        self.notifier.notify();
    }

    /// Takes everything that waits.
    pub(super) fn take(&self) -> VecDeque<Message> {
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
