//! One phase of a run: workers on threads, and a collector that merges what they measured,
//! interval by interval.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, TryRecvError};
use std::sync::{Arc, Barrier, OnceLock};
use std::time::{Duration, Instant};

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::SeedableRng;
use torc_measure::mix::Operation;

use super::interrupt;
use super::place::{Place, RealTime};
use super::recorder::Recorder;
use super::schedule::{Arrivals, Gaps, Schedule, Sessions};
use super::trace::Trace;
use super::worker::{Settings, Shared, Worker};
use super::world::{Nanos, Sockets};

/// The lowest priority of a thread.
const NICE_LOWEST: i32 = 19;

/// Connections that are being opened at a time, by all workers: the backlog of most servers, where they wait until they
/// are accepted, has room for 128 or more.
const OPENING_MAX: usize = 100;

/// How often what workers have recorded is looked for. Were the collector woken instead, the worker that wakes it
/// would spend tens of microseconds on that, in which requests are due.
const COLLECT_EVERY: Duration = Duration::from_millis(20);

/// How long answers may still take after a signal before people are told.
const TELL_AFTER: Duration = Duration::from_secs(1);

/// When operations are due, before they are shared out to workers.
#[derive(Clone)]
pub enum Pace {
    /// As soon as the one before is answered.
    Closed,
    /// At a rate, in operations a second.
    Open(f64, Gaps),
    /// Sessions of so many operations with a pause between them, at a rate of operations.
    Sessions(f64, Gaps, u32, Duration),
    /// As the trace says.
    Trace(Arc<Trace>),
}

impl Pace {
    fn schedule(&self, index: usize, workers: usize) -> Schedule {
        let share = |rate: f64| rate / workers as f64;
        let phase = index as f64 / workers as f64;
        match self {
            Pace::Closed => Schedule::Closed,
            Pace::Open(rate, gaps) => Schedule::Open(Arrivals::new(share(*rate), *gaps, phase)),
            Pace::Sessions(rate, gaps, operations, think) => Schedule::Sessions(Sessions::new(
                share(*rate),
                *gaps,
                phase,
                *operations,
                nanos(*think),
            )),
            Pace::Trace(trace) => Schedule::Trace(trace.ahead(index, workers)),
        }
    }
}

/// How a phase runs.
#[derive(Clone)]
pub struct Phase {
    /// Threads.
    pub threads: usize,
    /// Connections of all threads.
    pub connections: usize,
    /// Requests that a connection has outstanding at most.
    pub pipeline: usize,
    /// When operations are due.
    pub pace: Pace,
    /// Seed of all random choices.
    pub seed: u64,
    /// No operation starts after this.
    pub length: Duration,
    /// Length of an interval.
    pub interval: Duration,
    /// Whether workers poll before an operation is due, rather than sleep.
    pub spin: bool,
    /// Where the threads run.
    pub place: Place,
    /// Kinds of operations that will come, in any case most of them.
    pub operations: Vec<Operation>,
}

/// What a phase measured.
pub struct Measured {
    /// From the beginning to the end of the load, in seconds.
    pub seconds: f64,
    /// Everything.
    pub total: Recorder,
}

/// Whether a phase goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// It does.
    Continue,
    /// It is cut short.
    Stop,
}

/// Tells when a phase begins whose connections all stand; `None` = it does not.
pub type Begin<'a> = &'a (dyn Fn() -> Option<Instant> + Sync);

/// Sees each interval once all workers are through it: its number and what was measured in it.
pub type Observe<'a> = &'a mut (dyn FnMut(u64, &Recorder) -> Flow + Send);

enum Message {
    Interval(usize, u64, Box<Recorder>),
    /// When its load ended.
    Done(usize, std::io::Result<Nanos>),
}

