//! One thread of the load generator: a handful of connections, one event loop, one recorder.
//!
//! The loop waits on epoll until a socket is ready or an operation is due (to the nanosecond, so
//! the pacing does not add a millisecond to what it measures), takes all answers, then sends
//! everything that is due, one `write` a connection.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rand_xoshiro::Xoshiro256PlusPlus;
use rustix::event::{Timespec, epoll};
use rustix::fd::OwnedFd;

use super::connection::{Connection, Order, Pending};
use super::ledger::Ledger;
use super::plan::{Pace, Source};
use super::protocol::{Answer, Protocol};
use super::recorder::{Operation, Recorder};
use super::value::{self, Wrong};

/// Pause before a broken connection is opened again.
const RECONNECT_AFTER: Duration = Duration::from_millis(50);
/// Longest wait in the event loop, so that timeouts and the end are noticed.
const WAIT_MAX: Duration = Duration::from_millis(20);
/// Time that an answer may take beyond the deadline given to the server.
const GRACE: Duration = Duration::from_secs(1);

/// What all workers of a run share.
pub struct Shared {
    /// The protocol.
    pub protocol: Protocol,
    /// The servers; connections are spread over them.
    pub addresses: Vec<SocketAddr>,
    /// What is known of the keys.
    pub ledger: Ledger,
    /// What is done.
    pub source: Source,
    /// Bytes of a value.
    pub value_bytes: usize,
    /// Deadline given to the server.
    pub timeout: Duration,
    /// Whether a missing key is a loss, because it is known to have been written.
    pub must_exist: bool,
    /// Whether reads see every acknowledged write (read and write quorums overlap).
    pub strict: bool,
    /// Set when the run is cut short.
    pub stop: AtomicBool,
}

/// A worker's own settings.
pub struct Settings {
    /// Number of this worker, for spreading connections.
    pub index: usize,
    /// Connections of this worker.
    pub connections: usize,
    /// Requests that a connection has outstanding at most.
    pub pipeline: usize,
    /// No operation starts after this.
    pub end: Option<Instant>,
    /// When operations are due.
    pub pace: Pace,
    /// Randomness of this worker.
    pub rng: Xoshiro256PlusPlus,
}

/// A place for a connection, open or not.
struct Slot<'a> {
    connection: Option<Connection<'a>>,
    retry_at: Instant,
    attempts: usize,
    /// Whether epoll also reports when the socket takes bytes again.
    watches_output: bool,
}

/// The state of one worker.
pub struct Worker<'a> {
    shared: &'a Shared,
    settings: Settings,
    epoll: OwnedFd,
    slots: Vec<Slot<'a>>,
    /// Operations to try again (fill and verify insist).
    again: VecDeque<(Operation, u64)>,
    exhausted: bool,
    turn: usize,
    scratch: Vec<u8>,
    recorder: Recorder,
}

impl<'a> Worker<'a> {
    /// A worker that has not connected yet.
    pub fn new(shared: &'a Shared, settings: Settings) -> std::io::Result<Self> {
        let now = Instant::now();
        let slots = (0..settings.connections)
            .map(|_| Slot {
                connection: None,
                retry_at: now,
                attempts: 0,
                watches_output: false,
            })
            .collect();
        Ok(Self {
            shared,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            slots,
            again: VecDeque::new(),
            exhausted: false,
            turn: 0,
            scratch: vec![0; shared.value_bytes],
            recorder: Recorder::default(),
            settings,
        })
    }

    /// Works until the source is exhausted or the end has come and every answer is in.
    pub fn run(mut self) -> std::io::Result<Recorder> {
        let mut events = Vec::with_capacity(self.slots.len().max(1));
        loop {
            let now = Instant::now();
            self.reconnect(now);
            self.send_due(now);
            if self.finished(now) {
                break;
            }
            self.wait(now, &mut events)?;
            for event in events.drain(..) {
                let epoll::Event { data, .. } = event;
                let index = usize::try_from(data.u64()).expect("a slot number");
                self.receive(index);
            }
            self.expire(Instant::now());
        }
        if let Pace::Open(arrivals) = &self.settings.pace {
            self.recorder.unsent += arrivals.backlog();
        }
        for index in 0..self.slots.len() {
            self.drop_connection(index, "the run ended");
        }
        Ok(self.recorder)
    }

    fn over(&self, now: Instant) -> bool {
        self.settings.end.is_some_and(|end| now >= end) || self.shared.stop.load(Ordering::Relaxed)
    }

    fn outstanding(&self) -> usize {
        let open = self
            .slots
            .iter()
            .filter_map(|slot| slot.connection.as_ref());
        open.map(Connection::outstanding).sum()
    }

    fn finished(&self, now: Instant) -> bool {
        let nothing_more = self.over(now) || (self.exhausted && self.again.is_empty());
        nothing_more && self.outstanding() == 0
    }

