//! What becomes of an answer: it is booked, and judged by what is known of its key.

use std::collections::BTreeSet;

use bytes::Bytes;
use torc_measure::keys::unit;
use torc_measure::mix::Operation;

use super::{Task, Worker};
use crate::load::connection::{Keyed, Pending, read_key};
use crate::load::ledger::Floor;
use crate::load::protocol::{Answer, Entry};
use crate::load::recorder::Status;
use crate::load::value::{self, Sequence, Wrong};
use crate::load::world::{Nanos, World};

impl<'a, W: World> Worker<'a, W> {
    /// Books one answer.
    pub(super) fn settle(
        &mut self,
        number: usize,
        mut pending: Pending<'a>,
        answer: Answer,
        now: Nanos,
    ) {
        match answer {
            Answer::Refused(words) => self.failed(pending, Status::Refused, now, || words),
            Answer::InDoubt(words) => self.failed(pending, Status::InDoubt, now, || words),
            answer if pending.reads_first => {
                pending.reads_first = false;
                let context = version_of(&answer);
                self.judge_read(&pending, &answer, now);
                self.submit(number, pending, context.as_deref());
            }
            answer => self.done(pending, &answer, now),
        }
    }

    fn done(&mut self, mut pending: Pending<'a>, answer: &Answer, now: Nanos) {
        let status = match answer {
            _ if self.after_end(now) => Status::AfterEnd,
            Answer::Missing { .. } => Status::Missing,
            _ => Status::Ok,
        };
        self.record(&pending, status, now);
        if let Some(change) = pending.change.take() {
            self.waiting.wake(change.turn.key);
            // HTTP may answer a write with a body.
            let version = match answer {
                Answer::Written(version) | Answer::Value { version, .. } => version.clone(),
                other => return self.absurd(&pending, other),
            };
            self.carried(change.value_bytes.unwrap_or(0), now);
            let deletes = change.value_bytes.is_none();
            let by_us = self.shared.civil_us + now / 1000 + 1;
            change
                .turn
                .acknowledged(change.sequence, deletes, version, by_us);
        } else {
            self.judge_read(&pending, answer, now);
        }
    }

    /// A value of so many bytes was read or written.
    fn carried(&mut self, value_bytes: usize, now: Nanos) {
        if !self.after_end(now) {
            self.recorder.value_bytes += u64::try_from(value_bytes).unwrap_or(0);
        }
    }

    fn judge_read(&mut self, pending: &Pending<'_>, answer: &Answer, now: Nanos) {
        match (&pending.keys, answer) {
            (_, Answer::Page { entries, .. }) if pending.operation == Operation::Scan => {
                self.judge_page(pending, entries, now);
            }
            (Keyed::Many(keys), Answer::Many(answers)) if keys.len() == answers.len() => {
                for ((key, floor), answer) in keys.iter().zip(answers) {
                    self.judge_one(pending, *key, *floor, answer, now);
                }
            }
            (Keyed::One(key, floor), answer) => {
                self.judge_one(pending, *key, *floor, answer, now);
            }
            _ => self.absurd(pending, answer),
        }
    }

    /// What a scan returns is judged as if it had been read, by what was acknowledged before the scan
    /// was sent. Keys that are not the generator's say nothing, and one that is not there may be on
    /// another page.
    fn judge_page(&mut self, pending: &Pending<'_>, entries: &[Entry], now: Nanos) {
        let torcs = self.shared.protocol.pages_are_torcs();
        let sent_us = self.shared.civil_us + pending.sent / 1000;
        let mut seen = BTreeSet::new();
        for entry in entries {
            let key = String::from_utf8_lossy(&entry.key);
            // On Torc's ring each key comes after those before it. Where the ring is not known each comes
            // once at least.
            let place = (self.shared.targets.place(&entry.key), &entry.key);
            let last = seen.last().map(|(place, _)| *place);
            let fault = if !torcs {
                None
            } else if last.is_some_and(|last| place.0 < last) {
                Some("after keys behind it on the ring")
            } else if !seen.insert(place) {
                Some("twice")
            } else if entry.values.is_empty() {
                Some("without a value")
            } else {
                None
            };
            if let Some(fault) = fault {
                self.recorder.verdicts.wrong += 1;
                let words = || format!("{key}: {fault} on a page of a scan");
                self.recorder.verdicts.example(words);
            }
            if let Some(index) = read_key(&entry.key)
                && !entry.values.is_empty()
            {
                let floor = self.shared.ledger.floor_at(index, sent_us);
                self.check(index, floor, &entry.values, now);
            }
        }
    }

