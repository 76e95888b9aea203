//! Tests of the reactor on real sockets, with both drivers. They check the guarantee that a session
//! relies on: every change of readiness is reported, in any order of events.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::net::{Conn, would_block};
use crate::sys::Silence;

const DRIVERS: [Driver; 2] = [Driver::Uring, Driver::Epoll];

/// Runs `main` on io_uring and on epoll. If the kernel refuses io_uring, only epoll is used and a
/// note is printed; the test does not fail.
fn on_each_driver(busy_poll: Option<Duration>, main: impl AsyncFn(Runtime)) {
    for driver in DRIVERS {
        if driver == Driver::Uring && crate::net::probe::probe_ring().is_err() {
            eprintln!("skipped on io_uring: this kernel refuses it");
            continue;
        }
        run(driver, busy_poll, async |net| main(net).await).unwrap();
    }
}

/// Returns a TCP connection: the end that the reactor watches, and the other end as a blocking
/// stream.
fn pair(net: &Runtime) -> (Socket, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (near, _) = listener.accept().unwrap();
    near.set_nonblocking(true).unwrap();
    (net.adopt(accepted(near)).unwrap(), far)
}

fn accepted(near: TcpStream) -> Accepted {
    let socket = OwnedFd::from(near);
    Accepted { socket, peer: None }
}

async fn readable(conn: &Socket) {
    poll_fn(|cx| conn.poll_readable(cx)).await;
}

async fn writable(conn: &Socket) {
    poll_fn(|cx| conn.poll_writable(cx)).await;
}

/// Receives at least `want` bytes and returns them, or fewer if the stream ends before.
async fn receive(conn: &Socket, want: usize) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = [0; 64];
    while all.len() < want {
        readable(conn).await;
        match conn.try_recv(&mut buffer) {
            Ok(0) => break,
            Ok(n) => all.extend_from_slice(&buffer[..n]),
            Err(error) if would_block(&error) => {}
            Err(error) => panic!("{error}"),
        }
    }
    all
}

#[test]
fn bytes_and_then_the_end_are_reported() {
    on_each_driver(None, async |net| {
        let (conn, mut far) = pair(&net);
        for round in 0..100_u8 {
            far.write_all(&[round; 100]).unwrap();
            assert_eq!(receive(&conn, 100).await, [round; 100]);
        }
        drop(far);
        readable(&conn).await;
        assert_eq!(conn.try_recv(&mut [0; 8]).unwrap(), 0);
        // The end is reported on every later receive too.
        readable(&conn).await;
        assert_eq!(conn.try_recv(&mut [0; 8]).unwrap(), 0);
    });
}

/// The kernel reports the end together with the last bytes, and only once. The short receive of
/// these bytes must therefore not clear read readiness.
#[test]
fn an_end_that_arrives_with_the_last_bytes_is_reported() {
    on_each_driver(None, async |net| {
        for _ in 0..200 {
            let (conn, mut far) = pair(&net);
            far.write_all(b"last words").unwrap();
            drop(far);
            assert_eq!(receive(&conn, 10).await, b"last words");
            readable(&conn).await;
            assert_eq!(conn.try_recv(&mut [0; 8]).unwrap(), 0);
        }
    });
}

#[test]
fn an_end_after_unread_bytes_is_reported() {
    on_each_driver(None, async |net| {
        let (conn, mut far) = pair(&net);
        far.write_all(b"unread").unwrap();
        readable(&conn).await;
        let mut cx = Context::from_waker(Waker::noop());
        assert!(conn.poll_hangup(&mut cx).is_pending());
        drop(far);
        poll_fn(|cx| conn.poll_hangup(cx)).await;
        assert_eq!(receive(&conn, 6).await, b"unread");
    });
}

#[test]
fn room_in_a_full_socket_is_reported() {
    on_each_driver(None, async |net| {
        let (conn, mut far) = pair(&net);
        let bytes = vec![7_u8; 1 << 20];
        for _ in 0..3 {
            let mut sent = 0;
            while let Ok(n) = conn.try_send(&bytes) {
                sent += n;
            }
            let reader = std::thread::spawn(move || {
                let mut all = vec![0; sent];
                far.read_exact(&mut all).unwrap();
                far
            });
            writable(&conn).await;
            assert!(conn.try_send(b"x").is_ok());
            far = reader.join().unwrap();
            far.read_exact(&mut [0]).unwrap();
        }
    });
}

