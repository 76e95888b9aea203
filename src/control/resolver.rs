//! Host names to addresses, by the system's own resolver, on threads that may block.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::{io, thread};

use super::inbox::{Inbox, Message};
use crate::fleet::{Address, Target};
use crate::limits::{ADDRESSES_MAX, RESOLVE_QUEUE_MAX};
use crate::proxy::Resolved;

/// Look-ups under way at once: one dead name server answer takes seconds.
const THREADS: usize = 4;

/// A look-up for one shard.
struct Question {
    target: Target,
    inbox: Inbox,
}

/// Asks the resolver threads, which live as long as some clone of this.
#[derive(Clone)]
pub(super) struct Resolver {
    questions: SyncSender<Question>,
}

impl Resolver {
    /// Starts the threads.
    pub(super) fn start() -> io::Result<Self> {
        let (questions, asked) = sync_channel::<Question>(RESOLVE_QUEUE_MAX);
        let asked = Arc::new(Mutex::new(asked));
        for _ in 0..THREADS {
            let asked = Arc::clone(&asked);
            thread::Builder::new()
                .name("resolver".to_owned())
                .spawn(move || work(&asked))?;
        }
        Ok(Self { questions })
    }

    /// Asks for a name; the answer comes to `inbox`. `false`: too many are waiting.
    pub(super) fn ask(&self, target: &Target, inbox: &Inbox) -> bool {
        let question = Question {
            target: target.clone(),
            inbox: inbox.clone(),
        };
        match self.questions.try_send(question) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
        }
    }
}

fn work(asked: &Mutex<Receiver<Question>>) {
    loop {
        let next = asked.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Question { target, inbox }) = next else {
            return;
        };
        let addresses = resolve(&target);
        inbox.send(Message::Resolved(Resolved { target, addresses }));
    }
}

/// The addresses of a target, IPv4 first: engines listen there by default, and a refused first
/// try costs every new connection. Empty when the name does not resolve.
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
