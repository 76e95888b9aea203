//! Resolves host names with the system's resolver, on threads that may block.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::{io, thread};

use super::inbox::{Inbox, Message};
use crate::fleet::{Address, Target};
use crate::limits::{ADDRESSES_MAX, RESOLVE_QUEUE_MAX};
use crate::upstream::Resolved;

/// Number of resolver threads in the process, and thus of concurrent look-ups. With an unreachable
/// name server, each look-up takes seconds.
const THREADS: usize = 4;

/// A look-up and the inbox of the shard that requested it.
struct LookUpRequest {
    target: Target,
    inbox: Inbox,
}

/// Handle to the resolver threads, which exit when the last clone is dropped.
#[derive(Clone)]
pub(super) struct Resolver {
    questions: SyncSender<LookUpRequest>,
}

impl Resolver {
    /// Starts the resolver threads.
    pub(super) fn start() -> io::Result<Self> {
        let (questions, asked) = sync_channel::<LookUpRequest>(RESOLVE_QUEUE_MAX);
        let asked = Arc::new(Mutex::new(asked));
        for _ in 0..THREADS {
            let asked = Arc::clone(&asked);
            thread::Builder::new()
                .name("resolver".to_owned())
                .spawn(move || work(&asked))?;
        }
        Ok(Self { questions })
    }

    /// Queues a look-up of `target`; the result is sent to `inbox`. Returns `false` if the queue is
    /// full: no result is then sent.
    pub(super) fn ask(&self, target: &Target, inbox: &Inbox) -> bool {
        let question = LookUpRequest {
            target: target.clone(),
            inbox: inbox.clone(),
        };
        match self.questions.try_send(question) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
        }
    }
}

fn work(asked: &Mutex<Receiver<LookUpRequest>>) {
    loop {
        let next = asked.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(LookUpRequest { target, inbox }) = next else {
            return;
        };
        let addresses = resolve(&target);
        inbox.send(Message::Resolved(Resolved { target, addresses }));
    }
}

/// Resolves a target with a blocking look-up. Returns at most [`ADDRESSES_MAX`] addresses, and none
/// if the name does not resolve. IPv4 addresses come first: engines listen on IPv4 by default, and
/// a refused first attempt would delay every new connection.
pub(super) fn resolve(target: &Target) -> Vec<Address> {
    if let Some(address) = target.address() {
        return vec![address.clone()];
    }
    let Some(name) = target.name() else {
        return Vec::new();
    };
    let Ok(found) = name.to_socket_addrs() else {
        return Vec::new();
    };
    let mut addresses: Vec<SocketAddr> = found.collect();
    addresses.sort_by_key(SocketAddr::is_ipv6);
    addresses.dedup();
    addresses.truncate(ADDRESSES_MAX);
    addresses.into_iter().map(Address::Tcp).collect()
}
