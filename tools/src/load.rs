//! `torc load`: the load generator.
//!
//! One measuring core, thin protocols, thin modes. A run is a set of [`worker`] threads, each with
//! its own connections and event loop, that share a [`ledger`] of what was acknowledged. What they
//! measure flows in [`recorder`]s, an interval at a time, to a collector ([`phase`]); [`run`] strings
//! phases together, and every mode is made of its runs.
//!
//! Invariant: latency is taken from the moment an operation was *due* as well as from the moment it
//! was sent, and what was never answered or never sent stays in the figures, so that a stalled server
//! cannot hide behind requests that were never made (coordinated omission).

mod agents;
mod compare;
mod connection;
mod environment;
mod figures;
mod health;
mod html;
mod interrupt;
mod ledger;
mod limits;
mod login;
mod modes;
mod null_server;
mod options;
mod outcome;
mod output;
mod pauses;
mod phase;
mod place;
mod protocol;
mod recorder;
mod report;
mod run;
mod schedule;
mod search;
mod selftest;
mod settle;
mod source;
mod sparse;
mod targets;
mod trace;
mod value;
mod view;
#[cfg(test)]
mod virtual_world;
mod wire;
mod worker;
mod world;

use clap::{Args, Subcommand};

use crate::failure::Failure;
use options::Options;
pub(crate) use options::parse_duration;
use outcome::Outcome;
use run::{Bench, Run};

/// `torc load`
#[derive(Args, Clone, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Load {
    #[command(subcommand)]
    mode: Option<Mode>,
    #[command(flatten)]
    options: Options,
}

/// What a load command does; `run` when nothing is said.
#[derive(Clone, Debug, Subcommand)]
enum Mode {
    /// Fill the keys, then put load on them for a while and measure it
    Run(Box<Options>),
    /// Write every key once, and insist until each is acknowledged
    Fill(Box<Options>),
    /// Read every key once and check every byte; a missing key is a loss
    Verify(Box<Options>),
    /// Make the requests of a public cache trace with their timing: Twitter's, or Meta's CacheLib
    Replay(Box<modes::Replay>),
    /// Measure latency at rising rates
    Sweep(Box<modes::Sweep>),
    /// Find the highest rate that holds a service level, with an interval and what limits it
    Knee(Box<modes::Knee>),
    /// Tell whether systems differ, from repeated, interleaved runs
    Compare(modes::Compare),
    /// Find what this client can measure here, against a server that does nothing
    Selftest(Box<modes::Selftest>),
    /// Make load for coordinators on other machines
    Agent(modes::Agent),
    /// Put recorded runs into one HTML report
    Report(modes::Report),
}

impl Load {
    /// The options of a mode that has its own benches made from them.
    fn options(&self) -> Option<&Options> {
        match &self.mode {
            None => Some(&self.options),
            Some(Mode::Run(options) | Mode::Fill(options) | Mode::Verify(options)) => Some(options),
            Some(Mode::Sweep(args)) => Some(&args.options),
            Some(Mode::Knee(args)) => Some(&args.options),
            _ => None,
        }
    }

    /// Whether it measures itself and so has something to report when it is cut short.
    fn measures(&self) -> bool {
        match &self.mode {
            Some(Mode::Agent(_) | Mode::Report(_)) => false,
            Some(Mode::Selftest(args)) => !args.only_serves(),
            _ => true,
        }
    }

    /// Notes the command line for agents.
    fn note_words(&mut self) {
        let words: Vec<String> = std::env::args()
            .skip_while(|word| word != "load")
            .skip(1)
            .collect();
        let options = match &mut self.mode {
            None => &mut self.options,
            Some(Mode::Run(options) | Mode::Fill(options) | Mode::Verify(options)) => options,
            Some(Mode::Sweep(args)) => &mut args.options,
            Some(Mode::Knee(args)) => &mut args.options,
            Some(_) => return,
        };
        options.words = words;
    }
}

/// Runs a load and reports it. See [`verdict`] for what makes it fail.
pub fn load(args: &Load) -> Result<(), Failure> {
    let mut args = args.clone();
    args.note_words();
    if args.measures() {
        interrupt::catch()?;
    }
    interrupt::end(ended(&args))
}

