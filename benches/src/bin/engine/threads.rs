//! Runs the loads over an engine that blocks: a thread for each client.

use std::path::Path;
use std::time::Instant;

use torc_measure::mix::Operation;

use crate::results::Begun;
use crate::workload::{Client, Population, Run, Script, Settings, Tally};

/// An engine, opened.
pub trait Engine: Sync {
    /// Durable when it returns, if it `syncs`; else after the next [`Engine::flush`].
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

/// Runs a script on an empty engine in `directory`.
pub fn run(settings: &Settings, script: &Script, engine: &impl Engine, directory: &Path) {
    let population = Population::new(script.is_scattered);
    for (number, load) in script.loads.iter().enumerate() {
        if number == script.settled_after {
            engine.flush();
            engine.compact();
        }
        let begun = Begun::now();
        let run = Run::new(settings, load, &population, begun.at());
        // A single thread is what a bulk load is fastest with: nobody waits for a sync.
        let clients = if load.is_bulk { 0..1 } else { run.clients() };
        let mut tally = Tally::new();
        std::thread::scope(|scope| {
            let run = &run;
            let clients: Vec<_> = clients
                .map(|client| scope.spawn(move || one_client(run, engine, client)))
                .collect();
            for client in clients {
                tally.add(&client.join().expect("a client that ends"));
            }
        });
        if load.is_bulk {
            engine.flush();
        }
        begun.ended(&run, &tally, directory);
    }
}

fn one_client(run: &Run<'_>, engine: &impl Engine, number: usize) -> Tally {
    let mut client = Client::new(run, number);
    let syncs = !run.load.is_bulk;
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
