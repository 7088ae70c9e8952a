//! Runs the loads over an engine that blocks: a thread for each writer or reader.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::workload::{self, GETS, Keys, Load, Numbers, PUTS, Settings};

const FILLERS: usize = 64;

/// An engine, opened.
pub struct Engine<'a> {
    pub name: &'static str,
    /// Durable when it returns.
    pub put: &'a (dyn Fn(&[u8], &[u8]) + Sync),
    /// Whether the key was there.
    pub get: &'a (dyn Fn(&[u8]) -> bool + Sync),
    pub compact: &'a dyn Fn(),
}

pub fn run(settings: &Settings, engine: &Engine<'_>) {
    fill(settings, engine);
    for load in PUTS {
        run_load(settings, engine, load);
    }
    (engine.compact)();
    for load in GETS {
        run_load(settings, engine, load);
    }
}

/// Puts every key once, from many threads.
fn fill(settings: &Settings, engine: &Engine<'_>) {
    let next = AtomicU32::new(0);
    let begun = Instant::now();
    let latencies = on_threads(FILLERS, |thread, latencies| {
        let mut numbers = Numbers::new(thread + 1000);
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= settings.keys {
                return;
            }
            let value = numbers.value(settings);
            let sent = Instant::now();
            (engine.put)(&workload::key(number), &value);
            workload::record(latencies, sent.elapsed());
        }
    });
    let load = format!("fill, synced, {FILLERS} writers");
    workload::print(engine.name, &load, &latencies, begun.elapsed());
}

fn run_load(settings: &Settings, engine: &Engine<'_>, load: Load) {
    let (Load::Put { writers: count } | Load::Get { readers: count, .. }) = load;
    let begun = Instant::now();
    let end = begun + settings.duration;
    let latencies = on_threads(count, |thread, latencies| {
        let mut numbers = Numbers::new(thread + 1);
        let mut now = begun;
        while now < end {
            let took: Duration;
            (took, now) = match load {
                Load::Put { .. } => {
                    let key = numbers.key(settings, Keys::Uniform);
                    let value = numbers.value(settings);
                    timed(|| (engine.put)(&key, &value))
                }
                Load::Get { keys, .. } => {
                    let key = numbers.key(settings, keys);
                    timed(|| assert_eq!((engine.get)(&key), keys != Keys::Absent))
                }
            };
            workload::record(latencies, took);
        }
    });
    workload::print(engine.name, &load.name(), &latencies, begun.elapsed());
}

fn timed(operation: impl FnOnce()) -> (Duration, Instant) {
    let sent = Instant::now();
    operation();
    let now = Instant::now();
    (now - sent, now)
}

/// Runs `work` on `count` threads and joins their latencies.
fn on_threads(count: usize, work: impl Fn(usize, &mut Histogram<u64>) + Sync) -> Histogram<u64> {
    let mut joined = workload::histogram();
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..count)
            .map(|thread| {
                scope.spawn(move || {
                    let mut latencies = workload::histogram();
                    work(thread, &mut latencies);
                    latencies
                })
            })
            .collect();
        for thread in threads {
            joined
                .add(thread.join().expect("a load that ends"))
                .expect("one shape");
        }
    });
    joined
}
