//! When operations are due: closed, open, or in sessions.
//!
//! An open schedule is a function of the seed alone: it does not look at answers, so a stalled
//! server receives no fewer requests than a fast one. Nothing is queued; an operation that is late
//! keeps the time it was due, and what was never taken is counted.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rand_xoshiro::Xoshiro256PlusPlus;
use torc_measure::keys::{unit, whole};

use super::trace::{Ahead, Row};
use super::world::Nanos;

/// How the gaps between arrivals are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Gaps {
    /// Exponential gaps: independent callers.
    Poisson,
    /// Equal gaps.
    Uniform,
    /// So many at once, with equal gaps between the bursts.
    Burst(u32),
}

impl std::str::FromStr for Gaps {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "poisson" => Ok(Gaps::Poisson),
            None if text == "uniform" => Ok(Gaps::Uniform),
            Some(("burst", count)) => match count.parse() {
                Ok(count) if count > 0 => Ok(Gaps::Burst(count)),
                _ => Err("burst:N needs a count above zero".into()),
            },
            _ => Err("expected poisson, uniform or burst:N".into()),
        }
    }
}

/// An operation's turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Due {
    /// When, in nanoseconds of the run.
    pub at: Nanos,
    /// Operations that its session still makes after it.
    pub left: u32,
}

/// When operations are due.
pub enum Schedule {
    /// As soon as the one before is answered: service time, not latency.
    Closed,
    /// By a clock that does not wait for answers.
    Open(Arrivals),
    /// Sessions arrive by a clock; each makes its operations one after the other.
    Sessions(Sessions),
    /// As a trace says.
    Trace(Ahead),
}

/// Arrivals at a rate.
pub struct Arrivals {
    gaps: Gaps,
    gap_ns: f64,
    next: f64,
    in_burst: u32,
}

/// Sessions, and the operations that follow in those under way.
pub struct Sessions {
    arrivals: Arrivals,
    operations: u32,
    think_ns: Nanos,
    follow: BinaryHeap<Reverse<Due>>,
}

impl Arrivals {
    /// Arrivals at `rate` a second from time 0 on; `phase` (0 to 1) of a gap later when the gaps
    /// are equal, so that workers alternate.
    ///
    /// # Panics
    /// When the rate is not above zero.
    pub fn new(rate: f64, gaps: Gaps, phase: f64) -> Self {
        assert!(rate > 0.0, "an open loop needs a rate above zero");
        let batch = match gaps {
            Gaps::Burst(count) => f64::from(count),
            _ => 1.0,
        };
        let gap_ns = 1e9 * batch / rate;
        Self {
            gaps,
            gap_ns,
            next: gap_ns * phase,
            in_burst: 0,
        }
    }

    fn step(&mut self, rng: &mut Xoshiro256PlusPlus) {
        match self.gaps {
            Gaps::Poisson => self.next += self.gap_ns * -(1.0 - unit(rng)).ln(),
            Gaps::Uniform => self.next += self.gap_ns,
            Gaps::Burst(count) => {
                self.in_burst += 1;
                if self.in_burst == count {
                    self.in_burst = 0;
                    self.next += self.gap_ns;
                }
            }
        }
    }
}

impl Sessions {
    /// Sessions of `operations` each, at `rate` *operations* a second.
    pub fn new(rate: f64, gaps: Gaps, phase: f64, operations: u32, think_ns: Nanos) -> Self {
        Self {
            arrivals: Arrivals::new(rate / f64::from(operations.max(1)), gaps, phase),
            operations: operations.max(1),
            think_ns,
            follow: BinaryHeap::new(),
        }
    }
}

impl Schedule {
    /// When the next operation is due; `None` when it waits for an answer, or none follows.
    pub fn next_due(&self) -> Option<Nanos> {
        match self {
            Schedule::Closed => None,
            Schedule::Open(arrivals) => Some(whole(arrivals.next)),
            Schedule::Sessions(sessions) => {
                let follow = sessions.follow.peek().map(|due| due.0.at);
                let arrival = whole(sessions.arrivals.next);
                Some(follow.map_or(arrival, |at| at.min(arrival)))
            }
            Schedule::Trace(rows) => rows.peek().map(|row| row.at),
        }
    }

