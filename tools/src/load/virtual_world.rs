//! A modelled server with a clock of its own: the whole generator in virtual time.
//!
//! The server speaks the Redis protocol, keeps nothing, and serves requests one after the other in
//! the order of their arrival; each takes a time that the test chooses. The worker, the schedule, the
//! protocol and the recorder are the real ones.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;

use bytes::BytesMut;
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::SeedableRng;
use torc_measure::keys::{Distribution, Keys};
use torc_measure::mix::Mix;
use torc_measure::sizes::Sizes;

use super::ledger::Ledger;
use super::pauses::Pauses;
use super::protocol::{Levels, Protocol, ProtocolName};
use super::recorder::Recorder;
use super::schedule::Schedule;
use super::source::Source;
use super::targets::Targets;
use super::worker::{Connected, Judging, Settings, Shared, Worker};
use super::world::{Nanos, World};

/// Time that the client itself takes for each look at the clock, so that no loop stands still.
const TICK_NS: Nanos = 20;

/// Decides, for a request that is at the head of the queue at a time, when its service begins and
/// how long it takes; `None` = it is never answered.
pub type Service = Box<dyn FnMut(Nanos, &[u8]) -> Option<(Nanos, Nanos)>>;

pub struct VirtualWorld {
    now: Nanos,
    service: Service,
    /// When the server has done what it has taken so far.
    idle_at: Nanos,
    /// Answers by the time that they arrive.
    answers: BinaryHeap<Reverse<(Nanos, usize, &'static [u8])>>,
    arrived: Vec<VecDeque<&'static [u8]>>,
    connecting: Vec<usize>,
}

impl VirtualWorld {
    pub fn new(slots: usize, service: Service) -> Self {
        Self {
            now: 0,
            service,
            idle_at: 0,
            answers: BinaryHeap::new(),
            arrived: vec![VecDeque::new(); slots],
            connecting: Vec::new(),
        }
    }
}

impl World for VirtualWorld {
    fn delayed(&mut self) -> Nanos {
        0
    }

    fn stolen(&mut self) -> Nanos {
        0
    }

    fn now(&mut self) -> Nanos {
        self.now += TICK_NS;
        self.now
    }

    fn open(&mut self, slot: usize, _address: SocketAddr) -> io::Result<()> {
        self.connecting.push(slot);
        Ok(())
    }

    fn connected(&mut self, _slot: usize) -> io::Result<bool> {
        Ok(true)
    }

    fn close(&mut self, slot: usize) {
        self.arrived[slot].clear();
    }

    fn send(&mut self, slot: usize, output: &mut BytesMut) -> io::Result<()> {
        while !output.is_empty() {
            let (length, answer) = request(output);
            let bytes = output.split_to(length);
            if bytes.ends_with(b"PING\r\n") {
                // Before the load, and no part of what is modelled.
                self.answers.push(Reverse((self.now, slot, answer)));
                continue;
            }
            let ready = self.idle_at.max(self.now);
            if let Some((begins, takes)) = (self.service)(ready, &bytes) {
                self.idle_at = begins.max(ready) + takes;
                self.answers.push(Reverse((self.idle_at, slot, answer)));
            }
        }
        output.clear();
        Ok(())
    }

    fn receive(&mut self, slot: usize, input: &mut BytesMut) -> io::Result<()> {
        for answer in self.arrived[slot].drain(..) {
            input.extend_from_slice(answer);
        }
        Ok(())
    }

