//! Wakes a shard from another thread.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

/// Returns an eventfd, for a shard to wait on, and the notifier that makes it readable.
pub(super) fn notifier() -> io::Result<(OwnedFd, Notifier)> {
    let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
    let notifier = Notifier {
        event: Arc::new(event.try_clone()?),
    };
    Ok((event, notifier))
}

#[cfg(test)]
impl Notifier {
    /// Returns a notifier for which no shard waits.
    pub(crate) fn unconnected() -> Self {
        notifier().unwrap().1
    }
}

/// A handle with which any thread can wake the shard that created it.
#[derive(Clone, Debug)]
pub struct Notifier {
    event: Arc<OwnedFd>,
}

impl Notifier {
    /// Wakes the shard by making its eventfd readable.
    pub fn notify(&self) {
        // The counter is incremented by 1, so in practice it never overflows. Even if the write
        // failed because of that, the eventfd would be readable.
        let _ = rustix::io::write(&*self.event, &1_u64.to_ne_bytes());
    }
}
