//! Which request goes out when: pure state, time is a parameter.
//!
//! Requests come in pairs, one to each side, in an order drawn for each pair: drift and what one
//! request leaves behind for the next (a warm prefix cache) hit both sides alike. In a closed loop
//! each of `concurrency` lanes sends its next request when the one before has ended. In an open
//! loop requests have planned times that do not wait for answers.

use std::collections::VecDeque;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::limits::PAIRS_MAX;

/// Where a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Straight to the engine.
    Direct,
    /// Through the proxy.
    Proxy,
}

impl Side {
    /// Both, direct first.
    pub const BOTH: [Self; 2] = [Self::Direct, Self::Proxy];

    /// 0 for direct, 1 for the proxy.
    #[must_use]
    pub const fn index(self) -> usize {
        match self {
            Self::Direct => 0,
            Self::Proxy => 1,
        }
    }

    /// Its name in messages and reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Proxy => "proxy",
        }
    }

    const fn other(self) -> Self {
        match self {
            Self::Direct => Self::Proxy,
            Self::Proxy => Self::Direct,
        }
    }
}

/// When requests go out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Load {
    /// So many lanes, each with one request at a time.
    Closed {
        /// At least 1.
        concurrency: usize,
    },
    /// So many requests per second, both sides together.
    Open {
        /// Above 0.
        rate: f64,
        /// Whether the times between requests are exponentially distributed, else all equal.
        poisson: bool,
    },
}

/// When the run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// After so many pairs.
    Pairs(u64),
    /// After so many nanoseconds.
    Ns(u64),
}

/// One request to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Its pair, from 0; warm-up pairs come first.
    pub pair: u32,
    /// Where it goes.
    pub side: Side,
    /// Whether the other one of the pair comes before it.
    second: bool,
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Send this; in an open loop it was planned for that nanosecond.
    Send(Ask, Option<u64>),
    /// Nothing before that nanosecond.
    At(u64),
    /// Nothing before a request ends.
    Response,
    /// Nothing more, ever.
    Nothing,
}

/// The plan of one run.
#[derive(Clone, Debug)]
pub struct Schedule {
    load: Load,
    until: Until,
    warmup: u32,
    rng: SmallRng,
    /// Pairs begun.
    pairs: u32,
    /// When the first pair after the warm-up was begun.
    begun_ns: Option<u64>,
    ready: VecDeque<Ask>,
    /// Lanes without a request.
    lanes_free: usize,
    /// The planned time of the next request of an open loop.
    due_ns: u64,
    stopped: bool,
}

impl Schedule {
    /// A plan whose first `warmup` pairs do not count.
    #[must_use]
    pub fn new(load: Load, until: Until, warmup: u32, seed: u64) -> Self {
        Self {
            load,
            until,
            warmup,
            rng: SmallRng::seed_from_u64(seed),
            pairs: 0,
            begun_ns: None,
            ready: VecDeque::new(),
            lanes_free: match load {
                Load::Closed { concurrency } => concurrency,
                Load::Open { .. } => 0,
            },
            due_ns: 0,
            stopped: false,
        }
    }

    /// Pairs begun, warm-up included.
    #[must_use]
    pub const fn pairs(&self) -> u32 {
        self.pairs
    }

    /// When the first pair after the warm-up was begun.
    #[must_use]
    pub const fn begun_ns(&self) -> Option<u64> {
        self.begun_ns
    }

    /// Begins no pair any more and forgets what has not been sent.
    pub fn stop(&mut self) {
        self.stopped = true;
        self.ready.clear();
    }

