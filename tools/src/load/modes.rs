//! The modes beside `run`: each is made of runs of a [`Bench`].

use std::fs::File;
use std::io::BufReader;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::{Args, Parser};

use super::agents;
use super::compare::{self as comparing, order, undisturbed};
use super::environment;
use super::html;
use super::interrupt;
use super::null_server::NullServer;
use super::options::{Live, Options, parse_duration, parse_positive, parse_rate, refuse};
use super::outcome::Outcome;
use super::output;
use super::protocol::ProtocolName;
use super::run::{Bench, new_seed};
use super::search::{self, KneeOptions, Probe, RETRIES, Slo};
use super::selftest as testing;
use super::trace::Trace;
use super::{first_of, prepare, report as report_run};
use crate::failure::Failure;

/// `torc load replay`
#[derive(Args, Clone, Debug)]
pub struct Replay {
    /// The trace, as text
    #[arg(value_name = "FILE")]
    trace: PathBuf,
    /// Times as fast as it was recorded
    #[arg(long, default_value = "1", value_name = "FACTOR", value_parser = parse_positive)]
    speed: f64,
    #[command(flatten)]
    pub options: Options,
}

/// `torc load sweep`
#[derive(Args, Clone, Debug)]
pub struct Sweep {
    /// Lowest rate, in operations a second
    #[arg(long, default_value = "1000", value_name = "N", value_parser = parse_rate)]
    from: f64,
    /// Highest rate
    #[arg(long, default_value = "100000", value_name = "N", value_parser = parse_rate)]
    to: f64,
    /// Rates, by equal factors
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..=100))]
    steps: u32,
    /// Service level that each rate is judged by, such as p99<5ms or read:p99.9<1ms,failed<0.1%
    #[arg(long, default_value = "p99<5ms", value_name = "SLO")]
    slo: Slo,
    #[command(flatten)]
    pub options: Options,
}

/// `torc load knee`
#[derive(Args, Clone, Debug)]
pub struct Knee {
    /// Service level, such as p99<5ms or read:p99.9<1ms,failed<0.1%
    #[arg(long, default_value = "p99<5ms", value_name = "SLO")]
    slo: Slo,
    /// First rate, in operations a second
    #[arg(long, default_value = "1000", value_name = "N", value_parser = parse_rate)]
    from: f64,
    /// How narrow each search ends, as a share of the rate
    #[arg(long, default_value = "0.05", value_name = "SHARE", value_parser = parse_positive)]
    precision: f64,
    /// Searches; six give an interval of 97 %
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=50))]
    repeats: u32,
    #[command(flatten)]
    pub options: Options,
}

/// `torc load compare`
#[derive(Args, Clone, Debug)]
pub struct Compare {
    /// A system, as NAME=OPTIONS, the options being those of `torc load run`; two or more. The
    /// first is what the others are compared with
    #[arg(long = "run", value_name = "NAME=OPTIONS", allow_hyphen_values = true)]
    runs: Vec<String>,
    /// Runs of each system [default: what the number of figures needs, 5 or 6]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeats: Option<u32>,
    /// How often a run is done again in its place because the client did not keep up, so that its
    /// latencies would be partly those of the client
    #[arg(long, default_value_t = RETRIES, value_parser = clap::value_parser!(u32).range(0..=1000))]
    retries: u32,
    /// Recorded runs (see --out) instead: what the others are compared with
    #[arg(long, value_name = "RUN", num_args = 1.., requires = "after", conflicts_with = "runs")]
    before: Vec<PathBuf>,
    /// Recorded runs to be compared
    #[arg(long, value_name = "RUN", num_args = 1.., requires = "before")]
    after: Vec<PathBuf>,
    /// Directory for every run's JSON and one report of all systems
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Options of all systems
    #[arg(last = true, value_name = "OPTIONS")]
    common: Vec<String>,
}

/// `torc load selftest`
#[derive(Args, Clone, Debug)]
pub struct Selftest {
    /// Only serve the null server at this address, for other generators, until stopped
    #[arg(long, value_name = "HOST:PORT")]
    serve: Option<SocketAddr>,
    /// How long that server computes over each request, such as 100us
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = parse_duration, requires = "serve")]
    work: Duration,
    #[command(flatten)]
    options: Options,
}

/// `torc load agent`
#[derive(Args, Clone, Debug)]
pub struct Agent {
    /// Where coordinators reach it. Whoever does can make it put load on any address
    #[arg(long, default_value = "127.0.0.1:7499", value_name = "HOST:PORT")]
    listen: SocketAddr,
}