/// A peer has closed its sending side and does not read. Its end is remembered permanently, but a
/// full socket must not look writable because of that.
#[test]
fn a_full_socket_of_a_half_closed_peer_is_not_writable() {
    on_each_driver(None, async |net| {
        let (conn, mut far) = pair(&net);
        far.shutdown(std::net::Shutdown::Write).unwrap();
        poll_fn(|cx| conn.poll_hangup(cx)).await;
        let bytes = vec![7_u8; 1 << 20];
        let mut sent = 0;
        while let Ok(n) = conn.try_send(&bytes) {
            sent += n;
        }
        let mut cx = Context::from_waker(Waker::noop());
        assert!(conn.poll_writable(&mut cx).is_pending());
        let reader = std::thread::spawn(move || {
            far.read_exact(&mut vec![0; sent]).unwrap();
            far
        });
        writable(&conn).await;
        assert!(conn.try_send(b"x").is_ok());
        drop(reader.join().unwrap());
    });
}

#[test]
fn a_loop_that_gives_way_lets_other_tasks_run() {
    on_each_driver(None, async |net| {
        let (conn, mut far) = pair(&net);
        let came = Rc::new(Cell::new(false));
        let record = Rc::clone(&came);
        net.spawn(async move {
            receive(&conn, 1).await;
            record.set(true);
        });
        far.write_all(b"x").unwrap();
        let mut turns = 0;
        while !came.get() {
            net.give_way().await;
            turns += 1;
            assert!(turns < 1_000_000, "the kernel was never polled");
        }
    });
}

#[test]
fn connects_succeed_or_are_refused() {
    on_each_driver(None, async |net| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let conn = net.connect(&address.into()).unwrap();
        writable(&conn).await;
        conn.connected().unwrap();
        drop(listener);
        // Refused either immediately or after the socket becomes writable.
        if let Ok(conn) = net.connect(&address.into()) {
            writable(&conn).await;
            assert!(conn.connected().is_err());
        }
    });
}

#[test]
fn connects_to_unix_sockets_finish_immediately() {
    use crate::fleet::SocketPath;
    use crate::net::would_block;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener};
    on_each_driver(None, async |net| {
        let name = format!("ringside-connects-{}-{}", std::process::id(), net.random());
        let address = Address::Unix(SocketPath::parse(&format!("@{name}")).unwrap());
        let error = |tried: io::Result<Socket>| tried.unwrap_err();
        let refused = error(net.connect(&address));
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        let there = SocketAddr::from_abstract_name(&name).unwrap();
        let listener = UnixListener::bind_addr(&there).unwrap();
        let conn = net.connect(&address).unwrap();
        writable(&conn).await;
        conn.connected().unwrap();
        assert_eq!(conn.peer(), None);
        let (mut far, _) = listener.accept().unwrap();
        far.write_all(b"x").unwrap();
        readable(&conn).await;
        assert_eq!(conn.try_recv(&mut [0; 8]).unwrap(), 1);
        conn.try_send(b"y").unwrap();
        drop(conn);
        let mut heard = Vec::new();
        far.read_to_end(&mut heard).unwrap();
        assert_eq!(heard, b"y");
        // A connect to a full queue fails immediately with `WouldBlock`.
        rustix::net::listen(&listener, 0).unwrap();
        let mut queued = Vec::new();
        let full = loop {
            match net.connect(&address) {
                Ok(conn) => queued.push(conn),
                Err(error) => break error,
            }
        };
        assert!(would_block(&full), "{full}");
        assert!(queued.len() < 8);
        let path = "/nonexistent/ringside.sock";
        let missing = Address::Unix(SocketPath::parse(path).unwrap());
        let missing = error(net.connect(&missing));
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
    });
}

