//! A coarse timer wheel, one per shard.
//!
//! A [`Timer`] is armed and disarmed several times per request and almost never fires. Moving a
//! deadline *later* (or disarming it) therefore only writes a number: the entry remains in its
//! slot, and is moved to the right slot when the wheel reaches the old one. Only moving a deadline
//! *earlier* than the entry's current slot changes the lists. The tick is coarse on purpose: a
//! timer that really fires often costs more than the work it guards (`+33 %` CPU for 200 us waits,
//! measured).
//!
//! The wheel does not sleep. Its owner calls [`Wheel::advance`], which returns the time of the next
//! call, also available as [`Wheel::next_wake`].

use std::cell::RefCell;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::Instant;

/// Length of one tick. A deadline fires at most one tick late, never early.
pub const TICK: Duration = Duration::from_millis(10);
const TICK_NS: u64 = 10_000_000;
/// Number of slots, one per tick of a revolution. The entry of a deadline more than `SLOTS` ticks
/// away is passed over once per revolution.
const SLOTS: usize = 512;
const NONE: u32 = u32::MAX;
const OFF: u64 = u64::MAX;

/// Callback that is called with the time of the next [`Wheel::advance`] when that time has moved
/// earlier.
type Rearm = Box<dyn Fn(Instant)>;

struct Entry {
    previous: u32,
    next: u32,
    /// Tick in whose slot this entry is linked, or `OFF` if it is not linked.
    hung_tick: u64,
    /// Tick on which the timer fires, or `OFF` if it is disarmed or has fired.
    deadline_tick: u64,
    fired: bool,
    waker: Option<Waker>,
}

struct State {
    heads: Vec<u32>,
    entries: Vec<Entry>,
    free: Vec<u32>,
    /// The latest tick up to which the wheel has been advanced.
    now_tick: u64,
    /// The tick on which the owner should advance the wheel next, or `OFF` for none.
    wake_tick: u64,
}

/// The deadlines of one shard.
#[derive(Clone)]
pub struct Wheel {
    state: Rc<RefCell<State>>,
    rearm: Rc<RefCell<Option<Rearm>>>,
}

impl std::fmt::Debug for Wheel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Wheel").finish_non_exhaustive()
    }
}

impl Default for Wheel {
    fn default() -> Self {
        Self::new(Instant(0))
    }
}

impl Wheel {
    /// Creates a wheel whose time starts at `now`.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        let state = State {
            heads: vec![NONE; SLOTS],
            entries: Vec::new(),
            free: Vec::new(),
            now_tick: now.0 / TICK_NS,
            wake_tick: OFF,
        };
        Self {
            state: Rc::new(RefCell::new(state)),
            rearm: Rc::new(RefCell::new(None)),
        }
    }

    /// Sets a callback that is called with the time of the next [`Wheel::advance`] when a new
    /// deadline is earlier than the time reported before.
    pub fn on_rearm(&self, rearm: impl Fn(Instant) + 'static) {
        *self.rearm.borrow_mut() = Some(Box::new(rearm));
    }

    /// Returns a new timer, disarmed.
    #[must_use]
    pub fn timer(&self) -> Timer {
        let mut state = self.state.borrow_mut();
        let entry = Entry {
            previous: NONE,
            next: NONE,
            hung_tick: OFF,
            deadline_tick: OFF,
            fired: false,
            waker: None,
        };
        let index = if let Some(index) = state.free.pop() {
            state.entries[index as usize] = entry;
            index
        } else {
            state.entries.push(entry);
            u32::try_from(state.entries.len() - 1).unwrap_or(NONE)
        };
        drop(state);
        Timer {
            wheel: self.clone(),
            index,
        }
    }

    /// Fires every timer whose deadline `now` has reached. Returns the time at which to call it
    /// again, or `None` if that is not necessary until a timer is set.
    pub fn advance(&self, now: Instant) -> Option<Instant> {
        let mut wakers = Vec::new();
        let next = {
            let mut state = self.state.borrow_mut();
            let target = now.0 / TICK_NS;
            state.advance(target, &mut wakers);
            state.wake_tick = state.next_hung().unwrap_or(OFF);
            state.wake_tick
        };
        for waker in wakers {
            waker.wake();
        }
        (next != OFF).then(|| Instant(next.saturating_mul(TICK_NS)))
    }

    /// Returns the time at which the wheel must be advanced next, or `None` if that is not
    /// necessary until a timer is set.
    #[must_use]
    pub fn next_wake(&self) -> Option<Instant> {
        let tick = self.state.borrow().wake_tick;
        (tick != OFF).then(|| Instant(tick.saturating_mul(TICK_NS)))
    }

    /// Wakes every task that waits on a timer, so that it checks its other conditions again. A
    /// drain reaches idle sessions this way without keeping a list of them.
    pub fn nudge_all(&self) {
        let wakers: Vec<Waker> = self
            .state
            .borrow_mut()
            .entries
            .iter_mut()
            .filter_map(|e| e.waker.take())
            .collect();
        for waker in wakers {
            waker.wake();
        }
    }

    fn set(&self, index: u32, now: Instant, wait: Option<Duration>) {
        let mut state = self.state.borrow_mut();
        let deadline_tick = match wait {
            None => OFF,
            // Rounded up: a deadline may fire late but never early.
            Some(wait) => now.after(wait).0.div_ceil(TICK_NS).max(state.now_tick + 1),
        };
        let entry = &mut state.entries[index as usize];
        entry.fired = false;
        entry.deadline_tick = deadline_tick;
        if deadline_tick >= entry.hung_tick || deadline_tick == OFF {
            return;
        }
        state.unhang(index);
        state.hang(index, deadline_tick);
        if deadline_tick >= state.wake_tick {
            return;
        }
        state.wake_tick = deadline_tick;
        drop(state);
        if let Some(rearm) = &*self.rearm.borrow() {
            rearm(Instant(deadline_tick.saturating_mul(TICK_NS)));
        }
    }
}

