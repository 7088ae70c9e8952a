//! How long a pinned, spinning thread is taken off its core, and by whom.
//!
//! Each thread reads the clock in a loop; two readings further apart than [`GAP_NS`] are a gap.
//! Whoever took the core is named by the kernel's events where they can be recorded (root), with the
//! time that each took; else counters before and after name suspects: interrupts and softirqs of that CPU,
//! other threads (the time this one waited to run). Time stolen by a hypervisor is counted in both.

mod blame;

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::host::Unavailable;
use crate::kernel::{Kernel, Live};
use crate::probe;
use crate::trace::Trace;

/// Smallest gap counted: well above a cache miss, well below an interrupt's work.
pub const GAP_NS: u64 = 2_000;

/// What to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JitterOptions {
    /// CPUs, one thread each, all at once.
    pub cpus: Vec<u32>,
    /// How long.
    pub duration: Duration,
    /// Whether the threads take real-time priority: then only the kernel and the hypervisor are left.
    pub realtime: bool,
    /// Whether to record the kernel's events for the culprits' names. Costs about a microsecond for each
    /// event, so comparisons go without.
    pub trace: bool,
}

/// Why nothing was measured.
#[derive(Debug, Error)]
pub enum JitterError {
    /// The CPU cannot be used.
    #[error("cannot pin to CPU {cpu}: {source}")]
    Pin {
        /// Which.
        cpu: u32,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No real-time priority.
    #[error("cannot take real-time priority: {source} (CAP_SYS_NICE or an rtprio limit is needed)")]
    Realtime {
        /// The kernel's answer.
        source: io::Error,
    },
    /// The thread did not start or broke off.
    #[error("the probe of CPU {cpu} broke off")]
    BrokenOff {
        /// Which.
        cpu: u32,
    },
}

/// Someone who may have taken the core.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Culprit {
    /// E.g. `interrupt LOC`, `softirq TIMER`, `thread kworker/1:2`, `other threads`, `hypervisor`.
    pub what: String,
    /// How often, where that is known.
    pub times: Option<u64>,
    /// For how many microseconds in all, where that is known.
    pub us: Option<u64>,
}

/// One core.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CoreJitter {
    /// CPU.
    pub cpu: u32,
    /// Microseconds spun.
    pub spun_us: u64,
    /// Microseconds lost in gaps.
    pub lost_us: u64,
    /// Number of gaps.
    pub gaps: u64,
    /// Median gap in nanoseconds; 0 without gaps.
    pub p50_ns: u64,
    /// 99 % of the gaps are at most this long.
    pub p99_ns: u64,
    /// Longest gap in nanoseconds.
    pub max_ns: u64,
    /// Gaps by length: key is the lower end of a power of two, in nanoseconds.
    pub histogram: BTreeMap<u64, u64>,
    /// Suspects, the most frequent first.
    pub culprits: Vec<Culprit>,
}

/// A whole measurement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Jitter {
    /// By core.
    pub cores: Vec<CoreJitter>,
    /// What could not be told here.
    pub unavailable: Vec<Unavailable>,
}

/// Suspect whose counter is a time.
const HYPERVISOR: &str = "hypervisor";

/// Counters by CPU and name.
type Counters = BTreeMap<(u32, String), u64>;

/// Measures all CPUs at once.
pub fn measure(options: &JitterOptions) -> Result<Jitter, JitterError> {
    let kernel = Live::machine();
    let mut missing = unavailable(&kernel);
    let trace = options.trace.then(|| Trace::start(&blame::EVENTS));
    let trace = trace.and_then(|started| {
        started
            .map_err(|error| missing.push(untraced(&error.to_string())))
            .ok()
    });
    let before = counters(&kernel);
    let threads: Vec<_> = options
        .cpus
        .iter()
        .map(|&cpu| {
            let options = options.clone();
            let named = std::thread::Builder::new().name(format!("{}{cpu}", blame::SPINNER));
            (cpu, named.spawn(move || spin(cpu, &options)))
        })
        .collect();
    let mut cores = Vec::new();
    let mut failure = None;
    for (cpu, thread) in threads {
        let joined = thread.map(|thread| thread.join());
        let spun = joined.map_or(Err(JitterError::BrokenOff { cpu }), |joined| {
            joined.unwrap_or(Err(JitterError::BrokenOff { cpu }))
        });
        match spun {
            Ok(core) => cores.push(core),
            Err(error) => failure = Some(error),
        }
    }
    if let Some(error) = failure {
        return Err(error);
    }
    let after = counters(&kernel);
    let mut blamed = None;
    if let Some(trace) = trace {
        match blame::read(trace) {
            Ok((culprits, 0)) => blamed = Some(culprits),
            Ok((culprits, dropped)) => {
                missing.push(untraced(&format!(
                    "{dropped} events did not fit into the buffer, so only the beginning counts"
                )));
                blamed = Some(culprits);
            }
            Err(error) => missing.push(untraced(&error.to_string())),
        }
    }
    for core in &mut cores {
        let suspects = suspects(&before, &after, core.cpu);
        match &blamed {
            Some(blamed) => {
                let own = blamed.iter().filter(|(cpu, _)| *cpu == core.cpu);
                core.culprits = own.map(|(_, culprit)| culprit.clone()).collect();
                let stolen = suspects.into_iter().filter(|one| one.what == HYPERVISOR);
                core.culprits.extend(stolen);
            }
            None => core.culprits.extend(suspects),
        }
        core.culprits
            .sort_by_key(|culprit| std::cmp::Reverse((culprit.us, culprit.times)));
    }
    Ok(Jitter {
        cores,
        unavailable: missing,
    })
}

