//! The few system calls that neither the ring nor the standard library offers safely.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use torc_env::disk::Space;

/// Turns the C convention (-1 and errno) into a result.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// Fills `bytes` with randomness of the kernel's generator.
pub(crate) fn random_bytes(bytes: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        let rest = &mut bytes[filled..];
        // SAFETY: the kernel writes at most `rest.len()` bytes to `rest`, which is exclusively ours.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(got) {
            Ok(count) => filled += count,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// Nanoseconds of the system's monotonic clock, which starts when the host does.
pub(crate) fn monotonic_nanos() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one timespec to `time`, which is exclusively ours.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    debug_assert_eq!(result, 0, "every Linux has a monotonic clock");
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// A new eventfd with count zero; reads and writes never block.
pub(crate) fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: takes no pointers.
    let fd = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
    // SAFETY: `fd` was just created and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Adds one to an eventfd. A counter at its maximum still wakes its reader, so "would block" is
/// as good as success.
pub(crate) fn eventfd_signal(fd: BorrowedFd<'_>) {
    let one = 1_u64;
    // SAFETY: writes the eight bytes of `one`, which outlives the call.
    let wrote = unsafe { libc::write(fd.as_raw_fd(), (&raw const one).cast(), size_of::<u64>()) };
    debug_assert!(wrote == 8 || io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock);
}

/// Resets an eventfd to zero.
pub(crate) fn eventfd_clear(fd: BorrowedFd<'_>) {
    let mut count = 0_u64;
    // SAFETY: reads at most eight bytes into `count`, which outlives the call.
    let got = unsafe { libc::read(fd.as_raw_fd(), (&raw mut count).cast(), size_of::<u64>()) };
    debug_assert!(got == 8 || io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock);
}

/// Length of an open file in bytes.
pub(crate) fn file_len(fd: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(len_and_named(fd)?.0)
}

/// Length of an open file in bytes, and whether it has a name.
pub(crate) fn len_and_named(fd: BorrowedFd<'_>) -> io::Result<(u64, bool)> {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the kernel fills `stat`, which has the size that it expects.
    check(unsafe { libc::fstat(fd.as_raw_fd(), stat.as_mut_ptr()) })?;
    // SAFETY: fstat returned success, so `stat` is initialised.
    let stat = unsafe { stat.assume_init() };
    let named = stat.st_nlink > 0;
    Ok((u64::try_from(stat.st_size).unwrap_or(0), named))
}

/// Of `fcntl`: which signal a descriptor sends. The libc crate has it for few targets.
const F_SETSIG: libc::c_int = 10;

/// Whether a file that this descriptor may write is open elsewhere too, in this process or another. The kernel grants a lease
/// when it is not. Descriptors that were duplicated from this one do not count.
pub(crate) fn is_open_elsewhere(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let control = |command, value: libc::c_int| {
        // SAFETY: these commands take an integer, no pointer.
        check(unsafe { libc::fcntl(fd.as_raw_fd(), command, value) })
    };
    // Who opens the file while the lease lasts has a signal sent here; the usual one would end the process.
    control(F_SETSIG, libc::SIGURG)?;
    match control(libc::F_SETLEASE, libc::F_WRLCK) {
        Ok(_) => control(libc::F_SETLEASE, libc::F_UNLCK).map(|_| false),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
        Err(error) => Err(error),
    }
}

/// Cuts or extends a file. Blocks the caller for as long as the file system takes.
pub(crate) fn truncate(fd: BorrowedFd<'_>, len: u64) -> io::Result<()> {
    let len = libc::off_t::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: takes no pointers.
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), len) })?;
    Ok(())
}

/// Size and free space of the file system that `fd` lies on.
pub(crate) fn space(fd: BorrowedFd<'_>) -> io::Result<Space> {
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the kernel fills `stat`, which has the size that it expects.
    check(unsafe { libc::fstatvfs(fd.as_raw_fd(), stat.as_mut_ptr()) })?;
    // SAFETY: fstatvfs returned success, so `stat` is initialised.
    let stat = unsafe { stat.assume_init() };
    Ok(Space {
        total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
        free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
    })
}

/// A path as the kernel takes it.
pub(crate) fn c_path(path: &Path) -> io::Result<CString> {
    use std::os::unix::ffi::OsStrExt;
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// The CPUs that the calling thread may run on.
pub(crate) fn affinity() -> io::Result<libc::cpu_set_t> {
    let mut set = std::mem::MaybeUninit::<libc::cpu_set_t>::zeroed();
    // SAFETY: 0 is the calling thread; the kernel fills at most the size that is passed.
    check(unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), set.as_mut_ptr()) })?;
    // SAFETY: a cpu_set_t is an array of integers; zeroed or filled, it is initialised.
    Ok(unsafe { set.assume_init() })
}

/// Lets the calling thread run on `cpus` only.
pub(crate) fn set_affinity(cpus: &libc::cpu_set_t) -> io::Result<()> {
    // SAFETY: 0 is the calling thread; `cpus` outlives the call and has the size that is passed.
    check(unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), cpus) })?;
    Ok(())
}

/// Gives the calling thread (and the threads that it starts) a nice value.
pub(crate) fn set_nice(nice: libc::c_int) -> io::Result<()> {
    // SAFETY: takes no pointers; on Linux, 0 is the calling thread.
    check(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) })?;
    Ok(())
}

/// Lets the calling thread run only when nothing else wants its CPU. An unprivileged thread cannot
/// go back.
pub(crate) fn set_idle_policy() -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: 0 is the calling thread; `parameters` outlives the call.
    check(unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const parameters) })?;
    Ok(())
}

/// Keeps transparent huge pages out of this process and its children; what it has already stays.
pub(crate) fn forbid_huge_pages() -> io::Result<()> {
    let (yes, unused) = (1 as libc::c_ulong, 0 as libc::c_ulong);
    // SAFETY: takes no pointers.
    check(unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, yes, unused, unused, unused) })?;
    Ok(())
}

/// Soft and hard value of a resource limit of this process.
pub(crate) fn limit(resource: libc::__rlimit_resource_t) -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the kernel fills `limit`.
    check(unsafe { libc::getrlimit(resource, &raw mut limit) })?;
    Ok(limit)
}

/// Sets a resource limit of this process.
pub(crate) fn set_limit(
    resource: libc::__rlimit_resource_t,
    limit: libc::rlimit,
) -> io::Result<()> {
    // SAFETY: `limit` outlives the call.
    check(unsafe { libc::setrlimit(resource, &raw const limit) })?;
    Ok(())
}
