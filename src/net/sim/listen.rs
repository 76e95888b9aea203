//! Addresses that accept, refuse or ignore connects.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

use super::conn::SimConn;
use super::link::{Connect, Link};
use super::world::{Action, World};
use crate::net::Address;

/// The way an address handles connects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ConnectBehaviour {
    /// Connects succeed, after a random time up to the `delay_max` of [`SimListener::on_connect`].
    #[default]
    Accept,
    /// Connects fail with `ConnectionRefused`, after a random time up to the `delay_max` of
    /// [`SimListener::on_connect`].
    Refuse,
    /// Connects never finish.
    Hang,
    /// The call to [`Net::connect`](crate::net::Net::connect) itself fails with this error.
    Fail(io::ErrorKind),
}

/// The listening state of one address: its accept queue and its handling of new connects.
#[derive(Default)]
struct Place {
    greeting: Cell<ConnectBehaviour>,
    delay_max: Cell<Duration>,
    waiting: RefCell<VecDeque<SimConn>>,
    waker: RefCell<Option<Waker>>,
}

/// All addresses with a listener.
#[derive(Default)]
pub(super) struct Listeners {
    places: RefCell<BTreeMap<Address, Rc<Place>>>,
}

/// A connect that will finish at a scheduled time.
pub(super) struct Arrival {
    place: Rc<Place>,
    outcome: Connect,
    client: Rc<RefCell<Link>>,
    server: Option<SimConn>,
}

impl Arrival {
    pub(super) fn happen(self, world: &World) {
        if self.client.borrow().is_closed(0) {
            return;
        }
        self.client.borrow_mut().connected(world, self.outcome);
        let Some(server) = self.server else {
            return;
        };
        self.place.waiting.borrow_mut().push_back(server);
        let waker = self.place.waker.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Listeners {
    /// Returns how connects to `address` are handled. Without a listener they are refused.
    pub(super) fn greeting(&self, address: &Address) -> ConnectBehaviour {
        let places = self.places.borrow();
        places
            .get(address)
            .map_or(ConnectBehaviour::Refuse, |place| place.greeting.get())
    }

    /// Schedules the result of a connect to `address`, unless the address lets connects hang.
    /// `client` is the link of the new connection, and `server` creates its accepting end if the
    /// connect will succeed.
    pub(super) fn begin(
        &self,
        world: &World,
        address: &Address,
        client: &Rc<RefCell<Link>>,
        server: impl FnOnce() -> SimConn,
    ) {
        let place = self.places.borrow().get(address).cloned();
        let place = place.unwrap_or_default();
        let outcome = match self.greeting(address) {
            ConnectBehaviour::Accept => Connect::Established,
            ConnectBehaviour::Refuse | ConnectBehaviour::Fail(_) => Connect::Failed,
            ConnectBehaviour::Hang => return,
        };
        let at = world.now() + world.below_duration(place.delay_max.get());
        let arrival = Arrival {
            place,
            outcome,
            client: Rc::clone(client),
            server: (outcome == Connect::Established).then(server),
        };
        world.push(at, Action::Arrive(arrival));
    }

    pub(super) fn listen(&self, address: Address) -> SimListener {
        let place = Rc::<Place>::default();
        self.places.borrow_mut().insert(address, Rc::clone(&place));
        SimListener { place }
    }

    pub(super) fn clear(&self) {
        let places = std::mem::take(&mut *self.places.borrow_mut());
        for place in places.into_values() {
            let waiting = std::mem::take(&mut *place.waiting.borrow_mut());
            drop(waiting);
        }
    }
}

/// An address on which a scripted peer listens until the simulation ends.
#[derive(Clone)]
pub struct SimListener {
    place: Rc<Place>,
}

impl std::fmt::Debug for SimListener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimListener")
            .field("greeting", &self.place.greeting.get())
            .finish_non_exhaustive()
    }
}

impl SimListener {
    /// Sets how later connects are handled, and the maximum virtual time until their result.
    pub fn on_connect(&self, greeting: ConnectBehaviour, delay_max: Duration) {
        self.place.greeting.set(greeting);
        self.place.delay_max.set(delay_max);
    }

    /// Waits until a connection has been established to this address, and returns its accepting
    /// end.
    pub async fn accept(&self) -> SimConn {
        poll_fn(|cx| {
            if let Some(conn) = self.place.waiting.borrow_mut().pop_front() {
                return Poll::Ready(conn);
            }
            *self.place.waker.borrow_mut() = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }
}
