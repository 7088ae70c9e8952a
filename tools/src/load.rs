//! `torc load`: the load generator.
//!
//! A run is a set of worker threads, each with its own connections and event loop, that share a
//! ledger of what was acknowledged. Latency is taken from the moment an operation was due as well
//! as from the moment it was sent, so that a stalled server cannot hide behind requests that were
//! never made (coordinated omission).

mod connection;
mod keys;
mod ledger;
mod plan;
mod protocol;
mod recorder;
mod report;
mod value;
mod worker;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::SeedableRng;

use crate::endpoint::Endpoint;
use crate::failure::Failure;
use keys::{Keys, Zipf};
use ledger::Ledger;
use plan::{Arrivals, Pace, Source};
use protocol::{Levels, Protocol, ProtocolName};
use recorder::{Operation, Recorder};
use report::Setup;
use worker::{Settings, Shared, Worker};

/// What a load command does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Fill the keys, then read and write for a while
    Run,
    /// Write every key once, and insist until each is acknowledged
    Fill,
    /// Read every key once and check every byte; a missing key is a loss
    Verify,
}

/// How keys are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Distribution {
    /// Each key equally often
    Uniform,
    /// A few keys very often, as YCSB does
    Zipf,
}

/// `torc load`
#[derive(Args, Debug)]
pub struct Load {
    /// What to do
    #[arg(value_enum, default_value_t = Mode::Run)]
    pub mode: Mode,
    /// HTTP endpoint of any node; the others are learned from it
    #[arg(
        long,
        env = "TORC_ENDPOINT",
        default_value = "http://127.0.0.1:7480",
        value_name = "URL"
    )]
    pub endpoint: String,
    /// Address of the protocol's listener; given, nothing is learned. May be given several times
    #[arg(long, value_name = "HOST:PORT")]
    pub address: Vec<SocketAddr>,
    /// Protocol
    #[arg(long, value_enum, default_value_t = ProtocolName::Binary)]
    pub protocol: ProtocolName,
    /// Keyspace [default: default]
    #[arg(long, value_name = "NAME")]
    pub keyspace: Option<String>,
    /// Replicas that must answer a read [default: quorum]
    #[arg(long)]
    pub r: Option<String>,
    /// Replicas that must have a write [default: quorum]
    #[arg(long)]
    pub w: Option<String>,
    /// Number of keys
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    pub keys: u64,
    /// Distribution of the keys
    #[arg(long, value_enum, default_value_t = Distribution::Uniform)]
    pub distribution: Distribution,
    /// Exponent of the zipf distribution
    #[arg(long, default_value_t = 0.99)]
    pub zipf_exponent: f64,
    /// Bytes of a value
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(16..=1_048_576))]
    pub value_bytes: u32,
    /// Percent of reads, 0 to 100
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub reads: u8,
    /// Connections
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    pub connections: u32,
    /// Requests that a connection has outstanding at most
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub pipeline: u32,
    /// Threads
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub threads: u32,
    /// Operations a second (open loop); without it, each connection goes as fast as it is answered
    #[arg(long, value_name = "N")]
    pub rate: Option<f64>,
    /// How long to measure, such as 3s, 500ms or 2m
    #[arg(long, default_value = "10s", value_parser = parse_duration)]
    pub duration: Duration,
    /// Time before that which is not measured
    #[arg(long, default_value = "0s", value_parser = parse_duration)]
    pub warmup: Duration,
    /// Do not write every key before a run
    #[arg(long)]
    pub no_fill: bool,
    /// After a run, read every key once and judge it by all that was acknowledged
    #[arg(long)]
    pub check_all: bool,
    /// Deadline of a request, in milliseconds
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    pub timeout_ms: u32,
    /// Give up filling or verifying after this long
    #[arg(long, default_value = "10m", value_parser = parse_duration)]
    pub give_up: Duration,
    /// Seed of all random choices [default: from the clock; printed]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Write the result as JSON to this file; `-` for standard output
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Runs a load and reports it. Fails when a value was wrong or an acknowledged write lost, or when
/// nothing at all could be done.
pub fn load(args: &Load) -> Result<(), Failure> {
    check(args)?;
    let addresses = if args.address.is_empty() {
        learn(args)?
    } else {
        args.address.clone()
    };
    let levels = Levels {
        keyspace: args.keyspace.clone(),
        r: args.r.clone(),
        w: args.w.clone(),
        timeout_ms: args.timeout_ms,
    };
    let protocol =
        Protocol::named(args.protocol, levels).map_err(|error| Failure::new(error.to_string()))?;
    let seed = args.seed.unwrap_or_else(|| {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        since.map_or(0, |since| u64::from(since.subsec_nanos()))
    });
    let mut shared = Shared {
        protocol,
        addresses,
        ledger: Ledger::new(args.keys),
        source: each(args, Operation::Write),
        value_bytes: usize::try_from(args.value_bytes).expect("at most a mebibyte"),
        timeout: Duration::from_millis(args.timeout_ms.into()),
        must_exist: args.mode == Mode::Verify,
        strict: strict(args),
        stop: AtomicBool::new(false),
    };
    let (elapsed, recorder) = match args.mode {
        Mode::Fill => run_phase(args, &shared, seed, None, args.give_up)?,
        Mode::Verify => {
            shared.source = each(args, Operation::Read);
            run_phase(args, &shared, seed, None, args.give_up)?
        }
        Mode::Run => {
            let mut filled = None;
            if !args.no_fill {
                filled = Some(run_phase(args, &shared, seed, None, args.give_up)?);
            }
            if let Some((took, recorder)) = &filled {
                eprintln!(
                    "filled {} keys in {:.1} s",
                    recorder.series(Operation::Write).done,
                    took.as_secs_f64()
                );
            }
            shared.source = Source::Mix {
                keys: keys_of(args),
                read_fraction: f64::from(args.reads) / 100.0,
            };
            if !args.warmup.is_zero() {
                run_phase(args, &shared, seed ^ 1, args.rate, args.warmup)?;
            }
            let mut outcome = run_phase(args, &shared, seed ^ 2, args.rate, args.duration)?;
            if args.check_all {
                shared.source = each(args, Operation::Read);
                let (_, check) = run_phase(args, &shared, seed, None, args.give_up)?;
                outcome.1.verdicts.merge(&check.verdicts);
            }
            outcome
        }
    };
    report(args, &shared, seed, elapsed, &recorder)
}

