//! One thread of the load generator: a handful of connections, one event loop, one recorder.
//!
//! The loop waits until a connection has something or an operation is due, takes answers one
//! connection at a time, and between them sends what has become due, so that neither waits long
//! for the other. It is the same code in real and in virtual time (see [`World`]).

mod connect;
mod settle;
mod waiting;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use rand_xoshiro::Xoshiro256PlusPlus;

use super::connection::{Change, Connection, Keyed, Pending, Scratch};
use super::health::Thread;
use super::ledger::Ledger;
use super::protocol::Protocol;
use super::recorder::{Recorder, Status};
use super::schedule::{Due, Schedule};
use super::source::Source;
use super::targets::Targets;
use super::trace::Row;
use super::value::VALUE_BYTES_MIN;
use super::world::{Nanos, World};
use torc_measure::keys::Keys;
use torc_measure::mix::Operation;
use torc_measure::sizes::Sizes;
use waiting::Waiting;

#[cfg(test)]
pub use connect::Connected;

/// Pause before a broken connection is opened again.
const RECONNECT_AFTER_NS: Nanos = 50_000_000;
/// How long a server may take to accept.
const CONNECT_WITHIN_NS: Nanos = 2_000_000_000;
/// Why connections break.
const NOT_ACCEPTED: &str = "not accepted in time";
const CLOSED: &str = "the server closed the connection";
/// How often time limits, broken connections and the stop flag are looked after.
const CHECK_EVERY_NS: Nanos = 20_000_000;
/// Connections that are looked after at a time: what has become due waits for it. Of more, a part has its
/// turn more often.
const CHECKED_MAX: usize = 256;
/// How often turns to write a key are asked for again that other workers may have had.
const TURNS_EVERY_NS: Nanos = 100_000;
/// Operations that wait for their turn at most. While so many do, nothing more is begun.
const WAITING_MAX: usize = 1 << 16;
/// Time that an answer may take beyond the deadline given to the server.
const GRACE_NS: Nanos = 1_000_000_000;

/// What all workers of a run share.
pub struct Shared {
    /// The protocol.
    pub protocol: Protocol,
    /// The servers; connections are spread over them.
    pub addresses: Vec<SocketAddr>,
    /// Where keys go, for the report.
    pub targets: Targets,
    /// What is known of the keys.
    pub ledger: Ledger,
    /// What is done.
    pub source: Source,
    /// Bytes of a value.
    pub value_sizes: Sizes,
    /// Keys of a page.
    pub scan_sizes: Sizes,
    /// Keys of a read of several.
    pub batch_keys: usize,
    /// Seconds that values live.
    pub ttl_seconds: Option<u32>,
    /// Deadline given to the server.
    pub timeout_ns: Nanos,
    /// What is judged in an answer.
    pub judging: Judging,
    /// Civil time of the run's beginning, in microseconds.
    pub civil_us: u64,
    /// Set when the run is cut short.
    pub stop: AtomicBool,
}

/// What is judged in an answer.
#[derive(Clone, Copy, Debug)]
pub struct Judging {
    /// Whether a missing key is a loss, because it is known to have been written.
    pub must_exist: bool,
    /// Whether reads see every acknowledged write (read and write quorums overlap).
    pub strict: bool,
    /// Whether the server may throw values away (a cache, or a time to live).
    pub may_evict: bool,
    /// Share of the values that are checked byte by byte, 0 to 1.
    pub share: f64,
}

/// A worker's own settings.
pub struct Settings {
    /// Number of this worker, for spreading connections.
    pub index: usize,
    /// Connections of this worker.
    pub connections: usize,
    /// Connections that it opens at a time.
    pub opening: usize,
    /// Requests that a connection has outstanding at most.
    pub pipeline: usize,
    /// No operation starts after this; a run that is cut short ends when it is.
    pub end: Nanos,
    /// Length of an interval.
    pub interval: Nanos,
    /// When operations are due.
    pub schedule: Schedule,
    /// Randomness of this worker.
    pub rng: Xoshiro256PlusPlus,
}

/// An operation that is due.
#[derive(Clone, Copy)]
struct Task {
    operation: Operation,
    /// Its key; `None` = to be drawn.
    key: Option<u64>,
    /// The row of a trace that it is.
    row: Option<Row>,
    due: Due,
    /// Whether it has waited for the turn to write its key.
    waited: bool,
}

/// A place for a connection, open or not.
struct Slot<'a> {
    connection: Option<Connection<'a>>,
    connected: bool,
    /// When it was opened, or may be opened again.
    since: Nanos,
    attempts: usize,
    /// Whether it stands in the queue of those that have room.
    queued: bool,
}

