//! One side of a TLS session over buffers of the caller: records in, records out, no socket.
//!
//! The state of rustls without its buffers (its *unbuffered* interface): received records are
//! decrypted where they lie and records to be sent are written where they are to be sent from, so
//! a session that is idle holds its keys and nothing else.

use std::sync::Arc;

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::pki_types::ServerName;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{
    ConnectionState, EncodeError, UnbufferedConnectionCommon, UnbufferedStatus, WriteTraffic,
};
use rustls::{ClientConfig, Error, ServerConfig};

/// What a record may add to its payload: header, nonce, tag, padding byte; and room for what the
/// session itself has to say first (a key update).
const RECORD_EXTRA_BYTES: usize = 512;
/// Payload of a record at most (RFC 8446 5.1).
const RECORD_BYTES_MAX: usize = 16 * 1024;

/// One side of a session.
pub(super) enum Session {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
    /// None could be begun; the first use says why.
    None {
        is_server: bool,
        why: Error,
    },
}

/// What is to be done once received records are processed.
#[derive(Clone, Copy)]
pub(super) enum Wish<'a> {
    Nothing,
    /// Encrypts this.
    Encrypt(&'a [u8]),
    /// Says that nothing more will be sent.
    CloseNotify,
}

/// What processing came to.
#[derive(Debug, Default)]
pub(super) struct Processed {
    /// Bytes at the front of the received ones that are done with.
    pub(super) used: usize,
    /// The peer has said that it will send no more.
    pub(super) is_ended: bool,
    /// The session is of no use any more; what `out` holds says so to the peer.
    pub(super) error: Option<Error>,
    /// The wish was granted.
    pub(super) is_granted: bool,
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

    /// Processes every whole record of `received`: payload goes to the end of `plain`, records for
    /// the peer to the end of `out`. A wish is granted when the handshake allows it.
    pub(super) fn process(
        &mut self,
        received: &mut [u8],
        plain: &mut Vec<u8>,
        out: &mut Vec<u8>,
        wish: Wish<'_>,
    ) -> Processed {
        let mut run = Run {
            received,
            plain,
            out,
            wish,
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

/// The one call there is, of either side.
type Process<D> = for<'c, 'i> fn(
    &'c mut UnbufferedConnectionCommon<D>,
    &'i mut [u8],
) -> UnbufferedStatus<'c, 'i, D>;

struct Run<'a> {
    received: &'a mut [u8],
    plain: &'a mut Vec<u8>,
    out: &'a mut Vec<u8>,
    wish: Wish<'a>,
    done: Processed,
}

/// Whether there is more to do.
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
                    self.wish,
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
            self.last_words(session, process);
        }
    }

    /// Takes the alert that tells the peer of an error, if there is one. No received byte is
    /// looked at again.
    fn last_words<D>(&mut self, session: &mut UnbufferedConnectionCommon<D>, process: Process<D>) {
        while session.wants_write() {
            let Ok(state) = process(session, &mut []).state else {
                return;
            };
            let more = step(
                state,
                &mut 0,
                self.plain,
                self.out,
                Wish::Nothing,
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
    wish: Wish<'_>,
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
            // It is in `out`, which leaves before anything else does.
            data.done();
            More::Yes
        }
        ConnectionState::PeerClosed => {
            done.is_ended = true;
            More::Yes
        }
        ConnectionState::WriteTraffic(traffic) => {
            if done.error.is_none() {
                grant(traffic, wish, out, done);
            }
            More::No
        }
        ConnectionState::BlockedHandshake | ConnectionState::Closed => More::No,
        // Early data is never asked for.
        _ => {
            done.error = Some(Error::General("an unknown state of the session".into()));
            More::No
        }
    }
}

fn grant<D>(
    mut traffic: WriteTraffic<'_, D>,
    wish: Wish<'_>,
    out: &mut Vec<u8>,
    done: &mut Processed,
) {
    let start = out.len();
    let bytes = match wish {
        Wish::Nothing => return,
        Wish::Encrypt(bytes) => bytes,
        Wish::CloseNotify => &[],
    };
    let records = bytes.len().div_ceil(RECORD_BYTES_MAX).max(1);
    out.resize(start + bytes.len() + records * RECORD_EXTRA_BYTES, 0);
    let written = match wish {
        Wish::CloseNotify => traffic.queue_close_notify(&mut out[start..]),
        Wish::Nothing | Wish::Encrypt(_) => traffic.encrypt(bytes, &mut out[start..]),
    };
    match written {
        Ok(written) => {
            out.truncate(start + written);
            done.is_granted = true;
        }
        Err(error) => {
            out.truncate(start);
            done.error = Some(Error::General(error.to_string()));
        }
    }
}