/// `torc load report`
#[derive(Args, Clone, Debug)]
pub struct Report {
    /// Directories of runs (see --out), or their run.json or runs.json
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// Where the page goes
    #[arg(long, short, default_value = "report.html", value_name = "FILE")]
    output: PathBuf,
}

/// The options of one system of a comparison.
#[derive(Debug, Parser)]
#[command(name = "torc load", args_override_self = true)]
struct System {
    #[command(flatten)]
    options: Options,
}

/// A coordinator's command line, as an agent reads it.
#[derive(Debug, Parser)]
#[command(name = "torc load", args_override_self = true)]
struct CommandLine {
    #[command(flatten)]
    load: super::Load,
}

impl Selftest {
    /// Whether it measures nothing and is stopped by a signal.
    pub fn only_serves(&self) -> bool {
        self.serve.is_some()
    }
}

/// Replays a trace. Its keys are not written before: a trace says itself what is written.
pub fn replay(args: &Replay) -> Result<(), Failure> {
    let trace_says = "replay: the trace says what is done and when";
    refuse(trace_says, &args.options.paces())?;
    refuse(trace_says, &args.options.mixes())?;
    let agents = !args.options.agents.is_empty();
    refuse("replay, which one machine makes", &[("--agents", agents)])?;
    let fail =
        |error: &dyn std::fmt::Display| Failure::new(format!("{}: {error}", args.trace.display()));
    let file = File::open(&args.trace).map_err(|error| fail(&error))?;
    // The printed seed must repeat the moments of the requests too.
    let seed = args.options.seed.unwrap_or_else(new_seed);
    let trace =
        Trace::read(BufReader::new(file), args.speed, seed).map_err(|error| fail(&error))?;
    output::note(&format!(
        "{} requests on {} keys over {:.0} s in the format of {}, {} lines left out",
        trace.requests,
        trace.keys,
        trace.length().as_secs_f64(),
        trace.format,
        trace.skipped
    ));
    let options = Options {
        seed: Some(seed),
        keys: trace.keys,
        // A time to live may end while the trace still reads the key.
        may_evict: true,
        ..args.options.clone()
    };
    let mut bench = Bench::new(&options, (0, 1))?;
    let mut run = bench.replay(Arc::new(trace))?;
    run.check_all(&mut bench)?;
    report_run(&options, &run)
}

/// Latency over rate.
pub fn sweep(args: &Sweep) -> Result<(), Failure> {
    refuse(
        "sweep, which sets the rate by --from and --to",
        &args.options.paces(),
    )?;
    let mut bench = Bench::new(&args.options, (0, 1))?;
    prepare(&mut bench)?;
    let mut outcomes = Vec::new();
    let mut swept = Ok(());
    for rate in search::rates(args.from, args.to, args.steps) {
        swept = probe(&mut bench, rate, &args.slo, &mut outcomes).map(drop);
        if swept.is_err() {
            break;
        }
    }
    let written = write_all(&args.options, &outcomes);
    let checked = check_all(&mut bench, &mut outcomes);
    let judged = super::verdict(&outcomes, args.options.require_valid);
    first_of(judged, first_of(swept, written.and(checked)))
}

/// Measures a rate, prints its line and keeps its outcome. Fails when it was cut short.
fn probe(
    bench: &mut Bench,
    rate: f64,
    slo: &Slo,
    outcomes: &mut Vec<Outcome>,
) -> Result<Probe, Failure> {
    let (probe, run) = search::probe(bench, rate, slo)?;
    let mut outcome = run.outcome;
    outcome.setup.name = format!("{rate:.0}/s");
    let json = bench.options().json.as_deref();
    let said = output::show(json, &search::line(&outcome, &probe));
    outcomes.push(outcome);
    said.and_then(|()| interrupt::check()).map(|()| probe)
}

/// Reads every key, if that was asked for, and keeps what was found.
fn check_all(bench: &mut Bench, outcomes: &mut Vec<Outcome>) -> Result<(), Failure> {
    if !bench.options().check_all || interrupt::came() {
        return Ok(());
    }
    let check = bench.verify(false)?;
    output::note(&format!(
        "checked {} values of all keys: {} wrong, {} acknowledged writes lost",
        check.outcome.verification.checked,
        check.outcome.verification.wrong,
        check.outcome.verification.lost
    ));
    outcomes.push(check.outcome.clone());
    check.complete().map(drop)
}