/// Takes what was recorded in an interval, with its number, and leaves an empty recorder.
pub type Emit<'a> = &'a mut dyn FnMut(u64, &mut Recorder);

/// The state of one worker.
pub struct Worker<'a, W> {
    shared: &'a Shared,
    settings: Settings,
    world: W,
    slots: Vec<Slot<'a>>,
    /// Connections that have room, longest first.
    free: VecDeque<usize>,
    /// Since when there is one.
    free_since: Nanos,
    /// Connections with bytes that were not sent yet.
    unflushed: Vec<usize>,
    /// Operations to try again: fill and verify insist.
    again: VecDeque<Task>,
    /// Operations whose key is being written.
    waiting: Waiting,
    next_turns: Nanos,
    keys: Option<Keys>,
    exhausted: bool,
    outstanding: usize,
    scratch: Scratch,
    recorder: Recorder,
    interval_number: u64,
    interval_began: Nanos,
    waited: Nanos,
    /// What [`World::delayed`] was when the interval began.
    delayed: Nanos,
    /// What [`World::stolen`] was when the connections stood.
    stolen: Nanos,
    next_check: Nanos,
    /// Which connections are looked after then.
    next_part: usize,
    /// Why a connection broke last.
    why_broken: Option<String>,
}

impl<'a, W: World> Worker<'a, W> {
    /// A worker that has not connected yet, and fills an empty recorder first.
    pub fn new(shared: &'a Shared, settings: Settings, world: W, recorder: Recorder) -> Self {
        let slots = (0..settings.connections).map(|_| Slot {
            connection: None,
            connected: false,
            since: 0,
            attempts: 0,
            queued: false,
        });
        let keys = match &shared.source {
            Source::Mix { keys, .. } => Some(keys.clone()),
            _ => None,
        };
        Self {
            shared,
            world,
            slots: slots.collect(),
            free: VecDeque::new(),
            free_since: 0,
            unflushed: Vec::new(),
            again: VecDeque::new(),
            waiting: Waiting::default(),
            next_turns: 0,
            keys,
            exhausted: false,
            outstanding: 0,
            scratch: Scratch::default(),
            recorder,
            interval_number: 0,
            interval_began: 0,
            waited: 0,
            delayed: 0,
            stolen: 0,
            next_check: 0,
            next_part: 0,
            why_broken: None,
            settings,
        }
    }

    /// The world, e.g. to set its clock before [`Worker::run`].
    pub fn world(&mut self) -> &mut W {
        &mut self.world
    }

    /// Works until the source is exhausted or the end has come and every answer is in or given up.
    /// Each interval's record goes to `emit`, the last one too. Returns when the load ended, which is
    /// not after the end, whatever was still under way then.
    pub fn run(mut self, emit: Emit<'_>) -> std::io::Result<Nanos> {
        let mut ready = Vec::new();
        self.interval_began = self.world.now();
        self.delayed = self.world.delayed();
        let mut now = self.interval_began;
        loop {
            if self.shared.stop.load(Ordering::Relaxed) {
                self.settings.end = self.settings.end.min(now);
            }
            if now >= self.next_check {
                self.look_after(now);
            }
            if self.waiting.len() > 0 && now >= self.next_turns {
                self.next_turns = now + TURNS_EVERY_NS;
                self.waiting.wake_all();
            }
            self.send_due(now);
            if self.finished(now) {
                break;
            }
            let next = (self.interval_number + 1) * self.settings.interval;
            if now >= next && next < self.settings.end {
                self.emit(now, emit);
            }
            let before = self.world.now();
            let until = self.until(before);
            let pauses = &mut self.recorder.health.pauses;
            self.world.wait(until, &mut ready, pauses)?;
            now = self.world.now();
            self.waited += now - before;
            for slot in ready.drain(..) {
                self.receive(slot);
                // Taking an answer takes time, in which more may have become due.
                if !matches!(self.settings.schedule, Schedule::Closed) {
                    now = self.world.now();
                }
                self.send_due(now);
            }
            if self.over(now) {
                self.give_up(now);
            }
        }
        let ended = now.min(self.settings.end);
        self.count_unsent();
        if let Some(error) = self.settings.schedule.failed() {
            return Err(error);
        }
        for slot in 0..self.slots.len() {
            self.drop_connection(slot, Status::Unfinished, "the run ended");
        }
        let lost = Thread {
            stolen_ns: self.world.stolen().saturating_sub(self.stolen),
            ..Thread::default()
        };
        self.recorder.thread(self.settings.index, lost);
        let now = self.world.now();
        self.emit(now, emit);
        Ok(ended)
    }

