//! Measuring: `irqproof`, `disk`, `jitter`, `prove`.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use torc_tuning::change::Change;
use torc_tuning::cpuset::CpuSet;
use torc_tuning::disk::{self, DiskOptions};
use torc_tuning::irqproof::{self, Seen};
use torc_tuning::jitter::{self, JitterOptions};
use torc_tuning::plan::Plan;
use torc_tuning::prove::{self, Figure, Group};
use torc_tuning::stats::{Arm, CompareOptions, Good, Verdict, repeats_needed};

use super::{DiskArgs, IrqproofArgs, JitterArgs, Measure, ProveArgs, change, host};
use crate::failure::Failure;

fn words(error: &dyn std::error::Error) -> Failure {
    Failure::new(error.to_string())
}

pub(super) fn irqproof(args: &IrqproofArgs) -> Result<(), Failure> {
    let before = host::read(None)?;
    std::thread::sleep(args.duration);
    let after = host::read(None)?;
    let layout = Plan::of(&after, args.profile.into()).layout;
    let outcome = irqproof::prove(&before, &after, &layout);
    if args.json {
        host::print_json(&outcome)?;
    } else {
        for proof in &outcome.proofs {
            let seen = match &proof.seen {
                Seen::AsPlanned { arrivals } => format!("as planned ({arrivals})"),
                Seen::Quiet => "quiet: nothing arrived".into(),
                Seen::Stray { share, arrivals } => {
                    format!("STRAY: {:.0} % here, {arrivals:?}", share * 100.0)
                }
            };
            let shared = if proof.shared_with.is_empty() {
                String::new()
            } else {
                format!(" (queue shared with shards {:?})", proof.shared_with)
            };
            println!(
                "shard {} cpu {} {} irq {} on {}: {seen}{shared}",
                proof.shard, proof.cpu, proof.queue, proof.interrupt, proof.effective
            );
        }
        for missing in &outcome.unavailable {
            println!("not available here: {}: {}", missing.what, missing.reason);
        }
    }
    if outcome.has_strays() {
        return Err(Failure::new(
            "some interrupts did not land where the layout wants them",
        ));
    }
    Ok(())
}

pub(super) fn disk(args: &DiskArgs) -> Result<(), Failure> {
    let options = DiskOptions {
        directory: args.dir.clone(),
        file_bytes: args.file_mib << 20,
        pass: args.pass,
        depths: args.depths.clone(),
    };
    let properties =
        disk::measure(&options, |what| eprintln!("{what} …")).map_err(|error| words(&error))?;
    for figure in &properties.figures {
        let tail = figure
            .p999_us
            .map_or_else(|| "-".into(), |us| format!("{us:.0}"));
        println!(
            "{:<30} depth {:<4} {:>10.0}/s {:>8.1} MiB/s  p50 {:>7.0} p99 {:>7.0} p99.9 {tail:>7} us  {}",
            figure.work.name(),
            figure.depth,
            figure.per_second,
            figure.bytes_per_second / f64::from(1 << 20),
            figure.p50_us,
            figure.p99_us,
            figure
                .unstable
                .as_ref()
                .map_or_else(|| "stable".into(), |why| format!("NOT STABLE: {why}"))
        );
    }
    let Some(path) = &args.output else {
        return Ok(());
    };
    if !properties.is_stable() && !args.keep_unstable {
        return Err(Failure::new(
            "not stable, so no properties file was written (--keep-unstable writes it)",
        ));
    }
    let text = properties.to_toml().map_err(|error| words(&error))?;
    host::write(path, text)
}

pub(super) fn jitter(args: &JitterArgs) -> Result<(), Failure> {
    let cpus = match &args.cpus {
        Some(list) => CpuSet::parse_list(list).map_err(|error| words(&error))?,
        None => host::read(None)?.usable(),
    };
    let options = JitterOptions {
        cpus: cpus.iter().collect(),
        duration: args.duration,
        realtime: args.realtime,
    };
    let outcome = jitter::measure(&options).map_err(|error| words(&error))?;
    if args.json {
        return host::print_json(&outcome);
    }
    for core in &outcome.cores {
        let share = core.lost_us as f64 / core.spun_us.max(1) as f64 * 100.0;
        println!(
            "cpu {}: {share:.3} % lost in {} gaps, p50 {} p99 {} max {} us",
            core.cpu,
            core.gaps,
            core.p50_ns / 1000,
            core.p99_ns / 1000,
            core.max_ns / 1000
        );
        for (from, count) in &core.histogram {
            println!("  from {:>9.1} us  {count}", *from as f64 / 1000.0);
        }
        for culprit in core.culprits.iter().take(8) {
            println!(
                "  suspect {}: {} {}",
                culprit.what, culprit.amount, culprit.unit
            );
        }
    }
    for missing in &outcome.unavailable {
        println!("not available here: {}: {}", missing.what, missing.reason);
    }
    Ok(())
}

