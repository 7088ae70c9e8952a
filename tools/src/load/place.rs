//! Where the threads that make load run, and before whom.
//!
//! A request leaves late when another program has its thread's CPU. So the threads can be kept to
//! CPUs of their own and run before everything else there, and the rest of this program keeps off.

use std::io;

use rustix::thread::{CpuSet as Mask, sched_getaffinity, sched_setaffinity};
use torc_tuning::cpuset::CpuSet;
use torc_tuning::probe;

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
        let mut mask = Mask::new();
        for cpu in self.others() {
            mask.set(cpu);
        }
        if self.cpus.is_some() && mask.count() > 0 {
            // Where it is refused the scheduling lag tells.
            sched_setaffinity(None, &mask).ok();
        }
    }

    /// CPUs that the program may use and these threads do not, in order.
    pub fn others(&self) -> Vec<usize> {
        let Ok(allowed) = sched_getaffinity(None) else {
            return Vec::new();
        };
        let taken = |cpu: &usize| {
            let cpu = u32::try_from(*cpu).unwrap_or(u32::MAX);
            self.cpus.as_ref().is_some_and(|cpus| cpus.contains(cpu))
        };
        (0..Mask::MAX_CPU)
            .filter(|cpu| allowed.is_set(*cpu) && !taken(cpu))
            .collect()
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
        let cpu = Place::default().others()[0];
        let place = Place {
            cpus: Some(CpuSet::of(u32::try_from(cpu).unwrap())),
            realtime: false,
        };
        place.check().unwrap();
        assert!(!place.others().contains(&cpu));
        let thread = std::thread::spawn(move || {
            place.enter(3).unwrap();
            sched_getaffinity(None).unwrap()
        });
        let mask = thread.join().unwrap();
        assert!(mask.is_set(cpu) && mask.count() == 1);
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