    fn over(&self, now: Nanos) -> bool {
        now >= self.settings.end
    }

    /// Whether what is answered now is no part of the rate: in a closed loop the next operation would have
    /// begun with it, so the rate is what was answered in the time. Of an open loop it is what was due.
    fn after_end(&self, now: Nanos) -> bool {
        self.over(now) && matches!(self.settings.schedule, Schedule::Closed)
    }

    fn finished(&self, now: Nanos) -> bool {
        let nothing_more = self.over(now)
            || ((self.exhausted || self.settings.schedule.exhausted())
                && self.again.is_empty()
                && self.waiting.len() == 0);
        nothing_more && self.outstanding == 0
    }

    /// When there is something to do even if no connection has anything.
    fn until(&self, now: Nanos) -> Nanos {
        let mut until = self.next_check;
        let over = self.over(now);
        if !over {
            until = until.min(self.settings.end);
        }
        if over || self.free.is_empty() {
            return until;
        }
        if self.waiting.len() > 0 {
            until = until.min(self.next_turns);
        }
        if let Some(due) = self.settings.schedule.next_due()
            && self.waiting.len() < WAITING_MAX
        {
            until = until.min(due);
        }
        until
    }

    fn emit(&mut self, now: Nanos, emit: Emit<'_>) {
        let wall_ns = now.saturating_sub(self.interval_began);
        let delayed = self.world.delayed();
        let thread = Thread {
            busy_ns: wall_ns.saturating_sub(self.waited),
            wall_ns,
            delayed_ns: delayed.saturating_sub(self.delayed),
            ..Thread::default()
        };
        self.delayed = delayed;
        self.recorder.thread(self.settings.index, thread);
        emit(self.interval_number, &mut self.recorder);
        self.waited = 0;
        self.interval_began = now;
        // Answers after the end belong to the last interval.
        let last = self.settings.end.saturating_sub(1) / self.settings.interval;
        self.interval_number = (now / self.settings.interval).min(last);
    }

    /// Looks after the next connections in turn; each has its turn within [`CHECK_EVERY_NS`].
    fn look_after(&mut self, now: Nanos) {
        let parts = self.slots.len().div_ceil(CHECKED_MAX).max(1);
        let part = self.next_part % parts;
        self.next_part = part + 1;
        for slot in (part..self.slots.len()).step_by(parts) {
            self.reconnect(slot, now);
            self.expire(slot, now);
        }
        let parts = u64::try_from(parts).expect("a small number");
        self.next_check = now + CHECK_EVERY_NS / parts;
    }

    fn reconnect(&mut self, number: usize, now: Nanos) {
        let slot = &mut self.slots[number];
        if slot.connection.is_some() || slot.since > now {
            return;
        }
        let position = self.settings.index + number + slot.attempts;
        let address = position % self.shared.addresses.len();
        slot.attempts += 1;
        slot.since = now;
        match self.world.open(number, self.shared.addresses[address]) {
            Ok(()) => {
                slot.connection = Some(Connection::new(address, &self.shared.protocol));
            }
            Err(error) => {
                slot.since = now + RECONNECT_AFTER_NS;
                let words = format!("{}: {error}", self.shared.addresses[address]);
                self.recorder.health.broken += 1;
                self.recorder.error(|| words.clone());
                self.why_broken = Some(words);
            }
        }
    }

    /// Lets a connection take requests if it has room.
    fn offer(&mut self, number: usize, now: Nanos) {
        let slot = &mut self.slots[number];
        let room = slot
            .connection
            .as_ref()
            .is_some_and(|connection| connection.outstanding() < self.settings.pipeline);
        if room && slot.connected && !slot.queued {
            slot.queued = true;
            if self.free.is_empty() {
                self.free_since = now;
            }
            self.free.push_back(number);
        }
    }

    /// Sends everything that is due and finds room, spread over the connections in turn.
    fn send_due(&mut self, mut now: Nanos) {
        while let Some(number) = self.free.front().copied() {
            if self.over(now) {
                break;
            }
            if !self.slots[number].connected {
                self.slots[number].queued = false;
                self.free.pop_front();
                continue;
            }
            let Some(task) = self.next_task(now) else {
                break;
            };
            let open = !matches!(self.settings.schedule, Schedule::Closed);
            if open {
                now = self.world.now();
            }
            let overtakes = !task.waited && self.waiting.holds(task.key);
            let prepared = (!overtakes).then(|| self.prepare(task, now)).flatten();
            let Some((pending, context)) = prepared else {
                self.wait_for_turn(task);
                continue;
            };
            self.free.pop_front();
            self.slots[number].queued = false;
            if task.waited {
                // What is behind it may follow.
                self.waiting.wake(pending.key());
            } else if open {
                let lag = now.saturating_sub(task.due.at.max(self.free_since));
                self.recorder.health.lag.saturating_record(lag.max(1));
            }
            self.submit(number, pending, context.as_deref());
            self.offer(number, now);
            // A connection that is full waits for nothing more.
            if self.slots[number].queued {
                self.unflushed.push(number);
            } else {
                self.flush(number);
            }
        }
        while let Some(number) = self.unflushed.pop() {
            self.flush(number);
        }
    }

