//! A background that is slower than the updates: these come slower, evenly, and are not refused.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use torc_engine::compaction::Strategy;
use torc_engine::{Options, Store, WriteError};
use torc_env::{Class, Env, ShardId};
use torc_sim::{DiskOptions, SimEnv, Simulation};

use crate::support::{options, put, value};
use crate::table_support::noise;

const CLIENTS: u64 = 16;

/// What came of a load in virtual time.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    /// Updates acknowledged in each second.
    seconds: Vec<u64>,
    refused: u64,
    delayed: u64,
    level0_runs_max: usize,
    /// How long updates took that began after the first second, in microseconds, ascending.
    took_us: Vec<u64>,
}

impl Outcome {
    /// The slowest of the last seconds, in percent of their mean.
    fn lowest_percent(&self, of_last: usize) -> u64 {
        let last = &self.seconds[self.seconds.len() - of_last..];
        let sum: u64 = last.iter().sum();
        let count = u64::try_from(last.len()).unwrap();
        last.iter().min().unwrap() * 100 * count / sum
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Outcome {
            seconds,
            refused,
            delayed,
            level0_runs_max,
            took_us,
        } = self;
        let part = |of_1000: usize| took_us.get(took_us.len() * of_1000 / 1001);
        let parts = [500, 990, 999, 1000].map(part);
        write!(
            f,
            "{seconds:?}, {refused} refused, {delayed} delayed, {level0_runs_max} runs, {parts:?} us"
        )
    }
}

/// Values that are written, and how fast the background is.
struct Load {
    seed: u64,
    keys: u64,
    value_bytes: usize,
    /// A background job waits for so long before each of its steps.
    step_us: u64,
    sync_us: u64,
}

/// Many keys with small values.
const SMALL: Load = Load {
    seed: 1,
    keys: 4000,
    value_bytes: 1000,
    step_us: 600,
    sync_us: 1000,
};

/// Clients that overwrite keys one after the other for `seconds`.
fn overwrite(load: Load, options: Options, seconds: u64) -> Outcome {
    let Load {
        seed,
        keys,
        value_bytes,
        step_us,
        sync_us,
    } = load;
    let world = torc_sim::Options {
        background_us: step_us..=step_us + step_us / 4,
        give_way: 1.0,
        disk: DiskOptions {
            write_us: 500..=1000,
            sync_us: sync_us..=sync_us * 2,
            ..DiskOptions::default()
        },
        ..torc_sim::Options::default()
    };
    let simulation = Simulation::new(seed, world);
    let host = simulation.add_host(1);
    let scenario = move |env: SimEnv| async move {
        let (store, _) = Store::open(env.clone(), options).await.unwrap();
        let begun = env.now();
        let count = usize::try_from(seconds).unwrap();
        let acknowledged = Rc::new(RefCell::new(vec![0; count]));
        let took_us = Rc::new(RefCell::new(Vec::new()));
        for client in 0..CLIENTS {
            let (clock, store) = (env.clone(), store.clone());
            let (acknowledged, took_us) = (Rc::clone(&acknowledged), Rc::clone(&took_us));
            let load = async move {
                let mut number = client;
                loop {
                    let key = (number.wrapping_mul(0x9E37_79B9_7F4A_7C15) % keys).to_be_bytes();
                    let sent = clock.now();
                    match put(&store, key, value(noise(number, value_bytes), 1)).await {
                        Ok(()) => {}
                        Err(WriteError::Overloaded { .. }) => {
                            clock.sleep(Duration::from_millis(10)).await;
                            continue;
                        }
                        Err(error) => panic!("{error}"),
                    }
                    if (sent - begun).as_secs() >= 1 {
                        let took = (clock.now() - sent).as_micros();
                        took_us.borrow_mut().push(u64::try_from(took).unwrap());
                    }
                    let second = usize::try_from((clock.now() - begun).as_secs()).unwrap();
                    match acknowledged.borrow_mut().get_mut(second) {
                        Some(count) => *count += 1,
                        None => return,
                    }
                    number += CLIENTS;
                }
            };
            env.spawn(Class::Foreground, load);
        }
        let mut level0_runs_max = 0;
        for _ in 0..seconds * 10 {
            env.sleep(Duration::from_millis(100)).await;
            level0_runs_max = level0_runs_max.max(store.stats().level0_runs);
        }
        let counts = store.stats().counts;
        took_us.borrow_mut().sort_unstable();
        Outcome {
            took_us: took_us.take(),
            seconds: acknowledged.take(),
            refused: counts.refused_overload,
            delayed: counts.delayed,
            level0_runs_max,
        }
    };
    simulation
        .run_on(host, ShardId(0), scenario)
        .expect("nobody cuts the power")
}

fn small() -> Options {
    Options {
        level0_runs_max: 16,
        ..options()
    }
}

