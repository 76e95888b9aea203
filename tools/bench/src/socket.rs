//! System calls of the measuring client: non-blocking TCP, readiness and a timer.
//!
//! An event loop from a library would add its own work between the arrival of a byte and its
//! timestamp. Here the timestamp is taken immediately after the receive.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::limits::EVENTS_PER_WAKE_MAX;

/// Starts a connect. The socket becomes writable when the connect has finished; see [`connected`].
///
/// # Errors
/// Errors that the kernel reports immediately.
pub fn connect(addr: &SocketAddr) -> io::Result<OwnedFd> {
    begin(open(addr)?, addr)
}

fn open(addr: &SocketAddr) -> io::Result<OwnedFd> {
    let family = match addr {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_tcp_nodelay(&socket, true)?;
    Ok(socket)
}

fn begin(socket: OwnedFd, addr: &SocketAddr) -> io::Result<OwnedFd> {
    match rustix::net::connect(&socket, addr) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error.into()),
    }
}

/// Like [`connect`], with a receive buffer of about `buffer_bytes`, so that unread data soon fills
/// the peer's buffers.
///
/// # Errors
/// Errors that the kernel reports immediately.
pub fn connect_narrow(addr: &SocketAddr, buffer_bytes: usize) -> io::Result<OwnedFd> {
    // Set before the connect, because TCP does not shrink a window that it has advertised.
    let socket = open(addr)?;
    sockopt::set_socket_recv_buffer_size(&socket, buffer_bytes)?;
    begin(socket, addr)
}

/// Closes a connection with a reset (RST) instead of an orderly end (FIN).
///
/// # Errors
/// Errors that the kernel reports.
pub fn reset(socket: OwnedFd) -> io::Result<()> {
    Ok(sockopt::set_socket_linger(&socket, Some(Duration::ZERO))?)
}

/// Returns the result of a finished connect.
///
/// # Errors
/// If the connect failed.
pub fn connected(socket: &OwnedFd) -> io::Result<()> {
    Ok(sockopt::socket_error(socket)??)
}

/// Creates a listening socket whose queue holds `backlog` connections.
///
/// # Errors
/// Errors that the kernel reports, for example if the address is in use.
pub fn listen(addr: &SocketAddr, backlog: i32) -> io::Result<OwnedFd> {
    let socket = open(addr)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, addr)?;
    rustix::net::listen(&socket, backlog)?;
    Ok(socket)
}

/// Accepts a connection without blocking; `None` if none is waiting.
///
/// # Errors
/// Errors that the kernel reports.
pub fn accept(listener: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    match rustix::net::accept_with(listener, flags) {
        Ok(socket) => {
            sockopt::set_tcp_nodelay(&socket, true)?;
            Ok(Some(socket))
        }
        Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Returns the time of `CLOCK_MONOTONIC` in nanoseconds.
#[must_use]
pub fn monotonic_ns() -> u64 {
    // The kernel's clock is never negative.
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// The result of a receive.
#[derive(Debug)]
pub enum Received {
    /// Number of bytes received.
    Bytes(usize),
    /// No bytes are available yet.
    Nothing,
    /// The peer has closed its sending side.
    End,
    /// The connection failed.
    Failed(io::Error),
}

/// Receives available bytes without blocking.
pub fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Received {
    match rustix::net::recv(socket, buffer, RecvFlags::DONTWAIT) {
        Ok((0, _)) => Received::End,
        Ok((len, _)) => Received::Bytes(len),
        Err(Errno::AGAIN | Errno::INTR) => Received::Nothing,
        Err(error) => Received::Failed(error.into()),
    }
}

/// Sends as many bytes as the socket accepts without blocking and returns their number, possibly 0.
///
/// # Errors
/// If the connection has failed.
pub fn send(socket: &OwnedFd, bytes: &[u8]) -> io::Result<usize> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match rustix::net::send(socket, bytes, flags) {
        Ok(len) => Ok(len),
        Err(Errno::AGAIN | Errno::INTR) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

/// Events that a socket is watched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Reports the socket when there are bytes to receive or the stream has ended.
    Readable,
    /// Reports the socket when a connect has finished, there is room to send, or there are bytes to
    /// receive.
    Both,
    /// Reports the socket when there is room to send.
    Writable,
    /// Reports the socket only when the connection has failed, which epoll always reports.
    Failure,
}

impl Watch {
    fn flags(self) -> EventFlags {
        match self {
            Self::Readable => EventFlags::IN,
            Self::Both => EventFlags::IN | EventFlags::OUT,
            Self::Writable => EventFlags::OUT,
            Self::Failure => EventFlags::empty(),
        }
    }
}

/// The number that identifies the timer in epoll events.
const TIMER: u64 = u64::MAX;

/// An epoll instance, which watches sockets, and a timer.
pub struct Poll {
    epoll: OwnedFd,
    timer: OwnedFd,
    events: Vec<epoll::Event>,
}

impl fmt::Debug for Poll {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Poll").finish_non_exhaustive()
    }
}

impl Poll {
    /// Creates an instance that watches only its timer.
    ///
    /// # Errors
    /// Errors that the kernel reports.
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        epoll::add(&epoll, &timer, EventData::new_u64(TIMER), EventFlags::IN)?;
        Ok(Self {
            epoll,
            timer,
            events: Vec::with_capacity(EVENTS_PER_WAKE_MAX),
        })
    }

    /// Watches a socket until it is closed. [`Poll::wait`] reports it as `number`.
    ///
    /// # Errors
    /// Errors that the kernel reports.
    pub fn add(&self, socket: impl AsFd, number: usize, watch: Watch) -> io::Result<()> {
        let data = EventData::new_u64(number as u64);
        Ok(epoll::add(&self.epoll, socket, data, watch.flags())?)
    }

    /// Changes the events that a socket is watched for.
    ///
    /// # Errors
    /// Errors that the kernel reports.
    pub fn change(&self, socket: impl AsFd, number: usize, watch: Watch) -> io::Result<()> {
        let data = EventData::new_u64(number as u64);
        Ok(epoll::modify(&self.epoll, socket, data, watch.flags())?)
    }

    /// Wakes [`Poll::wait`] after `time`. This uses a separate timer, because the timeout of a wait
    /// is rounded to milliseconds.
    ///
    /// # Errors
    /// Errors that the kernel reports.
    pub fn wake_after(&self, time: Duration) -> io::Result<()> {
        // Zero would disarm the timer.
        let time = time.max(Duration::from_nanos(1));
        let spec = Itimerspec {
            it_interval: timespec(Duration::ZERO),
            it_value: timespec(time),
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec)?;
        Ok(())
    }

    /// Waits until a socket is ready or the timer expires, but for at most `time_max`. Appends the
    /// numbers of the ready sockets to `ready`.
    ///
    /// # Errors
    /// Errors that the kernel reports.
    pub fn wait(&mut self, time_max: Duration, ready: &mut Vec<usize>) -> io::Result<()> {
        self.events.clear();
        let time_max = timespec(time_max);
        let buffer = rustix::buffer::spare_capacity(&mut self.events);
        match epoll::wait(&self.epoll, buffer, Some(&time_max)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in &self.events {
            let number = event.data.u64();
            if number == TIMER {
                // Reading clears its readiness. The number of expirations does not matter.
                let _ = rustix::io::read(&self.timer, &mut [0; 8]);
            } else {
                ready.push(usize::try_from(number).unwrap_or(usize::MAX));
            }
        }
        Ok(())
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(time.subsec_nanos()),
    }
}