fn check(args: &Load) -> Result<(), Failure> {
    if args
        .rate
        .is_some_and(|rate| !rate.is_finite() || rate <= 0.0)
    {
        return Err(Failure::new("--rate: operations a second, above zero"));
    }
    if !args.zipf_exponent.is_finite() || args.zipf_exponent <= 0.0 {
        return Err(Failure::new("--zipf-exponent: a number above zero"));
    }
    Ok(())
}

/// The listeners of every node that is up, from one node's status.
fn learn(args: &Load) -> Result<Vec<SocketAddr>, Failure> {
    let field = match args.protocol {
        ProtocolName::Http => "http",
        ProtocolName::Resp => "resp",
        ProtocolName::Binary => "client",
    };
    let status = Endpoint::new(&args.endpoint)?.get_json("/admin/status")?;
    let nodes = status.get("nodes").and_then(serde_json::Value::as_array);
    let addresses: Vec<SocketAddr> = nodes
        .into_iter()
        .flatten()
        .filter_map(|node| node.get(field)?.as_str()?.parse().ok())
        .collect();
    if addresses.is_empty() {
        return Err(Failure::new(format!(
            "{}: its status names no {field} address; give --address HOST:PORT",
            args.endpoint
        )));
    }
    Ok(addresses)
}

fn each(args: &Load, operation: Operation) -> Source {
    Source::Each {
        operation,
        next: AtomicU64::new(0),
        count: args.keys,
    }
}

fn keys_of(args: &Load) -> Keys {
    match args.distribution {
        Distribution::Uniform => Keys::Uniform { count: args.keys },
        Distribution::Zipf => Keys::Zipf(Zipf::new(args.keys, args.zipf_exponent)),
    }
}

/// Whether a read must see every write acknowledged before it: quorums overlap for the levels that
/// are known to; anything else is judged only by its bytes.
fn strict(args: &Load) -> bool {
    let level = |level: &Option<String>| level.as_deref().unwrap_or("quorum").to_owned();
    let (r, w) = (level(&args.r), level(&args.w));
    let quorum = |level: &str| matches!(level, "quorum" | "2" | "3" | "all");
    (quorum(&r) && quorum(&w)) || r == "all" || w == "all"
}