    fn wait(&mut self, until: Nanos, ready: &mut Vec<usize>, _: &mut Pauses) -> io::Result<()> {
        ready.clear();
        ready.append(&mut self.connecting);
        if !ready.is_empty() {
            return Ok(());
        }
        let next = self.answers.peek().map_or(u64::MAX, |answer| answer.0.0);
        self.now = self.now.max(next.min(until));
        while let Some(Reverse((at, slot, answer))) = self.answers.peek().copied()
            && at <= self.now
        {
            self.answers.pop();
            self.arrived[slot].push_back(answer);
            if !ready.contains(&slot) {
                ready.push(slot);
            }
        }
        Ok(())
    }
}

/// Length of the first request, and its answer: reads find nothing, writes are done.
fn request(bytes: &[u8]) -> (usize, &'static [u8]) {
    let line = |at: usize| at + memchr::memchr(b'\n', &bytes[at..]).unwrap() + 1;
    let number = |at: usize| -> usize {
        let text = std::str::from_utf8(&bytes[at + 1..line(at) - 2]).unwrap();
        text.parse().unwrap()
    };
    let count = number(0);
    let mut at = line(0);
    for _ in 0..count {
        at = line(at) + number(at) + 2;
    }
    let answer: &[u8] = if bytes[line(line(0))..].starts_with(b"GET") {
        b"$-1\r\n"
    } else {
        b"+OK\r\n"
    };
    (at, answer)
}

/// Runs one worker on a thousand keys against a modelled server.
pub fn run(
    schedule: Schedule,
    reads: f64,
    connections: usize,
    length: Nanos,
    seed: u64,
    service: Service,
) -> Recorder {
    run_with_end(schedule, reads, connections, length, seed, service).0
}

/// The same, and when the load ended.
fn run_with_end(
    schedule: Schedule,
    reads: f64,
    connections: usize,
    length: Nanos,
    seed: u64,
    service: Service,
) -> (Recorder, Nanos) {
    let source = Source::Mix {
        mix: Mix::reads(reads),
        keys: Keys::new(Distribution::Uniform, 1000, 0.0),
    };
    let settings = Settings {
        index: 0,
        connections,
        opening: 100,
        pipeline: 1,
        end: length,
        interval: 1_000_000_000,
        schedule,
        rng: Xoshiro256PlusPlus::seed_from_u64(seed),
    };
    run_on(1000, source, settings, service)
}

fn run_on(keys: u64, source: Source, settings: Settings, service: Service) -> (Recorder, Nanos) {
    let shared = shared(keys, source);
    let world = VirtualWorld::new(settings.connections, service);
    let mut worker = Worker::new(&shared, settings, world, Recorder::default());
    assert_eq!(worker.connect().unwrap().missing, None);
    worker.world().now = 0;
    let mut total = Recorder::default();
    let ended = worker.run(&mut |_, recorder| {
        total.merge(recorder);
        recorder.clear();
    });
    (total, ended.unwrap())
}

/// Connects so many connections in a world; how far it came, and how long that took.
pub fn connect(connections: usize, world: impl World) -> (Connected, Nanos) {
    let shared = shared(1, Source::Trace);
    let settings = Settings {
        index: 0,
        connections,
        opening: 100,
        pipeline: 1,
        end: 0,
        interval: 1,
        schedule: Schedule::Closed,
        rng: Xoshiro256PlusPlus::seed_from_u64(0),
    };
    let mut worker = Worker::new(&shared, settings, world, Recorder::default());
    let connected = worker.connect().unwrap();
    (connected, worker.world().now())
}

/// What the worker of a run shares with nobody here.
fn shared(keys: u64, source: Source) -> Shared {
    let levels = Levels {
        keyspace: None,
        r: None,
        w: None,
        timeout_ms: 1000,
        login: None,
    };
    let addresses = vec!["127.0.0.1:1".parse().unwrap()];
    Shared {
        protocol: Protocol::named(ProtocolName::Resp, levels).unwrap(),
        targets: Targets::servers(&addresses),
        addresses,
        ledger: Ledger::new(keys, 0, 1),
        source,
        value_sizes: Sizes::Fixed(16),
        scan_sizes: Sizes::Fixed(1),
        batch_keys: 1,
        ttl_seconds: None,
        timeout_ns: 1_000_000_000,
        judging: Judging {
            must_exist: false,
            strict: false,
            may_evict: true,
            share: 1.0,
        },
        civil_us: 1,
        stop: AtomicBool::new(false),
    }
}

mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;
    use torc_measure::keys::{unit, whole};
    use torc_measure::mix::Operation;

    use super::*;
    use crate::load::outcome::micros;
    use crate::load::recorder::{Series, Status};
    use crate::load::schedule::{Arrivals, Gaps, Sessions};
    use crate::load::trace::{Row, Trace};

    const SECOND: Nanos = 1_000_000_000;

    /// Exponential service of `mean` nanoseconds, and stalls of 200 ms at 5 and at 12 seconds.
    fn stalling(mean: f64, seed: u64) -> Service {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
        let stalls = [(5 * SECOND, 5_200_000_000), (12 * SECOND, 12_200_000_000)];
        Box::new(move |now, _| {
            let stall = stalls.iter().find(|(from, to)| (*from..*to).contains(&now));
            let begins = stall.map_or(now, |(_, to)| *to);
            Some((begins, whole(-(1.0 - unit(&mut rng)).ln() * mean)))
        })
    }