impl State {
    fn slot(tick: u64) -> usize {
        usize::try_from(tick % SLOTS as u64).unwrap_or(0)
    }

    fn hang(&mut self, index: u32, tick: u64) {
        let slot = Self::slot(tick);
        let head = self.heads[slot];
        self.heads[slot] = index;
        if head != NONE {
            self.entries[head as usize].previous = index;
        }
        let entry = &mut self.entries[index as usize];
        entry.previous = NONE;
        entry.next = head;
        entry.hung_tick = tick;
    }

    fn unhang(&mut self, index: u32) {
        let entry = &mut self.entries[index as usize];
        if entry.hung_tick == OFF {
            return;
        }
        let (previous, next, tick) = (entry.previous, entry.next, entry.hung_tick);
        entry.hung_tick = OFF;
        if previous == NONE {
            self.heads[Self::slot(tick)] = next;
        } else {
            self.entries[previous as usize].next = next;
        }
        if next != NONE {
            self.entries[next as usize].previous = previous;
        }
    }

    fn advance(&mut self, target: u64, wakers: &mut Vec<Waker>) {
        // After a long sleep one revolution visits every slot; more would visit nothing new.
        let first = (self.now_tick + 1).max(target.saturating_sub(SLOTS as u64 - 1));
        self.now_tick = self.now_tick.max(target);
        for tick in first..=target {
            let mut index = self.heads[Self::slot(tick)];
            while index != NONE {
                let next = self.entries[index as usize].next;
                if self.entries[index as usize].hung_tick <= target {
                    self.visit(index, target, wakers);
                }
                index = next;
            }
        }
    }

    /// Handles the entry `entries[index]` when the wheel, advanced to the tick `target`, reaches
    /// its slot: fires the timer and adds its waker to `wakers`, links the entry to the slot of a
    /// deadline that has moved later, or leaves it unlinked if the timer is disarmed.
    fn visit(&mut self, index: u32, target: u64, wakers: &mut Vec<Waker>) {
        self.unhang(index);
        let entry = &mut self.entries[index as usize];
        if entry.deadline_tick == OFF {
            return;
        }
        if entry.deadline_tick > target {
            let tick = entry.deadline_tick;
            self.hang(index, tick);
            return;
        }
        entry.deadline_tick = OFF;
        entry.fired = true;
        wakers.extend(entry.waker.take());
    }

    /// Returns the next tick whose slot is not empty, at most one revolution away, or `None` if all
    /// slots are empty.
    fn next_hung(&self) -> Option<u64> {
        (self.now_tick + 1..=self.now_tick + SLOTS as u64)
            .find(|tick| self.heads[Self::slot(*tick)] != NONE)
    }
}

/// A deadline that can be moved and waited for. Dropping it disarms it.
#[derive(Debug)]
pub struct Timer {
    wheel: Wheel,
    index: u32,
}

impl Timer {
    /// Returns the number of this timer, for [`Timer::nudge`] of another timer of the same wheel.
    #[must_use]
    pub const fn number(&self) -> u32 {
        self.index
    }

