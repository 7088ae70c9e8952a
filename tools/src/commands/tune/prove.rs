//! `torc tune prove`: before and after, interleaved, with a verdict.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use torc_tuning::apply;
use torc_tuning::change::Change;
use torc_tuning::disk::{self, Probe, Subject, Work};
use torc_tuning::jitter::{self, JitterOptions};
use torc_tuning::kernel::Live;
use torc_tuning::plan::Plan;
use torc_tuning::prove::{self, Figure, Group, Runs};
use torc_tuning::render;
use torc_tuning::stats::{Arm, CompareOptions, Good, repeats_needed};

use super::measure::words;
use super::{Measure, ProveArgs, change, host};
use crate::failure::Failure;

/// Figures of one measurement, whatever is measured.
const FIGURES: usize = 2;
/// The file that a disk is measured on.
const FILE_BYTES: u64 = 256 << 20;
/// The random reads of `--measure disk`.
const ROW: (Work, u32) = (Work::RandomRead, 4);

/// What makes one arm differ from the other.
enum Difference<'a> {
    /// Nothing: whatever is found is chance.
    None,
    /// Changes of the host.
    Changes(&'a [Change]),
    /// A command that runs beside.
    Beside(&'a str),
}

pub(super) fn prove(state: &Path, args: &ProveArgs) -> Result<(), Failure> {
    let host = host::read(None)?;
    let plan = Plan::of(&host, args.profile.into());
    let groups = groups(args, &plan)?;
    if groups.iter().any(|group| !group.changes.is_empty()) {
        change::need_root()?;
    }
    let options = CompareOptions::default();
    let repeats = usize::from(args.repeats);
    let needed = repeats_needed(FIGURES * groups.len(), options.level);
    if repeats < needed {
        return Err(Failure::new(format!(
            "{repeats} runs a side can show no difference in {} figures; --repeats {needed} can",
            FIGURES * groups.len()
        )));
    }
    let seconds = args.run.as_secs_f64() * 2.0 * f64::from(args.repeats) * groups.len() as f64;
    eprintln!("{} to judge, about {seconds:.0} s", groups.len());
    let mut measurement = Measurement::new(args, &plan)?;
    let mut runs = Vec::new();
    for group in &groups {
        eprintln!("  {}", group.name);
        let difference = match &args.beside {
            Some(command) => Difference::Beside(command),
            None if args.aa => Difference::None,
            None => Difference::Changes(&group.changes),
        };
        runs.push(one(state, args, group, &difference, &mut measurement)?);
    }
    let proofs = prove::judge(&runs, options);
    if args.json {
        return host::print_json(&proofs);
    }
    host::show(&render::proofs(&proofs))
}

fn groups(args: &ProveArgs, plan: &Plan) -> Result<Vec<Group>, Failure> {
    let lone = |name: String, changes: &[Change]| {
        vec![Group {
            name,
            changes: changes.to_vec(),
        }]
    };
    if args.aa {
        return Ok(lone("nothing (A/A)".into(), &[]));
    }
    if let Some(command) = &args.beside {
        return Ok(lone(format!("beside: {command}"), &[]));
    }
    if plan.changes.is_empty() {
        return Err(Failure::new(
            "nothing to prove: the host is as the plan wants it (roll back first)",
        ));
    }
    if args.each {
        return Ok(prove::groups(&plan.changes));
    }
    Ok(lone(format!("plan {}", plan.id), &plan.changes))
}

fn one(
    state: &Path,
    args: &ProveArgs,
    group: &Group,
    difference: &Difference<'_>,
    measurement: &mut Measurement<'_>,
) -> Result<Runs, Failure> {
    let mut neighbour = Neighbour(None);
    let switch = |arm| match difference {
        Difference::None => Ok(()),
        Difference::Changes(changes) => change_host(state, args, changes, arm),
        Difference::Beside(command) => neighbour.switch(command, arm),
    };
    let runs = prove::run(&group.name, args.repeats.into(), switch, || {
        measurement.figures()
    });
    // Whatever ended it: the host stays as it was.
    if let Difference::Changes(changes) = difference {
        change_host(state, args, changes, Arm::Before)?;
    }
    runs
}

/// Makes the host as the arm says. A change that outlives its run by a crash goes away by itself.
fn change_host(
    state: &Path,
    args: &ProveArgs,
    changes: &[Change],
    arm: Arm,
) -> Result<(), Failure> {
    let kernel = Live::machine();
    let holds = apply::verify(&kernel, changes).is_empty();
    match arm {
        Arm::After if !holds => {
            let within = args.run * 4 + Duration::from_secs(30);
            change::carry_out(state, "prove", changes, within).map(drop)
        }
        Arm::Before if holds => apply::rollback(&kernel, state, change::now_s())
            .map(drop)
            .map_err(|error| words(&error)),
        Arm::Before | Arm::After => Ok(()),
    }
}

/// A command that runs during the runs of one arm, with all that it starts.
struct Neighbour(Option<Child>);

impl Neighbour {
    fn switch(&mut self, command: &str, arm: Arm) -> Result<(), Failure> {
        // Anew for each run, so that all runs of the arm meet the same.
        self.stop();
        if arm == Arm::After {
            let child = Command::new("sh")
                .args(["-c", command])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .process_group(0)
                .spawn()?;
            self.0 = Some(child);
        }
        Ok(())
    }

    fn stop(&mut self) {
        let Some(mut child) = self.0.take() else {
            return;
        };
        let group = i32::try_from(child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        if let Some(group) = group {
            // Gone already is as good.
            rustix::process::kill_process_group(group, rustix::process::Signal::KILL).ok();
        }
        child.wait().ok();
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Gives the figures of one run.
struct Measurement<'a> {
    args: &'a ProveArgs,
    cpus: Vec<u32>,
    disk: Option<Probe>,
    runs: u64,
}

impl<'a> Measurement<'a> {
    fn new(args: &'a ProveArgs, plan: &Plan) -> Result<Self, Failure> {
        let disk = match args.measure {
            Measure::Disk => {
                let subject = Subject::Directory {
                    path: args.dir.clone(),
                    file_bytes: FILE_BYTES,
                };
                Some(Probe::new(&subject).map_err(|error| words(&error))?)
            }
            Measure::Jitter | Measure::Load => None,
        };
        Ok(Self {
            args,
            cpus: plan.layout.shard_cpus().iter().collect(),
            disk,
            runs: 0,
        })
    }

    fn figures(&mut self) -> Result<Vec<Figure>, Failure> {
        self.runs += 1;
        let run = self.args.run;
        match (&self.args.measure, &self.disk) {
            (Measure::Disk, Some(probe)) => disk_figures(probe, run, self.runs),
            (Measure::Load, _) => load_figures(self.args, self.runs),
            (Measure::Jitter | Measure::Disk, _) => jitter_figures(&self.cpus, run),
        }
    }
}

fn jitter_figures(cpus: &[u32], duration: Duration) -> Result<Vec<Figure>, Failure> {
    let options = JitterOptions {
        cpus: cpus.to_vec(),
        duration,
        realtime: false,
        trace: false,
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
        figure("us lost a second, worst core", lost.fold(0.0, f64::max)),
        figure("gap p99 us, worst core", p99.fold(0.0, f64::max)),
    ])
}

fn disk_figures(probe: &Probe, duration: Duration, seed: u64) -> Result<Vec<Figure>, Failure> {
    let pass = probe
        .pass(ROW, duration, seed)
        .map_err(|error| words(&error))?;
    let figure = disk::figure(ROW.0, ROW.1, &[pass]);
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

/// One run of `torc load`. The first fills the keys; those that follow find them.
fn load_figures(args: &ProveArgs, number: u64) -> Result<Vec<Figure>, Failure> {
    let file = tempfile::NamedTempFile::new()?;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["load", "run", "--endpoint", &args.endpoint])
        .args(["--duration", &format!("{}ms", args.run.as_millis())])
        .args(["--seed", &number.to_string()])
        .args(args.load.split_whitespace())
        .arg("--json")
        .arg(file.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    if number > 1 {
        command.arg("--no-fill");
    }
    if !command.status()?.success() {
        return Err(Failure::new(
            "torc load failed, so there is nothing to compare",
        ));
    }
    let bytes = std::fs::read(file.path())?;
    let document = serde_json::from_slice(&bytes).map_err(|error| words(&error))?;
    for reason in load_doubts(&document) {
        eprintln!("    run {number} is not valid: {reason}");
    }
    load_latencies(&document)
}

/// Why a run may not be quoted.
fn load_doubts(document: &serde_json::Value) -> Vec<&str> {
    let reasons = document.pointer("/validity/reasons");
    let reasons = reasons.and_then(serde_json::Value::as_array);
    let reasons = reasons.into_iter().flatten();
    reasons.filter_map(serde_json::Value::as_str).collect()
}

/// In an open loop the rate is given, so what a run finds out is how long operations took.
fn load_latencies(document: &serde_json::Value) -> Result<Vec<Figure>, Failure> {
    let figure = |kind: &str| {
        let path = format!("/operations/{kind}/latency_us_from_intended/p99");
        let value = document.pointer(&path)?.as_f64()?;
        Some(Figure {
            name: format!("{kind} p99 us"),
            good: Good::Lower,
            value,
        })
    };
    let figures: Vec<Figure> = ["read", "write"].into_iter().filter_map(figure).collect();
    if figures.is_empty() {
        return Err(Failure::new(
            "torc load neither read nor wrote, so there is nothing to compare",
        ));
    }
    Ok(figures)
}
