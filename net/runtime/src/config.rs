//! Settings of the runtime.

use std::path::PathBuf;
use std::time::Duration;

use torc_env::NodeId;

/// Where background jobs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Background {
    /// On glommio executors with threads of their own: the kernel shares the cores out.
    #[default]
    Glommio,
    /// On the shard that asked, as a task of the flush class.
    Shard,
}

/// What the disk was measured to do, in bytes a second with large requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskRates {
    /// Reading.
    pub read: u64,
    /// Writing.
    pub write: u64,
}

/// Settings of a runtime.
#[derive(Clone, Debug)]
pub struct RuntimeConfig {
    /// Shards, each a thread with a ring; at least 1. May exceed the cores, unpinned.
    pub shards: u16,
    /// Pin shard i to the i-th core from `first_core` on. Not done when there are too few cores.
    pub pin: bool,
    /// The first core to pin to, among those that this process may use.
    pub first_core: usize,
    /// How long an idle shard looks for work before it sleeps; zero: not at all. Not done when
    /// shards are not pinned, while the shard's own writes are in flight, or when the kernel reports
    /// that others want the core. A wake-up from sleep
    /// costs tens of microseconds, spinning costs a whole core.
    pub spin: Duration,
    /// The node's data directory. Made if it is missing.
    pub data_dir: PathBuf,
    /// This node.
    pub node: NodeId,
    /// Where background jobs run.
    pub background: Background,
    /// What the disk can do. Background executors then leave a part of its time to the shards; without
    /// it they take what they get.
    pub disk_rates: Option<DiskRates>,
    /// Submission queue entries of each ring. More operations may be in flight; this bounds what
    /// leaves in one system call.
    pub ring_entries: u32,
}

impl RuntimeConfig {
    /// A runtime in `data_dir` with one unpinned shard that does not spin.
    pub fn new(data_dir: impl Into<PathBuf>) -> RuntimeConfig {
        RuntimeConfig {
            shards: 1,
            pin: false,
            first_core: 0,
            spin: Duration::ZERO,
            data_dir: data_dir.into(),
            node: NodeId::default(),
            background: Background::default(),
            disk_rates: None,
            ring_entries: 512,
        }
    }
}