/// The highest rate that holds a service level.
pub fn knee(args: &Knee) -> Result<(), Failure> {
    refuse("knee, which looks for the rate", &args.options.paces())?;
    let mut bench = Bench::new(&args.options, (0, 1))?;
    bench.set_rate(args.from);
    prepare(&mut bench)?;
    let options = KneeOptions {
        start: args.from,
        precision: args.precision,
        repeats: usize::try_from(args.repeats).expect("a small number"),
    };
    let mut outcomes: Vec<Outcome> = Vec::new();
    let found = search::knee(options, |rate| {
        probe(&mut bench, rate, &args.slo, &mut outcomes)
    });
    let found = found.and_then(|found| {
        let words = format!("\nknee      {}\nbeyond it {}\n", found.words(), found.limit);
        output::show(args.options.json.as_deref(), &words)?;
        match args.options.require_valid && found.by_client {
            true => Err(Failure::invalid(found.words())),
            false => Ok(()),
        }
    });
    outcomes.sort_by(|one, other| {
        let rate = |outcome: &Outcome| outcome.setup.offered_per_s.unwrap_or(0.0);
        rate(one).total_cmp(&rate(other))
    });
    let written = write_all(&args.options, &outcomes);
    let checked = check_all(&mut bench, &mut outcomes);
    // Probes that the client could not carry, or in which nothing was due, belong to the search.
    let judged = super::verdict(outcomes.iter().filter(|one| one.operations_done > 0), false);
    first_of(judged, first_of(found, written.and(checked)))
}

/// Writes all runs to where the options say.
fn write_all(options: &Options, outcomes: &[Outcome]) -> Result<(), Failure> {
    output::Results::of_runs(outcomes).write(options.json.as_deref(), options.out.as_deref())
}

/// Whether systems differ.
pub fn compare(args: &Compare) -> Result<(), Failure> {
    if !args.before.is_empty() {
        let systems = [
            ("before".to_owned(), output::read_all(&args.before)?),
            ("after".to_owned(), output::read_all(&args.after)?),
        ];
        return conclude(&systems, args.out.as_deref());
    }
    if args.runs.len() < 2 {
        return Err(Failure::usage(
            "give two systems or more, each as --run NAME=OPTIONS, or recorded runs as --before \
             and --after",
        ));
    }
    // All are understood before the first is filled.
    let options = systems_of(args)?;
    output::ready(None, args.out.as_deref())?;
    let mut benches = Vec::new();
    let mut systems: Vec<(String, Vec<Outcome>)> = Vec::new();
    for (name, options) in options {
        let mut bench = Bench::new(&options, (0, 1))?;
        prepare(&mut bench)?;
        benches.push(bench);
        systems.push((name, Vec::new()));
    }
    let measured = interleave(args, &mut benches, &mut systems);
    // What was measured before something failed is worth its report.
    let concluded = match systems.iter().all(|(_, outcomes)| !outcomes.is_empty()) {
        true => conclude(&systems, args.out.as_deref()),
        false => Ok(()),
    };
    let mut checks = Vec::new();
    let checked = benches
        .iter_mut()
        .try_for_each(|bench| check_all(bench, &mut checks));
    let require_valid = benches.iter().any(|bench| bench.options().require_valid);
    let outcomes = systems.iter().flat_map(|(_, outcomes)| outcomes);
    let judged = super::verdict(outcomes.chain(&checks), require_valid);
    first_of(judged, first_of(measured, concluded.and(checked)))
}

/// Names of the systems with their options.
fn systems_of(args: &Compare) -> Result<Vec<(String, Options)>, Failure> {
    let mut systems: Vec<(String, Options)> = Vec::new();
    for run in &args.runs {
        let fail = |words: &str| Failure::usage(format!("--run {run}: {words}"));
        let (name, words) = run
            .split_once('=')
            .ok_or_else(|| fail("expected NAME=OPTIONS"))?;
        if name.is_empty() || name.contains('/') || systems.iter().any(|(other, _)| other == name) {
            return Err(fail(
                "the name must be its own and without a slash, since files have it",
            ));
        }
        let words = args
            .common
            .iter()
            .map(String::as_str)
            .chain(words.split_whitespace());
        let parsed = System::try_parse_from(std::iter::once("torc load").chain(words.clone()));
        let options = parsed.map_err(|error| fail(&error.to_string()))?.options;
        if options.json.is_some() || options.out.is_some() {
            return Err(fail(
                "results of all systems go to the --out of `compare`, which stands before `--`",
            ));
        }
        let options = Options {
            name: Some(name.to_owned()),
            words: std::iter::once("run")
                .chain(words)
                .map(str::to_owned)
                .collect(),
            ..options
        };
        systems.push((name.to_owned(), options));
    }
    Ok(systems)
}

