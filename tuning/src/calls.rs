//! What the kernel only says through system calls, in the shape of small files (see
//! [`crate::kernel::CALLS`]).
//!
//! - `ethtool/<nic>/{adaptive-rx,rx-usecs,rx-frames,tx-usecs}`: interrupt coalescing, writable;
//! - `ethtool/<nic>/{channels,rss}`: queues in use and at most; the indirection table;
//! - `io_uring/{features,operations,setup}`: what this kernel's ring can do, probed, never inferred;
//! - `process/allowed`: the CPUs on which this process runs; `process/reachable`: those that it may ask
//!   for, which is more where CPUs are isolated.

use std::io;
use std::os::fd::AsRawFd as _;

use io_uring::{IoUring, Probe};

use crate::cpuset::CpuSet;
use crate::kernel::CALLS;
use crate::probe;

const ETHTOOL_GET_COALESCE: u32 = 0x0e;
const ETHTOOL_SET_COALESCE: u32 = 0x0f;
const ETHTOOL_GET_RSS: u32 = 0x38;
const ETHTOOL_GET_CHANNELS: u32 = 0x3c;

/// Words of the largest argument: header and an indirection table of 4096 entries.
const WORDS_MAX: usize = 2 + 4096;
const COALESCE_WORDS: usize = 23;

/// Position of a coalescing value in `struct ethtool_coalesce`, counted in 32-bit words.
fn coalesce_word(knob: &str) -> Option<usize> {
    match knob {
        "rx-usecs" => Some(1),
        "rx-frames" => Some(2),
        "tx-usecs" => Some(5),
        "adaptive-rx" => Some(10),
        _ => None,
    }
}

fn absent() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOENT)
}

fn parts(path: &str) -> Option<(&str, &str, &str)> {
    let mut steps = path.strip_prefix(CALLS)?.strip_prefix('/')?.split('/');
    let group = steps.next()?;
    let first = steps.next()?;
    Some((group, first, steps.next().unwrap_or("")))
}

pub(crate) fn read(path: &str) -> io::Result<Vec<u8>> {
    let text = match parts(path).ok_or_else(absent)? {
        ("ethtool", nic, "channels") => {
            let words = ethtool(nic, ETHTOOL_GET_CHANNELS, &[0; 8])?;
            format!(
                "rx {} tx {} combined {} max {}",
                words[5], words[6], words[8], words[4]
            )
        }
        ("ethtool", nic, "rss") => {
            let size = usize::try_from(ethtool(nic, ETHTOOL_GET_RSS, &[0])?[1]).unwrap_or(0);
            let size = size.min(WORDS_MAX - 2);
            let argument = [u32::try_from(size).unwrap_or(0)];
            let words = ethtool(nic, ETHTOOL_GET_RSS, &argument)?;
            let table: Vec<String> = words[2..2 + size].iter().map(u32::to_string).collect();
            table.join(" ")
        }
        ("ethtool", nic, knob) => {
            let word = coalesce_word(knob).ok_or_else(absent)?;
            let words = ethtool(nic, ETHTOOL_GET_COALESCE, &[0; COALESCE_WORDS - 1])?;
            words[word].to_string()
        }
        ("io_uring", "features", "") => features()?.join(" "),
        ("io_uring", "operations", "") => operations()?.join(" "),
        ("io_uring", "setup", "") => setup_flags()?.join(" "),
        ("process", "allowed", "") => probe::allowed()?.to_string(),
        ("process", "reachable", "") => reachable()?.to_string(),
        _ => return Err(absent()),
    };
    Ok(format!("{text}\n").into_bytes())
}

pub(crate) fn writable(path: &str) -> io::Result<()> {
    let Some(("ethtool", nic, knob)) = parts(path) else {
        return Err(io::Error::from_raw_os_error(libc::EACCES));
    };
    coalesce_word(knob).ok_or_else(absent)?;
    ethtool(nic, ETHTOOL_GET_COALESCE, &[0; COALESCE_WORDS - 1])?;
    if rustix::process::geteuid().is_root() {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::EPERM))
    }
}

pub(crate) fn write(path: &str, bytes: &[u8]) -> io::Result<()> {
    let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
    let (nic, word) = match parts(path) {
        Some(("ethtool", nic, knob)) => (nic, coalesce_word(knob).ok_or_else(absent)?),
        _ => return Err(absent()),
    };
    let text = std::str::from_utf8(bytes).map_err(|_| invalid())?;
    let value: u32 = text.trim().parse().map_err(|_| invalid())?;
    let mut words = ethtool(nic, ETHTOOL_GET_COALESCE, &[0; COALESCE_WORDS - 1])?;
    words[word] = value;
    ethtool(nic, ETHTOOL_SET_COALESCE, &words[1..COALESCE_WORDS]).map(drop)
}

