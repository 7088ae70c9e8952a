//! How an engine lies on the cores of this machine.

use clap::ValueEnum;
use core_affinity::CoreId;
use serde::{Deserialize, Serialize};

/// Cores, and instances on them.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// One instance; its whole process, background threads included, has one core.
    OneCore,
    /// An instance for each core: its clients are pinned there, background threads run where there is room. Data,
    /// memory and clients are divided equally.
    Pinned,
}

impl Layout {
    /// As headings have it.
    pub fn name(self) -> &'static str {
        match self {
            Layout::OneCore => "one core",
            Layout::Pinned => "pinned instances",
        }
    }

    /// What a process may take in all: besides caches and memtables filters, what is on its way and merged, its threads,
    /// and the page cache that it fills. Two instances merge at the same time.
    pub fn memory_bytes_max(self) -> u64 {
        match self {
            Layout::OneCore => 192 << 20,
            Layout::Pinned => 256 << 20,
        }
    }

    /// Takes effect on the calling thread and on all that it starts, and returns the core of each instance.
    pub fn enter(self) -> Vec<CoreId> {
        let cores = core_affinity::get_core_ids().expect("the cores that this process may use");
        match self {
            Layout::OneCore => {
                let last = *cores.last().expect("at least one core");
                pin(last);
                vec![last]
            }
            Layout::Pinned => cores,
        }
    }
}

/// Keeps the calling thread, and those that it starts from now on, on a core.
pub fn pin(core: CoreId) {
    assert!(core_affinity::set_for_current(core), "a core to run on");
}