pub(super) fn prove(state: &Path, args: &ProveArgs) -> Result<(), Failure> {
    if !args.aa {
        change::need_root()?;
    }
    let host = host::read(None)?;
    let plan = Plan::of(&host, args.profile.into());
    let groups = if args.aa {
        vec![Group {
            name: "nothing (A/A)".into(),
            changes: Vec::new(),
        }]
    } else if args.each {
        prove::groups(&plan.changes)
    } else {
        vec![Group {
            name: format!("plan {}", plan.id),
            changes: plan.changes.clone(),
        }]
    };
    if groups.iter().all(|group| group.changes.is_empty()) && !args.aa {
        return Err(Failure::new(
            "nothing to prove: the host is as the plan wants it (roll back first)",
        ));
    }
    let cpus: Vec<u32> = plan.layout.shard_cpus().iter().collect();
    let mut proofs = Vec::new();
    for group in &groups {
        let outcome = one(state, args, group, &cpus);
        // Whatever ended it: the host stays as it was.
        switch(state, args, &group.changes, Arm::Before)?;
        proofs.push(outcome?);
    }
    if args.json {
        return host::print_json(&proofs);
    }
    for proof in &proofs {
        println!("{}", proof.group);
        for comparison in &proof.comparisons {
            let verdict = match &comparison.verdict {
                Verdict::Better => "BETTER".into(),
                Verdict::Worse => "WORSE".into(),
                Verdict::NoChange => "no change".into(),
                Verdict::CannotTell { reason } => format!("cannot tell: {reason}"),
            };
            println!(
                "  {:<28} {:>12.2} -> {:>12.2}  x{:.2} to x{:.2}  p {:.4} ({:.4} corrected)  {verdict}",
                comparison.name,
                comparison.before,
                comparison.after,
                comparison.ratio.low,
                comparison.ratio.high,
                comparison.p,
                comparison.p_corrected
            );
        }
    }
    Ok(())
}

fn one(
    state: &Path,
    args: &ProveArgs,
    group: &Group,
    cpus: &[u32],
) -> Result<prove::Proof, Failure> {
    let seed = std::cell::Cell::new(0_u64);
    let measure = || {
        seed.set(seed.get() + 1);
        match args.measure {
            Measure::Jitter => jitter_figures(cpus, args.run),
            Measure::Disk => disk_figures(&args.dir, args.run, seed.get()),
            Measure::Load => load_figures(&args.endpoint, args.run, seed.get()),
        }
    };
    let options = CompareOptions::default();
    let repeats = usize::from(args.repeats);
    let needed = repeats_needed(2, options.level);
    if repeats < needed {
        eprintln!("{repeats} runs a side cannot show anything in two figures; {needed} can");
    }
    prove::prove(
        &group.name,
        repeats,
        options,
        |arm| switch(state, args, &group.changes, arm),
        measure,
    )
}

/// Makes the host as the arm says. A change that outlives its run by a crash goes away by itself.
fn switch(state: &Path, args: &ProveArgs, changes: &[Change], arm: Arm) -> Result<(), Failure> {
    if changes.is_empty() {
        return Ok(());
    }
    let kernel = torc_tuning::kernel::Live::machine();
    let holds = torc_tuning::apply::verify(&kernel, changes).is_empty();
    match arm {
        Arm::After if !holds => {
            let within = args.run * 4 + Duration::from_secs(30);
            change::carry_out(state, "prove", changes, within).map(drop)
        }
        Arm::Before if holds => torc_tuning::apply::rollback(&kernel, state, change::now_s())
            .map(drop)
            .map_err(|error| words(&error)),
        Arm::Before | Arm::After => Ok(()),
    }
}

fn jitter_figures(cpus: &[u32], duration: Duration) -> Result<Vec<Figure>, Failure> {
    let options = JitterOptions {
        cpus: cpus.to_vec(),
        duration,
        realtime: false,
    };
    let outcome = jitter::measure(&options).map_err(|error| words(&error))?;
    let lost = outcome
        .cores
        .iter()
        .map(|core| core.lost_us as f64 / core.spun_us.max(1) as f64 * 1e6);
    let p99 = outcome.cores.iter().map(|core| core.p99_ns as f64 / 1000.0);
    let figure = |name: &str, value| Figure {
        name: name.into(),
        good: Good::Lower,
        value,
    };
    Ok(vec![
        figure("lost us a second, worst core", lost.fold(0.0, f64::max)),
        figure("gap p99 us, worst core", p99.fold(0.0, f64::max)),
    ])
}

fn disk_figures(directory: &Path, pass: Duration, seed: u64) -> Result<Vec<Figure>, Failure> {
    let figure = disk::quick(directory, pass, seed).map_err(|error| words(&error))?;
    Ok(vec![
        Figure {
            name: "random reads a second".into(),
            good: Good::Higher,
            value: figure.per_second,
        },
        Figure {
            name: "random read p99 us".into(),
            good: Good::Lower,
            value: figure.p99_us,
        },
    ])
}

fn load_figures(endpoint: &str, duration: Duration, seed: u64) -> Result<Vec<Figure>, Failure> {
    let file = tempfile::NamedTempFile::new()?;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["load", "run", "--endpoint", endpoint])
        .args(["--duration", &format!("{}ms", duration.as_millis())])
        .args(["--seed", &seed.to_string(), "--json"])
        .arg(file.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    if !command.status()?.success() {
        return Err(Failure::new(
            "torc load failed, so there is nothing to compare",
        ));
    }
    let bytes = std::fs::read(file.path())?;
    let document: serde_json::Value =
        serde_json::from_slice(&bytes).map_err(|error| words(&error))?;
    let number = |pointer: &str| {
        document
            .pointer(pointer)
            .and_then(serde_json::Value::as_f64)
            .unwrap_or(f64::NAN)
    };
    let get = number("/operations/read/latency_us_from_intended/p99");
    Ok(vec![
        Figure {
            name: "operations a second".into(),
            good: Good::Higher,
            value: number("/rate_per_s"),
        },
        Figure {
            name: "read p99 us".into(),
            good: Good::Lower,
            value: get,
        },
    ])
}
