//! Wakes a shard from another thread.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

/// Returns an eventfd that becomes readable when the notifier returned with it is notified.
pub(super) fn notifier() -> io::Result<(OwnedFd, Notifier)> {
    let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
    let notifier = Notifier {
        event: Arc::new(event.try_clone()?),
    };
    Ok((event, notifier))
}

/// Wakes a shard. May be used from any thread.
#[derive(Clone, Debug)]
pub struct Notifier {
    event: Arc<OwnedFd>,
}

impl Notifier {
    /// Wakes the shard.
    pub fn notify(&self) {
        // In practice the counter, incremented by 1, never overflows. A full one is readable
        // anyway.
        let _ = rustix::io::write(&*self.event, &1_u64.to_ne_bytes());
    }
}
