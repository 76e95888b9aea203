//! The order and the times of the requests of a run. This module is pure state; the time is a
//! parameter.
//!
//! Requests are sent in rounds, one to each side, in an order drawn at random for each round, so
//! that drift and the effects of one request on the next (a warm prefix cache) affect all sides
//! alike. In a closed loop, each of `concurrency` lanes sends its next request when the previous
//! one has ended. In an open loop, requests have planned times that do not depend on responses.

use std::collections::VecDeque;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::limits::{ROUNDS_MAX, SIDES_MAX};

/// The destination of a request: the engine itself, or one of the proxies in front of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Side(u8);

impl Side {
    /// The request is sent directly to the engine.
    pub const DIRECT: Self = Self(0);

    /// Returns the sides of a run with this many of them, at most [`SIDES_MAX`]: direct first, then
    /// the proxies in the order of the command line.
    pub fn all(count: usize) -> impl Iterator<Item = Self> + Clone {
        (0..).map(Self).take(count.min(SIDES_MAX))
    }

    /// Returns 0 for direct, 1 for the first proxy, and so on.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// The order in which the requests of one round are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Order {
    sides: [Side; SIDES_MAX],
    count: u8,
}

impl Order {
    /// Draws an order of `count` sides; all orders are equally likely.
    fn draw(count: usize, rng: &mut SmallRng) -> Self {
        let mut sides = [Side::DIRECT; SIDES_MAX];
        for (place, side) in sides.iter_mut().zip(Side::all(count)) {
            *place = side;
        }
        for last in (1..count).rev() {
            sides.swap(last, rng.random_range(0..=last));
        }
        Self {
            sides,
            count: count as u8,
        }
    }
}

/// The load of a run: when requests are sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Load {
    /// Closed loop: each of a number of lanes sends its next request when the previous one has
    /// ended.
    Closed {
        /// Number of lanes, which is the number of concurrent requests; at least 1.
        concurrency: usize,
    },
    /// Open loop: requests have planned times that do not depend on responses.
    Open {
        /// Requests per second to all sides together, above 0.
        rate: f64,
        /// Whether the times between requests are exponentially distributed; otherwise they are
        /// equal.
        poisson: bool,
    },
}

/// When a run stops starting rounds of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// The run stops starting rounds after this many, not counting those of the warm-up.
    Rounds(u64),
    /// The run stops starting rounds this many nanoseconds after the first round that follows the
    /// warm-up, or earlier if it has started `ROUNDS_MAX` rounds.
    Ns(u64),
}

/// One request to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Number of the round (one request to each side) that the request belongs to, counted from 0;
    /// the rounds of the warm-up come first.
    pub round: u32,
    /// The side that the request is sent to.
    pub side: Side,
    /// Position of the request in its round, from 0.
    position: u8,
    order: Order,
}

impl Ask {
    const fn first(round: u32, order: Order) -> Self {
        Self {
            round,
            side: order.sides[0],
            position: 0,
            order,
        }
    }

    /// Returns the request of the same round that follows this one; `None` if this is the last.
    const fn following(self) -> Option<Self> {
        let position = self.position + 1;
        if position >= self.order.count {
            return None;
        }
        Some(Self {
            side: self.order.sides[position as usize],
            position,
            ..self
        })
    }
}

/// The next action of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Send this request. In an open loop, the second value is its planned time in nanoseconds of
    /// the run's clock; in a closed loop, it is `None`.
    Send(Ask, Option<u64>),
    /// Send nothing before this time, in nanoseconds of the run's clock.
    At(u64),
    /// Send nothing before a request in flight ends.
    Response,
    /// Nothing more will be sent.
    Nothing,
}

/// The schedule of one run.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// Number of sides: 1 for direct, and the number of proxies.
    sides: usize,
    load: Load,
    until: Until,
    warmup: u32,
    rng: SmallRng,
    /// Number of rounds started, including the warm-up.
    rounds: u32,
    /// Time in nanoseconds at which the first round after the warm-up started, or was planned to
    /// start in an open loop; `None` before that.
    begun_ns: Option<u64>,
    ready: VecDeque<Ask>,
    /// Number of lanes of a closed loop that can start a new round; 0 in an open loop.
    lanes_free: usize,
    /// Planned time of the next request in an open loop, in nanoseconds of the run's clock.
    due_ns: u64,
    stopped: bool,
    /// Whether no round is started until [`Schedule::release`].
    held: bool,
}

impl Schedule {
    /// Creates a schedule of rounds with one request to each of `sides` sides. The first `warmup`
    /// rounds do not count towards `until`.
    #[must_use]
    pub fn new(sides: usize, load: Load, until: Until, warmup: u32, seed: u64) -> Self {
        Self {
            sides: sides.clamp(1, SIDES_MAX),
            load,
            until,
            warmup,
            rng: SmallRng::seed_from_u64(seed),
            rounds: 0,
            begun_ns: None,
            ready: VecDeque::new(),
            lanes_free: match load {
                Load::Closed { concurrency } => concurrency,
                Load::Open { .. } => 0,
            },
            due_ns: 0,
            stopped: false,
            held: false,
        }
    }

