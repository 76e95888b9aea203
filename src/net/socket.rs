//! System calls on a stream socket. None of them blocks.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType,
};

use super::Address;
use crate::fleet::SocketPath;
use crate::limits::{SEND_BYTES_MAX, SEND_JOINED_BYTES_MAX, SEND_SLICES_MAX};
use crate::sys::set_keepalive;

/// Whether a socket is still ready after a receive or a send, as far as the result of the call
/// shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// Still ready: another call may make progress immediately.
    Ready,
    /// The socket is empty (or full): the caller must wait for readiness before the next call.
    Exhausted,
}

/// Derives from the result of a receive of at most `wanted` bytes whether the socket is still
/// readable.
///
/// A short receive means that the socket is empty. The end of the stream (0) does not: the socket
/// stays readable from then on. `EINTR` cannot happen to a non-blocking call, so there is no retry.
///
/// With TCP urgent data, a receive can be short although the socket is not empty: the kernel stops
/// at the urgent mark, and the bytes after it are noticed only when more arrive. HTTP does not use
/// urgent data, and a peer that sends it delays only its own connection.
fn after_recv(received: rustix::io::Result<usize>, wanted: usize) -> (Left, io::Result<usize>) {
    let empty = match received {
        Ok(n) => n > 0 && n < wanted,
        Err(error) => error == rustix::io::Errno::WOULDBLOCK,
    };
    let left = if empty { Left::Exhausted } else { Left::Ready };
    (left, received.map_err(io::Error::from))
}

fn after_send(sent: rustix::io::Result<usize>, wanted: usize) -> (Left, io::Result<usize>) {
    let full = match sent {
        Ok(n) => n < wanted,
        Err(error) => error == rustix::io::Errno::WOULDBLOCK,
    };
    let left = if full { Left::Exhausted } else { Left::Ready };
    (left, sent.map_err(io::Error::from))
}

pub(super) fn recv(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> (Left, io::Result<usize>) {
    let wanted = buffer.len();
    let received = rustix::net::recv(socket, buffer, RecvFlags::DONTWAIT);
    after_recv(received.map(|(n, _)| n), wanted)
}

/// Receives at most `bytes_max` bytes into the spare capacity of `buffer`, which must not be zero,
/// and appends them.
#[expect(
    unsafe_code,
    reason = "a large body is neither zeroed first nor copied again"
)]
pub(super) fn recv_append(
    socket: BorrowedFd<'_>,
    buffer: &mut Vec<u8>,
    bytes_max: usize,
) -> (Left, io::Result<usize>) {
    let before = buffer.len();
    let spare = buffer.spare_capacity_mut();
    let wanted = bytes_max.min(spare.len());
    debug_assert!(
        wanted > 0,
        "a receive into an empty buffer would look like the end of the stream"
    );
    let spare = &mut spare[..wanted];
    let received = rustix::net::recv(socket, spare, RecvFlags::DONTWAIT);
    let received = received.map(|((filled, _), _)| filled.len());
    let (left, received) = after_recv(received, wanted);
    if let Ok(n) = received {
        // SAFETY: the kernel has just written `n` bytes starting at `before`, within the capacity.
        unsafe { buffer.set_len(before + n) };
    }
    (left, received)
}

/// Returns whether bytes, the end of the stream or an error can be received, without consuming it.
pub(super) fn has_input(socket: BorrowedFd<'_>) -> bool {
    let mut byte = [0_u8; 1];
    let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
    let peeked = rustix::net::recv(socket, &mut byte, flags);
    !matches!(peeked, Err(rustix::io::Errno::WOULDBLOCK))
}

pub(super) fn send(socket: BorrowedFd<'_>, bytes: &[u8]) -> (Left, io::Result<usize>) {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let bytes = &bytes[..bytes.len().min(SEND_BYTES_MAX)];
    after_send(rustix::net::send(socket, bytes, flags), bytes.len())
}

/// Returns the first [`SEND_BYTES_MAX`] bytes of `slices`, of which there are at most
/// [`SEND_SLICES_MAX`].
fn first_slices<'a>(slices: &'a [IoSlice<'_>]) -> ([IoSlice<'a>; SEND_SLICES_MAX], usize) {
    let mut first = [IoSlice::new(&[]); SEND_SLICES_MAX];
    let (mut count, mut room) = (0, SEND_BYTES_MAX);
    for (to, from) in first.iter_mut().zip(slices) {
        *to = IoSlice::new(&from[..from.len().min(room)]);
        room -= to.len();
        count += 1;
        if room == 0 {
            break;
        }
    }
    (first, count)
}

thread_local! {
    /// Buffer of this thread, into which the slices of a small send are copied to send them with
    /// one plain `send`.
    static JOINED: RefCell<[u8; SEND_JOINED_BYTES_MAX]> =
        const { RefCell::new([0; SEND_JOINED_BYTES_MAX]) };
}

