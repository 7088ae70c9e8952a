//! The typed model of a host: everything that the checks, the plans and the pictures look at.
//!
//! Read once by [`Host::read`]; a plain value afterwards, so the same capture always gives the same
//! findings and the same plan. What could not be read is `None` or listed in
//! [`Host::unavailable`] with the reason: an absent fact is never a guess.

mod blocks;
mod cpus;
mod interrupts;
mod nics;
mod settings;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::cpuset::CpuSet;
use crate::kernel::Kernel;

pub(crate) use blocks::discarding_devices;
pub use blocks::{Block, HardwareQueue};
pub use cpus::{Cache, CoreKind, Cpu, Cpus, NumaNode};
pub use interrupts::{Interrupt, InterruptNumbers, Managed};
pub use nics::{Coalescing, Nic, Queue};
pub(crate) use settings::BOOT_ARGUMENTS;
pub use settings::{Choice, IdleState, IoUring, IrqBalance, Limits, Settings, Virtualisation};

/// Layout of the JSON; raised when a field changes its meaning.
pub const HOST_SCHEMA: u32 = 1;

/// Why no host could be read.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum HostError {
    /// The files that every Linux has are not there.
    #[error(
        "{place} does not hold a Linux host: {missing} is missing (give a directory or archive that `torc tune capture` made)"
    )]
    NotAHost {
        /// What was read: the machine, a directory, an archive.
        place: String,
        /// The first file that is missing.
        missing: &'static str,
    },
    /// A kernel whose files may mean something else.
    #[error("kernel {release:?} is unknown to this tool: it knows Linux 5.10 and later")]
    UnknownKernel {
        /// What the kernel calls itself.
        release: String,
    },
}

/// Something that this host does not tell or cannot do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unavailable {
    /// The fact or ability.
    pub what: String,
    /// Why not here.
    pub reason: String,
}

/// A host as the tool sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// [`HOST_SCHEMA`].
    pub schema: u32,
    /// Kernel release, e.g. `6.12.4`.
    pub kernel: String,
    /// Boot arguments that matter here; others are left out as they may name persons or places.
    pub boot_arguments: BTreeMap<String, String>,
    /// Whether and in what this host is a guest.
    pub virtualisation: Virtualisation,
    /// Processors, caches, memory nodes.
    pub cpus: Cpus,
    /// Device interrupts, by number.
    pub interrupts: Vec<Interrupt>,
    /// Block devices with hardware queues.
    pub blocks: Vec<Block>,
    /// Network cards.
    pub nics: Vec<Nic>,
    /// Switches of the kernel.
    pub settings: Settings,
    /// Limits of this process.
    pub limits: Limits,
    /// What the kernel's io_uring can do.
    pub io_uring: IoUring,
    /// Whether a daemon moves interrupts.
    pub irqbalance: IrqBalance,
    /// Processor weaknesses and what the kernel does about them.
    pub mitigations: BTreeMap<String, String>,
    /// What could not be read, and why.
    pub unavailable: Vec<Unavailable>,
}

impl Host {
    /// Reads a host. `place` names it in messages.
    pub fn read(kernel: &impl Kernel, place: &str) -> Result<Self, HostError> {
        let missing = |missing| HostError::NotAHost {
            place: place.to_owned(),
            missing,
        };
        let release = kernel
            .text("/proc/sys/kernel/osrelease")
            .ok_or_else(|| missing("/proc/sys/kernel/osrelease"))?;
        if !is_known(&release) {
            return Err(HostError::UnknownKernel { release });
        }
        let mut unavailable = Vec::new();
        let cpus = cpus::read(kernel, &mut unavailable)
            .ok_or_else(|| missing("/sys/devices/system/cpu/online"))?;
        let interrupts = interrupts::read(kernel, &mut unavailable);
        let blocks = blocks::read(kernel, &interrupts);
        let nics = nics::read(kernel, &interrupts, &mut unavailable);
        let settings = settings::read(kernel, &cpus.online, &mut unavailable);
        Ok(Self {
            schema: HOST_SCHEMA,
            boot_arguments: settings::boot_arguments(kernel),
            virtualisation: settings::virtualisation(kernel),
            limits: settings::limits(kernel),
            io_uring: settings::io_uring(kernel),
            irqbalance: settings::irqbalance(kernel),
            mitigations: settings::mitigations(kernel),
            kernel: release,
            cpus,
            interrupts,
            blocks,
            nics,
            settings,
            unavailable,
        })
    }

    /// Short name of the parts of the host on which a plan rests: processors, and the devices that
    /// interrupt them, with their queues. It survives a change of settings, interrupt numbers and
    /// counters, and what software makes and removes at any time: loop devices, containers' cards.
    pub fn fingerprint(&self) -> String {
        let mut text = format!("{} {:?}", self.cpus.present, self.cpus.allowed);
        for cpu in &self.cpus.list {
            text.push_str(&format!("|{} {:?} {:?}", cpu.id, cpu.node, cpu.siblings));
        }
        let blocks = self.blocks.iter().filter(|block| {
            let mut queues = block.queues.iter();
            queues.any(|queue| queue.interrupt.is_some())
        });
        for block in blocks {
            text.push_str(&format!("|{}", block.name));
            for queue in &block.queues {
                text.push_str(&format!(" {:?}", queue.cpus));
            }
        }
        let nics = self.nics.iter().filter(|nic| {
            let mut queues = nic.receive.iter().chain(&nic.transmit);
            queues.any(|queue| queue.interrupt.is_some())
        });
        for nic in nics {
            text.push_str(&format!(
                "|{} {} {}",
                nic.name,
                nic.receive.len(),
                nic.transmit.len()
            ));
        }
        format!("{:016x}", xxhash_rust::xxh3::xxh3_64(text.as_bytes()))
    }

    /// Interrupt `number`.
    pub fn interrupt(&self, number: u32) -> Option<&Interrupt> {
        self.interrupts.iter().find(|irq| irq.number == number)
    }

    /// CPUs on which shards may run: online, allowed to this process.
    pub fn usable(&self) -> CpuSet {
        self.cpus.online.and(&self.cpus.allowed)
    }
}

/// Major and minor number of a kernel release.
pub fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn is_known(release: &str) -> bool {
    kernel_version(release).is_some_and(|version| version >= (5, 10))
}
