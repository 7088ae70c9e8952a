//! Whether the client itself kept up, and so whether its figures mean the server.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::pauses::Pauses;
use super::recorder::{add, histogram};
use super::world::Nanos;

/// Above this share of busy time a thread has no room left, and its queue is in the latencies.
const BUSY_MAX: f64 = 0.9;
/// A scheduling lag below this never matters, in nanoseconds.
const LAG_NS_FREE: u64 = 100_000;
/// Share of the time that a thread may be without a CPU before requests leave late by it: a thousandth
/// would be the p99.9.
const DELAYED_MAX: f64 = 0.0005;
/// Share of operations that may stay unsent, since the last of a run may just have become due, and
/// that may wait for a write of their key.
const UNSENT_MAX: f64 = 0.001;

/// How one worker thread spent its time, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thread {
    /// Working: all time that it did not wait for sockets or for the clock.
    pub busy_ns: Nanos,
    /// In all.
    pub wall_ns: Nanos,
    /// Ready to work, while other threads had its CPU; part of either of the above.
    #[serde(default)]
    pub delayed_ns: Nanos,
    /// A hypervisor had its CPU, likewise; with the last stretch for the whole run.
    #[serde(default)]
    pub stolen_ns: Nanos,
}

impl Thread {
    /// Adds another stretch of time.
    pub fn add(&mut self, other: Thread) {
        self.busy_ns += other.busy_ns;
        self.wall_ns += other.wall_ns;
        self.delayed_ns += other.delayed_ns;
        self.stolen_ns += other.stolen_ns;
    }

    /// Share of the time that it worked, 0 to 1.
    pub fn busy(&self) -> f64 {
        self.busy_ns as f64 / self.wall_ns.max(1) as f64
    }

    /// Share of the time that it waited for a CPU, 0 to 1.
    pub fn delayed(&self) -> f64 {
        self.delayed_ns as f64 / self.wall_ns.max(1) as f64
    }

    /// Share of the time that a hypervisor had its CPU, 0 to 1.
    pub fn stolen(&self) -> f64 {
        self.stolen_ns as f64 / self.wall_ns.max(1) as f64
    }
}

/// What the workers know of themselves.
#[derive(Clone)]
pub struct Health {
    /// By number of the worker.
    pub threads: BTreeMap<usize, Thread>,
    /// From the moment that an operation was due and a connection free for it, to the moment it was
    /// sent, in nanoseconds.
    pub lag: Histogram<u64>,
    /// What held up threads that had nothing to do.
    pub pauses: Pauses,
    /// Connections that broke or could not be made.
    pub broken: u64,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            threads: BTreeMap::new(),
            lag: histogram(3),
            pauses: Pauses::default(),
            broken: 0,
        }
    }
}

impl Health {
    /// Adds that of another worker or interval.
    pub fn merge(&mut self, other: &Health) {
        for (number, thread) in &other.threads {
            self.threads.entry(*number).or_default().add(*thread);
        }
        add(&mut self.lag, &other.lag);
        self.pauses.merge(&other.pauses);
        self.broken += other.broken;
    }

    /// Empties it.
    pub fn clear(&mut self) {
        self.threads.clear();
        self.broken = 0;
        self.pauses.clear();
        if !self.lag.is_empty() {
            self.lag.reset();
        }
    }

    /// The largest share of a thread, 0 to 1.
    pub fn most(&self, share: fn(&Thread) -> f64) -> f64 {
        self.threads.values().map(share).fold(0.0, f64::max)
    }
}

/// Whether a run may be quoted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Validity {
    /// Why not; empty for a valid run.
    pub reasons: Vec<String>,
    /// Whether the client itself was too slow.
    #[serde(default)]
    pub client: bool,
}

impl Validity {
    /// Whether it may.
    pub fn valid(&self) -> bool {
        self.reasons.is_empty()
    }

    /// `VALID`, or `INVALID` with the reasons.
    pub fn words(&self) -> String {
        if self.valid() {
            "VALID".into()
        } else {
            format!("INVALID: {}", self.reasons.join("; "))
        }
    }
}

/// What a run is judged by.
#[derive(Clone, Copy)]
pub struct Facts<'a> {
    /// The workers' own record.
    pub health: &'a Health,
    /// Whether operations had their own time.
    pub open: bool,
    /// Operations that were due.
    pub due: u64,
    /// Operations that were never sent.
    pub unsent: u64,
    /// Operations that waited until a write of their key was answered.
    pub waited: u64,
    /// Median latency of all operations, in nanoseconds.
    pub median_ns: u64,
}

