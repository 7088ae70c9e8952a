//! Measurements as text: disk, jitter, proofs of interrupts and of gains.

use super::{Table, line, shard_names, unavailable};
use crate::disk::Properties;
use crate::irqproof::{IrqProof, Seen};
use crate::jitter::{CoreJitter, Jitter};
use crate::prove::Proof;
use crate::stats::{Comparison, Verdict};

/// Longest bar of a histogram, in characters.
const BAR: u64 = 30;
/// Suspects shown for each core.
const SUSPECTS: usize = 8;

/// A number with as many digits as mean anything.
fn short(value: f64) -> String {
    if value.abs() >= 100.0 {
        format!("{value:.0}")
    } else if value.abs() >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

/// One row a kind of work and depth, with what makes a figure unreliable.
pub fn disk(properties: &Properties) -> String {
    let mut table = Table::new(0, &[1, 2, 3, 4, 5, 6]);
    table.row([
        "work", "depth", "per s", "MiB/s", "p50 us", "p99 us", "p99.9 us", "",
    ]);
    for figure in &properties.figures {
        table.row([
            figure.work.name().to_owned(),
            figure.depth.to_string(),
            format!("{:.0}", figure.per_second),
            format!("{:.1}", figure.bytes_per_second / f64::from(1 << 20)),
            format!("{:.0}", figure.p50_us),
            format!("{:.0}", figure.p99_us),
            figure
                .p999_us
                .map_or_else(|| "-".into(), |us| format!("{us:.0}")),
            figure
                .unstable
                .as_ref()
                .map_or_else(|| "stable".into(), |why| format!("NOT STABLE: {why}")),
        ]);
    }
    let mut out = String::new();
    table.draw(&mut out);
    if properties
        .figures
        .iter()
        .any(|figure| figure.p999_us.is_none())
    {
        out.push_str("p99.9 takes 10 000 requests: a longer --pass shows it\n");
    }
    if properties.device.is_none() {
        out.push_str(
            "not available here: the block device below: the file system lies on none, or on several\n",
        );
    }
    out
}

/// One row a core, then its gaps by length and whoever may have taken it.
pub fn jitter(jitter: &Jitter) -> String {
    let mut table = Table::new(0, &[0, 1, 2, 3, 4, 5]);
    table.row(["cpu", "lost", "gaps", "p50 us", "p99 us", "max us"]);
    let microseconds = |ns: u64| short(ns as f64 / 1000.0);
    for core in &jitter.cores {
        let share = core.lost_us as f64 / core.spun_us.max(1) as f64 * 100.0;
        table.row([
            core.cpu.to_string(),
            format!("{share:.3} %"),
            core.gaps.to_string(),
            microseconds(core.p50_ns),
            microseconds(core.p99_ns),
            microseconds(core.max_ns),
        ]);
    }
    let mut out = String::new();
    table.draw(&mut out);
    for core in &jitter.cores {
        core_details(&mut out, core);
    }
    unavailable(&mut out, &jitter.unavailable);
    out
}

fn core_details(out: &mut String, core: &CoreJitter) {
    line(out, format_args!("\ncpu {}: gaps by length", core.cpu));
    let most = core.histogram.values().max().copied().unwrap_or(1);
    let mut table = Table::new(2, &[0, 1]);
    for (from, count) in &core.histogram {
        let bar = (count * BAR).div_ceil(most);
        table.row([
            format!("from {} us", short(*from as f64 / 1000.0)),
            count.to_string(),
            "#".repeat(usize::try_from(bar).unwrap_or(0)),
        ]);
    }
    table.draw(out);
    line(out, format_args!("cpu {}: suspects", core.cpu));
    let mut table = Table::new(2, &[1, 2]);
    for culprit in core.culprits.iter().take(SUSPECTS) {
        let or_dash = |value: Option<u64>, unit: &str| {
            value.map_or_else(|| "-".into(), |value| format!("{value} {unit}"))
        };
        table.row([
            culprit.what.clone(),
            or_dash(culprit.times, "times"),
            or_dash(culprit.us, "us"),
        ]);
    }
    table.draw(out);
}

/// One row a shard and source of arrivals.
pub fn irqproof(proof: &IrqProof) -> String {
    let mut table = Table::new(0, &[]);
    table.row(["shard", "planned", "what arrives", "allowed", "seen"]);
    for proof in &proof.proofs {
        let seen = match &proof.seen {
            Seen::AsPlanned { arrivals } => format!("as planned ({arrivals})"),
            Seen::Quiet => "quiet: nothing arrived".into(),
            Seen::Stray { share, arrivals } => {
                let places: Vec<String> = arrivals
                    .iter()
                    .map(|(cpu, count)| format!("{count} on cpu {cpu}"))
                    .collect();
                format!(
                    "STRAY: {:.0} % as planned; {}",
                    share * 100.0,
                    places.join(", ")
                )
            }
        };
        table.row([
            if proof.shards.is_empty() {
                "hk".into()
            } else {
                shard_names(&proof.shards)
            },
            format!("cpu {}", proof.planned),
            proof.what.clone(),
            proof
                .allowed
                .as_ref()
                .map_or_else(|| "-".into(), |cpus| format!("cpu {cpus}")),
            seen,
        ]);
    }
    let mut out = String::new();
    table.draw(&mut out);
    unavailable(&mut out, &proof.unavailable);
    out
}

/// For each group of knobs, one row a figure with its verdict.
pub fn proofs(proofs: &[Proof]) -> String {
    let mut out = String::new();
    for proof in proofs {
        line(&mut out, format_args!("{}", proof.group));
        let mut table = Table::new(2, &[1, 2, 3, 4]);
        table.row([
            "figure",
            "before",
            "after",
            "change",
            "p",
            "95 % interval of the change",
            "verdict",
        ]);
        for comparison in &proof.comparisons {
            table.row(row(comparison));
        }
        table.draw(&mut out);
    }
    out
}

fn row(comparison: &Comparison) -> [String; 7] {
    let percent = |ratio: f64| format!("{:+.1} %", (ratio - 1.0) * 100.0);
    let verdict = match &comparison.verdict {
        Verdict::Better => "BETTER".into(),
        Verdict::Worse => "WORSE".into(),
        Verdict::NoChange => "no change".into(),
        Verdict::CannotTell { reason } => format!("cannot tell: {reason}"),
    };
    [
        comparison.name.clone(),
        short(comparison.before),
        short(comparison.after),
        percent(comparison.after / comparison.before),
        format!("{:.4}", comparison.p_corrected),
        format!(
            "{} to {}",
            percent(comparison.ratio.low),
            percent(comparison.ratio.high)
        ),
        verdict,
    ]
}
