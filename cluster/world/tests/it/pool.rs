//! Runs seeds on every core. Threads are the harness's: a world never leaves its own.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use torc_world::Report;

/// Runs `world` for each seed until one is bad, and returns the bad one with the lowest seed among those that
/// were run.
pub(crate) fn first_bad(seeds: Range<u64>, world: impl Fn(u64) -> Report + Sync) -> Option<Report> {
    let next = AtomicU64::new(seeds.start);
    let found = AtomicBool::new(false);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let work = || {
        while !found.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return None;
            }
            let report = world(seed);
            if !report.is_good() {
                found.store(true, Ordering::Relaxed);
                return Some(report);
            }
        }
        None
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        let bad = workers.into_iter().filter_map(|worker| {
            let report = worker.join();
            report.expect("a world's panic is caught and reported")
        });
        bad.min_by_key(|report| report.seed)
    })
}