    /// Returns the number of rounds started, including the warm-up.
    #[must_use]
    pub const fn rounds(&self) -> u32 {
        self.rounds
    }

    /// Returns the time in nanoseconds at which the first round after the warm-up started, or was
    /// planned to start in an open loop; `None` if it has not started.
    #[must_use]
    pub const fn begun_ns(&self) -> Option<u64> {
        self.begun_ns
    }

    /// Starts no new round until [`Schedule::release`], so that the servers become idle. Has no
    /// effect unless requests are sent one at a time: an open loop has planned times, and several
    /// lanes would all start together after a pause, which is another load than the one requested.
    pub fn hold(&mut self) {
        self.held = matches!(self.load, Load::Closed { concurrency: 1 });
    }

    /// Ends a [`Schedule::hold`].
    pub fn release(&mut self) {
        self.held = false;
    }

    /// Returns whether the schedule is held.
    #[must_use]
    pub const fn is_held(&self) -> bool {
        self.held
    }

    /// Stops starting rounds and discards requests that have not been sent.
    pub fn stop(&mut self) {
        self.stopped = true;
        self.ready.clear();
    }

    /// Returns the action to take at `now_ns`. A returned request counts as sent.
    pub fn next(&mut self, now_ns: u64) -> Next {
        match self.load {
            Load::Closed { .. } => {
                let may_begin = self.ready.is_empty() && self.lanes_free > 0 && !self.held;
                if may_begin && self.begin_round(now_ns) {
                    self.lanes_free -= 1;
                }
                match self.ready.pop_front() {
                    Some(ask) => Next::Send(ask, None),
                    None if self.may_begin(now_ns) => Next::Response,
                    None => Next::Nothing,
                }
            }
            Load::Open { rate, poisson } => {
                let due = self.due_ns;
                let more = !self.ready.is_empty() || self.may_begin(due);
                if more && now_ns < due {
                    return Next::At(due);
                }
                if self.ready.is_empty() && self.begin_round(due) {
                    // Each further request of the round gets its own planned time.
                    while let Some(ask) = self.ready.back().and_then(|ask| ask.following()) {
                        self.ready.push_back(ask);
                    }
                }
                let Some(ask) = self.ready.pop_front() else {
                    return Next::Nothing;
                };
                // The random number is in [0, 1), so the draw is above 0 and its logarithm is
                // finite.
                let draw = 1.0 - self.rng.random::<f64>();
                let factor = if poisson { -draw.ln() } else { 1.0 };
                self.due_ns = due.saturating_add((factor * 1e9 / rate) as u64);
                Next::Send(ask, Some(due))
            }
        }
    }

    /// Records that a request has ended, successfully or not.
    pub fn ended(&mut self, ask: Ask) {
        if matches!(self.load, Load::Open { .. }) {
            return;
        }
        match ask.following().filter(|_| !self.stopped) {
            Some(ask) => self.ready.push_back(ask),
            None => self.lanes_free += 1,
        }
    }

    fn may_begin(&self, now_ns: u64) -> bool {
        let counted = u64::from(self.rounds.saturating_sub(self.warmup));
        let left = match (self.until, self.begun_ns) {
            (Until::Rounds(rounds), _) => counted < rounds,
            (Until::Ns(length), Some(begun)) => now_ns.saturating_sub(begun) < length,
            (Until::Ns(_), None) => true,
        };
        !self.stopped && left && counted < ROUNDS_MAX
    }