fn untraced(reason: &str) -> Unavailable {
    Unavailable {
        what: "names and times of whoever took the core".into(),
        reason: reason.to_owned(),
    }
}

fn spin(cpu: u32, options: &JitterOptions) -> Result<CoreJitter, JitterError> {
    probe::pin(cpu).map_err(|source| JitterError::Pin { cpu, source })?;
    if options.realtime {
        probe::raise().map_err(|source| JitterError::Realtime { source })?;
    }
    let kernel = Live::machine();
    let waited_before = waited_ns(&kernel);
    let mut gaps: Vec<u64> = Vec::with_capacity(1 << 16);
    let begun = Instant::now();
    let mut last = begun;
    loop {
        let now = Instant::now();
        let gap = u64::try_from((now - last).as_nanos()).unwrap_or(u64::MAX);
        if gap >= GAP_NS && gaps.len() < gaps.capacity() {
            gaps.push(gap);
            // Keeping the gap is no part of the next one.
            last = Instant::now();
        } else {
            last = now;
        }
        if now - begun >= options.duration {
            break;
        }
    }
    let spun = begun.elapsed();
    let waited = waited_ns(&kernel)
        .zip(waited_before)
        .map(|(after, before)| after.saturating_sub(before));
    Ok(core(cpu, spun, gaps, waited))
}

fn core(cpu: u32, spun: Duration, mut gaps: Vec<u64>, waited_ns: Option<u64>) -> CoreJitter {
    gaps.sort_unstable();
    let mut histogram = BTreeMap::new();
    for gap in &gaps {
        *histogram.entry(1_u64 << gap.max(&1).ilog2()).or_insert(0) += 1;
    }
    let at = |numerator: usize, denominator: usize| {
        let rank = (gaps.len() * numerator).div_ceil(denominator).max(1);
        gaps.get(rank - 1).copied().unwrap_or(0)
    };
    let waited = waited_ns
        .filter(|waited| *waited >= 1000)
        .map(|waited| Culprit {
            what: "other threads".into(),
            times: None,
            us: Some(waited / 1000),
        });
    CoreJitter {
        cpu,
        spun_us: u64::try_from(spun.as_micros()).unwrap_or(u64::MAX),
        lost_us: gaps.iter().sum::<u64>() / 1000,
        gaps: gaps.len() as u64,
        p50_ns: at(1, 2),
        p99_ns: at(99, 100),
        max_ns: gaps.last().copied().unwrap_or(0),
        histogram,
        culprits: waited.into_iter().collect(),
    }
}

/// Nanoseconds that this thread was runnable and did not run.
fn waited_ns(kernel: &impl Kernel) -> Option<u64> {
    let text = kernel.text("/proc/thread-self/schedstat")?;
    text.split_whitespace().nth(1)?.parse().ok()
}

fn counters(kernel: &impl Kernel) -> Counters {
    let mut counters = Counters::new();
    for (file, sort) in [
        ("/proc/interrupts", "interrupt"),
        ("/proc/softirqs", "softirq"),
    ] {
        counters.extend(table(&kernel.text(file).unwrap_or_default(), sort));
    }
    let stat = kernel.text("/proc/stat").unwrap_or_default();
    counters.extend(stolen_us(&stat).map(|(cpu, stolen)| ((cpu, HYPERVISOR.into()), stolen)));
    counters
}

/// What a hypervisor took of each CPU since the start, in microseconds, as the text of `/proc/stat` says:
/// in steps of 10 ms.
pub fn stolen_us(stat: &str) -> impl Iterator<Item = (u32, u64)> {
    stat.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let cpu = words.next()?.strip_prefix("cpu")?.parse().ok()?;
        // user nice system idle iowait irq softirq steal, in hundredths of a second.
        let steal: u64 = words.nth(7)?.parse().ok()?;
        Some((cpu, steal.saturating_mul(10_000)))
    })
}

