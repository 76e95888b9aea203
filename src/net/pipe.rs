//! Pipes that move bytes from socket to socket within the kernel.
//!
//! The bytes are not copied to user space, which costs less CPU for bodies of 2 MiB or more
//! (figures at `limits::SPLICE_BYTES_MIN`).
//!
//! Uses the system call `splice(2)` when a socket is ready, not io_uring's splice operation: that
//! one always runs on a worker thread, which competes with the shard for its CPU.

use std::cell::RefCell;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags};

use super::socket::Left;
use crate::limits::{PIPE_BYTES, PIPES_IDLE_MAX, PIPES_MAX};

/// Number of pipes open in this process.
static OPEN: AtomicUsize = AtomicUsize::new(0);

/// A pipe borrowed from its shard. Dropping it returns it to the shard's idle pipes, or closes it
/// if bytes are left in it or there are enough idle pipes.
#[derive(Debug)]
pub struct Pipe {
    ends: Option<Ends>,
    held: usize,
    idle: Rc<RefCell<Vec<Ends>>>,
}

/// Both ends of a pipe, closed together.
#[derive(Debug)]
struct Ends {
    out: OwnedFd,
    into: OwnedFd,
}

impl Ends {
    /// Opens a pipe with a capacity of [`PIPE_BYTES`]. Returns `None` if the process already has
    /// [`PIPES_MAX`] pipes, or the kernel refuses another pipe or that capacity
    /// (`pipe-user-pages-soft`).
    fn open() -> Option<Self> {
        let reserve = |open: usize| (open < PIPES_MAX).then_some(open + 1);
        OPEN.fetch_update(Ordering::Relaxed, Ordering::Relaxed, reserve)
            .ok()?;
        let opened = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK);
        let Ok((out, into)) = opened else {
            OPEN.fetch_sub(1, Ordering::Relaxed);
            return None;
        };
        let ends = Self { out, into };
        let size = rustix::pipe::fcntl_setpipe_size(&ends.into, PIPE_BYTES);
        size.is_ok_and(|size| size >= PIPE_BYTES).then_some(ends)
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        OPEN.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The idle pipes of one shard.
#[derive(Clone, Debug, Default)]
pub(super) struct Pipes {
    idle: Rc<RefCell<Vec<Ends>>>,
}

impl Pipes {
    /// Returns an empty pipe: an idle one, otherwise a new one. Returns `None` if no more may be
    /// opened and the caller should copy the body instead.
    pub(super) fn take(&self) -> Option<Pipe> {
        let idle = self.idle.borrow_mut().pop();
        let ends = idle.or_else(Ends::open)?;
        Some(Pipe {
            ends: Some(ends),
            held: 0,
            idle: Rc::clone(&self.idle),
        })
    }
}

impl Pipe {
    /// Returns the number of bytes in the pipe.
    #[must_use]
    pub const fn held(&self) -> usize {
        self.held
    }

    /// Moves at most `bytes_max` bytes from the socket's receive buffer into the pipe, which must
    /// be empty. Returns whether the socket may have more, and the number of bytes (0 is the end of
    /// the stream).
    ///
    /// The kernel returns the same error for a full pipe and for an empty socket. Because the pipe
    /// is empty, the error can only mean that the socket is empty.
    pub(super) fn fill(
        &mut self,
        from: BorrowedFd<'_>,
        bytes_max: usize,
    ) -> (Left, io::Result<usize>) {
        debug_assert!(
            self.held == 0 && bytes_max > 0,
            "with bytes in the pipe or nothing to move, the result would be ambiguous"
        );
        let Some(ends) = &self.ends else {
            return (Left::Ready, Err(Errno::BADF.into()));
        };
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        let wanted = bytes_max.min(PIPE_BYTES);
        let moved = rustix::pipe::splice(from, None, &ends.into, None, wanted, flags);
        if let Ok(n) = moved {
            self.held = n;
        }
        // A short count does not mean that the socket is empty: the pipe also limits the number of
        // page fragments it can hold.
        (left(moved), moved.map_err(io::Error::from))
    }

    /// Moves as many bytes as the socket accepts out of the pipe, which must not be empty. Returns
    /// whether the socket may accept more, and the number of bytes.
    pub(super) fn drain(&mut self, to: BorrowedFd<'_>) -> (Left, io::Result<usize>) {
        debug_assert!(self.held > 0, "an empty pipe has nothing to send");
        let Some(ends) = &self.ends else {
            return (Left::Ready, Err(Errno::BADF.into()));
        };
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        let moved = rustix::pipe::splice(&ends.out, None, to, None, self.held, flags);
        if let Ok(n) = moved {
            self.held -= n;
        }
        (left(moved), moved.map_err(io::Error::from))
    }
}

fn left(moved: rustix::io::Result<usize>) -> Left {
    if moved == Err(Errno::WOULDBLOCK) {
        Left::Exhausted
    } else {
        Left::Ready
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        let Some(ends) = self.ends.take() else {
            return;
        };
        let mut idle = self.idle.borrow_mut();
        if self.held == 0 && idle.len() < PIPES_IDLE_MAX {
            idle.push(ends);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        near.set_nonblocking(true).unwrap();
        (near, far)
    }

    #[test]
    fn bytes_pass_and_a_pipe_with_bytes_left_is_not_reused() {
        let pipes = Pipes::default();
        let mut pipe = pipes.take().unwrap();
        let ((from, mut client), (to, mut engine)) = (pair(), pair());
        assert_eq!(pipe.fill(from.as_fd(), 100).0, Left::Exhausted);
        client.write_all(b"abcdefgh").unwrap();
        assert_eq!(pipe.fill(from.as_fd(), 5).1.unwrap(), 5);
        assert_eq!((pipe.drain(to.as_fd()).1.unwrap(), pipe.held()), (5, 0));
        let mut got = [0; 5];
        engine.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"abcde");
        drop(pipe);
        assert_eq!(pipes.idle.borrow().len(), 1);
        let mut pipe = pipes.take().unwrap();
        assert_eq!(pipe.fill(from.as_fd(), 100).1.unwrap(), 3);
        drop(pipe);
        assert!(pipes.idle.borrow().is_empty(), "three bytes are left in it");
        drop(client);
        let mut pipe = pipes.take().unwrap();
        assert_eq!(pipe.fill(from.as_fd(), 100).1.unwrap(), 0);
    }

    #[test]
    fn the_number_of_pipes_is_limited() {
        let pipes = Pipes::default();
        let lent: Vec<_> = std::iter::from_fn(|| pipes.take())
            .take(PIPES_MAX + 1)
            .collect();
        assert!(lent.len() <= PIPES_MAX);
        drop(lent);
        assert!(pipes.idle.borrow().len() <= PIPES_IDLE_MAX);
    }
}