    /// What is to be done at `now_ns`.
    pub fn next(&mut self, now_ns: u64) -> Next {
        match self.load {
            Load::Closed { .. } => {
                if self.ready.is_empty() && self.lanes_free > 0 && self.begin_pair(now_ns) {
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
                if self.ready.is_empty() && self.begin_pair(due) {
                    // Its second request is due on its own.
                    let second = self.ready.front().map(|first| Ask {
                        side: first.side.other(),
                        second: true,
                        ..*first
                    });
                    self.ready.extend(second);
                }
                let Some(ask) = self.ready.pop_front() else {
                    return Next::Nothing;
                };
                // Of a number in [0, 1), so that the logarithm is finite.
                let draw = 1.0 - self.rng.random::<f64>();
                let factor = if poisson { -draw.ln() } else { 1.0 };
                self.due_ns = due.saturating_add((factor * 1e9 / rate) as u64);
                Next::Send(ask, Some(due))
            }
        }
    }

    /// A request of the plan has ended, well or not.
    pub fn ended(&mut self, ask: Ask) {
        if matches!(self.load, Load::Open { .. }) {
            return;
        }
        if ask.second || self.stopped {
            self.lanes_free += 1;
        } else {
            self.ready.push_back(Ask {
                side: ask.side.other(),
                second: true,
                ..ask
            });
        }
    }

    fn may_begin(&self, now_ns: u64) -> bool {
        let counted = u64::from(self.pairs.saturating_sub(self.warmup));
        let left = match (self.until, self.begun_ns) {
            (Until::Pairs(pairs), _) => counted < pairs,
            (Until::Ns(length), Some(begun)) => now_ns.saturating_sub(begun) < length,
            (Until::Ns(_), None) => true,
        };
        !self.stopped && left && counted < PAIRS_MAX
    }

    fn begin_pair(&mut self, now_ns: u64) -> bool {
        if !self.may_begin(now_ns) {
            return false;
        }
        if self.pairs >= self.warmup && self.begun_ns.is_none() {
            self.begun_ns = Some(now_ns);
        }
        let side = Side::BOTH[usize::from(self.rng.random::<bool>())];
        self.ready.push_back(Ask {
            pair: self.pairs,
            side,
            second: false,
        });
        self.pairs += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a plan in which each request takes `response_ns`; every request with its time.
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

    fn check_pairs(sent: &[(Ask, u64)], pairs: usize) {
        assert_eq!(sent.len(), pairs * 2);
        for pair in 0..pairs {
            let both: Vec<&Ask> = sent
                .iter()
                .map(|(ask, _)| ask)
                .filter(|ask| ask.pair as usize == pair)
                .collect();
            assert_eq!(both.len(), 2);
            assert_eq!(both[0].side, both[1].side.other());
            assert!(!both[0].second && both[1].second);
        }
        let direct_first = sent
            .iter()
            .filter(|(ask, _)| !ask.second && ask.side == Side::Direct)
            .count();
        assert!((pairs / 4..=pairs * 3 / 4).contains(&direct_first));
    }

    #[test]
    fn closed_loops_keep_their_lanes_busy() {
        for concurrency in [1, 3] {
            let load = Load::Closed { concurrency };
            let sent = run(Schedule::new(load, Until::Pairs(90), 10, 1), 50);
            check_pairs(&sent, 100);
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
            Schedule::new(load(false), Until::Pairs(200), 0, 1),
            1_000_000,
        );
        check_pairs(&fixed, 200);
        assert!(fixed.windows(2).all(|two| two[1].1 - two[0].1 == 1_000));
        let poisson = run(
            Schedule::new(load(true), Until::Pairs(2_000), 0, 1),
            1_000_000,
        );
        check_pairs(&poisson, 2_000);
        let mean = poisson[poisson.len() - 1].1 / (poisson.len() as u64 - 1);
        assert!((900..1_100).contains(&mean), "{mean}");
        let long = poisson.windows(2).filter(|two| two[1].1 - two[0].1 > 1_000);
        // A share of 1/e of exponential times is above their mean.
        let share = long.count() as f64 / poisson.len() as f64;
        assert!((0.33..0.41).contains(&share), "{share}");
    }

    #[test]
    fn durations_begin_after_the_warm_up() {
        let load = Load::Closed { concurrency: 1 };
        let sent = run(Schedule::new(load, Until::Ns(1_000), 5, 2), 100);
        // Five pairs of warm-up, then five in a thousand nanoseconds.
        assert_eq!(sent.len(), 20);
    }

    #[test]
    fn a_stopped_plan_sends_nothing_more() {
        let load = Load::Closed { concurrency: 2 };
        let mut schedule = Schedule::new(load, Until::Pairs(10), 0, 1);
        let Next::Send(ask, None) = schedule.next(0) else {
            panic!("nothing to send")
        };
        schedule.ended(ask);
        schedule.stop();
        assert_eq!(schedule.next(1), Next::Nothing);
    }
}
