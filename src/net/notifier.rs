//! Waking a shard from another thread.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

/// A descriptor that becomes readable when its ringer is rung.
pub(super) fn notifier() -> io::Result<(OwnedFd, Notifier)> {
    let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
    let notifier = Notifier {
        event: Arc::new(event.try_clone()?),
    };
    Ok((event, notifier))
}

/// Rings a shard's bell; may be used from any thread.
#[derive(Clone, Debug)]
pub struct Notifier {
    event: Arc<OwnedFd>,
}

impl Notifier {
    /// Wakes the shard.
    pub fn notify(&self) {
        // The counter cannot overflow by ones in practice; a full one means "already rung".
        let _ = rustix::io::write(&*self.event, &1_u64.to_ne_bytes());
    }
}