    /// Wakes the task that waits on the timer with this number, if one does. The timer does not
    /// fire.
    pub fn nudge(&self, number: u32) {
        let mut state = self.wheel.state.borrow_mut();
        let entry = state.entries.get_mut(number as usize);
        let waker = entry.and_then(|entry| entry.waker.take());
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Sets the deadline to `wait` after `now`, or disarms the timer if `wait` is `None`.
    pub fn set(&self, now: Instant, wait: Option<Duration>) {
        self.wheel.set(self.index, now, wait);
    }

    /// Waits until the timer fires. Then ready until [`Timer::set`] is called again. Never ready
    /// while the timer is disarmed.
    pub fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.wheel.state.borrow_mut();
        let entry = &mut state.entries[self.index as usize];
        if entry.fired {
            return Poll::Ready(());
        }
        match &mut entry.waker {
            Some(waker) if waker.will_wake(cx.waker()) => {}
            waker => *waker = Some(cx.waker().clone()),
        }
        Poll::Pending
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        let mut state = self.wheel.state.borrow_mut();
        state.unhang(self.index);
        let entry = &mut state.entries[self.index as usize];
        entry.deadline_tick = OFF;
        let waker = entry.waker.take();
        state.free.push(self.index);
        drop(state);
        // Dropped after the borrow has ended: a waker may own the last reference to a task whose
        // drop calls back into the wheel.
        drop(waker);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::task::Wake;

    struct Count(AtomicU32);
    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn at(ms: u64) -> Instant {
        Instant(ms * 1_000_000)
    }

    fn is_fired(timer: &Timer) -> bool {
        timer
            .poll(&mut Context::from_waker(Waker::noop()))
            .is_ready()
    }

    #[test]
    fn timers_may_fire_late_but_never_early() {
        let wheel = Wheel::new(at(0));
        let timer = wheel.timer();
        timer.set(at(3), Some(Duration::from_millis(25)));
        wheel.advance(at(20));
        assert!(!is_fired(&timer));
        wheel.advance(at(28));
        assert!(
            !is_fired(&timer),
            "28 ms is not past 3 + 25 ms on a 10 ms tick"
        );
        wheel.advance(at(30));
        assert!(is_fired(&timer));
    }

    #[test]
    fn moving_later_keeps_the_slot_and_fires_at_the_new_time() {
        let wheel = Wheel::new(at(0));
        let timer = wheel.timer();
        timer.set(at(0), Some(Duration::from_millis(50)));
        timer.set(at(0), Some(Duration::from_secs(20)));
        assert_eq!(
            wheel.advance(at(60)),
            Some(at(20_000)).map(|_| wheel.next_wake().unwrap())
        );
        assert!(!is_fired(&timer));
        let mut now = 60;
        while now < 19_990 {
            now += 500;
            wheel.advance(at(now.min(19_990)));
            assert!(!is_fired(&timer), "at {now}");
        }
        wheel.advance(at(20_000));
        assert!(is_fired(&timer));
    }

    #[test]
    fn moving_earlier_requests_an_earlier_wake() {
        let wheel = Wheel::new(at(0));
        let asked = Rc::new(RefCell::new(Vec::new()));
        let log = Rc::clone(&asked);
        wheel.on_rearm(move |instant| log.borrow_mut().push(instant));
        let (far, near) = (wheel.timer(), wheel.timer());
        far.set(at(0), Some(Duration::from_secs(3)));
        near.set(at(0), Some(Duration::from_millis(100)));
        far.set(at(0), Some(Duration::from_secs(4)));
        assert_eq!(*asked.borrow(), vec![at(3000), at(100)]);
        wheel.advance(at(100));
        assert!(is_fired(&near) && !is_fired(&far));
    }

    #[test]
    fn off_and_drop_never_fire_and_do_not_leak() {
        let wheel = Wheel::new(at(0));
        for _ in 0..10_000 {
            let timer = wheel.timer();
            timer.set(at(0), Some(Duration::from_millis(10)));
            timer.set(at(0), None);
        }
        assert_eq!(wheel.state.borrow().entries.len(), 1);
        assert_eq!(wheel.advance(at(1000)), None);
    }

    #[test]
    fn every_waiter_is_woken_once() {
        let wheel = Wheel::new(at(0));
        let count = Arc::new(Count(AtomicU32::new(0)));
        let waker = Waker::from(Arc::clone(&count));
        let timers: Vec<Timer> = (0..100).map(|_| wheel.timer()).collect();
        for (i, timer) in timers.iter().enumerate() {
            timer.set(at(0), Some(Duration::from_millis(10 * i as u64)));
            assert!(timer.poll(&mut Context::from_waker(&waker)).is_pending());
        }
        wheel.advance(at(100_000));
        assert_eq!(count.0.load(Ordering::Relaxed), 100);
        assert!(timers.iter().all(is_fired));
        wheel.nudge_all();
        assert_eq!(count.0.load(Ordering::Relaxed), 100);
    }

    /// Compares the wheel with a plain list of deadlines under a seeded mix of sets, moves, drops
    /// and jumps in time.
    #[test]
    fn agrees_with_a_naive_list() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        let wheel = Wheel::new(at(0));
        let mut timers: Vec<(Timer, Option<u64>)> =
            (0..50).map(|_| (wheel.timer(), None)).collect();
        let mut now = 0;
        for _ in 0..20_000 {
            let pick = usize::try_from(random(50)).unwrap();
            match random(4) {
                0 => {
                    let wait = random(20_000);
                    timers[pick]
                        .0
                        .set(at(now), Some(Duration::from_millis(wait)));
                    timers[pick].1 = Some((now + wait).div_ceil(10).max(now / 10 + 1));
                }
                1 => {
                    timers[pick].0.set(at(now), None);
                    timers[pick].1 = None;
                }
                2 => timers[pick] = (wheel.timer(), None),
                _ => {
                    now += random(3000);
                    wheel.advance(at(now));
                }
            }
            for (timer, deadline) in &timers {
                let due = deadline.is_some_and(|tick| tick <= now / 10);
                assert_eq!(is_fired(timer), due, "now {now}, deadline {deadline:?}");
            }
        }
    }
}