    fn open(rate: f64) -> Schedule {
        Schedule::Open(Arrivals::new(rate, Gaps::Poisson, 0.0))
    }

    #[test]
    fn two_stalls_of_a_fifth_of_a_second_are_in_the_intended_p99_as_theory_says() {
        let (rate, mean_ns, length_s) = (8000.0, 60_000.0, 20.0);
        let recorder = run(open(rate), 50.0, 16, 20 * SECOND, 7, stalling(mean_ns, 8));
        let mut total = recorder.series(Operation::Read).total();
        total
            .intended
            .add(&recorder.series(Operation::Write).total().intended)
            .unwrap();
        total
            .sent
            .add(&recorder.series(Operation::Write).total().sent)
            .unwrap();
        // An operation that falls due t after a stall of D began waits D - t (1 - load), until
        // the backlog is gone at t = D / (1 - load). So of two stalls in the run, a share of
        // 2 (D - w) / (1 - load) / length waits longer than w, and the 99th percentile is
        // w = D - 0.01 (1 - load) length / 2.
        let load = rate * mean_ns / 1e9;
        let theory_ms = 200.0 - 1000.0 * 0.01 * (1.0 - load) * length_s / 2.0;
        let at = |histogram: &hdrhistogram::Histogram<u64>| {
            micros(histogram.value_at_percentile(99.0)) / 1e3
        };
        let (intended_ms, sent_ms) = (at(&total.intended), at(&total.sent));
        assert!(
            (intended_ms / theory_ms - 1.0).abs() < 0.05,
            "from intended: {intended_ms} ms, theory: {theory_ms} ms"
        );
        assert!(
            sent_ms < 0.05 * theory_ms,
            "from sent: {sent_ms} ms hides the stalls"
        );
        let count = total.intended.len();
        assert!(
            (159_000..161_000).contains(&count),
            "{count}: a stall thins nothing out"
        );
    }

    #[test]
    fn a_closed_loop_sees_each_stall_once_a_connection() {
        let recorder = run(
            Schedule::Closed,
            100.0,
            4,
            20 * SECOND,
            7,
            stalling(60_000.0, 8),
        );
        let total = recorder.series(Operation::Read).total();
        let slow = total.intended.count_between(100_000_000, u64::MAX);
        assert!(
            (4..=8).contains(&slow),
            "{slow} of {}",
            total.intended.len()
        );
    }

    #[test]
    fn a_closed_loop_counts_what_is_answered_in_its_time_and_keeps_the_latency_of_the_rest() {
        // One after the other, a millisecond each; those that are under way at the end stall.
        let (connections, end) = (4, 5 * SECOND);
        let service: Service = Box::new(move |ready, _| {
            let stalls = ready > end - 1_500_000;
            Some((ready, if stalls { SECOND / 5 } else { 1_000_000 }))
        });
        let (recorder, ended) = run_with_end(Schedule::Closed, 50.0, connections, end, 7, service);
        assert_eq!(ended, end);
        let both = [Operation::Read, Operation::Write].map(|one| recorder.series(one));
        let count = |status| both.iter().map(|one| one.count(status)).sum::<u64>();
        // The tick of the virtual clock is the client's own time between two answers.
        let done = recorder.done();
        assert!((4_990..=5_000).contains(&done), "{done} at 1000/s in 5 s");
        assert_eq!(count(Status::AfterEnd), 4, "one a connection was under way");
        assert_eq!(both.map(Series::failed), [0, 0]);
        assert_eq!(recorder.value_bytes, 16 * both[1].count(Status::Ok));
        let sent = both.map(|one| one.total().sent);
        let slow: u64 = sent
            .iter()
            .map(|one| one.count_between(190_000_000, SECOND))
            .sum();
        assert_eq!(slow, 4, "a stall at the end shows");
    }

    #[test]
    fn requests_without_an_answer_are_censored_and_end_the_run() {
        let mut number = 0;
        let service: Service = Box::new(move |now, _| {
            number += 1;
            (number % 100 != 0).then_some((now, 10_000))
        });
        let recorder = run(open(1000.0), 100.0, 64, 4 * SECOND, 7, service);
        let read = recorder.series(Operation::Read);
        let lost = read.count(Status::TimedOut) + read.count(Status::Unfinished);
        assert!((30..50).contains(&lost), "{lost} of about 40 lost");
        assert_eq!(read.count(Status::InDoubt), 0);
        let total = read.total();
        assert!(micros(total.intended.value_at_percentile(99.5)) >= 1e6);
    }

