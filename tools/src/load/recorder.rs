//! What was measured, mergeable over workers, intervals and machines.
//!
//! Every operation is recorded once, under its kind and how it ended, from the time it was due and
//! from the time it was sent. What has no answer is recorded with the time waited so far and counts
//! as *censored*: it took at least that long.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use torc_measure::mix::Operation;

use super::health::{Health, Thread};
use super::sparse::Sparse;
use super::world::Nanos;

/// Highest latency that is told apart, in nanoseconds; longer ones count as this.
pub const LATENCY_NS_MAX: u64 = 3_600_000_000_000;
/// How many findings are kept in words.
const EXAMPLES_MAX: usize = 10;

/// Letters of an error that are kept; a server may send thousands.
const ERROR_LETTERS_MAX: usize = 300;

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    /// Answered as asked.
    Ok,
    /// A read that found no value.
    Missing,
    /// Answered as one of the two above, but after the end of a closed loop: its latency counts, and
    /// the rate has nothing of it.
    AfterEnd,
    /// Answered with an error that says nothing happened.
    Refused,
    /// Answered with an error that leaves the outcome open, or its connection broke.
    InDoubt,
    /// No answer within the time limit. Censored.
    TimedOut,
    /// No answer when the run ended. Censored.
    Unfinished,
    /// Due before the end, and never sent. Censored.
    Unsent,
}

impl Status {
    /// All of them, in order of `as usize`.
    pub const ALL: [Status; 8] = [
        Status::Ok,
        Status::Missing,
        Status::AfterEnd,
        Status::Refused,
        Status::InDoubt,
        Status::TimedOut,
        Status::Unfinished,
        Status::Unsent,
    ];

    /// Name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Missing => "missing",
            Status::AfterEnd => "after_end",
            Status::Refused => "refused",
            Status::InDoubt => "in_doubt",
            Status::TimedOut => "timed_out",
            Status::Unfinished => "unfinished",
            Status::Unsent => "unsent",
        }
    }

    /// The one with this name.
    pub fn named(name: &str) -> Option<Status> {
        Status::ALL.into_iter().find(|one| one.name() == name)
    }

    /// Whether it was refused, in doubt or without an answer.
    pub fn failed(self) -> bool {
        !matches!(self, Status::Ok | Status::Missing | Status::AfterEnd)
    }

    /// Whether the latency is only known to be at least what was recorded.
    pub fn censored(self) -> bool {
        matches!(self, Status::TimedOut | Status::Unfinished | Status::Unsent)
    }
}

/// Latencies in nanoseconds, from two beginnings.
#[derive(Clone)]
pub struct Dual {
    /// From the moment the request was due.
    pub intended: Histogram<u64>,
    /// From the moment the request was really sent; nothing of what was never sent.
    pub sent: Histogram<u64>,
}

impl Default for Dual {
    fn default() -> Self {
        Self {
            intended: histogram(3),
            sent: histogram(3),
        }
    }
}

impl Dual {
    fn add(&mut self, other: &Dual) {
        add(&mut self.intended, &other.intended);
        add(&mut self.sent, &other.sent);
    }

    fn touch(&mut self) {
        self.intended.reset();
        self.sent.reset();
    }

    fn clear(&mut self) {
        // Clearing costs a pass over the buckets; most intervals leave most of them alone.
        if !self.intended.is_empty() {
            self.intended.reset();
        }
        if !self.sent.is_empty() {
            self.sent.reset();
        }
    }
}

/// An empty histogram of nanoseconds with so many significant digits.
pub fn histogram(digits: u8) -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_NS_MAX, digits).expect("these bounds are valid")
}

/// Adds histograms of the same bounds.
pub fn add(to: &mut Histogram<u64>, from: &Histogram<u64>) {
    if !from.is_empty() {
        to.add(from).expect("same bounds");
    }
}

/// One kind of operation.
#[derive(Clone, Default)]
pub struct Series {
    statuses: [Option<Box<Dual>>; Status::ALL.len()],
}

impl Series {
    /// Operations that ended so.
    pub fn count(&self, status: Status) -> u64 {
        let dual = self.statuses[status as usize].as_ref();
        dual.map_or(0, |dual| dual.intended.len())
    }

    /// Answered as asked, or with "there is no such key".
    pub fn done(&self) -> u64 {
        self.count(Status::Ok) + self.count(Status::Missing)
    }

