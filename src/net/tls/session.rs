//! One side of a TLS session that works on buffers of the caller: records in, records out, no
//! socket.
//!
//! This is rustls without its buffers (its *unbuffered* interface). Received records are decrypted
//! in place, and records to send are written directly to the send buffer, so an idle session holds
//! its keys and no buffers.

use std::sync::Arc;

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::pki_types::ServerName;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{
    ConnectionState, EncodeError, UnbufferedConnectionCommon, UnbufferedStatus, WriteTraffic,
};
use rustls::{ClientConfig, Error, ServerConfig};

/// Upper bound on the bytes that a record adds to its payload (header, nonce, tag, padding byte),
/// plus room for a record that the session itself must send first (a key update).
const RECORD_EXTRA_BYTES: usize = 512;
/// Maximum payload of a record (RFC 8446, section 5.1).
const RECORD_BYTES_MAX: usize = 16 * 1024;

/// One side of a TLS session.
pub(super) enum Session {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
    /// rustls could not create the session. Every [`Session::process`] returns the error `why`.
    None {
        is_server: bool,
        why: Error,
    },
}

/// Operation to perform once [`Session::process`] has processed the received records.
#[derive(Clone, Copy)]
pub(super) enum Operation<'a> {
    Nothing,
    /// Encrypts these plaintext bytes into records for the peer.
    Encrypt(&'a [u8]),
    /// Encodes a `close_notify` alert for the peer.
    CloseNotify,
}

/// The result of one [`Session::process`].
#[derive(Debug, Default)]
pub(super) struct Processed {
    /// Number of bytes at the start of the argument `received` that were processed. The others must
    /// be passed again in the next call, followed by more.
    pub(super) used: usize,
    /// Whether the peer has sent a `close_notify`.
    pub(super) is_ended: bool,
    /// The error that ended the session. The alert for the peer, if there is one, has been appended
    /// to the argument `out`.
    pub(super) error: Option<Error>,
    /// Whether the requested [`Operation`] was performed. `false` during the handshake, after an
    /// error, and for [`Operation::Nothing`].
    pub(super) is_performed: bool,
}

impl Session {
    pub(super) fn client(config: Arc<ClientConfig>, name: ServerName<'static>) -> Self {
        match UnbufferedClientConnection::new(config, name) {
            Ok(session) => Self::Client(Box::new(session)),
            Err(why) => Self::None {
                is_server: false,
                why,
            },
        }
    }

    pub(super) fn server(config: Arc<ServerConfig>) -> Self {
        match UnbufferedServerConnection::new(config) {
            Ok(session) => Self::Server(Box::new(session)),
            Err(why) => Self::None {
                is_server: true,
                why,
            },
        }
    }

    pub(super) const fn is_server(&self) -> bool {
        matches!(
            self,
            Self::Server(_)
                | Self::None {
                    is_server: true,
                    ..
                }
        )
    }

    pub(super) fn is_handshaking(&self) -> bool {
        match self {
            Self::Client(session) => session.is_handshaking(),
            Self::Server(session) => session.is_handshaking(),
            Self::None { .. } => true,
        }
    }

    /// Processes every complete record in `received`. Decrypted bytes are appended to `plain`,
    /// records for the peer to `out`. `operation` is performed if the handshake has progressed far
    /// enough to encrypt application bytes.
    pub(super) fn process(
        &mut self,
        received: &mut [u8],
        plain: &mut Vec<u8>,
        out: &mut Vec<u8>,
        operation: Operation<'_>,
    ) -> Processed {
        let mut run = Run {
            received,
            plain,
            out,
            operation,
            done: Processed::default(),
        };
        match self {
            Self::Client(session) => {
                run.all(
                    session,
                    UnbufferedConnectionCommon::<ClientConnectionData>::process_tls_records,
                );
            }
            Self::Server(session) => {
                run.all(
                    session,
                    UnbufferedConnectionCommon::<ServerConnectionData>::process_tls_records,
                );
            }
            Self::None { why, .. } => run.done.error = Some(why.clone()),
        }
        run.done
    }
}

/// The `process_tls_records` method of a client or server session.
type Process<D> = for<'c, 'i> fn(
    &'c mut UnbufferedConnectionCommon<D>,
    &'i mut [u8],
) -> UnbufferedStatus<'c, 'i, D>;