    fn judge_one(
        &mut self,
        pending: &Pending<'_>,
        key: u64,
        floor: Floor,
        answer: &Answer,
        now: Nanos,
    ) {
        match answer {
            Answer::Value { value, .. } => self.check(key, floor, std::slice::from_ref(value), now),
            Answer::Siblings { values, .. } => self.check(key, floor, values, now),
            Answer::Missing { .. } => self.missing(key, floor, now),
            other => self.absurd(pending, other),
        }
    }

    fn absurd(&mut self, pending: &Pending<'_>, answer: &Answer) {
        let verdicts = &mut self.recorder.verdicts;
        verdicts.wrong += 1;
        let (key, name) = (pending.key(), pending.operation.name());
        verdicts.example(|| format!("key {key}: {answer:?} answers a {name}"));
    }

    fn missing(&mut self, key: u64, floor: Floor, now: Nanos) {
        let judging = self.shared.judging;
        if judging.may_evict {
            return;
        }
        let known = judging.must_exist || !self.shared.ledger.may_be_missing(key, floor);
        let now_us = self.shared.civil_us + now / 1000;
        let expired = self.shared.ttl_seconds.is_some_and(|seconds| {
            // A second of tolerance: servers expire by their own clocks.
            let lives_us = u64::from(seconds.saturating_sub(1)) * 1_000_000;
            floor.sequence.micros() + lives_us < now_us
        });
        if !known || expired {
            return;
        }
        let verdicts = &mut self.recorder.verdicts;
        if judging.strict || judging.must_exist {
            verdicts.lost += 1;
            verdicts.example(|| format!("key {key}: missing"));
        } else {
            verdicts.stale += 1;
        }
    }

    fn check(&mut self, key: u64, floor: Floor, values: &[Bytes], now: Nanos) {
        let judging = self.shared.judging;
        for value in values {
            self.carried(value.len(), now);
        }
        if judging.share < 1.0 && unit(&mut self.settings.rng) >= judging.share {
            return;
        }
        let verdicts = &mut self.recorder.verdicts;
        let mut newest = Sequence(0);
        for value in values {
            verdicts.checked += 1;
            match value::verify(key, value) {
                Ok(sequence) => newest = newest.max(sequence),
                Err(wrong) => {
                    verdicts.wrong += 1;
                    verdicts.example(|| describe(key, wrong));
                }
            }
        }
        if values.len() > 1 {
            verdicts.siblings += 1;
        }
        if newest >= floor.sequence {
            return;
        }
        if judging.strict {
            verdicts.lost += 1;
            verdicts.example(|| {
                format!(
                    "key {key}: read version {}, but {} was acknowledged before",
                    newest.0, floor.sequence.0
                )
            });
        } else {
            verdicts.stale += 1;
            let behind = newest.versions_to(floor.sequence);
            verdicts.stale_versions_max = verdicts.stale_versions_max.max(behind);
            let now_us = self.shared.civil_us + now / 1000;
            let age = now_us.saturating_sub(floor.sequence.micros());
            verdicts.stale_us_max = verdicts.stale_us_max.max(age);
        }
    }

    fn record(&mut self, pending: &Pending<'_>, status: Status, now: Nanos) {
        let intended = now.saturating_sub(pending.due.at);
        let sent = now.saturating_sub(pending.sent);
        self.recorder
            .record(pending.operation, status, intended, Some(sent));
        self.recorder
            .record_target(pending.target, pending.operation, status, intended, sent);
        self.settings.schedule.answered(pending.due, now);
    }

    /// Books an operation that was not done.
    pub(super) fn failed(
        &mut self,
        mut pending: Pending<'a>,
        status: Status,
        now: Nanos,
        words: impl FnOnce() -> String,
    ) {
        self.record(&pending, status, now);
        let name = pending.operation.name();
        if status != Status::Unfinished {
            self.recorder.error(|| format!("{name}: {}", words()));
        }
        if let Some(change) = pending.change.take() {
            self.waiting.wake(change.turn.key);
            let may_delete = change.value_bytes.is_none() && status != Status::Refused;
            change.turn.failed(may_delete);
        }
        if self.shared.source.insists() {
            self.again.push_back(Task {
                operation: pending.operation,
                key: Some(pending.key()),
                row: None,
                due: pending.due,
                waited: false,
            });
        }
    }
}

fn version_of(answer: &Answer) -> Option<Bytes> {
    match answer {
        Answer::Value { version, .. }
        | Answer::Siblings { version, .. }
        | Answer::Missing { version } => version.clone(),
        _ => None,
    }
}

fn describe(key: u64, wrong: Wrong) -> String {
    match wrong {
        Wrong::Short => format!("key {key}: a value too short to be ours"),
        Wrong::OtherKey { found } => format!("key {key}: the value of key {found}"),
        Wrong::Damaged { offset } => format!("key {key}: a wrong byte at offset {offset}"),
    }
}