    /// Refused, in doubt or without an answer.
    pub fn failed(&self) -> u64 {
        let failed = Status::ALL.into_iter().filter(|status| status.failed());
        failed.map(|status| self.count(status)).sum()
    }

    /// Everything that was due.
    pub fn total_count(&self) -> u64 {
        Status::ALL.iter().map(|status| self.count(*status)).sum()
    }

    /// The latencies of everything that was due, however it ended.
    pub fn total(&self) -> Dual {
        let mut total = Dual::default();
        for dual in self.statuses.iter().flatten() {
            total.add(dual);
        }
        total
    }

    /// The latencies of what ended so.
    pub fn of(&self, status: Status) -> Option<&Dual> {
        self.statuses[status as usize].as_deref()
    }

    fn dual(&mut self, status: Status) -> &mut Dual {
        self.statuses[status as usize].get_or_insert_default()
    }

    /// Adds latencies of what ended so.
    pub fn add_dual(&mut self, status: Status, dual: &Dual) {
        self.dual(status).add(dual);
    }

    /// Adds another series.
    pub fn merge(&mut self, other: &Series) {
        for status in Status::ALL {
            if let Some(theirs) = other.of(status) {
                self.dual(status).add(theirs);
            }
        }
    }
}

/// What verification found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdicts {
    /// Values checked byte by byte.
    pub checked: u64,
    /// Values with a wrong byte or of another key.
    pub wrong: u64,
    /// Acknowledged writes that a read with quorum did not return: older value or none.
    pub lost: u64,
    /// The same where quorums do not overlap, so that it is no fault.
    pub stale: u64,
    /// Versions that the stalest read was behind.
    pub stale_versions_max: u64,
    /// Age of the newer value that the stalest read did not see, in microseconds.
    pub stale_us_max: u64,
    /// Answers with more than one value.
    pub siblings: u64,
    /// The first few findings, in words.
    pub examples: Vec<String>,
}

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
        self.stale += other.stale;
        self.stale_versions_max = self.stale_versions_max.max(other.stale_versions_max);
        self.stale_us_max = self.stale_us_max.max(other.stale_us_max);
        self.siblings += other.siblings;
        take_some(&mut self.examples, &other.examples);
    }
}

/// Words that may be a server's, as a line that no terminal takes for an order.
fn printable(words: &str) -> String {
    let letters = words.chars().take(ERROR_LETTERS_MAX);
    let shown = letters.map(|letter| if letter.is_control() { ' ' } else { letter });
    shown.collect()
}

fn take_some(mine: &mut Vec<String>, theirs: &[String]) {
    for words in theirs {
        if mine.len() < EXAMPLES_MAX && !mine.contains(words) {
            mine.push(words.clone());
        }
    }
}

/// What it took that one key has one writer at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turns {
    /// Writes that went to another key than the drawn one, which was being written.
    pub moved: u64,
    /// Operations that were due and waited until a write of their key was answered.
    pub waited: u64,
}

/// What went to one target, a server or a shard of it: latencies by operation and how it ended.
#[derive(Clone, Default)]
pub struct Target {
    cells: [[Option<Box<Cell>>; Status::ALL.len()]; Operation::ALL.len()],
}

/// Latencies of one operation that ended so on one target, in nanoseconds.
#[derive(Clone, Default)]
pub struct Cell {
    /// From the moment each was due.
    pub intended: Sparse,
    /// From the moment each was sent.
    pub sent: Sparse,
}

impl Target {
    /// What there is of each operation and how it ended; nothing of what did not occur.
    pub fn cells(&self) -> impl Iterator<Item = (Operation, Status, &Cell)> {
        Operation::ALL.into_iter().flat_map(move |operation| {
            Status::ALL.into_iter().filter_map(move |status| {
                let cell = self.cells[operation as usize][status as usize].as_deref()?;
                (cell.intended.len() > 0).then_some((operation, status, cell))
            })
        })
    }

    /// Latencies from the moment each operation was due, whatever it was and however it ended.
    pub fn intended(&self) -> Histogram<u64> {
        let mut all = Sparse::default();
        for (_, _, cell) in self.cells() {
            all.add(&cell.intended);
        }
        all.dense()
    }

    /// What there is of an operation that ended so, to add to.
    pub fn cell_mut(&mut self, operation: Operation, status: Status) -> &mut Cell {
        self.cells[operation as usize][status as usize].get_or_insert_default()
    }

    fn merge(&mut self, other: &Target) {
        for (operation, status, theirs) in other.cells() {
            let mine = self.cell_mut(operation, status);
            mine.intended.add(&theirs.intended);
            mine.sent.add(&theirs.sent);
        }
    }