fn ended(args: &Load) -> Result<(), Failure> {
    match &args.mode {
        None => run_once(&args.options),
        Some(Mode::Run(options)) => run_once(options),
        Some(Mode::Fill(options)) => {
            options::refuse(EACH, &options.paces())?;
            let run = Bench::new(options, (0, 1))?.fill()?;
            report(options, &run)
        }
        Some(Mode::Verify(options)) => {
            options::refuse(EACH, &options.paces())?;
            let run = Bench::new(options, (0, 1))?.verify(true)?;
            report(options, &run)
        }
        Some(Mode::Replay(args)) => modes::replay(args),
        Some(Mode::Sweep(args)) => modes::sweep(args),
        Some(Mode::Knee(args)) => modes::knee(args),
        Some(Mode::Compare(args)) => modes::compare(args),
        Some(Mode::Selftest(args)) => modes::selftest(args),
        Some(Mode::Agent(args)) => modes::agent(args),
        Some(Mode::Report(args)) => modes::report(args),
    }
}

/// Modes that have no pace of their own.
const EACH: &str = "fill and verify, which go as fast as answers come";

fn run_once(options: &Options) -> Result<(), Failure> {
    let mut bench = Bench::new(options, (0, 1))?;
    prepare(&mut bench)?;
    let mut run = bench.run()?;
    run.check_all(&mut bench)?;
    report(options, &run)
}

/// Fills and warms up as the options say.
fn prepare(bench: &mut Bench) -> Result<(), Failure> {
    if !bench.options().no_fill {
        let run = bench.fill()?.complete()?;
        output::note(&format!(
            "filled {} keys in {:.1} s",
            run.outcome.operations_done, run.outcome.seconds
        ));
        if !bench.options().no_settle {
            output::note(&bench.settle());
        }
    }
    bench.warm_up()
}

/// Prints a run, writes the files asked for, and fails when verification did.
fn report(options: &Options, run: &Run) -> Result<(), Failure> {
    let said = output::show(options.json.as_deref(), &report::text(&run.outcome));
    let results = output::Results::of_run(run);
    let written = results.write(options.json.as_deref(), options.out.as_deref());
    let written = first_of(written, said);
    let judged = match &run.gave_up {
        Some(words) if faults([&run.outcome]).is_none() => Err(Failure::new(words.as_str())),
        _ => verdict([&run.outcome], options.require_valid),
    };
    first_of(judged, written)
}

/// The first of two failures; the second is told too.
fn first_of(first: Result<(), Failure>, second: Result<(), Failure>) -> Result<(), Failure> {
    if let (Err(_), Err(second)) = (&first, &second) {
        output::note(&format!("torc: {second}"));
    }
    first.and(second)
}

/// What verification found that makes a store untrue.
fn faults<'a>(outcomes: impl IntoIterator<Item = &'a Outcome>) -> Option<Failure> {
    let (mut wrong, mut lost) = (0, 0);
    for outcome in outcomes {
        wrong += outcome.verification.wrong;
        lost += outcome.verification.lost;
    }
    (wrong + lost > 0).then(|| {
        Failure::untrue(format!(
            "verification failed: {wrong} wrong values, {lost} acknowledged writes lost"
        ))
    })
}

fn why_idle(outcome: &Outcome) -> String {
    if let Some(error) = outcome.errors.first() {
        return error.clone();
    }
    let all = outcome.operations.values();
    let unanswered: u64 = all.map(|one| one.censored).sum();
    match unanswered - outcome.unsent {
        0 => "none was due in that time".into(),
        sent => format!("{sent} were sent and none was answered"),
    }
}

/// Fails when a value of some run was wrong or an acknowledged write lost, when a run did nothing,
/// or, if they must be, when one is not VALID; in this order, so that a store's fault is never
/// taken for the client's.
fn verdict<'a>(
    outcomes: impl IntoIterator<Item = &'a Outcome> + Clone,
    require_valid: bool,
) -> Result<(), Failure> {
    if let Some(failure) = faults(outcomes.clone()) {
        return Err(failure);
    }
    let idle = |outcome: &&Outcome| outcome.operations_done == 0 && !outcome.interrupted;
    if let Some(outcome) = outcomes.clone().into_iter().find(idle) {
        return Err(Failure::new(format!(
            "no operation was done: {}",
            why_idle(outcome)
        )));
    }
    let invalid = |outcome: &&Outcome| !outcome.validity.valid();
    match outcomes.into_iter().find(invalid) {
        Some(outcome) if require_valid => Err(Failure::invalid(format!(
            "the measurement is {}",
            outcome.validity.words()
        ))),
        _ => Ok(()),
    }
}
