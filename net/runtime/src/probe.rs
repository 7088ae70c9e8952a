//! Whether this host's io_uring does what the runtime needs. Features are tried, not inferred from
//! the kernel's version: distributions backport and containers forbid.

use std::io;

use io_uring::{IoUring, Probe, opcode};

/// Why the runtime cannot start here. The message says what to change.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The kernel has no io_uring.
    #[error(
        "io_uring is missing: Torc needs Linux 6.1 or newer, built with CONFIG_IO_URING ({source})"
    )]
    Missing {
        /// The kernel's answer.
        source: io::Error,
    },
    /// io_uring exists and this process may not use it.
    #[error(
        "io_uring is forbidden here ({source}): set `sysctl -w kernel.io_uring_disabled=0` (or add \
         this user to kernel.io_uring_group); in a container, allow io_uring_setup, io_uring_enter \
         and io_uring_register in its seccomp profile"
    )]
    Forbidden {
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel is too old.
    #[error("io_uring lacks {what}: Torc needs Linux 6.1 or newer")]
    TooOld {
        /// The missing part.
        what: &'static str,
    },
    /// The kernel could not give memory or descriptors for a ring.
    #[error(
        "cannot set up a ring of {entries} entries ({source}): raise the limits of locked memory \
         (ulimit -l, LimitMEMLOCK=) and open files (ulimit -n, LimitNOFILE=)"
    )]
    Resources {
        /// Submission queue entries asked for.
        entries: u32,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Completions are processed only when the shard asks for them (DEFER_TASKRUN): 1.5 times
    /// cheaper per request. Present since Linux 6.1.
    pub deferred_completions: bool,
    /// Shards wake each other through their rings (MSG_RING) and not by eventfd.
    pub ring_messages: bool,
    /// Files are truncated by the ring (Linux 6.9) and not by a blocking call.
    pub truncate: bool,
}

/// Operations that the runtime cannot do without.
const REQUIRED: [(u8, &str); 16] = [
    (opcode::Read::CODE, "read"),
    (opcode::Write::CODE, "write"),
    (opcode::Fsync::CODE, "fsync"),
    (opcode::Fallocate::CODE, "fallocate"),
    (opcode::OpenAt::CODE, "openat"),
    (opcode::Close::CODE, "close"),
    (opcode::UnlinkAt::CODE, "unlinkat"),
    (opcode::RenameAt::CODE, "renameat"),
    (opcode::LinkAt::CODE, "linkat"),
    (opcode::MkDirAt::CODE, "mkdirat"),
    (opcode::Accept::CODE, "accept"),
    (opcode::Connect::CODE, "connect"),
    (opcode::Recv::CODE, "recv"),
    (opcode::Send::CODE, "send"),
    (opcode::SendMsg::CODE, "sendmsg"),
    (opcode::AsyncCancel::CODE, "cancel"),
];

/// Checks this host with a small ring that is closed again.
pub fn check() -> Result<Features, ProbeError> {
    open_ring(8, 16).map(|(_, features)| features)
}

/// Opens a ring with the best flags that the kernel takes. It belongs to the calling thread.
pub(crate) fn open_ring(entries: u32, completions: u32) -> Result<(IoUring, Features), ProbeError> {
    let (ring, deferred_completions) = match build(entries, completions, true) {
        Ok(ring) => (ring, true),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let ring = build(entries, completions, false).map_err(|e| explain(entries, e))?;
            (ring, false)
        }
        Err(error) => return Err(explain(entries, error)),
    };
    if !ring.params().is_feature_ext_arg() {
        return Err(ProbeError::TooOld {
            what: "waiting with a timeout",
        });
    }
    if !ring.params().is_feature_nodrop() {
        return Err(ProbeError::TooOld {
            what: "lossless completions",
        });
    }
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(|e| explain(entries, e))?;
    if let Some((_, what)) = REQUIRED.iter().find(|(code, _)| !probe.is_supported(*code)) {
        return Err(ProbeError::TooOld { what });
    }
    let features = Features {
        deferred_completions,
        ring_messages: probe.is_supported(opcode::MsgRingData::CODE)
            && ring.params().is_feature_skip_cqe_on_success(),
        truncate: probe.is_supported(opcode::Ftruncate::CODE),
    };
    Ok((ring, features))
}

fn build(entries: u32, completions: u32, deferred: bool) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder
        .setup_clamp()
        .setup_cqsize(completions)
        .setup_submit_all()
        .setup_taskrun_flag();
    if deferred {
        builder.setup_single_issuer().setup_defer_taskrun();
    } else {
        builder.setup_coop_taskrun();
    }
    builder.build(entries)
}

fn explain(entries: u32, source: io::Error) -> ProbeError {
    match source.raw_os_error() {
        Some(libc::ENOSYS) => ProbeError::Missing { source },
        Some(libc::EPERM | libc::EACCES) => ProbeError::Forbidden { source },
        Some(libc::EINVAL) => ProbeError::TooOld {
            what: "cooperative completions",
        },
        _ => ProbeError::Resources { entries, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_switch_that_causes_it() {
        let message = |errno| explain(8, io::Error::from_raw_os_error(errno)).to_string();
        assert!(message(libc::EPERM).contains("kernel.io_uring_disabled"));
        assert!(message(libc::EPERM).contains("seccomp"));
        assert!(message(libc::ENOSYS).contains("6.1"));
        assert!(message(libc::ENOMEM).contains("LimitMEMLOCK"));
    }

    #[test]
    fn the_host_that_runs_this_test_is_good_enough() {
        check().unwrap();
    }
}