    fn clear(&mut self) {
        for cell in self.cells.iter_mut().flatten().flatten() {
            cell.intended.clear();
            cell.sent.clear();
        }
    }
}

/// Everything that one worker measured in an interval, or a whole run.
#[derive(Clone, Default)]
pub struct Recorder {
    series: [Series; Operation::ALL.len()],
    targets: Vec<Target>,
    /// What verification found.
    pub verdicts: Verdicts,
    /// Whether the client kept up.
    pub health: Health,
    /// Where writers met.
    pub turns: Turns,
    /// Bytes of values read and written.
    pub value_bytes: u64,
    /// The first few errors that differ, in words.
    pub errors: Vec<String>,
    /// Errors by their words, without numbers.
    pub error_kinds: BTreeMap<String, u64>,
}

impl Recorder {
    /// An empty one whose memory for these kinds is there already. A page that is touched for the
    /// first time costs microseconds, a huge one milliseconds, in which requests would leave late.
    pub fn touched(operations: &[Operation]) -> Self {
        let mut recorder = Self::default();
        for operation in operations {
            recorder.series_mut(*operation).dual(Status::Ok).touch();
            if !operation.writes() {
                recorder
                    .series_mut(*operation)
                    .dual(Status::Missing)
                    .touch();
            }
        }
        recorder.health.lag.reset();
        recorder.health.pauses.gaps.reset();
        recorder
    }

    /// The series of one kind.
    pub fn series(&self, operation: Operation) -> &Series {
        &self.series[operation as usize]
    }

    /// The series of one kind, to add to.
    pub fn series_mut(&mut self, operation: Operation) -> &mut Series {
        &mut self.series[operation as usize]
    }

    /// Records one operation that ended: time since it was due, and since it was sent unless it
    /// never was, in nanoseconds.
    pub fn record(
        &mut self,
        operation: Operation,
        status: Status,
        intended: Nanos,
        sent: Option<Nanos>,
    ) {
        let series = self.series_mut(operation);
        let dual = series.dual(status);
        dual.intended.saturating_record(intended.max(1));
        if let Some(sent) = sent {
            dual.sent.saturating_record(sent.max(1));
        }
    }

    /// Records the same under its target, of an operation that was sent.
    pub fn record_target(
        &mut self,
        target: usize,
        operation: Operation,
        status: Status,
        intended: Nanos,
        sent: Nanos,
    ) {
        let cell = self.target_mut(target).cell_mut(operation, status);
        cell.intended.record(intended);
        cell.sent.record(sent);
    }

    /// A target, to add to.
    pub fn target_mut(&mut self, target: usize) -> &mut Target {
        if self.targets.len() <= target {
            self.targets.resize_with(target + 1, Target::default);
        }
        &mut self.targets[target]
    }

    /// Targets by number, as far as anything went to them.
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// Answered operations of all kinds.
    pub fn done(&self) -> u64 {
        self.series.iter().map(Series::done).sum()
    }

    /// Operations of all kinds that ended so.
    pub fn count(&self, status: Status) -> u64 {
        self.series.iter().map(|series| series.count(status)).sum()
    }

    /// Keeps an error in words while there is room, and counts its kind.
    pub fn error(&mut self, words: impl FnOnce() -> String) {
        let words = printable(&words());
        let kind: String = words
            .chars()
            .filter(|letter| !letter.is_ascii_digit())
            .take(80)
            .collect();
        if self.error_kinds.len() < EXAMPLES_MAX || self.error_kinds.contains_key(&kind) {
            *self.error_kinds.entry(kind).or_default() += 1;
        }
        take_some(&mut self.errors, &[words]);
    }

    /// Adds what another worker or interval measured.
    pub fn merge(&mut self, other: &Recorder) {
        for (mine, theirs) in self.series.iter_mut().zip(&other.series) {
            mine.merge(theirs);
        }
        for (number, target) in other.targets.iter().enumerate() {
            self.target_mut(number).merge(target);
        }
        self.verdicts.merge(&other.verdicts);
        self.health.merge(&other.health);
        self.turns.moved += other.turns.moved;
        self.turns.waited += other.turns.waited;
        self.value_bytes += other.value_bytes;
        take_some(&mut self.errors, &other.errors);
        for (kind, count) in &other.error_kinds {
            if self.error_kinds.len() < EXAMPLES_MAX || self.error_kinds.contains_key(kind) {
                *self.error_kinds.entry(kind.clone()).or_default() += count;
            }
        }
    }

