//! What a worker measured, mergeable over workers.

use std::time::Duration;

use hdrhistogram::Histogram;

/// Highest latency that is told apart, in nanoseconds; longer ones count as this.
const LATENCY_NS_MAX: u64 = 3_600_000_000_000;

/// Kinds of operations that are measured apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read of one key.
    Read,
    /// Write of one key.
    Write,
}

impl Operation {
    /// Both kinds, in order of `as usize`.
    pub const ALL: [Operation; 2] = [Operation::Read, Operation::Write];

    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Operation::Read => "read",
            Operation::Write => "write",
        }
    }
}

/// Latencies and counts of one kind of operation.
pub struct Series {
    /// From the moment the request was due (open loop) or sent (closed loop), in nanoseconds.
    /// Requests without an answer are in here with the time waited so far: at least that long.
    pub intended: Histogram<u64>,
    /// From the moment the request was really sent, in nanoseconds.
    pub sent: Histogram<u64>,
    /// Answered as asked.
    pub done: u64,
    /// Answered with an error that says nothing happened.
    pub refused: u64,
    /// Failed with an unknown outcome: timeouts, broken connections.
    pub in_doubt: u64,
    /// Reads that found no value.
    pub missing: u64,
}

impl Default for Series {
    fn default() -> Self {
        Self {
            intended: histogram(),
            sent: histogram(),
            done: 0,
            refused: 0,
            in_doubt: 0,
            missing: 0,
        }
    }
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3).expect("these bounds are valid")
}

/// What verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdicts {
    /// Values checked byte by byte.
    pub checked: u64,
    /// Values with a wrong byte or of another key.
    pub wrong: u64,
    /// Acknowledged writes that a read with quorum did not return: older value or none.
    pub lost: u64,
    /// Answers with more than one value.
    pub siblings: u64,
    /// The first few findings, in words.
    pub examples: Vec<String>,
}

/// How many findings are kept in words.
const EXAMPLES_MAX: usize = 10;

impl Verdicts {
    /// Keeps `example` while there is room.
    pub fn example(&mut self, example: impl FnOnce() -> String) {
        if self.examples.len() < EXAMPLES_MAX {
            self.examples.push(example());
        }
    }

    /// Adds what another worker or phase found.
    pub fn merge(&mut self, other: &Verdicts) {
        self.checked += other.checked;
        self.wrong += other.wrong;
        self.lost += other.lost;
        self.siblings += other.siblings;
        let room = EXAMPLES_MAX - self.examples.len().min(EXAMPLES_MAX);
        self.examples
            .extend(other.examples.iter().take(room).cloned());
    }
}

/// Everything that one worker, or a whole run, measured.
#[derive(Default)]
pub struct Recorder {
    series: [Series; 2],
    /// What verification found.
    pub verdicts: Verdicts,
    /// Operations that were due but never sent before the end.
    pub unsent: u64,
    /// The first few errors, in words.
    pub errors: Vec<String>,
}

impl Recorder {
    /// The series of one kind.
    pub fn series(&self, operation: Operation) -> &Series {
        &self.series[operation as usize]
    }

    /// The series of one kind, to add to.
    pub fn series_mut(&mut self, operation: Operation) -> &mut Series {
        &mut self.series[operation as usize]
    }

    /// Records the latency of one operation that ended, well or not.
    pub fn latency(&mut self, operation: Operation, intended: Duration, sent: Duration) {
        let series = self.series_mut(operation);
        series.intended.saturating_record(nanos(intended));
        series.sent.saturating_record(nanos(sent));
    }

    /// Keeps an error in words while there is room.
    pub fn error(&mut self, words: impl FnOnce() -> String) {
        if self.errors.len() < EXAMPLES_MAX {
            self.errors.push(words());
        }
    }

    /// Adds what another worker measured.
    pub fn merge(&mut self, other: &Recorder) {
        for (mine, theirs) in self.series.iter_mut().zip(&other.series) {
            mine.intended.add(&theirs.intended).expect("same bounds");
            mine.sent.add(&theirs.sent).expect("same bounds");
            mine.done += theirs.done;
            mine.refused += theirs.refused;
            mine.in_doubt += theirs.in_doubt;
            mine.missing += theirs.missing;
        }
        self.verdicts.merge(&other.verdicts);
        self.unsent += other.unsent;
        let room = EXAMPLES_MAX - self.errors.len().min(EXAMPLES_MAX);
        self.errors.extend(other.errors.iter().take(room).cloned());
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos())
        .unwrap_or(u64::MAX)
        .max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_adds_counts_latencies_and_findings() {
        let mut one = Recorder::default();
        one.latency(
            Operation::Read,
            Duration::from_millis(2),
            Duration::from_millis(1),
        );
        one.series_mut(Operation::Read).done += 1;
        let mut two = Recorder::default();
        two.latency(
            Operation::Read,
            Duration::from_millis(4),
            Duration::from_millis(1),
        );
        two.series_mut(Operation::Read).done += 1;
        two.verdicts.lost = 1;
        two.verdicts.example(|| "key 7".into());
        one.merge(&two);
        let series = one.series(Operation::Read);
        assert_eq!((series.done, series.intended.len()), (2, 2));
        assert!(series.intended.max() >= 4_000_000 && series.sent.max() < 2_000_000);
        assert_eq!(one.verdicts.examples, ["key 7"]);
    }
}
