//! Runs the loads over an engine that blocks: a thread for each client.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use crate::report::{Begun, Report};
use crate::workload::{Latencies, Load, Numbers, READS, Settings, Step, WRITES};

/// An engine, opened.
pub struct Engine<'a> {
    pub name: &'static str,
    /// Durable when it returns.
    pub put: &'a (dyn Fn(&[u8], &[u8]) + Sync),
    /// Whether the key was there.
    pub get: &'a (dyn Fn(&[u8]) -> bool + Sync),
    pub compact: &'a (dyn Fn() + Sync),
}

pub fn run(settings: &Settings, engine: &Engine<'_>, report: &mut Report) {
    for load in WRITES {
        run_load(settings, engine, load, report);
    }
    (engine.compact)();
    for load in READS {
        run_load(settings, engine, load, report);
    }
}

fn run_load(settings: &Settings, engine: &Engine<'_>, load: Load, report: &mut Report) {
    let filled = AtomicU32::new(0);
    let begun = Begun::now();
    let end = begun.at() + settings.duration;
    let mut joined = Latencies::new();
    std::thread::scope(|scope| {
        let filled = &filled;
        let clients: Vec<_> = (0..load.clients())
            .map(|client| {
                scope.spawn(move || one_client(settings, engine, load, end, client, filled))
            })
            .collect();
        for client in clients {
            joined.add(&client.join().expect("a client that ends"));
        }
    });
    report.add(engine.name, load, &joined, &begun);
}

fn one_client(
    settings: &Settings,
    engine: &Engine<'_>,
    load: Load,
    end: Instant,
    client: usize,
    filled: &AtomicU32,
) -> Latencies {
    let mut numbers = Numbers::new(client + 1);
    let mut latencies = Latencies::new();
    let is_timed = !matches!(load, Load::Fill { .. });
    let number = || filled.fetch_add(1, Ordering::Relaxed);
    while let Some(step) = load.next(settings, &mut numbers, number) {
        let sent = Instant::now();
        let is_put = match step {
            Step::Insert { key, value } => {
                (engine.put)(&key, &value);
                true
            }
            Step::Update { key, value } => {
                assert!((engine.get)(&key));
                (engine.put)(&key, &value);
                true
            }
            Step::Get { key, is_there } => {
                assert_eq!((engine.get)(&key), is_there);
                false
            }
        };
        let now = Instant::now();
        latencies.record(is_put, now - sent);
        if is_timed && now >= end {
            break;
        }
    }
    latencies
}
