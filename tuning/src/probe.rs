//! Where the calling thread may run, pinning and raising it: what every measuring probe does first, and
//! what `torc load` does with the threads that make its load.

use std::io;

use crate::cpuset::CpuSet;

/// CPUs that the calling thread may use.
///
/// # Errors
/// The kernel's; none are known.
pub fn allowed() -> io::Result<CpuSet> {
    let set = rustix::thread::sched_getaffinity(None)?;
    let cpus = (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu));
    Ok(cpus.filter_map(|cpu| u32::try_from(cpu).ok()).collect())
}

/// Pins the calling thread to one CPU.
///
/// # Errors
/// The kernel's: there is no such CPU, or this program may not use it.
pub fn pin(cpu: u32) -> io::Result<()> {
    pin_to(&CpuSet::of(cpu))
}

/// Keeps the calling thread on these CPUs.
///
/// # Errors
/// The kernel's: one of them cannot be there, or this program may use none of them.
pub fn pin_to(cpus: &CpuSet) -> io::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    for cpu in cpus.iter() {
        let index = usize::try_from(cpu).unwrap_or(usize::MAX);
        if index >= rustix::thread::CpuSet::MAX_CPU {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        set.set(index);
    }
    Ok(rustix::thread::sched_setaffinity(None, &set)?)
}

/// Gives the calling thread real-time priority 1 (SCHED_FIFO), which ends with the thread.
///
/// # Errors
/// The kernel's: neither CAP_SYS_NICE nor a limit of rtprio allows it.
pub fn raise() -> io::Result<()> {
    schedule(libc::SCHED_FIFO, 1)
}

/// Makes the calling thread an ordinary one again (SCHED_OTHER), with the niceness that it had.
///
/// # Errors
/// The kernel's; none are known.
pub fn lower() -> io::Result<()> {
    schedule(libc::SCHED_OTHER, 0)
}

fn schedule(policy: i32, priority: i32) -> io::Result<()> {
    let parameters = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: 0 is the calling thread, and the parameters live through the call.
    let status = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    if status == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use crate::cpuset::CpuSet;

    #[test]
    fn this_process_may_use_some_cpu() {
        assert!(!super::allowed().unwrap().is_empty());
    }

    #[test]
    fn a_thread_keeps_to_the_cpus_that_it_is_pinned_to() {
        let thread = std::thread::spawn(|| {
            let one = CpuSet::of(super::allowed().unwrap().first().unwrap());
            super::pin_to(&one).unwrap();
            assert_eq!(super::allowed().unwrap(), one);
            super::pin_to(&CpuSet::of(u32::MAX)).unwrap_err();
            super::pin_to(&CpuSet::new()).unwrap_err();
            assert_eq!(
                super::allowed().unwrap(),
                one,
                "what is refused changes nothing"
            );
        });
        thread.join().unwrap();
    }

    /// The calling thread's.
    fn policy() -> String {
        let status = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        // Field 41, counted from behind the name.
        let (_, fields) = status.rsplit_once(") ").unwrap();
        fields.split(' ').nth(41 - 3).unwrap().to_owned()
    }

    #[test]
    fn a_raised_thread_is_scheduled_first_in_first_out_until_it_is_lowered() {
        let thread = std::thread::spawn(|| {
            if let Err(error) = super::raise() {
                println!("not available here: real-time priority: {error}");
                return;
            }
            assert_eq!(policy(), "1", "SCHED_FIFO");
            super::lower().unwrap();
            assert_eq!(policy(), "0", "SCHED_OTHER");
        });
        thread.join().unwrap();
    }
}