    fn submit(&mut self, number: usize, mut pending: Pending<'a>, context: Option<&[u8]>) {
        let Some(connection) = self.slots[number].connection.as_mut() else {
            return;
        };
        pending.target = self.shared.targets.of(pending.key(), connection.address);
        self.outstanding += 1;
        connection.submit(&self.shared.protocol, pending, context, &mut self.scratch);
    }

    fn wait_for_turn(&mut self, task: Task) {
        if task.waited {
            return self.waiting.put_back(task);
        }
        self.recorder.turns.waited += 1;
        let waited = true;
        self.waiting.push(Task { waited, ..task });
    }

    /// What comes next. `None` when nothing is due, or all is done.
    fn next_task(&mut self, now: Nanos) -> Option<Task> {
        let waits = self.waiting.take_awake();
        if let Some(task) = waits.or_else(|| self.again.pop_front()) {
            return Some(task);
        }
        // In a closed loop what waits has a connection of its own.
        let room = match self.settings.schedule {
            Schedule::Closed => self.free.len(),
            _ => WAITING_MAX,
        };
        if self.exhausted || self.waiting.len() >= room {
            return None;
        }
        let (due, row) = self.settings.schedule.take(now, &mut self.settings.rng)?;
        let next = match row {
            Some(row) => Some((row.operation, Some(row.key))),
            None => self.shared.source.next(&mut self.settings.rng),
        };
        self.exhausted = next.is_none();
        next.map(|(operation, key)| Task {
            operation,
            key,
            row,
            due,
            waited: false,
        })
    }

    fn draw_key(&mut self, now: Nanos) -> u64 {
        let count = self.shared.ledger.settled();
        match &mut self.keys {
            Some(keys) => keys.next(&mut self.settings.rng, count, now),
            None => 0,
        }
    }

    /// The request for an operation, with the context of its write. `None` while its key is being
    /// written.
    fn prepare(&mut self, task: Task, now: Nanos) -> Option<(Pending<'a>, Option<bytes::Bytes>)> {
        let Task {
            operation,
            key,
            row,
            due,
            ..
        } = task;
        let shared = self.shared;
        let ledger = &shared.ledger;
        let with_floor = |key| (key, ledger.floor(key));
        if !operation.writes() {
            let keys = if operation == Operation::Batch {
                let keys = (0..shared.batch_keys).map(|_| with_floor(self.draw_key(now)));
                Keyed::Many(keys.collect())
            } else {
                let (key, floor) = with_floor(key.unwrap_or_else(|| self.draw_key(now)));
                Keyed::One(key, floor)
            };
            let mut pending = Pending::new(operation, due, now, keys);
            if operation == Operation::Scan {
                pending.limit = shared.scan_sizes.sample(&mut self.settings.rng, 1);
            }
            return Some((pending, None));
        }
        let mut turn = match (operation, key) {
            (Operation::Insert, _) => ledger.insert_turn()?,
            (_, Some(key)) => ledger.write_turn(key)?,
            (_, None) => ledger.write_turn_from(self.draw_key(now))?,
        };
        self.recorder.turns.moved += u64::from(turn.moved);
        let least = u32::try_from(VALUE_BYTES_MIN).expect("a small number");
        let size = match row {
            Some(row) => row.value_bytes,
            None => shared.value_sizes.sample(&mut self.settings.rng, least),
        };
        let ttl_seconds = match row {
            Some(row) => (row.ttl_seconds > 0).then_some(row.ttl_seconds),
            None => shared.ttl_seconds,
        };
        let context = turn.context();
        let reads_first = operation == Operation::Modify
            || (operation != Operation::Insert
                && context.is_none()
                && shared.protocol.writer_must_read());
        let (key, floor) = with_floor(turn.key);
        if operation == Operation::Delete {
            turn.begin_deletion();
        }
        let mut pending = Pending::new(operation, due, now, Keyed::One(key, floor));
        pending.reads_first = reads_first;
        pending.change = Some(Change {
            sequence: turn.next_sequence(shared.civil_us + now / 1000),
            turn,
            value_bytes: (operation != Operation::Delete)
                .then(|| usize::try_from(size).expect("at most a mebibyte")),
            ttl_seconds,
        });
        Some((pending, context))
    }