#[test]
fn a_dropped_connection_is_closed_immediately_or_reset_if_requested() {
    on_each_driver(None, async |net| {
        let (conn, mut far) = pair(&net);
        drop(conn);
        assert_eq!(far.read(&mut [0; 8]).unwrap(), 0);
        let (conn, mut far) = pair(&net);
        conn.reset_on_close();
        drop(conn);
        // io_uring releases the socket in its next iteration.
        let timer = net.timer();
        timer.set(net.now(), Some(Duration::from_millis(1)));
        poll_fn(|cx| timer.poll(cx)).await;
        let error = far.read(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    });
}

#[test]
fn aborting_a_connection_wakes_its_waiting_task() {
    on_each_driver(None, async |net| {
        let (conn, far) = pair(&net);
        let conn = Rc::new(conn);
        let other = Rc::clone(&conn);
        net.spawn(async move { other.abort() });
        readable(&conn).await;
        assert_eq!(conn.try_recv(&mut [0; 8]).unwrap(), 0);
        drop(far);
    });
}

/// Entries of the table of watched descriptors are reused, so an event of a dropped connection must
/// not be applied to the next one.
#[test]
fn events_of_a_dropped_connection_do_not_reach_the_next_one() {
    on_each_driver(None, async |net| {
        for round in 0..300_u32 {
            let (first, mut far) = pair(&net);
            far.write_all(b"for the first").unwrap();
            if round % 3 == 0 {
                readable(&first).await;
            }
            drop(first);
            let (second, mut far) = pair(&net);
            let mut cx = Context::from_waker(Waker::noop());
            assert!(second.poll_readable(&mut cx).is_pending());
            far.write_all(&round.to_be_bytes()).unwrap();
            assert_eq!(receive(&second, 4).await, round.to_be_bytes());
        }
        let places = net.inner.watches.borrow().places.len();
        assert!(places < 64, "{places} entries for two connections");
    });
}

#[test]
fn an_event_of_an_earlier_generation_is_ignored() {
    let mut watches = Watches::default();
    let slot = || {
        let (fd, _) = notifier().unwrap();
        Rc::new(Slot::new(fd, Readiness::default(), false))
    };
    let event = |key, is_last| Event {
        key,
        ready: Readiness::READ,
        is_last,
        has_failed: false,
    };
    let old = watches.add(slot());
    watches.forget(old);
    let new = watches.add(slot());
    assert_ne!(old, new);
    assert!(watches.record(event(old, false)).is_none());
    assert!(watches.record(event(old | WRITE_KEY, true)).is_none());
    assert!(matches!(
        watches.record(event(new, false)),
        Some((_, false))
    ));
    // A read watch that ended by itself is armed again; that of a dropped connection frees its
    // entry.
    assert!(matches!(watches.record(event(new, true)), Some((_, true))));
    watches.place(new).unwrap().1.slot = None;
    assert!(watches.record(event(new, true)).is_none());
    assert!(watches.place(new).is_none());
    assert_eq!(watches.free.len(), 1);
}

/// Produces more events at the same time than the completion queue holds, which makes the kernel
/// end multishot polls.
#[test]
fn a_full_completion_queue_loses_no_event() {
    const CONNECTIONS: usize = 5000;
    let _ = crate::sys::raise_nofile();
    on_each_driver(None, async |net| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut pairs = Vec::new();
        for _ in 0..CONNECTIONS {
            let Ok(far) = TcpStream::connect(address) else {
                break;
            };
            let (near, _) = listener.accept().unwrap();
            near.set_nonblocking(true).unwrap();
            pairs.push((net.adopt(accepted(near)).unwrap(), far));
        }
        assert!(pairs.len() > 4096, "only {} pairs of sockets", pairs.len());
        for round in 0..3_u8 {
            for (_, far) in &mut pairs {
                far.write_all(&[round]).unwrap();
            }
            for (conn, _) in &pairs {
                assert_eq!(receive(conn, 1).await, [round]);
            }
        }
    });
}

