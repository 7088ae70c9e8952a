//! `torc sim`: one simulated run of a whole cluster, or many.

use clap::Args;
use torc_world::Options;

use crate::commands::whole;
use crate::failure::Failure;

/// `torc sim`
#[derive(Args, Debug)]
pub struct Sim {
    /// Seed of the (first) run
    #[arg(long, allow_hyphen_values = true, value_parser = |text: &str| whole(text, 0..=u64::MAX))]
    pub seed: u64,
    /// How many seeds, counted up from the first
    #[arg(long, default_value_t = 1, allow_hyphen_values = true, value_parser = |text: &str| whole(text, 1..=u64::MAX))]
    pub seeds: u64,
    /// Print each run's configuration and counts
    #[arg(long)]
    pub verbose: bool,
    /// Print every event
    #[arg(long)]
    pub events: bool,
}

/// Runs the seeds and prints a line each: seed, hash of the event log, number of events, verdict.
/// A run that breaks a promise is printed whole, with the story of the keys concerned. Fails when
/// there was one.
pub fn sim(args: &Sim) -> Result<(), Failure> {
    let options = Options {
        keep_events: args.events,
        ..Options::default()
    };
    let mut bad = Vec::new();
    for seed in (0..args.seeds).map(|step| args.seed.wrapping_add(step)) {
        let report = torc_world::run(seed, &options);
        for event in &report.events {
            println!("{event}");
        }
        if args.verbose || !report.is_good() {
            println!("{report}");
        }
        println!(
            "seed {seed} hash {:032x} events {} {}",
            report.hash,
            report.event_count,
            if report.is_good() { "good" } else { "BAD" }
        );
        if !report.is_good() {
            bad.push(seed.to_string());
        }
    }
    if bad.is_empty() {
        Ok(())
    } else {
        Err(Failure::new(format!(
            "a promise was broken with seed {}",
            bad.join(", ")
        )))
    }
}