/// Rows of a table with one column for each CPU.
fn table(text: &str, sort: &str) -> Counters {
    let mut lines = text.lines();
    let cpus: Vec<u32> = lines
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|name| name.strip_prefix("CPU")?.parse().ok())
        .collect();
    let mut counters = Counters::new();
    for line in lines {
        let Some((name, rest)) = line.split_once(':') else {
            continue;
        };
        let words: Vec<&str> = rest.split_whitespace().collect();
        let driver = words.get(cpus.len()..).and_then(<[_]>::last);
        let is_number = name.trim().parse::<u32>().is_ok();
        let name = driver
            .filter(|_| is_number)
            .unwrap_or(&name.trim())
            .to_owned();
        for (cpu, count) in cpus.iter().zip(words) {
            if let Ok(count) = count.parse() {
                counters.insert((*cpu, format!("{sort} {name}")), count);
            }
        }
    }
    counters
}

fn suspects(before: &Counters, after: &Counters, cpu: u32) -> Vec<Culprit> {
    let own = after.iter().filter(|((at, _), _)| *at == cpu);
    own.filter_map(|(key, count)| {
        let amount = count.saturating_sub(before.get(key).copied().unwrap_or(0));
        let is_time = key.1 == HYPERVISOR;
        (amount > 0).then(|| Culprit {
            what: key.1.clone(),
            times: (!is_time).then_some(amount),
            us: is_time.then_some(amount),
        })
    })
    .collect()
}

fn unavailable(kernel: &impl Kernel) -> Vec<Unavailable> {
    if waited_ns(kernel).is_some() {
        return Vec::new();
    }
    vec![Unavailable {
        what: "time waited for other threads".into(),
        reason: "the kernel was built without scheduler statistics".into(),
    }]
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{JitterOptions, core, measure, suspects, table};

    #[test]
    fn gaps_become_a_histogram_with_exact_ranks() {
        let gaps = (1..=100).map(|n| n * 1000).collect();
        let core = core(3, Duration::from_millis(1), gaps, Some(5_000));
        assert_eq!(
            (core.gaps, core.p50_ns, core.p99_ns, core.max_ns),
            (100, 50_000, 99_000, 100_000)
        );
        assert_eq!(core.histogram.values().sum::<u64>(), 100);
        assert_eq!(core.lost_us, 5050);
        assert_eq!(core.culprits[0].what, "other threads");
        let quiet = super::core(0, Duration::ZERO, Vec::new(), None);
        assert_eq!((quiet.p99_ns, quiet.max_ns), (0, 0));
    }

    #[test]
    fn suspects_are_what_grew_on_that_cpu() {
        let head = "       CPU0       CPU1\n";
        let before = table(
            &format!(
                "{head} 36:   5   9  PCI-MSIX 1-edge  virtio1-req.0\nLOC:  10  20  Local timer interrupts\n"
            ),
            "interrupt",
        );
        let after = table(
            &format!(
                "{head} 36:   5  12  PCI-MSIX 1-edge  virtio1-req.0\nLOC:  30  20  Local timer interrupts\n"
            ),
            "interrupt",
        );
        let on = |cpu| {
            suspects(&before, &after, cpu)
                .into_iter()
                .map(|culprit| (culprit.what, culprit.times.unwrap()))
                .collect::<Vec<_>>()
        };
        assert_eq!(on(0), [("interrupt LOC".to_owned(), 20)]);
        assert_eq!(on(1), [("interrupt virtio1-req.0".to_owned(), 3)]);
    }

    #[test]
    fn a_cpu_that_is_not_there_is_an_error() {
        let options = JitterOptions {
            cpus: vec![60_000],
            duration: Duration::ZERO,
            realtime: false,
            trace: true,
        };
        assert!(measure(&options).is_err());
    }

    #[test]
    fn this_machine_can_be_measured() {
        let cpus =
            crate::kernel::Kernel::text(&crate::kernel::Live::machine(), "/torc/process/allowed")
                .unwrap();
        let cpu = crate::cpuset::CpuSet::parse_list(&cpus)
            .unwrap()
            .first()
            .unwrap();
        let options = JitterOptions {
            cpus: vec![cpu],
            duration: Duration::from_millis(20),
            realtime: false,
            trace: true,
        };
        let jitter = measure(&options).unwrap();
        assert_eq!(jitter.cores.len(), 1);
        assert!(jitter.cores[0].spun_us >= 20_000);
    }
}
