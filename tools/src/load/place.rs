//! Where the threads that make load run, and before whom.
//!
//! A request leaves late when another program has its thread's CPU. So the threads can be kept to
//! CPUs of their own and run before everything else there, and the rest of this program keeps off.

use std::io;

use torc_tuning::cpuset::CpuSet;
use torc_tuning::probe;

use super::world::{Nanos, Polls};

/// The highest priority of an ordinary thread.
const NICE_HIGHEST: i32 = -20;

/// Where threads run, as it was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// CPUs of the threads, one each in turn; `None` = all that the program may use.
    pub cpus: Option<CpuSet>,
    /// Whether they run before all else there (SCHED_FIFO).
    pub realtime: bool,
}

impl Place {
    /// Places the calling thread, the `index`th of those that make load.
    ///
    /// # Errors
    /// With the option that was refused.
    pub fn enter(&self, index: usize) -> io::Result<()> {
        let named = |option: &str, error: io::Error| {
            let hint = match error.kind() {
                io::ErrorKind::PermissionDenied => " (it needs CAP_SYS_NICE, or a limit of rtprio)",
                _ => "",
            };
            io::Error::other(format!("{option}: {error}{hint}"))
        };
        if let Some(cpus) = &self.cpus
            && let Some(cpu) = cpus.iter().nth(index % cpus.len().max(1))
        {
            probe::pin(cpu).map_err(|error| named(&format!("--cpus {cpu}"), error))?;
        }
        if self.realtime {
            probe::raise().map_err(|error| named("--realtime", error))?;
            // For the times when it is an ordinary one. Where it is refused the lag tells.
            rustix::process::setpriority_process(None, NICE_HIGHEST).ok();
        }
        Ok(())
    }

    /// Whether threads can be placed so.
    ///
    /// # Errors
    /// See [`Place::enter`].
    pub fn check(&self) -> io::Result<()> {
        let count = self.cpus.as_ref().map_or(1, CpuSet::len);
        // On a thread of its own, which what it tries ends with.
        let tried = std::thread::scope(|scope| {
            let thread = scope.spawn(|| (0..count).try_for_each(|index| self.enter(index)));
            thread.join()
        });
        tried.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Keeps the calling thread off the CPUs of those that make load, where it may use others.
    pub fn leave(&self) {
        let others = self.others();
        if self.cpus.is_some() && !others.is_empty() {
            // Where it is refused the scheduling lag tells.
            probe::pin_to(&others).ok();
        }
    }

    /// Whether each of so many threads has a CPU for itself.
    pub fn has_a_cpu_for_each(&self, threads: usize) -> bool {
        self.cpus.as_ref().is_some_and(|cpus| cpus.len() >= threads)
    }

    /// How each of so many threads waits until an operation is due, where polling was asked for or not.
    pub fn polls(&self, spin: bool, threads: usize) -> Polls {
        // A real-time thread that never sleeps keeps the kernel's own threads off its CPU too, which
        // the servers' disks may wait for.
        match spin {
            false => Polls::Never,
            true if self.has_a_cpu_for_each(threads) && !self.realtime => Polls::Always,
            true => Polls::LastStretch,
        }
    }

    /// CPUs that the program may use and these threads do not.
    pub fn others(&self) -> CpuSet {
        let allowed = probe::allowed().unwrap_or_default();
        match &self.cpus {
            Some(taken) => allowed.minus(taken),
            None => allowed,
        }
    }
}

/// Keeps a real-time thread within what the kernel lets such threads have of a CPU.
///
/// A thread that works or polls all the time would be stopped for the last 50 ms of each second
/// (`kernel.sched_rt_runtime_us`), whoever else there is, and every request of that time would leave
/// late. So it gives the priority back before, for the rest of the second: then others may have the
/// CPU, but it does not stand still. One that sleeps for twice as much of the second anyhow keeps it.
#[derive(Debug, PartialEq, Eq)]
pub struct RealTime {
    /// Of each period it has the priority for so long.
    share_ns: Nanos,
    period_ns: Nanos,
    ordinary: bool,
    /// How long it has slept in the period that is under way.
    slept_ns: Nanos,
    /// Number of that period.
    period: Nanos,
}

impl RealTime {
    /// Within the limit of this machine. `None` where there is none.
    pub fn of_this_machine() -> Option<Self> {
        let read = |name: &str| {
            let text = std::fs::read_to_string(format!("/proc/sys/kernel/sched_rt_{name}_us"));
            text.ok()?.trim().parse().ok()
        };
        // Unless it can be read: the kernel's defaults.
        let limit_us = read("runtime").unwrap_or(950_000);
        let period_us = read("period").unwrap_or(1_000_000);
        Self::within(limit_us, period_us)
    }

    fn within(limit_us: i64, period_us: i64) -> Option<Self> {
        // Below zero means no limit.
        let limit_ns = Nanos::try_from(limit_us).ok()? * 1000;
        let period_ns = Nanos::try_from(period_us).ok()?.max(1) * 1000;
        (limit_ns < period_ns).then(|| Self {
            share_ns: limit_ns.saturating_sub(period_ns / 50),
            period_ns,
            ordinary: false,
            slept_ns: 0,
            period: 0,
        })
    }