    #[test]
    fn what_never_finds_a_connection_is_counted_as_unsent() {
        // 1000 a second can be served, 2000 are due.
        let service: Service = Box::new(|now, _| Some((now, 1_000_000)));
        let recorder = run(open(2000.0), 100.0, 4, 10 * SECOND, 7, service);
        let read = recorder.series(Operation::Read);
        assert!((9_900..10_100).contains(&read.done()), "{}", read.done());
        assert!((9_700..10_300).contains(&read.count(Status::Unsent)));
        let p50 = micros(read.total().intended.value_at_percentile(50.0)) / 1e3;
        assert!(
            (2000.0..5100.0).contains(&p50),
            "the queue is in the figures: {p50} ms"
        );
    }

    #[test]
    fn sessions_make_their_operations_one_after_the_other() {
        let sessions = Sessions::new(1000.0, Gaps::Poisson, 0.0, 10, 1_000_000);
        let service: Service = Box::new(|now, _| Some((now, 20_000)));
        let schedule = Schedule::Sessions(sessions);
        let recorder = run(schedule, 100.0, 64, 20 * SECOND, 7, service);
        let done = recorder.series(Operation::Read).done();
        assert!((18_000..22_000).contains(&done), "{done} at 1000/s in 20 s");
    }

    fn settings(schedule: Schedule, connections: usize) -> Settings {
        Settings {
            index: 0,
            connections,
            opening: 100,
            pipeline: 1,
            end: 4 * SECOND,
            interval: SECOND,
            schedule,
            rng: Xoshiro256PlusPlus::seed_from_u64(7),
        }
    }

    #[test]
    fn a_write_that_waits_for_its_key_holds_up_its_own_key_only() {
        let row = |at_ms: u64, key, operation| Row {
            at: at_ms * 1_000_000,
            key,
            value_bytes: 16,
            ttl_seconds: 0,
            operation,
        };
        // The first write is never answered, so the second waits until that is given up.
        let mut rows = vec![
            row(0, 0, Operation::Write),
            row(1, 0, Operation::Write),
            row(2, 0, Operation::Read),
        ];
        rows.extend((3..1000).map(|at| row(at, 1, Operation::Delete)));
        let trace = Trace::of(&rows);
        let seen = Rc::new(RefCell::new(Vec::new()));
        let sees = seen.clone();
        let service: Service = Box::new(move |now, request| {
            let mut seen = sees.borrow_mut();
            seen.push(String::from_utf8_lossy(request).into_owned());
            (seen.len() > 1).then_some((now, 10_000))
        });
        let schedule = Schedule::Trace(trace.ahead(0, 1));
        let settings = settings(schedule, 8);
        let (recorder, _) = run_on(2, Source::Trace, settings, service);
        let deletions = recorder.series(Operation::Delete).total().intended;
        assert_eq!(deletions.len(), 997);
        assert!(
            deletions.max() < 1_000_000,
            "{} ns: another key's wait is in it",
            deletions.max()
        );
        let on_first_key: Vec<String> = seen
            .borrow()
            .iter()
            .filter(|request| request.contains("key000000000000"))
            .map(|request| request[8..11].to_owned())
            .collect();
        assert_eq!(on_first_key, ["SET", "SET", "GET"], "in their order");
        assert_eq!(recorder.turns.waited, 2);
        let lag = &recorder.health.lag;
        assert!(
            lag.max() < 1_000_000,
            "{} ns: it is not the client that is late",
            lag.max()
        );
    }

    #[test]
    fn writers_of_one_key_take_turns_in_a_closed_loop() {
        let source = Source::Mix {
            mix: Mix::reads(0.0),
            keys: Keys::new(Distribution::Uniform, 1, 0.0),
        };
        let service: Service = Box::new(|now, _| Some((now, 1_000_000)));
        let settings = settings(Schedule::Closed, 4);
        let (recorder, _) = run_on(1, source, settings, service);
        let done = recorder.series(Operation::Write).done();
        assert!((3_900..=4_000).contains(&done), "{done} at 1000/s in 4 s");
        assert!(recorder.turns.waited > 0);
    }
}