/// Measures the systems in turn.
fn interleave(
    args: &Compare,
    benches: &mut [Bench],
    systems: &mut [(String, Vec<Outcome>)],
) -> Result<(), Failure> {
    let count = |number: u32| usize::try_from(number).expect("a small number");
    let mut repeats = args.repeats.map_or(1, count);
    let mut done = 0;
    while done < repeats {
        let orders = order(benches.len(), done + 1);
        for system in &orders[done * benches.len()..] {
            let bench = &mut benches[*system];
            let outcome = undisturbed(count(args.retries), || Ok(bench.run()?.outcome))?;
            // Half a run is none.
            interrupt::check()?;
            output::note(&format!(
                "run {} of {repeats}  {:<20} {:.0}/s  {}",
                done + 1,
                systems[*system].0,
                outcome.rate_per_s,
                outcome.validity.words()
            ));
            if let Some(directory) = &args.out {
                output::make_directory(directory)?;
                let file = format!("{}-{}.json", systems[*system].0, done + 1);
                output::file(&directory.join(file), &output::json(&outcome))?;
            }
            systems[*system].1.push(outcome);
        }
        done += 1;
        if args.repeats.is_none() {
            // The first round tells how many figures there will be.
            repeats = comparing::repeats_for(&systems[0].1[0]).max(5);
        }
    }
    Ok(())
}

fn conclude(systems: &[(String, Vec<Outcome>)], out: Option<&Path>) -> Result<(), Failure> {
    let runs = |at: usize| systems[at].1.iter().collect::<Vec<_>>();
    let before = runs(0);
    let mut said = String::new();
    for (at, (name, _)) in systems.iter().enumerate().skip(1) {
        let after = runs(at);
        let invalid = before
            .iter()
            .chain(&after)
            .filter(|run| !run.validity.valid())
            .count();
        let comparisons = comparing::judge(&before, &after);
        let text = comparing::text(&systems[0].0, name, &comparisons, invalid);
        output::say(&text)?;
        output::say("\n")?;
        said.push_str(&text);
        said.push('\n');
    }
    let Some(directory) = out else {
        return Ok(());
    };
    let typical: Vec<Outcome> = (0..systems.len())
        .filter_map(|at| comparing::typical(&runs(at)).cloned())
        .collect();
    output::make_directory(directory)?;
    output::file(&directory.join("report.html"), &html::page(&typical, &said))
}

/// What this client can measure here.
pub fn selftest(args: &Selftest) -> Result<(), Failure> {
    if let Some(address) = args.serve {
        environment::allow_all_files();
        let server = NullServer::bind(address)
            .map_err(|error| Failure::new(format!("--serve {address}: {error}")))?
            .working(args.work);
        output::say(&format!("null server at {}\n", server.address()?))?;
        return Ok(server.serve(&AtomicBool::new(false))?);
    }
    let options = &args.options;
    let what = "selftest, which measures the client against a server of its own";
    refuse(what, &options.paces())?;
    let target = [
        ("--address", !options.address.is_empty()),
        ("--protocol", options.protocol != ProtocolName::Binary),
        ("--agents", !options.agents.is_empty()),
    ];
    refuse(what, &target)?;
    let found = testing::run(options)?;
    output::show(options.json.as_deref(), &testing::text(&found))?;
    write_all(&args.options, &[found.closed, found.half])
}

/// One page of recorded runs.
pub fn report(args: &Report) -> Result<(), Failure> {
    let runs = output::read_all(&args.runs)?;
    output::file(&args.output, &html::page(&runs, ""))?;
    if args.output.as_os_str() != "-" {
        output::note(&format!("{} is written", args.output.display()));
    }
    Ok(())
}

/// Makes load for coordinators.
pub fn agent(args: &Agent) -> Result<(), Failure> {
    agents::serve(args.listen, |words| {
        let parsed = CommandLine::try_parse_from(words_of_load(words))
            .map_err(|error| Failure::new(error.to_string()))?;
        let options = parsed.load.options().ok_or_else(|| {
            Failure::new("agents serve run, fill, verify, sweep, knee and compare only")
        })?;
        Ok(Options {
            agents: Vec::new(),
            live: Live::Off,
            json: None,
            out: None,
            ..options.clone()
        })
    })
}

fn words_of_load(words: &[String]) -> impl Iterator<Item = &str> {
    std::iter::once("torc load").chain(words.iter().map(String::as_str))
}