    /// Empties it and keeps its memory, so that the next interval allocates nothing.
    pub fn clear(&mut self) {
        for series in &mut self.series {
            for dual in series.statuses.iter_mut().flatten() {
                dual.clear();
            }
        }
        self.targets.iter_mut().for_each(Target::clear);
        self.verdicts = Verdicts::default();
        self.health.clear();
        self.turns = Turns::default();
        self.value_bytes = 0;
        self.errors.clear();
        self.error_kinds.clear();
    }

    /// Notes how a worker thread spent its time.
    pub fn thread(&mut self, number: usize, thread: Thread) {
        self.health.threads.entry(number).or_default().add(thread);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_adds_counts_latencies_and_findings() {
        let mut one = Recorder::default();
        one.record(Operation::Read, Status::Ok, 2_000_000, Some(1_000_000));
        let mut two = Recorder::default();
        two.record(Operation::Read, Status::Ok, 4_000_000, Some(1_000_000));
        two.record_target(3, Operation::Read, Status::Ok, 4_000_000, 1_000_000);
        two.record_target(3, Operation::Read, Status::TimedOut, 9_000_000, 8_000_000);
        two.verdicts.lost = 1;
        two.verdicts.example(|| "key 7".into());
        one.merge(&two);
        let series = one.series(Operation::Read);
        let total = series.total();
        assert_eq!((series.done(), total.intended.len()), (2, 2));
        assert!(total.intended.max() >= 4_000_000 && total.sent.max() < 2_000_000);
        assert_eq!(one.verdicts.examples, ["key 7"]);
        assert_eq!(one.targets()[0].cells().count(), 0);
        let late = one.targets()[3]
            .cells()
            .find(|(_, status, _)| *status == Status::TimedOut);
        let (operation, _, cell) = late.unwrap();
        assert_eq!(
            (operation, cell.intended.len(), cell.sent.len()),
            (Operation::Read, 1, 1)
        );
        assert!(cell.sent.dense().max() < cell.intended.dense().min());
        assert_eq!(one.targets()[3].intended().len(), 2);
        one.clear();
        assert_eq!(one.done(), 0);
        assert_eq!(one.series(Operation::Read).total().intended.len(), 0);
        assert_eq!(one.targets()[3].cells().count(), 0);
    }

    #[test]
    fn what_was_never_answered_stays_in_the_tail_and_marks_it() {
        let mut recorder = Recorder::default();
        for _ in 0..99 {
            recorder.record(Operation::Read, Status::Ok, 1_000, Some(1_000));
        }
        recorder.record(
            Operation::Read,
            Status::TimedOut,
            5_000_000,
            Some(4_000_000),
        );
        recorder.record(Operation::Read, Status::Unsent, 9_000_000, None);
        let series = recorder.series(Operation::Read);
        assert_eq!((series.done(), series.total_count()), (99, 101));
        let total = series.total();
        assert!(total.intended.value_at_percentile(99.9) >= 9_000_000);
        assert_eq!(
            total.sent.len(),
            100,
            "what was never sent has no time since it was sent"
        );
    }

    #[test]
    fn errors_of_one_kind_are_counted_together() {
        let mut recorder = Recorder::default();
        for request in 0..50 {
            recorder.error(|| format!("no answer to request {request}"));
        }
        assert_eq!(recorder.errors.len(), EXAMPLES_MAX);
        assert_eq!(recorder.error_kinds["no answer to request "], 50);
    }

    #[test]
    fn an_error_that_repeats_leaves_room_for_others() {
        let mut recorder = Recorder::default();
        for _ in 0..50 {
            recorder.error(|| "connection refused".into());
        }
        let mut total = Recorder::default();
        total.merge(&recorder);
        recorder.error(|| "reset".into());
        total.merge(&recorder);
        assert_eq!(total.errors, ["connection refused", "reset"]);
        assert_eq!(total.error_kinds["connection refused"], 100);
    }

    #[test]
    fn a_servers_words_stay_one_short_line_without_orders_to_the_terminal() {
        let mut recorder = Recorder::default();
        recorder.error(|| format!("ERR \u{1b}[2J\nall well{}", "!".repeat(9999)));
        assert!(recorder.errors[0].starts_with("ERR  [2J all well!"));
        assert_eq!(recorder.errors[0].len(), ERROR_LETTERS_MAX);
    }
}