    /// Sends what is queued; what the connection does not take is sent when it is ready again.
    fn flush(&mut self, number: usize) {
        let Some(connection) = self.slots[number].connection.as_mut() else {
            return;
        };
        if connection.output.is_empty() {
            return;
        }
        if let Err(error) = self.world.send(number, &mut connection.output) {
            self.drop_connection(number, Status::InDoubt, &error.to_string());
        }
    }

    fn receive(&mut self, number: usize) {
        let slot = &mut self.slots[number];
        let Some(connection) = slot.connection.as_mut() else {
            return;
        };
        if !slot.connected {
            match self.world.connected(number) {
                Ok(false) => return,
                Ok(true) => {
                    slot.connected = true;
                    let now = self.world.now();
                    self.flush(number);
                    return self.offer(number, now);
                }
                Err(error) => {
                    return self.drop_connection(number, Status::InDoubt, &error.to_string());
                }
            }
        }
        let closed = self.world.receive(number, &mut connection.input).err();
        // All that was just read was here at this moment.
        let now = self.world.now();
        loop {
            let Some(connection) = self.slots[number].connection.as_mut() else {
                return;
            };
            match connection.answer(&self.shared.protocol) {
                Ok(Some((pending, answer))) => {
                    self.outstanding -= 1;
                    self.settle(number, pending, answer, now);
                }
                Ok(None) => break,
                Err(error) => {
                    return self.drop_connection(number, Status::InDoubt, &error.to_string());
                }
            }
        }
        match closed {
            Some(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                self.drop_connection(number, Status::InDoubt, CLOSED);
            }
            Some(error) => self.drop_connection(number, Status::InDoubt, &error.to_string()),
            None => {
                self.offer(number, now);
                self.flush(number);
            }
        }
    }

    /// Gives up on requests that have waited too long, and on their connection.
    fn expire(&mut self, number: usize, now: Nanos) {
        let limit = self.shared.timeout_ns + GRACE_NS;
        let slot = &self.slots[number];
        let oldest = slot.connection.as_ref().and_then(Connection::oldest_sent);
        if oldest.is_some_and(|sent| now.saturating_sub(sent) > limit) {
            self.drop_connection(number, Status::TimedOut, "no answer in time");
        } else if slot.connection.is_some()
            && !slot.connected
            && now.saturating_sub(slot.since) > CONNECT_WITHIN_NS
        {
            self.drop_connection(number, Status::InDoubt, NOT_ACCEPTED);
        }
    }

    /// After the end, what is not answered within the deadline is given up.
    fn give_up(&mut self, now: Nanos) {
        if now.saturating_sub(self.settings.end) > self.shared.timeout_ns {
            for number in 0..self.slots.len() {
                self.drop_connection(number, Status::Unfinished, "the run ended");
            }
        }
    }

    /// What was due before the end and never sent counts with the time that it has waited.
    fn count_unsent(&mut self) {
        if matches!(self.settings.schedule, Schedule::Closed) {
            return;
        }
        let end = self.settings.end;
        let last = end.saturating_sub(1);
        while let Some(task) = self.next_task(last).or_else(|| self.waiting.take()) {
            let waited = end.saturating_sub(task.due.at);
            self.recorder
                .record(task.operation, Status::Unsent, waited, None);
        }
    }

    fn drop_connection(&mut self, number: usize, status: Status, reason: &str) {
        let now = self.world.now();
        let slot = &mut self.slots[number];
        let Some(connection) = slot.connection.take() else {
            return;
        };
        let stood = std::mem::replace(&mut slot.connected, false);
        slot.since = now + RECONNECT_AFTER_NS;
        self.world.close(number);
        let address = self.shared.addresses[connection.address];
        if status != Status::Unfinished {
            let words = format!("{address}: {reason}");
            self.recorder.health.broken += 1;
            if !stood {
                self.recorder.error(|| words.clone());
            }
            self.why_broken = Some(words);
        }
        let abandoned = connection.abandon();
        self.outstanding -= abandoned.len();
        let limit = self.shared.timeout_ns;
        for pending in abandoned {
            // Younger requests on the same connection are lost with it, not late.
            let status = match status {
                Status::TimedOut if now.saturating_sub(pending.sent) < limit => Status::InDoubt,
                status => status,
            };
            self.failed(pending, status, now, || format!("{address}: {reason}"));
        }
    }
}