struct Run<'a> {
    received: &'a mut [u8],
    plain: &'a mut Vec<u8>,
    out: &'a mut Vec<u8>,
    operation: Operation<'a>,
    done: Processed,
}

/// Whether to call `process_tls_records` again.
#[derive(PartialEq, Eq)]
enum More {
    Yes,
    No,
}

impl Run<'_> {
    fn all<D>(&mut self, session: &mut UnbufferedConnectionCommon<D>, process: Process<D>) {
        loop {
            let UnbufferedStatus {
                mut discard, state, ..
            } = process(session, &mut self.received[self.done.used..]);
            let more = match state {
                Ok(state) => step(
                    state,
                    &mut discard,
                    self.plain,
                    self.out,
                    self.operation,
                    &mut self.done,
                ),
                Err(error) => {
                    self.done.error = Some(error);
                    More::No
                }
            };
            self.done.used += discard;
            if more == More::No {
                break;
            }
        }
        if self.done.error.is_some() {
            self.append_alert(session, process);
        }
    }

    /// Appends to `out` the alert that reports the session's error to the peer, if there is one.
    /// Processes no received bytes.
    fn append_alert<D>(
        &mut self,
        session: &mut UnbufferedConnectionCommon<D>,
        process: Process<D>,
    ) {
        while session.wants_write() {
            let Ok(state) = process(session, &mut []).state else {
                return;
            };
            let more = step(
                state,
                &mut 0,
                self.plain,
                self.out,
                Operation::Nothing,
                &mut self.done,
            );
            if more == More::No {
                return;
            }
        }
    }
}

fn step<D>(
    state: ConnectionState<'_, '_, D>,
    discard: &mut usize,
    plain: &mut Vec<u8>,
    out: &mut Vec<u8>,
    operation: Operation<'_>,
    done: &mut Processed,
) -> More {
    match state {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                match record {
                    Ok(record) => {
                        *discard += record.discard;
                        plain.extend_from_slice(record.payload);
                    }
                    Err(error) => {
                        done.error = Some(error);
                        return More::No;
                    }
                }
            }
            More::Yes
        }
        ConnectionState::EncodeTlsData(mut data) => {
            let start = out.len();
            let mut size = RECORD_EXTRA_BYTES;
            loop {
                out.resize(start + size, 0);
                match data.encode(&mut out[start..]) {
                    Ok(written) => {
                        out.truncate(start + written);
                        return More::Yes;
                    }
                    Err(EncodeError::InsufficientSize(wanted)) if wanted.required_size > size => {
                        size = wanted.required_size;
                    }
                    Err(_) => {
                        out.truncate(start);
                        done.error = Some(Error::General("a record was encoded twice".into()));
                        return More::No;
                    }
                }
            }
        }
        ConnectionState::TransmitTlsData(data) => {
            // The records are in `out`, which is sent before any later record.
            data.done();
            More::Yes
        }
        ConnectionState::PeerClosed => {
            done.is_ended = true;
            More::Yes
        }
        ConnectionState::WriteTraffic(traffic) => {
            if done.error.is_none() {
                perform(traffic, operation, out, done);
            }
            More::No
        }
        ConnectionState::BlockedHandshake | ConnectionState::Closed => More::No,
        // Early data is never enabled.
        _ => {
            done.error = Some(Error::General("an unknown state of the session".into()));
            More::No
        }
    }
}

fn perform<D>(
    mut traffic: WriteTraffic<'_, D>,
    operation: Operation<'_>,
    out: &mut Vec<u8>,
    done: &mut Processed,
) {
    let start = out.len();
    let bytes = match operation {
        Operation::Nothing => return,
        Operation::Encrypt(bytes) => bytes,
        Operation::CloseNotify => &[],
    };
    let records = bytes.len().div_ceil(RECORD_BYTES_MAX).max(1);
    out.resize(start + bytes.len() + records * RECORD_EXTRA_BYTES, 0);
    let written = match operation {
        Operation::CloseNotify => traffic.queue_close_notify(&mut out[start..]),
        Operation::Nothing | Operation::Encrypt(_) => traffic.encrypt(bytes, &mut out[start..]),
    };
    match written {
        Ok(written) => {
            out.truncate(start + written);
            done.is_performed = true;
        }
        Err(error) => {
            out.truncate(start);
            done.error = Some(Error::General(error.to_string()));
        }
    }
}