/// Judges whether the client distorted what it measured.
pub fn judge(facts: Facts<'_>) -> Validity {
    let mut reasons = Vec::new();
    let busiest = facts.health.most(Thread::busy);
    if busiest > BUSY_MAX {
        reasons.push(format!(
            "the busiest client thread worked {:.0} % of the time (limit {:.0} %): use more \
             threads or a lower rate",
            busiest * 100.0,
            BUSY_MAX * 100.0
        ));
    }
    let mut client = !reasons.is_empty();
    let many = |count: u64| count as f64 > UNSENT_MAX * facts.due as f64;
    if facts.open {
        let lag = facts.health.lag.value_at_quantile(0.999);
        let limit = (facts.median_ns / 10).max(LAG_NS_FREE);
        if lag > limit {
            client = true;
            reasons.push(format!(
                "requests left late: scheduling lag p99.9 {:.0} us (limit {:.0} us); {}",
                lag as f64 / 1e3,
                limit as f64 / 1e3,
                why_late(facts.health, limit)
            ));
        }
        if many(facts.unsent) {
            let why = match facts.health.broken {
                0 => "the rate is above what server, connections or client can carry".to_owned(),
                broken => format!("{broken} connections broke or could not be made"),
            };
            reasons.push(format!(
                "{} of {} operations were due and never sent: {why}",
                facts.unsent, facts.due
            ));
        }
        if many(facts.waited) {
            reasons.push(format!(
                "{} of {} operations waited for a write of their key, which has one writer at a \
                 time: use more keys",
                facts.waited, facts.due
            ));
        }
    }
    Validity { reasons, client }
}

/// Whose doing it is that requests left later than `limit`, as far as it is known.
fn why_late(health: &Health, limit: Nanos) -> String {
    let mut causes = Vec::new();
    // Whatever waits behind a pause waits on while the backlog is worked off.
    let alone = health.pauses.wait_at(0.999);
    if let Some(alone) = alone.filter(|alone| *alone > limit / 2) {
        causes.push(format!(
            "the machine itself held the client up when it had nothing to do, p99.9 {:.0} us",
            alone as f64 / 1e3
        ));
    }
    let stolen = health.most(Thread::stolen);
    if stolen > DELAYED_MAX {
        causes.push(format!(
            "the hypervisor had its CPUs for {:.1} % of the time",
            stolen * 100.0
        ));
    }
    let delayed = health.most(Thread::delayed);
    if delayed > DELAYED_MAX {
        causes.push(format!(
            "other programs had its threads' CPUs for {:.1} % of the time (with --cpus and --realtime \
             only the kernel's own threads can)",
            delayed * 100.0
        ));
    }
    if causes.is_empty() {
        causes.push("single system calls took that long, or the rate is too high for it".into());
    }
    causes.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(health: &Health) -> Facts<'_> {
        Facts {
            health,
            open: true,
            due: 10_000,
            unsent: 0,
            waited: 0,
            median_ns: 200_000,
        }
    }

    fn busy(share: u64) -> Health {
        let mut health = Health::default();
        health.threads.insert(
            0,
            Thread {
                busy_ns: share,
                wall_ns: 100,
                delayed_ns: 7,
                stolen_ns: 3,
            },
        );
        health
    }

    #[test]
    fn a_run_is_invalid_for_each_reason_alone() {
        let health = busy(50);
        assert!(judge(facts(&health)).valid());
        assert!(!judge(facts(&busy(95))).valid());
        let unsent = Facts {
            unsent: 11,
            ..facts(&health)
        };
        let words = judge(unsent).words();
        assert!(
            words.contains("11 of 10000") && words.contains("the rate"),
            "{words}"
        );
        let mut broken = busy(50);
        broken.broken = 3;
        let unreachable = Facts {
            health: &broken,
            ..unsent
        };
        assert!(judge(facts(&broken)).valid());
        let words = judge(unreachable).words();
        assert!(words.contains("3 connections broke"), "{words}");
        let waited = Facts {
            waited: 11,
            ..facts(&health)
        };
        let verdict = judge(waited);
        assert!(!verdict.client && verdict.words().contains("11 of 10000"));
        let mut late = busy(50);
        late.lag.record(150_000).unwrap();
        let words = judge(facts(&late)).words();
        assert!(
            words.contains("150 us") && words.contains("7.0 %"),
            "{words}"
        );
        assert!(
            words.contains("the hypervisor had its CPUs for 3.0 %"),
            "{words}"
        );
        assert!(!words.contains("machine itself"), "{words}");
        let mut alone = late.clone();
        alone.threads.clear();
        let words = judge(facts(&alone)).words();
        assert!(
            words.contains("system calls")
                && !words.contains("other programs")
                && !words.contains("hypervisor"),
            "{words}"
        );
        late.pauses.polled(80_000_000);
        let words = judge(facts(&late)).words();
        assert!(words.contains("machine itself"), "{words}");
        assert!(words.contains("p99.9 799"), "{words}");
        let slow_server = Facts {
            median_ns: 5_000_000,
            ..facts(&late)
        };
        assert!(
            judge(slow_server).valid(),
            "a tenth of the median is no distortion"
        );
        let closed = Facts {
            open: false,
            ..facts(&late)
        };
        assert!(judge(closed).valid());
    }
}
