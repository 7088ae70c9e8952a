//! Runs the loads over engines that block: a thread for each client.

use std::path::Path;
use std::time::Instant;

use core_affinity::CoreId;
use torc_measure::mix::Operation;

use crate::layout::pin;
use crate::results::Begun;
use crate::workload::{Client, Population, Run, Script, Settings, Tally};

/// An engine, opened.
pub trait Engine: Sync {
    /// Durable when it returns, if it `syncs`; else logged, and durable after the next [`Engine::flush`].
    fn put(&self, key: &[u8], value: &[u8], syncs: bool);
    /// Bytes of the key's value.
    fn get(&self, key: &[u8]) -> Option<usize>;
    /// Bytes of the next so many records from a key on.
    fn scan(&self, from: &[u8], records: usize) -> usize;
    /// Writes what is in memory to tables, durably.
    fn flush(&self);
    /// Merges all tables.
    fn compact(&self);
}

/// Opens an engine in a directory of its own.
pub type Open<'a, E> = dyn Fn(&Path) -> E + 'a;

/// Runs a script on empty engines, each with its part of it and its clients on its core; `directory` holds them all.
pub fn run<E: Engine>(
    settings: &Settings,
    script: Script,
    cores: &[CoreId],
    directory: &Path,
    open: &Open<'_, E>,
) {
    let settings = settings.part(cores.len());
    let script = script.part(cores.len());
    let open = || -> Vec<(E, CoreId)> {
        let directory_of = |core: &CoreId| directory.join(core.id.to_string());
        let open = |core: &CoreId| (open(&directory_of(core)), *core);
        cores.iter().map(open).collect()
    };
    let populations: Vec<Population> = cores.iter().map(|_| Population::default()).collect();
    let mut engines = open();
    for (number, load) in script.loads.iter().enumerate() {
        if number == script.settled_after {
            on_each(&engines, |engine| {
                engine.flush();
                engine.compact();
            });
            drop(engines);
            engines = open();
        }
        let begun = Begun::now();
        let runs = populations.iter();
        let runs = runs.map(|population| Run::new(&settings, load, population, begun.at()));
        let runs: Vec<Run<'_>> = runs.collect();
        let tallies = all_clients(&runs, &engines);
        if load.is_bulk() {
            on_each(&engines, E::flush);
        }
        let keys = populations.iter().map(Population::count).sum();
        begun.ended(load, &settings, keys, &tallies, directory);
    }
}

/// Does something with all at the same time.
fn on_each<E: Engine>(engines: &[(E, CoreId)], what: impl Fn(&E) + Sync) {
    std::thread::scope(|scope| {
        let what = &what;
        for (engine, _) in engines {
            scope.spawn(move || what(engine));
        }
    });
}

/// What each client has done.
fn all_clients<E: Engine>(runs: &[Run<'_>], engines: &[(E, CoreId)]) -> Vec<Tally> {
    std::thread::scope(|scope| {
        let mut clients = Vec::new();
        for (run, (engine, core)) in runs.iter().zip(engines) {
            clients.extend(run.clients().map(|number| {
                scope.spawn(move || {
                    pin(*core);
                    one_client(run, engine, number)
                })
            }));
        }
        let clients = clients.into_iter();
        clients
            .map(|client| client.join().expect("a client that ends"))
            .collect()
    })
}

fn one_client(run: &Run<'_>, engine: &impl Engine, number: usize) -> Tally {
    let mut client = Client::new(run, number);
    let syncs = !run.load.is_bulk();
    while let Some(step) = client.next() {
        let sent = Instant::now();
        let mut scanned = 0;
        match step.operation {
            Operation::Read => {
                let found = engine.get(&step.key);
                let expected = step.is_there.then_some(run.settings.value_bytes);
                assert_eq!(found, expected, "a wrong answer");
            }
            Operation::Scan => scanned = engine.scan(&step.key, step.records),
            Operation::Modify => {
                assert!(engine.get(&step.key).is_some(), "a lost key");
                engine.put(&step.key, &step.value, syncs);
            }
            _ => engine.put(&step.key, &step.value, syncs),
        }
        let scanned = u64::try_from(scanned).expect("64 bits");
        client.done(&step, sent.elapsed(), scanned);
    }
    client.tally
}