/// Runs the shared source on all threads: for `length` at most, at `rate` or as fast as answers
/// come.
fn run_phase(
    args: &Load,
    shared: &Shared,
    seed: u64,
    rate: Option<f64>,
    length: Duration,
) -> Result<(Duration, Recorder), Failure> {
    shared.stop.store(false, Ordering::Relaxed);
    let begun = Instant::now();
    let threads = args.threads.min(args.connections);
    let mut merged = Recorder::default();
    let results: Vec<std::io::Result<Recorder>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|index| {
                let share =
                    args.connections / threads + u32::from(index < args.connections % threads);
                let pace = match rate {
                    None => Pace::Closed,
                    Some(rate) => Pace::Open(Arrivals::new(rate / f64::from(threads), begun)),
                };
                let settings = Settings {
                    index: usize::try_from(index).expect("a small number"),
                    connections: usize::try_from(share).expect("a small number"),
                    pipeline: usize::try_from(args.pipeline).expect("a small number"),
                    end: Some(begun + length),
                    pace,
                    rng: Xoshiro256PlusPlus::seed_from_u64(seed.wrapping_add(u64::from(index))),
                };
                scope.spawn(move || Worker::new(shared, settings)?.run())
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|_| Err(std::io::Error::other("panicked")))
            })
            .collect()
    });
    for result in results {
        merged.merge(&result?);
    }
    let elapsed = begun.elapsed();
    if let Source::Each {
        count, operation, ..
    } = &shared.source
    {
        let done = merged.series(*operation).done;
        if done < *count {
            return Err(Failure::new(format!(
                "gave up after {:.0} s with {done} of {count} keys done: {}",
                elapsed.as_secs_f64(),
                merged
                    .errors
                    .first()
                    .map_or("no error was reported", String::as_str)
            )));
        }
    }
    Ok((elapsed, merged))
}

fn report(
    args: &Load,
    shared: &Shared,
    seed: u64,
    elapsed: Duration,
    recorder: &Recorder,
) -> Result<(), Failure> {
    let setup = Setup {
        target: format!(
            "{:?} to {}",
            args.protocol,
            shared
                .addresses
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(", ")
        )
        .to_lowercase(),
        model: match args.rate {
            Some(rate) if args.mode == Mode::Run => format!("open loop at {rate}/s, Poisson"),
            _ => format!(
                "closed loop (service time), {} connections x {} outstanding",
                args.connections, args.pipeline
            ),
        },
        workload: format!(
            "{:?} of {} keys, {:?}, {} bytes, {} % reads, r {}, w {}",
            args.mode,
            args.keys,
            args.distribution,
            args.value_bytes,
            args.reads,
            args.r.as_deref().unwrap_or("quorum"),
            args.w.as_deref().unwrap_or("quorum")
        )
        .to_lowercase(),
        seed,
    };
    print!("{}", report::text(&setup, elapsed, recorder));
    if let Some(path) = &args.json {
        let document = format!("{:#}\n", report::json(&setup, elapsed, recorder));
        if path.as_os_str() == "-" {
            print!("{document}");
        } else {
            std::fs::write(path, document).map_err(|error| {
                Failure::new(format!("cannot write {}: {error}", path.display()))
            })?;
        }
    }
    let verdicts = &recorder.verdicts;
    if verdicts.wrong + verdicts.lost > 0 {
        return Err(Failure::new(format!(
            "verification failed: {} wrong values, {} acknowledged writes lost",
            verdicts.wrong, verdicts.lost
        )));
    }
    if Operation::ALL
        .iter()
        .all(|operation| recorder.series(*operation).done == 0)
    {
        let reason = recorder
            .errors
            .first()
            .map_or("no error was reported", String::as_str);
        return Err(Failure::new(format!("no operation was done: {reason}")));
    }
    Ok(())
}

/// `3s`, `500ms`, `2m`, `1h`.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let scale = match unit {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err("expected a number with ms, s, m or h, such as 3s".into()),
    };
    let number: f64 = number
        .parse()
        .map_err(|_| "expected a number before the unit")?;
    Duration::try_from_secs_f64(number * scale).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_with_their_unit() {
        assert_eq!(parse_duration("3s"), Ok(Duration::from_secs(3)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("1.5m"), Ok(Duration::from_secs(90)));
        for bad in ["3", "s", "", "3 s", "-1s", "3d"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