/// Sends random amounts at random times over many connections, each read in small parts by a
/// separate task. Every byte must arrive, in order, followed by the end of the stream.
#[test]
fn random_streams_arrive_completely() {
    for (seed, busy_poll) in [(1, None), (2, None), (3, Some(Duration::from_micros(50)))] {
        on_each_driver(busy_poll, async |net| {
            let done = Rc::new(Cell::new(0));
            let mut writers = Vec::new();
            for stream in 0..20_u64 {
                let (conn, mut far) = pair(&net);
                let mut random = seed * 1000 + stream;
                writers.push(std::thread::spawn(move || {
                    let mut next = 0_u8;
                    for _ in 0..200 {
                        random = random
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1);
                        let count = usize::try_from(random >> 33).unwrap() % 300;
                        let bytes: Vec<u8> = (0..count)
                            .map(|_| {
                                next = next.wrapping_add(1);
                                next
                            })
                            .collect();
                        far.write_all(&bytes).unwrap();
                        if random.is_multiple_of(7) {
                            std::thread::yield_now();
                        }
                    }
                }));
                let done = Rc::clone(&done);
                net.spawn(async move {
                    let mut want = 0_u8;
                    let mut buffer = [0; 97];
                    loop {
                        readable(&conn).await;
                        let n = match conn.try_recv(&mut buffer) {
                            Ok(0) => break,
                            Ok(n) => n,
                            Err(error) if would_block(&error) => continue,
                            Err(error) => panic!("{error}"),
                        };
                        for &byte in &buffer[..n] {
                            want = want.wrapping_add(1);
                            assert_eq!(byte, want);
                        }
                    }
                    done.set(done.get() + 1);
                });
            }
            let timer = net.timer();
            while done.get() < 20 {
                timer.set(net.now(), Some(Duration::from_millis(10)));
                poll_fn(|cx| timer.poll(cx)).await;
            }
            for writer in writers {
                writer.join().unwrap();
            }
        });
    }
}

/// A task that always has something to read must let the other tasks run.
#[test]
fn a_busy_task_starves_no_other_task() {
    on_each_driver(None, async |net| {
        let (busy, mut far) = pair(&net);
        far.write_all(&[1; 10_000]).unwrap();
        let read = Rc::new(Cell::new(0_u32));
        let count = Rc::clone(&read);
        net.spawn(async move {
            loop {
                readable(&busy).await;
                match busy.try_recv(&mut [0; 1]) {
                    Ok(n) if n > 0 => count.set(count.get() + 1),
                    _ => return,
                }
            }
        });
        let (conn, mut other) = pair(&net);
        other.write_all(b"x").unwrap();
        receive(&conn, 1).await;
        assert!(read.get() < 5000, "{} bytes were read first", read.get());
    });
}

/// Keeps the thread busy for 100 us.
fn spin() {
    let began = std::time::Instant::now();
    while began.elapsed() < Duration::from_micros(100) {
        std::hint::spin_loop();
    }
}

/// Starts 100 tasks that are always runnable, each of which spins and then ends its turn with
/// `end_turn`. Returns a counter of their polls.
fn crowd(net: &Runtime, end_turn: fn()) -> Rc<Cell<u32>> {
    let polls = Rc::new(Cell::new(0_u32));
    for _ in 0..100 {
        let (net_of_task, polls) = (net.clone(), Rc::clone(&polls));
        net.spawn(async move {
            loop {
                polls.set(polls.get() + 1);
                spin();
                end_turn();
                net_of_task.give_way().await;
            }
        });
    }
    polls
}

/// Runs all tasks that are runnable, and polls the kernel.
async fn next_iteration(net: &Runtime) {
    turn::end();
    net.give_way().await;
}

/// Returns how many polls of a crowd there are between an event and the poll of the task that waits
/// for it.
async fn polls_before_an_event(net: &Runtime, polls: &Rc<Cell<u32>>) -> u32 {
    let (conn, mut far) = pair(net);
    let polled_at = Rc::new(Cell::new(None));
    let (record, count) = (Rc::clone(&polled_at), Rc::clone(polls));
    net.spawn(async move {
        receive(&conn, 1).await;
        record.set(Some(count.get()));
    });
    for _ in 0..3 {
        next_iteration(net).await;
    }
    let before = polls.get();
    far.write_all(b"x").unwrap();
    loop {
        if let Some(at) = polled_at.get() {
            return at - before;
        }
        next_iteration(net).await;
    }
}