#[test]
pub fn updates_slow_down_evenly_when_merges_cannot_follow() {
    let outcome = overwrite(SMALL, small(), 40);
    println!("{outcome}");
    assert!(outcome.delayed > 1000, "the background keeps up: {outcome}");
    assert_eq!(outcome.refused, 0, "{outcome}");
    assert!(outcome.level0_runs_max < 16, "{outcome}");
    assert!(outcome.lowest_percent(30) >= 70, "{outcome}");
}

#[test]
fn updates_do_not_wait_when_the_background_keeps_up() {
    let load = Load {
        step_us: 10,
        ..SMALL
    };
    let outcome = overwrite(load, small(), 10);
    println!("{outcome}");
    let updates: u64 = outcome.seconds.iter().sum();
    assert!(outcome.delayed * 100 <= updates, "{outcome}");
    assert_eq!(outcome.refused, 0, "{outcome}");
}

#[test]
fn no_update_waits_much_longer_than_others_while_memtables_fill_as_fast_as_they_are_flushed() {
    for (step_us, sync_us) in [(150, 1000), (300, 3000)] {
        for seed in 1..=4 {
            let options = Options {
                memtable_bytes: 8 << 20,
                wal_segment_bytes: 8 << 20,
                ..small()
            };
            let load = Load {
                seed,
                value_bytes: 16_000,
                step_us,
                sync_us,
                ..SMALL
            };
            let outcome = overwrite(load, options, 4);
            println!("{outcome}");
            assert!(outcome.delayed > 1000, "memory never fills: {outcome}");
            assert_eq!(outcome.refused, 0, "{outcome}");
            let took_us = &outcome.took_us;
            let median = took_us[took_us.len() / 2];
            assert!(took_us[took_us.len() - 1] < 5 * median, "{outcome}");
        }
    }
}

#[test]
fn updates_do_not_stop_while_values_are_moved_out_of_blobs() {
    let options = Options {
        memtable_bytes: 4 << 20,
        ..small()
    };
    let load = Load {
        keys: 8000,
        value_bytes: 16_000,
        step_us: 10,
        ..SMALL
    };
    let outcome = overwrite(load, options, 20);
    println!("{outcome}");
    assert_eq!(outcome.refused, 0, "{outcome}");
    assert!(outcome.level0_runs_max < 16, "{outcome}");
    assert!(outcome.lowest_percent(10) >= 70, "{outcome}");
}

/// Milliseconds until 20 MiB of values are moved out of blobs of which five eighths are dead.
async fn emptied_after(env: &SimEnv, is_wanted: bool) -> u64 {
    let idle = Options {
        memtable_bytes: 4 << 20,
        strategy: None,
        level0_runs_max: 1000,
        ..options()
    };
    let (store, _) = Store::open(env.clone(), idle.clone()).await.unwrap();
    for (of_eight, stamp) in [(8, 1), (5, 2)] {
        for number in (0..4096u64).filter(|number| number % 8 < of_eight) {
            let record = value(noise(number, 16_000), stamp);
            put(&store, number.to_be_bytes(), record).await.unwrap();
        }
    }
    store.close().await.unwrap();
    let options = Options {
        strategy: Some(Strategy::Hybrid),
        ..idle
    };
    let (store, _) = Store::open(env.clone(), options).await.unwrap();
    let begun = env.now();
    if is_wanted {
        store.compact().await.unwrap();
    }
    while store.stats().counts.blob_bytes_written < 20 << 20 {
        env.sleep(Duration::from_millis(10)).await;
    }
    u64::try_from((env.now() - begun).as_millis()).unwrap()
}

#[test]
fn values_are_moved_out_of_blobs_slowly_unless_somebody_waits_for_it() {
    let quick = || torc_sim::Options {
        background_us: 0..=1,
        disk: DiskOptions {
            read_us: 10..=20,
            write_us: 10..=20,
            sync_us: 10..=20,
            ..DiskOptions::default()
        },
        ..torc_sim::Options::default()
    };
    let run = |is_wanted| {
        let simulation = Simulation::new(1, quick());
        let host = simulation.add_host(1);
        let scenario = move |env: SimEnv| async move { emptied_after(&env, is_wanted).await };
        simulation.run_on(host, ShardId(0), scenario).unwrap()
    };
    let (slow, quick) = (run(false), run(true));
    println!("{slow} ms, and {quick} when wanted");
    assert!(slow >= 2000, "{slow} ms for 20 MiB");
    assert!(quick < slow / 2, "{quick} ms, not much less than {slow}");
}

#[test]
fn pacing_is_the_same_each_time() {
    let run = || overwrite(Load { seed: 7, ..SMALL }, small(), 5);
    assert_eq!(run(), run());
}