/// Calls the driver with `command` and `argument`; returns its answer, the command word first.
fn ethtool(nic: &str, command: u32, argument: &[u32]) -> io::Result<Box<[u32; WORDS_MAX]>> {
    let socket = std::net::UdpSocket::bind(("127.0.0.1", 0))?;
    let mut words = Box::new([0_u32; WORDS_MAX]);
    words[0] = command;
    words[1..=argument.len()].copy_from_slice(argument);
    let mut name = [0; libc::IFNAMSIZ];
    if nic.len() >= name.len() {
        return Err(absent());
    }
    for (to, from) in name.iter_mut().zip(nic.bytes()) {
        *to = from as libc::c_char;
    }
    let mut request = libc::ifreq {
        ifr_name: name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_data: words.as_mut_ptr().cast(),
        },
    };
    // SAFETY: `request` lives through the call and names a buffer of WORDS_MAX words, which bounds
    // what any of the four commands writes: the table's length is given to the kernel in words[1].
    let status = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    if status < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(words)
}

fn features() -> io::Result<Vec<&'static str>> {
    let ring = IoUring::new(2)?;
    let parameters = ring.params();
    let features = [
        ("nodrop", parameters.is_feature_nodrop()),
        ("submit_stable", parameters.is_feature_submit_stable()),
        ("fast_poll", parameters.is_feature_fast_poll()),
        ("ext_arg", parameters.is_feature_ext_arg()),
        ("native_workers", parameters.is_feature_native_workers()),
        ("resource_tagging", parameters.is_feature_resource_tagging()),
        (
            "skip_cqe_on_success",
            parameters.is_feature_skip_cqe_on_success(),
        ),
        ("linked_file", parameters.is_feature_linked_file()),
        ("recvsend_bundle", parameters.is_feature_recvsend_bundle()),
    ];
    Ok(features
        .into_iter()
        .filter(|(_, has)| *has)
        .map(|(name, _)| name)
        .collect())
}

fn operations() -> io::Result<Vec<&'static str>> {
    use io_uring::opcode;
    let ring = IoUring::new(2)?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let operations = [
        ("read_fixed", opcode::ReadFixed::CODE),
        ("write", opcode::Write::CODE),
        ("fsync", opcode::Fsync::CODE),
        ("fallocate", opcode::Fallocate::CODE),
        ("send_zc", opcode::SendZc::CODE),
        ("recv", opcode::Recv::CODE),
        ("accept", opcode::Accept::CODE),
        ("msg_ring", opcode::MsgRingData::CODE),
        ("async_cancel", opcode::AsyncCancel::CODE),
        ("futex_wait", opcode::FutexWait::CODE),
        ("uring_cmd", opcode::UringCmd16::CODE),
    ];
    let supported = operations
        .into_iter()
        .filter(|(_, code)| probe.is_supported(*code));
    Ok(supported.map(|(name, _)| name).collect())
}

fn setup_flags() -> io::Result<Vec<&'static str>> {
    IoUring::new(2)?;
    let mut flags = Vec::new();
    if <IoUring>::builder().setup_single_issuer().build(2).is_ok() {
        flags.push("single_issuer");
    }
    let deferred = <IoUring>::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(2);
    if deferred.is_ok() {
        flags.push("defer_taskrun");
    }
    if <IoUring>::builder().setup_sqpoll(10).build(2).is_ok() {
        flags.push("sqpoll");
    }
    if <IoUring>::builder().setup_iopoll().build(2).is_ok() {
        flags.push("iopoll");
    }
    Ok(flags)
}

/// What the kernel grants to a thread that asks for every CPU.
fn reachable() -> io::Result<CpuSet> {
    let asked = std::thread::spawn(|| {
        let mut all = rustix::thread::CpuSet::new();
        (0..rustix::thread::CpuSet::MAX_CPU).for_each(|cpu| all.set(cpu));
        rustix::thread::sched_setaffinity(None, &all)?;
        probe::allowed()
    });
    asked
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread that asks broke off")))
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_allowed_can_be_asked_for() {
        let allowed = crate::probe::allowed().unwrap();
        assert!(allowed.within(&super::reachable().unwrap()));
    }

    #[test]
    fn unknown_calls_are_missing_files() {
        for path in ["/torc", "/torc/x/y", "/torc/ethtool/lo/weather", "/sys/x"] {
            assert!(super::read(path).is_err(), "{path}");
            assert!(super::write(path, b"1").is_err(), "{path}");
        }
    }
}
