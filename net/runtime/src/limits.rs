//! Limits that the kernel puts on this process: raised where it may, reported where it may not.

use std::io;

use crate::sys;

/// Open files wanted: connections, and the tables of every shard.
const OPEN_FILES_WANTED: u64 = 1 << 20;

/// Locked memory wanted: the rings of shards and background executors, registered buffers. Counted
/// per user, not per process.
const LOCKED_BYTES_WANTED: u64 = 1 << 30;

/// A limit after the attempt to raise it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Raised {
    /// What the process now has.
    pub now: u64,
    /// What it would like to have.
    pub wanted: u64,
}

/// The limits of this process.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Open files (RLIMIT_NOFILE).
    pub open_files: Raised,
    /// Locked memory in bytes (RLIMIT_MEMLOCK).
    pub locked_bytes: Raised,
}

/// Raises the limits of this process as far as it may.
pub fn raise() -> io::Result<Limits> {
    Ok(Limits {
        open_files: raise_one(libc::RLIMIT_NOFILE, OPEN_FILES_WANTED)?,
        locked_bytes: raise_one(libc::RLIMIT_MEMLOCK, LOCKED_BYTES_WANTED)?,
    })
}

impl Limits {
    /// What an operator should set, for each limit below what is wanted; empty when all is well.
    pub fn advice(&self) -> Vec<String> {
        let mut advice = Vec::new();
        if self.open_files.now < self.open_files.wanted {
            advice.push(format!(
                "open files: {} (want {}): set LimitNOFILE={} in the unit, or `ulimit -n {}` as root",
                self.open_files.now,
                self.open_files.wanted,
                self.open_files.wanted,
                self.open_files.wanted,
            ));
        }
        if self.locked_bytes.now < self.locked_bytes.wanted {
            advice.push(format!(
                "locked memory: {} KiB (want {} KiB): set LimitMEMLOCK=infinity in the unit, or \
                 `ulimit -l unlimited` as root",
                self.locked_bytes.now >> 10,
                self.locked_bytes.wanted >> 10,
            ));
        }
        advice
    }
}

fn raise_one(resource: libc::__rlimit_resource_t, wanted: u64) -> io::Result<Raised> {
    let before = sys::limit(resource)?;
    if before.rlim_cur >= wanted {
        return Ok(Raised {
            now: before.rlim_cur,
            wanted,
        });
    }
    // First what only root may do (raise the hard limit as well), then what everybody may.
    let attempts = [
        libc::rlimit {
            rlim_cur: wanted,
            rlim_max: before.rlim_max.max(wanted),
        },
        libc::rlimit {
            rlim_cur: before.rlim_max.min(wanted),
            rlim_max: before.rlim_max,
        },
    ];
    let raised = attempts
        .into_iter()
        .any(|limit| sys::set_limit(resource, limit).is_ok());
    if !raised {
        tracing::debug!(resource, "a resource limit could not be raised");
    }
    Ok(Raised {
        now: sys::limit(resource)?.rlim_cur,
        wanted,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raising_never_lowers_a_limit_and_advice_names_what_is_missing() {
        let before = sys::limit(libc::RLIMIT_NOFILE).unwrap().rlim_cur;
        let limits = raise().unwrap();
        assert!(limits.open_files.now >= before.min(OPEN_FILES_WANTED));
        let short = Limits {
            open_files: Raised {
                now: 1024,
                wanted: 4096,
            },
            locked_bytes: Raised {
                now: 1 << 30,
                wanted: 1 << 30,
            },
        };
        assert_eq!(short.advice().len(), 1);
        assert!(short.advice()[0].contains("LimitNOFILE=4096"));
    }
}
