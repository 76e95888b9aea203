//! Finds connections whose peer has vanished, and resets them.

use std::rc::Rc;

use super::{Runtime, turn};
use crate::net::{give_way, socket};
use crate::sys::{Silence, has_vanished};

/// Connections that are checked before other tasks run: some 50 us.
const BATCH: usize = 64;

impl Runtime {
    /// Resets each connection of this thread whose peer has vanished (see [`Silence`]). The tasks
    /// that use it find it reset by the peer. Returns their number.
    pub async fn reset_vanished(&self, least: Silence) -> u64 {
        let mut count = 0;
        let mut at = 0;
        loop {
            turn::set_background();
            let mut found = Vec::new();
            {
                let watches = self.inner.watches.borrow();
                if at >= watches.places.len() {
                    return count;
                }
                let batch = watches.places[at..].iter().take(BATCH);
                let slots = batch.filter_map(|place| place.slot.as_ref());
                let vanished =
                    slots.filter(|slot| !slot.is_vital() && has_vanished(slot.fd(), least));
                found.extend(vanished.map(Rc::clone));
            }
            at += BATCH;
            count += found.len() as u64;
            for slot in found {
                socket::reset(slot.fd());
            }
            turn::end();
            give_way().await;
        }
    }
}