    fn begin_round(&mut self, now_ns: u64) -> bool {
        if !self.may_begin(now_ns) {
            return false;
        }
        if self.rounds >= self.warmup && self.begun_ns.is_none() {
            self.begun_ns = Some(now_ns);
        }
        let order = Order::draw(self.sides, &mut self.rng);
        self.ready.push_back(Ask::first(self.rounds, order));
        self.rounds += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Simulates a run in which each response takes `response_ns`. Returns every request with its
    /// planned time (open loop) or its send time (closed loop).
    fn run(mut schedule: Schedule, response_ns: u64) -> Vec<(Ask, u64)> {
        let (mut now, mut sent, mut open) = (0, Vec::new(), VecDeque::<(u64, Ask)>::new());
        loop {
            match schedule.next(now) {
                Next::Send(ask, due) => {
                    assert!(due.is_none_or(|due| due <= now));
                    sent.push((ask, due.unwrap_or(now)));
                    open.push_back((now + response_ns, ask));
                }
                Next::At(at) => {
                    assert!(at > now);
                    now = at;
                }
                Next::Response | Next::Nothing => {
                    let Some((at, ask)) = open.pop_front() else {
                        assert_eq!(schedule.next(now), Next::Nothing);
                        return sent;
                    };
                    now = now.max(at);
                    schedule.ended(ask);
                }
            }
        }
    }

    fn check_rounds(sent: &[(Ask, u64)], sides: usize, rounds: usize) {
        assert_eq!(sent.len(), rounds * sides);
        let mut begun_by = vec![0; sides];
        for round in 0..rounds {
            let of_round = sent.iter().map(|(ask, _)| ask);
            let of_round = of_round.filter(|ask| ask.round as usize == round);
            let mut seen: Vec<usize> = of_round.map(|ask| ask.side.index()).collect();
            begun_by[seen[0]] += 1;
            seen.sort_unstable();
            assert_eq!(seen, (0..sides).collect::<Vec<_>>());
        }
        let fair = rounds / sides;
        let usual = fair / 2..=fair * 3 / 2;
        assert!(
            begun_by.iter().all(|count| usual.contains(count)),
            "{begun_by:?}"
        );
    }

    #[test]
    fn closed_loops_keep_their_lanes_busy() {
        for (concurrency, sides) in [(1, 2), (3, 2), (2, 5), (1, SIDES_MAX)] {
            let load = Load::Closed { concurrency };
            let sent = run(Schedule::new(sides, load, Until::Rounds(190), 10, 1), 50);
            check_rounds(&sent, sides, 200);
            for at in 0..sent[sent.len() - 1].1 {
                let open = sent.iter().filter(|(_, t)| *t <= at && at < t + 50).count();
                assert!(open <= concurrency, "{open} at {at}");
            }
        }
    }

    #[test]
    fn open_loops_do_not_wait_for_responses() {
        let load = |poisson| Load::Open { rate: 1e6, poisson };
        let fixed = run(
            Schedule::new(2, load(false), Until::Rounds(200), 0, 1),
            1_000_000,
        );
        check_rounds(&fixed, 2, 200);
        assert!(fixed.windows(2).all(|two| two[1].1 - two[0].1 == 1_000));
        let poisson = run(
            Schedule::new(2, load(true), Until::Rounds(2_000), 0, 1),
            1_000_000,
        );
        check_rounds(&poisson, 2, 2_000);
        let of_four = Schedule::new(4, load(true), Until::Rounds(200), 3, 1);
        check_rounds(&run(of_four, 5_000), 4, 203);
        let mean = poisson[poisson.len() - 1].1 / (poisson.len() as u64 - 1);
        assert!((900..1_100).contains(&mean), "{mean}");
        let long = poisson.windows(2).filter(|two| two[1].1 - two[0].1 > 1_000);
        // A share of 1/e of exponentially distributed times is above their mean.
        let share = long.count() as f64 / poisson.len() as f64;
        assert!((0.33..0.41).contains(&share), "{share}");
    }

    #[test]
    fn durations_count_from_the_end_of_the_warm_up() {
        let load = Load::Closed { concurrency: 1 };
        let sent = run(Schedule::new(2, load, Until::Ns(1_000), 5, 2), 100);
        // Five warm-up rounds, then five rounds in a thousand nanoseconds.
        assert_eq!(sent.len(), 20);
    }

    #[test]
    fn a_held_schedule_finishes_the_round_and_starts_no_other() {
        let load = Load::Closed { concurrency: 1 };
        let mut schedule = Schedule::new(3, load, Until::Rounds(10), 0, 1);
        let Next::Send(first, None) = schedule.next(0) else {
            panic!("nothing to send")
        };
        schedule.hold();
        schedule.ended(first);
        for _ in 0..2 {
            let Next::Send(ask, None) = schedule.next(1) else {
                panic!("the round is not finished")
            };
            assert_eq!(ask.round, 0);
            schedule.ended(ask);
        }
        assert_eq!(schedule.next(2), Next::Response);
        assert!(schedule.is_held());
        schedule.release();
        let Next::Send(ask, None) = schedule.next(3) else {
            panic!("nothing to send")
        };
        assert_eq!(ask.round, 1);
        let open = Load::Open {
            rate: 1.0,
            poisson: false,
        };
        for load in [open, Load::Closed { concurrency: 2 }] {
            let mut schedule = Schedule::new(2, load, Until::Rounds(1), 0, 1);
            schedule.hold();
            assert!(!schedule.is_held() && matches!(schedule.next(0), Next::Send(..)));
        }
    }

    #[test]
    fn a_stopped_schedule_sends_nothing_more() {
        let load = Load::Closed { concurrency: 2 };
        let mut schedule = Schedule::new(2, load, Until::Rounds(10), 0, 1);
        let Next::Send(ask, None) = schedule.next(0) else {
            panic!("nothing to send")
        };
        schedule.ended(ask);
        schedule.stop();
        assert_eq!(schedule.next(1), Next::Nothing);
    }
}