/// A task that an event woke runs before the many tasks that have used up their turns, or that
/// accept or perform handshakes.
#[test]
fn an_event_is_handled_before_tasks_of_lower_classes() {
    for end_turn in [turn::end as fn(), || {
        turn::set_background();
        turn::end();
    }] {
        on_each_driver(None, async |net| {
            let polls = crowd(&net, end_turn);
            // In the first iteration, their class is not known yet.
            next_iteration(&net).await;
            for _ in 0..10 {
                let between = polls_before_an_event(&net, &polls).await;
                assert!(between <= 10, "{between} polls of other tasks came first");
            }
        });
    }
}

/// Tasks of every class are polled even if there is always a task to poll in each of them.
#[test]
fn no_class_starves() {
    on_each_driver(None, async |net| {
        let bulk = crowd(&net, turn::end);
        let background = crowd(&net, || {
            turn::set_background();
            turn::end();
        });
        next_iteration(&net).await;
        let begun = [bulk.get(), background.get()];
        for _ in 0..300 {
            next_iteration(&net).await;
        }
        let polled = [bulk.get() - begun[0], background.get() - begun[1]];
        assert!(polled.iter().all(|polls| *polls >= 300), "{polled:?}");
    });
}

/// A peer that reads as fast as bytes are sent cannot make one send last.
#[test]
fn one_send_is_bounded() {
    use crate::limits::SEND_BYTES_MAX;
    on_each_driver(None, async |net| {
        let (conn, mut far) = pair(&net);
        let reader = std::thread::spawn(move || io::copy(&mut far, &mut io::sink()));
        let bytes = vec![7_u8; 64 << 20];
        let slices: Vec<_> = bytes.chunks(3 << 20).map(io::IoSlice::new).collect();
        let mut sent = 0;
        while sent < 16 << 20 {
            writable(&conn).await;
            let n = match (sent / 1024) % 2 {
                0 => conn.try_send(&bytes),
                _ => conn.try_send_vectored(&slices),
            };
            match n {
                Ok(n) => {
                    assert!(n <= SEND_BYTES_MAX, "{n} bytes");
                    sent += n;
                }
                Err(error) => assert!(would_block(&error), "{error}"),
            }
        }
        conn.finish();
        assert_eq!(reader.join().unwrap().unwrap(), sent as u64);
    });
}

#[test]
fn a_panic_ends_one_task_and_is_counted() {
    on_each_driver(None, async |net| {
        let panics = Rc::new(Cell::new(0));
        let count = Rc::clone(&panics);
        net.on_panic(move || count.set(count.get() + 1));
        let (conn, mut far) = pair(&net);
        net.spawn(async move {
            readable(&conn).await;
            panic!("meant");
        });
        far.write_all(b"x").unwrap();
        // The panic drops `conn`, which closes it (checked below).
        let (mine, mut other) = pair(&net);
        net.spawn(async move {
            let _ = receive(&mine, 1).await;
            let _ = mine.try_send(b"y");
            drop(mine);
        });
        other.write_all(b"x").unwrap();
        let timer = net.timer();
        while panics.get() == 0 {
            timer.set(net.now(), Some(Duration::from_millis(1)));
            poll_fn(|cx| timer.poll(cx)).await;
        }
        let mut response = [0];
        other.read_exact(&mut response).unwrap();
        assert_eq!((panics.get(), &response), (1, b"y"));
        assert!(matches!(far.read(&mut [0; 8]), Ok(0) | Err(_)));
    });
}

#[test]
fn a_panic_in_a_vital_task_ends_the_thread() {
    let ran = std::panic::catch_unwind(|| {
        run(Driver::Epoll, None, async |net: Runtime| {
            net.spawn_vital(async { panic!("meant") });
            std::future::pending::<()>().await;
        })
    });
    assert!(ran.is_err());
}

#[test]
fn tasks_and_their_connections_are_dropped_when_run_returns() {
    static DROPPED: AtomicU32 = AtomicU32::new(0);
    struct Note(Runtime);
    impl Drop for Note {
        fn drop(&mut self) {
            DROPPED.fetch_add(1, Ordering::Relaxed);
            // A task that is spawned while the run ends must be dropped: neither run nor leaked.
            self.0.spawn(std::future::pending());
        }
    }
    let far = RefCell::new(Vec::new());
    on_each_driver(None, async |net| {
        for _ in 0..10 {
            let (conn, other) = pair(&net);
            far.borrow_mut().push(other);
            let record = Note(net.clone());
            net.spawn(async move {
                let _note = record;
                readable(&conn).await;
            });
        }
    });
    let mut far = far.into_inner();
    assert_eq!(DROPPED.load(Ordering::Relaxed) as usize, far.len());
    for other in &mut far {
        assert!(matches!(other.read(&mut [0; 8]), Ok(0) | Err(_)));
    }
}