    /// The oldest operation that is due by `now`, of a trace with its row. A closed loop always has
    /// one.
    pub fn take(&mut self, now: Nanos, rng: &mut Xoshiro256PlusPlus) -> Option<(Due, Option<Row>)> {
        let first = |at| Due { at, left: 0 };
        if matches!(self, Schedule::Closed) {
            return Some((first(now), None));
        }
        let at = self.next_due().filter(|at| *at <= now)?;
        match self {
            Schedule::Closed => None,
            Schedule::Open(arrivals) => {
                arrivals.step(rng);
                Some((first(at), None))
            }
            Schedule::Sessions(sessions) => {
                if sessions.follow.peek().is_some_and(|due| due.0.at == at) {
                    return sessions.follow.pop().map(|due| (due.0, None));
                }
                sessions.arrivals.step(rng);
                let left = sessions.operations - 1;
                Some((Due { at, left }, None))
            }
            Schedule::Trace(rows) => Some((first(at), rows.next())),
        }
    }

    /// An operation of `due` was answered at `now`: its session goes on.
    pub fn answered(&mut self, due: Due, now: Nanos) {
        if let Schedule::Sessions(sessions) = self
            && due.left > 0
        {
            sessions.follow.push(Reverse(Due {
                at: now + sessions.think_ns,
                left: due.left - 1,
            }));
        }
    }

    /// Whether nothing will ever be due again.
    pub fn exhausted(&self) -> bool {
        matches!(self, Schedule::Trace(rows) if rows.peek().is_none())
    }

    /// Why what would be due is not known.
    pub fn failed(&mut self) -> Option<std::io::Error> {
        match self {
            Schedule::Trace(rows) => rows.failed(),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_xoshiro::rand_core::SeedableRng;

    fn rng() -> Xoshiro256PlusPlus {
        Xoshiro256PlusPlus::seed_from_u64(3)
    }

    #[test]
    fn arrivals_keep_their_rate_and_are_not_thinned_by_a_stall() {
        for gaps in [Gaps::Poisson, Gaps::Uniform, Gaps::Burst(10)] {
            let mut rng = rng();
            let mut schedule = Schedule::Open(Arrivals::new(1000.0, gaps, 0.0));
            let mut due = Vec::new();
            // Nobody asked for ten seconds: every one of them is still there, with its own time.
            while let Some((one, _)) = schedule.take(10_000_000_000, &mut rng) {
                due.push(one.at);
            }
            assert!(
                (9_600..10_400).contains(&due.len()),
                "{gaps:?}: {}",
                due.len()
            );
            assert_eq!(due[0], 0, "a late one keeps its intended time");
            assert!(due.is_sorted());
        }
    }

    #[test]
    fn poisson_gaps_have_the_spread_of_an_exponential() {
        let mut rng = rng();
        let mut schedule = Schedule::Open(Arrivals::new(1000.0, Gaps::Poisson, 0.0));
        let mut last = 0.0;
        let mut gaps = Vec::new();
        while let Some((due, _)) = schedule.take(50_000_000_000, &mut rng) {
            let at = due.at as f64;
            gaps.push(at - last);
            last = at;
        }
        let count = f64::from(u32::try_from(gaps.len()).unwrap());
        let mean = gaps.iter().sum::<f64>() / count;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / count;
        let spread = variance.sqrt() / mean;
        assert!((0.97..1.03).contains(&spread), "{spread}");
    }

    #[test]
    fn a_session_goes_on_only_when_it_was_answered() {
        let mut rng = rng();
        let mut schedule =
            Schedule::Sessions(Sessions::new(300.0, Gaps::Uniform, 0.0, 3, 1_000_000));
        let (first, _) = schedule.take(0, &mut rng).unwrap();
        assert_eq!((first.at, first.left), (0, 2));
        assert_eq!(schedule.next_due(), Some(10_000_000), "the next session");
        schedule.answered(first, 2_000_000);
        let (second, _) = schedule.take(3_000_000, &mut rng).unwrap();
        assert_eq!((second.at, second.left), (3_000_000, 1));
        schedule.answered(second, 4_000_000);
        let (third, _) = schedule.take(9_000_000, &mut rng).unwrap();
        assert_eq!(third.left, 0);
        schedule.answered(third, 9_000_000);
        assert!(schedule.take(9_999_999, &mut rng).is_none());
    }
}