    fn wait(&mut self, now: Instant, events: &mut Vec<epoll::Event>) -> std::io::Result<()> {
        let mut timeout = WAIT_MAX;
        if let Pace::Open(arrivals) = &self.settings.pace
            && self.has_room()
            && !self.over(now)
        {
            timeout = timeout.min(arrivals.next_due().saturating_duration_since(now));
        }
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(timeout.subsec_nanos()),
        };
        events.clear();
        match epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(events),
            Some(&timeout),
        ) {
            Ok(_) => Ok(()),
            Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn has_room(&self) -> bool {
        self.slots.iter().any(|slot| self.room(slot))
    }

    fn room(&self, slot: &Slot<'_>) -> bool {
        slot.connection
            .as_ref()
            .is_some_and(|connection| connection.outstanding() < self.settings.pipeline)
    }

    fn reconnect(&mut self, now: Instant) {
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            if slot.connection.is_some() || slot.retry_at > now {
                continue;
            }
            let position = self.settings.index + index * 7 + slot.attempts;
            let address = self.shared.addresses[position % self.shared.addresses.len()];
            slot.attempts += 1;
            slot.retry_at = now + RECONNECT_AFTER;
            match Connection::open(address, &self.shared.protocol) {
                Ok(connection) => {
                    let data = epoll::EventData::new_u64(u64::try_from(index).expect("a slot"));
                    let interest = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
                    match epoll::add(&self.epoll, connection.stream(), data, interest) {
                        Ok(()) => {
                            slot.connection = Some(connection);
                            slot.watches_output = false;
                        }
                        Err(error) => self.recorder.error(|| format!("epoll: {error}")),
                    }
                }
                Err(error) => self.recorder.error(|| format!("{address}: {error}")),
            }
        }
    }

    /// Sends everything that is due and finds room, spread over the connections in turn.
    fn send_due(&mut self, now: Instant) {
        if let Pace::Open(arrivals) = &mut self.settings.pace {
            let until = self.settings.end.map_or(now, |end| end.min(now));
            arrivals.advance(until, &mut self.settings.rng);
        }
        let slots = self.slots.len();
        let mut idle = 0;
        while idle < slots && !self.over(now) {
            let index = self.turn % slots;
            self.turn += 1;
            if !self.room(&self.slots[index]) || !self.send_one(index, now) {
                idle += 1;
                continue;
            }
            idle = 0;
        }
        for index in 0..slots {
            self.flush(index);
        }
    }

    /// Sends the next operation over a connection that has room. `false` when none is due.
    fn send_one(&mut self, index: usize, now: Instant) -> bool {
        let intended = match &mut self.settings.pace {
            Pace::Closed => now,
            Pace::Open(arrivals) => match arrivals.take() {
                Some(intended) => intended,
                None => return false,
            },
        };
        let next = self
            .again
            .pop_front()
            .or_else(|| self.shared.source.next(&mut self.settings.rng));
        let Some((operation, key)) = next else {
            self.exhausted = true;
            return false;
        };
        let order = match operation {
            Operation::Read => Order {
                operation,
                key,
                intended,
                floor: self.shared.ledger.acknowledged(key),
                write: None,
            },
            Operation::Write => {
                let Some(turn) = self.shared.ledger.write_turn(key) else {
                    // Every key is being written: this one waits for its turn.
                    self.again.push_back((operation, key));
                    return false;
                };
                let key = turn.key;
                Order {
                    operation,
                    key,
                    intended,
                    floor: 0,
                    write: Some((turn, sequence_now())),
                }
            }
        };
        let connection = self.slots[index]
            .connection
            .as_mut()
            .expect("checked by the caller");
        connection.submit(&self.shared.protocol, order, &mut self.scratch);
        true
    }

    /// Sends what is queued; while the socket takes no more, epoll tells when it does again.
    fn flush(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        let Some(connection) = slot.connection.as_mut() else {
            return;
        };
        if !connection.wants_to_write() && !slot.watches_output {
            return;
        }
        let mut result = connection.flush();
        let blocked = connection.wants_to_write();
        if result.is_ok() && blocked != slot.watches_output {
            let mut interest = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
            interest.set(epoll::EventFlags::OUT, blocked);
            let data = epoll::EventData::new_u64(u64::try_from(index).expect("a slot"));
            result = epoll::modify(&self.epoll, connection.stream(), data, interest)
                .map_err(std::io::Error::from);
            slot.watches_output = blocked;
        }
        if let Err(error) = result {
            self.drop_connection(index, &error.to_string());
        }
    }

    fn receive(&mut self, index: usize) {
        let Some(connection) = self.slots[index].connection.as_mut() else {
            return;
        };
        let closed = connection.fill().err();
        loop {
            let Some(connection) = self.slots[index].connection.as_mut() else {
                return;
            };
            match connection.answer(&self.shared.protocol) {
                Ok(Some((pending, answer))) => self.settle(index, pending, answer),
                Ok(None) => break,
                Err(error) => return self.drop_connection(index, &error.to_string()),
            }
        }
        match closed {
            Some(error) => self.drop_connection(index, &error.to_string()),
            None => self.flush(index),
        }
    }

    /// Books one answer.
    fn settle(&mut self, index: usize, mut pending: Pending<'a>, answer: Answer) {
        if pending.reading_context {
            let context = match answer {
                Answer::Values { version, .. } | Answer::Missing { version } => version,
                Answer::Refused(words) | Answer::InDoubt(words) => {
                    return self.failed(pending, false, &words);
                }
                Answer::Written(_) => None,
            };
            let connection = self.slots[index]
                .connection
                .as_mut()
                .expect("it just answered");
            connection.submit_write(&self.shared.protocol, pending, context, &mut self.scratch);
            return;
        }
        match answer {
            Answer::Refused(words) => return self.failed(pending, false, &words),
            Answer::InDoubt(words) => return self.failed(pending, true, &words),
            _ => {}
        }
        self.record_latency(&pending);
        self.recorder.series_mut(pending.operation).done += 1;
        match (pending.write.take(), answer) {
            (Some((turn, sequence)), Answer::Written(version)) => {
                turn.acknowledged(sequence, version);
            }
            // HTTP may answer a write with a body.
            (Some((turn, sequence)), Answer::Values { version, .. }) => {
                turn.acknowledged(sequence, version);
            }
            (None, Answer::Values { values, .. }) => self.check(&pending, &values),
            (None, Answer::Missing { .. }) => {
                self.recorder.series_mut(Operation::Read).missing += 1;
                if self.shared.must_exist || (self.shared.strict && pending.floor > 0) {
                    self.recorder.verdicts.lost += 1;
                    self.recorder
                        .verdicts
                        .example(|| format!("key {}: missing", pending.key));
                }
            }
            (_, answer) => {
                self.recorder.verdicts.wrong += 1;
                self.recorder.verdicts.example(|| {
                    format!(
                        "key {}: {answer:?} answers a {}",
                        pending.key,
                        pending.operation.name()
                    )
                });
            }
        }
    }

    fn check(&mut self, pending: &Pending<'_>, values: &[Bytes]) {
        let verdicts = &mut self.recorder.verdicts;
        let mut newest = 0;
        for value in values {
            verdicts.checked += 1;
            match value::verify(pending.key, value) {
                Ok(sequence) => newest = newest.max(sequence),
                Err(wrong) => {
                    verdicts.wrong += 1;
                    verdicts.example(|| describe(pending.key, wrong));
                }
            }
        }
        if values.len() > 1 {
            verdicts.siblings += 1;
        }
        if self.shared.strict && newest < pending.floor {
            verdicts.lost += 1;
            verdicts.example(|| {
                format!(
                    "key {}: read version {newest}, but {} was acknowledged before",
                    pending.key, pending.floor
                )
            });
        }
    }

    fn record_latency(&mut self, pending: &Pending<'_>) {
        let now = Instant::now();
        self.recorder.latency(
            pending.operation,
            now.saturating_duration_since(pending.intended),
            now.saturating_duration_since(pending.sent),
        );
    }

    fn failed(&mut self, mut pending: Pending<'a>, in_doubt: bool, words: &str) {
        self.record_latency(&pending);
        let series = self.recorder.series_mut(pending.operation);
        if in_doubt {
            series.in_doubt += 1;
        } else {
            series.refused += 1;
        }
        self.recorder
            .error(|| format!("{}: {words}", pending.operation.name()));
        if let Some((turn, _)) = pending.write.take() {
            turn.failed();
        }
        if self.shared.source.insists() {
            self.again.push_back((pending.operation, pending.key));
        }
    }

    /// Gives up on requests that have waited too long, and on their connections.
    fn expire(&mut self, now: Instant) {
        let limit = self.shared.timeout + GRACE;
        for index in 0..self.slots.len() {
            let oldest = self.slots[index]
                .connection
                .as_ref()
                .and_then(Connection::oldest_sent);
            if oldest.is_some_and(|sent| now.saturating_duration_since(sent) > limit) {
                self.drop_connection(index, "no answer in time");
            }
        }
    }

    fn drop_connection(&mut self, index: usize, reason: &str) {
        let Some(connection) = self.slots[index].connection.take() else {
            return;
        };
        let address = connection.address;
        let abandoned = connection.abandon();
        if !abandoned.is_empty() {
            let words = format!("{address}: {reason}");
            for pending in abandoned {
                self.failed(pending, true, &words);
            }
        }
    }
}

/// Civil time in microseconds, as a version: it grows within a run and over runs.
fn sequence_now() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

fn describe(key: u64, wrong: Wrong) -> String {
    match wrong {
        Wrong::Short => format!("key {key}: a value too short to be ours"),
        Wrong::OtherKey { found } => format!("key {key}: the value of key {found}"),
        Wrong::Damaged { offset } => format!("key {key}: a wrong byte at offset {offset}"),
    }
}