#[test]
fn a_notification_from_another_thread_wakes_the_shard() {
    on_each_driver(None, async |net| {
        let (receiver, notifier) = net.notifier().unwrap();
        for _ in 0..100 {
            let notifier = notifier.clone();
            let notifies = std::thread::spawn(move || notifier.notify());
            receiver.notified().await;
            notifies.join().unwrap();
        }
        notifier.notify();
        notifier.notify();
        receiver.notified().await;
        let mut again = pin!(receiver.notified());
        let mut cx = Context::from_waker(Waker::noop());
        assert!(again.as_mut().poll(&mut cx).is_pending());
    });
}

/// Timers must fire while the thread polls for events without sleeping.
#[test]
fn busy_polling_meets_deadlines() {
    on_each_driver(Some(Duration::from_secs(1)), async |net| {
        let timer = net.timer();
        for _ in 0..5 {
            timer.set(net.now(), Some(Duration::from_millis(20)));
            poll_fn(|cx| timer.poll(cx)).await;
        }
    });
}

#[test]
fn a_listener_accepts_every_queued_connection() {
    on_each_driver(None, async |net| {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        let address = socket.local_addr().unwrap();
        let listener = net.listener(socket).unwrap();
        let clients: Vec<_> = (0..20)
            .map(|_| TcpStream::connect(address).unwrap())
            .collect();
        let mut taken = Vec::new();
        while taken.len() < clients.len() {
            listener.readable().await;
            // Accept one connection at a time: no new event is reported for those left in the
            // queue.
            match listener.try_accept() {
                Ok(conn) => taken.push(conn),
                Err(error) => assert!(would_block(&error), "{error}"),
            }
        }
    });
}

/// Makes a socket discard every segment that arrives, so that its peer sees it vanish.
fn discard_all(socket: &TcpStream) {
    let mut instruction = libc::sock_filter {
        code: 0x06, // Return the number of bytes that pass (BPF_RET | BPF_K).
        jt: 0,
        jf: 0,
        k: 0,
    };
    let program = libc::sock_fprog {
        len: 1,
        filter: &raw mut instruction,
    };
    let len = libc::socklen_t::try_from(size_of_val(&program)).unwrap();
    #[expect(unsafe_code, reason = "no safe wrapper of this option")]
    // SAFETY: the kernel reads `len` bytes of `program`, and the instruction that it points to.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            len,
        )
    };
    assert_eq!(result, 0);
}

#[test]
fn a_connection_whose_peer_has_vanished_is_reset() {
    let least = Silence { tries: 1, ms: 1 };
    on_each_driver(None, async |net| {
        let (idle, _idle_far) = pair(&net);
        // More than are checked together.
        let _others: Vec<_> = (0..200).map(|_| pair(&net)).collect();
        let (full, _full_far) = pair(&net);
        // The peer reads nothing, so bytes are left that cannot be sent.
        while full.try_send(&[0; 64 * 1024]).is_ok() {}
        let (lost, lost_far) = pair(&net);
        discard_all(&lost_far);
        lost.try_send(b"token").unwrap();
        let (timer, mut count) = (net.timer(), 0);
        while count == 0 {
            timer.set(net.now(), Some(Duration::from_millis(10)));
            poll_fn(|cx| timer.poll(cx)).await;
            count = net.reset_vanished(least).await;
        }
        assert_eq!(count, 1);
        poll_fn(|cx| lost.poll_hangup(cx)).await;
        let error = lost.try_recv(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        // It is no clean end.
        assert!(lost.try_recv(&mut [0; 8]).is_err());
        assert!(lost.try_send(b"token").is_err());
        assert_eq!(net.reset_vanished(least).await, 0);
        let mut cx = Context::from_waker(Waker::noop());
        assert!(idle.poll_hangup(&mut cx).is_pending());
        assert!(full.poll_hangup(&mut cx).is_pending());
    });
}
