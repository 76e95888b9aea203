//! Calls to engines: connections and their pools, name look-ups, requests, responses and tasks.
//!
//! `Upstreams` has what one shard needs for them. A call runs in a `Scope`, its exchange or a
//! separate task, which ends the call's waits when the call is no longer needed. This module uses
//! nothing of `proxy`: a client appears only as the fields of its request and as the reason why a
//! wait ended.

mod addresses;
mod attempts;
mod buffers;
mod call;
mod connection;
mod dial;
mod engine;
mod error;
mod head;
mod pool;
mod request;
mod response;
mod scope;
mod task;
mod trouble;
mod upstreams;
mod wait;

pub use addresses::{NamedBy, Resolved, Resolver};
pub(crate) use attempts::{Attempts, Ended, Limits, Next, Reuse};
pub(crate) use buffers::Buffers;
pub(crate) use call::{Call, CallEnd, Deadlines};
pub(crate) use connection::{CleanEnd, Connection};
pub(crate) use error::CallError;
pub(crate) use head::{Forwarded, HeadWriter};
pub(crate) use response::Response;
pub(crate) use scope::{Scope, Stage};
pub(crate) use task::{CallTask, LegTask, OwnedCall, TaskContext};
pub(crate) use upstreams::{IsOwn, TaskGuard, UpstreamDeps, Upstreams, any_known};
pub use upstreams::{OnEngineLost, OnSocketFailed, SecureUpstream};
pub(crate) use wait::{Deadline, Timeout, Waited};