    /// The calling thread has slept for so long.
    pub fn slept(&mut self, time: Nanos) {
        self.slept_ns += time;
    }

    /// Makes the calling thread what it should be at this time of the machine's monotonic clock, so
    /// that threads and runs that follow each other do not add up.
    pub fn keep(&mut self, now: Nanos) {
        let period = now / self.period_ns;
        if period != self.period {
            self.period = period;
            self.slept_ns = 0;
        }
        let must_rest = self.slept_ns < 2 * (self.period_ns - self.share_ns);
        let late = now % self.period_ns >= self.share_ns;
        let ordinary = late && (must_rest || self.ordinary);
        if ordinary != self.ordinary {
            self.ordinary = ordinary;
            let changed = if ordinary {
                probe::lower()
            } else {
                probe::raise()
            };
            // It had the priority, so it may have it again; else the scheduling lag tells.
            changed.ok();
        }
    }
}

/// A list of CPUs that is not empty, such as `1` or `2-5,8`.
pub fn parse_cpus(text: &str) -> Result<CpuSet, String> {
    let cpus = CpuSet::parse_list(text).map_err(|error| error.to_string())?;
    if cpus.is_empty() {
        return Err("expected CPUs, such as 1 or 2-5".into());
    }
    Ok(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_keep_to_their_cpus_and_the_rest_keeps_off() {
        let cpu = Place::default().others().first().unwrap();
        let place = Place {
            cpus: Some(CpuSet::of(cpu)),
            realtime: false,
        };
        place.check().unwrap();
        assert!(!place.others().contains(cpu));
        assert!(place.has_a_cpu_for_each(1) && !place.has_a_cpu_for_each(2));
        let thread = std::thread::spawn(move || {
            place.enter(3).unwrap();
            probe::allowed().unwrap()
        });
        assert_eq!(thread.join().unwrap(), CpuSet::of(cpu));
    }

    #[test]
    fn a_real_time_thread_gives_its_priority_back_before_the_kernel_stops_it() {
        assert_eq!(RealTime::within(-1, 1_000_000), None, "there is no limit");
        assert_eq!(RealTime::within(1_000_000, 1_000_000), None);
        let mut realtime = RealTime::within(950_000, 1_000_000).unwrap();
        // On a thread of its own, which what it tries ends with.
        let seen = std::thread::spawn(move || {
            [0, 929, 931, 999, 1001, 1950].map(|millis| {
                realtime.keep(millis * 1_000_000);
                realtime.ordinary
            })
        });
        let expected = [false, false, true, true, false, true];
        assert_eq!(seen.join().unwrap(), expected);
        let mut realtime = RealTime::within(950_000, 1_000_000).unwrap();
        let seen = std::thread::spawn(move || {
            [
                (0, 139),
                (931, 1),
                (1931, 100),
                (2000, 0),
                (2931, 141),
                (2999, 0),
                (3931, 0),
            ]
            .map(|(millis, slept)| {
                realtime.keep(millis * 1_000_000);
                realtime.slept(slept * 1_000_000);
                realtime.ordinary
            })
        });
        let expected = [false, true, true, false, true, true, true];
        assert_eq!(seen.join().unwrap(), expected, "too little sleep");
        let mut realtime = RealTime::within(950_000, 1_000_000).unwrap();
        let seen = std::thread::spawn(move || {
            [(0, 140), (931, 0), (1000, 0), (1500, 140), (1950, 0)].map(|(millis, slept)| {
                realtime.keep(millis * 1_000_000);
                realtime.slept(slept * 1_000_000);
                realtime.ordinary
            })
        });
        assert_eq!(seen.join().unwrap(), [false; 5], "enough of it");
    }

    #[test]
    fn a_thread_with_a_cpu_of_its_own_never_sleeps_unless_it_runs_before_all_else() {
        let polls = |cpus: &str, realtime| {
            let place = Place {
                cpus: Some(parse_cpus(cpus).unwrap()),
                realtime,
            };
            place.polls(true, 2)
        };
        assert_eq!(polls("0-1", false), Polls::Always);
        assert_eq!(polls("0-1", true), Polls::LastStretch);
        assert_eq!(polls("0", false), Polls::LastStretch);
        assert_eq!(Place::default().polls(true, 1), Polls::LastStretch);
        assert_eq!(Place::default().polls(false, 1), Polls::Never);
    }

    #[test]
    fn a_cpu_that_is_not_there_is_refused_by_name() {
        let place = Place {
            cpus: Some(CpuSet::of(60_000)),
            realtime: false,
        };
        let words = place.check().unwrap_err().to_string();
        assert!(words.contains("--cpus 60000"), "{words}");
        assert!(parse_cpus("").is_err() && parse_cpus("x").is_err());
        assert_eq!(parse_cpus("1-2").unwrap().len(), 2);
    }
}
