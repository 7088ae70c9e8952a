//! A bound on the memory of a process, so that the kernel's page cache counts as memory like any other.

use std::path::{Path, PathBuf};

const V1: &str = "/sys/fs/cgroup/memory";
const V2: &str = "/sys/fs/cgroup";

/// A control group with a limit; removed when dropped.
pub struct Limit(PathBuf);

impl Limit {
    /// `None` where groups cannot be made: not root, or no controller for memory.
    pub fn new(bytes: u64) -> Option<Limit> {
        let (root, limit) = if Path::new(V1).is_dir() {
            (V1, "memory.limit_in_bytes")
        } else {
            (V2, "memory.max")
        };
        let path = Path::new(root).join(format!("torc-bench-{}", std::process::id()));
        std::fs::create_dir(&path).ok()?;
        let group = Limit(path);
        std::fs::write(group.0.join(limit), bytes.to_string()).ok()?;
        Some(group)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir(&self.0) {
            eprintln!("{} stays behind: {error}", self.0.display());
        }
    }
}

/// Puts this process into a group.
pub fn join(group: &Path) {
    let id = std::process::id().to_string();
    std::fs::write(group.join("cgroup.procs"), id).expect("a group to join");
}