pub(super) fn send_vectored(
    socket: BorrowedFd<'_>,
    slices: &[IoSlice<'_>],
) -> (Left, io::Result<usize>) {
    let wanted: usize = slices.iter().map(|slice| slice.len()).sum();
    if wanted > SEND_BYTES_MAX {
        let (first, count) = first_slices(slices);
        return send_slices(socket, &first[..count]);
    }
    if wanted <= SEND_JOINED_BYTES_MAX {
        return JOINED.with_borrow_mut(|joined| {
            let mut at = 0;
            for slice in slices {
                joined[at..at + slice.len()].copy_from_slice(slice);
                at += slice.len();
            }
            send(socket, &joined[..wanted])
        });
    }
    send_slices(socket, slices)
}

fn send_slices(socket: BorrowedFd<'_>, slices: &[IoSlice<'_>]) -> (Left, io::Result<usize>) {
    let wanted = slices.iter().map(|slice| slice.len()).sum();
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let mut control = rustix::net::SendAncillaryBuffer::default();
    after_send(
        rustix::net::sendmsg(socket, slices, &mut control, flags),
        wanted,
    )
}

/// Returns the error with which a connect has failed (`SO_ERROR`), or `Ok` if it has succeeded.
pub(super) fn connected(socket: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::net::sockopt::socket_error(socket)??)
}

/// Closes the sending side of the socket (FIN).
pub(super) fn finish(socket: BorrowedFd<'_>) {
    let _ = rustix::net::shutdown(socket, Shutdown::Write);
}

/// Shuts down both directions. The peer sees the end immediately, even if the descriptor is also
/// open elsewhere (in a duplicate, or in a poll of the io_uring instance).
pub(super) fn end(socket: BorrowedFd<'_>) {
    let _ = rustix::net::shutdown(socket, Shutdown::Both);
}

/// Ends a TCP connection with a RST. Further calls on the socket fail, unlike after [`end`], after
/// which a receive would return the end of the stream.
pub(super) fn reset(socket: BorrowedFd<'_>) {
    let _ = rustix::net::connect_unspec(socket);
}

/// Sets whether closing the socket sends a RST instead of a FIN.
pub(super) fn set_reset_on_close(socket: BorrowedFd<'_>, reset: bool) {
    let linger = reset.then_some(std::time::Duration::ZERO);
    let _ = rustix::net::sockopt::set_socket_linger(socket, linger);
}

/// Starts a non-blocking connect and returns its socket. A TCP connect may still be in progress.
pub(super) fn connect(address: &Address) -> io::Result<OwnedFd> {
    match address {
        Address::Tcp(address) => connect_tcp(address),
        Address::Unix(path) => connect_unix(path),
    }
}

fn connect_tcp(address: &SocketAddr) -> io::Result<OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = stream_socket(family)?;
    rustix::net::sockopt::set_tcp_nodelay(&socket, true)?;
    set_keepalive(&socket)?;
    match rustix::net::connect(&socket, address) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}

/// Connects to a Unix socket. The connect succeeds or fails immediately: if the accept queue is
/// full it fails with `EAGAIN`, never with `EINPROGRESS` (connect(2)). The peer is on this machine
/// and its end is always noticed, so no keep-alive is set.
fn connect_unix(path: &SocketPath) -> io::Result<OwnedFd> {
    let address = match path.abstract_name() {
        Some(name) => SocketAddrUnix::new_abstract_name(name.as_bytes())?,
        None => SocketAddrUnix::new(path.sun_path())?,
    };
    let socket = stream_socket(AddressFamily::UNIX)?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket)
}

fn stream_socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(
        family,
        SocketType::STREAM,
        flags,
        None,
    )?)
}

/// Returns whether a connection is in the accept queue.
pub(super) fn has_pending(listener: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(listener, PollFlags::IN)];
    // An error is found by the accept.
    !matches!(poll(&mut polled, Some(&Timespec::default())), Ok(0))
}

/// An accepted connection that no executor watches yet. Any shard can adopt it.
#[derive(Debug)]
pub struct Accepted {
    pub(super) socket: OwnedFd,
    /// The IP address and port of the peer, if the connection is over IP.
    pub(super) peer: Option<SocketAddr>,
}

/// Accepts the next connection in the accept queue.
pub(super) fn accept(listener: BorrowedFd<'_>) -> io::Result<Accepted> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (socket, address) = rustix::net::acceptfrom_with(listener, flags)?;
    let peer = address.and_then(|any| SocketAddr::try_from(any).ok());
    let peer = peer.map(|at| SocketAddr::new(at.ip().to_canonical(), at.port()));
    Ok(Accepted { socket, peer })
}

/// Reads, and thereby resets, the eight-byte counter of an eventfd or timerfd.
pub(super) fn drain_counter(fd: BorrowedFd<'_>) {
    let mut counter = [0_u8; 8];
    let _ = rustix::io::read(fd, &mut counter);
}