fn nanos(duration: Duration) -> Nanos {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Runs a phase to its end.
///
/// # Errors
/// When a worker cannot work at all, or connections do not stand.
pub fn run(
    phase: &Phase,
    shared: &Shared,
    begin: Begin<'_>,
    observe: Observe<'_>,
) -> std::io::Result<Measured> {
    shared.stop.store(false, Ordering::Relaxed);
    let workers = phase.threads.min(phase.connections).max(1);
    let start = Start {
        barrier: Barrier::new(workers),
        begin,
        begun: Instant::now(),
        epoch: OnceLock::new(),
        standing: AtomicUsize::new(0),
        missing: OnceLock::new(),
    };
    let collected = std::thread::scope(|scope| {
        let (send, receive) = mpsc::channel();
        let mut spares = Vec::new();
        for index in 0..workers {
            let (spare_send, spare) = mpsc::channel();
            spares.push(spare_send);
            let send = send.clone();
            let start = &start;
            scope.spawn(move || {
                // A thread that reads a trace ahead is as every other one, and begun before this one is not.
                let schedule = phase.pace.schedule(index, workers);
                // Memory is best where the thread runs.
                let placed = phase.place.enter(index);
                let mut first = Some(Recorder::touched(&phase.operations));
                let emit = |at, recorder: &mut Recorder| {
                    let returned = spare.try_recv().ok();
                    let empty = returned.or_else(|| first.take()).unwrap_or_default();
                    let full = std::mem::replace(recorder, empty);
                    // The collector outlives the workers.
                    send.send(Message::Interval(index, at, Box::new(full))).ok();
                };
                let outcome = match placed {
                    Ok(()) => work(phase, shared, schedule, (index, workers), start, emit),
                    Err(error) => {
                        // Nobody may wait for a worker that failed.
                        start.barrier.wait();
                        Err(error)
                    }
                };
                send.send(Message::Done(index, outcome)).ok();
            });
        }
        drop(send);
        let place = &phase.place;
        let collecting = scope.spawn(move || {
            place.leave();
            collect(shared, &receive, &spares, observe)
        });
        collecting
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    if let Some(error) = collected.failed {
        return Err(error);
    }
    Ok(Measured {
        seconds: Duration::from_nanos(collected.ended).as_secs_f64(),
        total: collected.total,
    })
}

struct Collected {
    /// Everything that was measured.
    total: Recorder,
    /// When the load of the last worker ended.
    ended: Nanos,
    /// Why a worker could not work.
    failed: Option<std::io::Error>,
}

/// Collects until every worker has ended.
///
/// Merging and encoding an interval takes milliseconds. Where all cores are busy they would be the
/// workers' or the server's, and requests would leave late by as much; so it happens at the lowest
/// priority, on a thread of its own because threads that it starts would inherit it.
fn collect(
    shared: &Shared,
    receive: &mpsc::Receiver<Message>,
    spares: &[mpsc::Sender<Recorder>],
    observe: Observe<'_>,
) -> Collected {
    // Where it is refused the scheduling lag tells.
    rustix::process::setpriority_process(None, NICE_LOWEST).ok();
    let mut collector = Collector::new(spares.len());
    let mut failed: Option<std::io::Error> = None;
    let mut ended = 0;
    let (mut stopped, mut told) = (None, false);
    loop {
        match receive.try_recv() {
            Ok(Message::Interval(index, at, mut recorder)) => {
                collector.add(index, at, &recorder);
                recorder.clear();
                // A worker that has ended needs no memory back.
                spares[index].send(*recorder).ok();
            }
            Ok(Message::Done(index, outcome)) => {
                collector.end(index);
                match outcome {
                    Ok(at) => ended = ended.max(at),
                    Err(error) => failed = failed.or(Some(error)),
                }
            }
            Err(TryRecvError::Empty) => std::thread::sleep(COLLECT_EVERY),
            Err(TryRecvError::Disconnected) => break,
        }
        let interrupted = interrupt::came();
        if collector.deliver(observe) == Flow::Stop || failed.is_some() || interrupted {
            shared.stop.store(true, Ordering::Relaxed);
            let since = stopped.get_or_insert_with(Instant::now);
            if interrupted && !told && since.elapsed() > TELL_AFTER {
                told = true;
                interrupt::tell();
            }
        }
    }
    collector.deliver(observe);
    Collected {
        total: collector.into_total(),
        ended,
        failed,
    }
}

/// What workers begin together by.
struct Start<'a> {
    barrier: Barrier,
    begin: Begin<'a>,
    /// When they began to connect.
    begun: Instant,
    epoch: OnceLock<Option<Instant>>,
    /// Connections of all that stand.
    standing: AtomicUsize,
    /// Why not all do.
    missing: OnceLock<String>,
}

impl Start<'_> {
    /// Fails when not all of so many connections stand.
    fn all_stand(&self, connections: usize) -> std::io::Result<()> {
        let Some(why) = self.missing.get() else {
            return Ok(());
        };
        Err(std::io::Error::other(format!(
            "{} of {connections} connections stand after {:.0} s: {why}",
            self.standing.load(Ordering::Relaxed),
            self.begun.elapsed().as_secs_f64()
        )))
    }
}

/// The work of one of so many workers.
fn work(
    phase: &Phase,
    shared: &Shared,
    schedule: Schedule,
    (index, workers): (usize, usize),
    start: &Start<'_>,
    mut emit: impl FnMut(u64, &mut Recorder),
) -> std::io::Result<Nanos> {
    let share = |all: usize| all / workers + usize::from(index < all % workers);
    let connections = share(phase.connections);
    let number = u64::try_from(index).expect("a small number");
    let settings = Settings {
        index,
        connections,
        opening: (OPENING_MAX / workers).max(1),
        pipeline: phase.pipeline,
        end: nanos(phase.length),
        interval: nanos(phase.interval),
        schedule,
        rng: Xoshiro256PlusPlus::seed_from_u64(phase.seed.wrapping_add(number)),
    };
    let recorder = Recorder::touched(&phase.operations);
    let polls = phase.place.polls(phase.spin, workers);
    let realtime = match phase.place.realtime {
        true => RealTime::of_this_machine(),
        false => None,
    };
    let connected = Sockets::new(connections, Instant::now(), polls, realtime)
        .map(|sockets| Worker::new(shared, settings, sockets, recorder))
        .and_then(|mut worker| {
            let connected = worker.connect()?;
            start
                .standing
                .fetch_add(connected.standing, Ordering::Relaxed);
            if let Some(why) = connected.missing {
                start.missing.get_or_init(|| why);
            }
            Ok(worker)
        });
    // Nobody may wait for a worker that failed.
    start.barrier.wait();
    let mut worker = connected?;
    start.all_stand(phase.connections)?;
    let Some(epoch) = *start.epoch.get_or_init(|| (start.begin)()) else {
        return Ok(0);
    };
    std::thread::sleep(epoch.saturating_duration_since(Instant::now()));
    worker.world().restart(epoch);
    worker.run(&mut emit)
}

/// Merges intervals of several workers in their order.
pub struct Collector {
    waiting: BTreeMap<u64, Recorder>,
    /// For each worker, one past the last interval that it reported.
    through: Vec<u64>,
    total: Recorder,
}

impl Collector {
    /// For so many workers, none of which has reported.
    pub fn new(workers: usize) -> Self {
        Self {
            waiting: BTreeMap::new(),
            through: vec![0; workers],
            total: Recorder::default(),
        }
    }

    /// A worker measured this in an interval.
    pub fn add(&mut self, worker: usize, at: u64, recorder: &Recorder) {
        self.waiting.entry(at).or_default().merge(recorder);
        self.through[worker] = at + 1;
    }

    /// A worker reports no more.
    pub fn end(&mut self, worker: usize) {
        self.through[worker] = u64::MAX;
    }

    /// Everything that was handed on.
    pub fn into_total(self) -> Recorder {
        self.total
    }

    /// Hands on what all workers are through.
    pub fn deliver(&mut self, observe: Observe<'_>) -> Flow {
        let through = self.through.iter().copied().min().unwrap_or(0);
        let mut flow = Flow::Continue;
        while let Some(entry) = self.waiting.first_entry()
            && *entry.key() < through
        {
            let (at, recorder) = entry.remove_entry();
            self.total.merge(&recorder);
            if observe(at, &recorder) == Flow::Stop {
                flow = Flow::Stop;
            }
        }
        flow
    }
}
