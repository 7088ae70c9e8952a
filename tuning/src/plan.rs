//! From a host to a plan: where shards, interrupts and everything else run, and which files have to
//! say what for it. Pure: the same host gives the same plan, and a host that fulfils it gives one
//! without changes. Managed interrupts are never moved; the shards go where their queues are.

mod changes;
mod layout;
mod network;

use serde::{Deserialize, Serialize};

use crate::change::Change;
use crate::cpuset::CpuSet;
use crate::host::Host;

pub use layout::{Layout, Place, Role};
pub(crate) use network::{interrupted, near};

/// Layout of the JSON.
pub const PLAN_SCHEMA: u32 = 1;

/// What the host is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// Shortest answers: one shard a core, siblings idle, power saving off.
    Latency,
    /// Most answers: one shard a hardware thread.
    Throughput,
    /// Others work here too: half of the cores, and nothing that others would feel.
    Shared,
}

impl Profile {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Latency, Self::Throughput, Self::Shared];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Latency => "latency",
            Self::Throughput => "throughput",
            Self::Shared => "shared",
        }
    }
}

/// A boot argument that would help: printed, never set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootAdvice {
    /// The argument.
    pub argument: String,
    /// Why.
    pub reason: String,
}

/// A whole plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// [`PLAN_SCHEMA`].
    pub schema: u32,
    /// Name: hash of layout and wishes.
    pub id: String,
    /// What for.
    pub profile: Profile,
    /// The host that it fits, see [`Host::fingerprint`].
    pub host: String,
    /// Who runs where.
    pub layout: Layout,
    /// Writes, in order.
    pub changes: Vec<Change>,
    /// Boot arguments, printed only.
    pub boot: Vec<BootAdvice>,
    /// What was decided besides, and why.
    pub notes: Vec<String>,
}

impl Plan {
    /// Plans for a host.
    pub fn of(host: &Host, profile: Profile) -> Self {
        let layout = layout::lay_out(host, profile);
        let mut notes = layout::notes(host, &layout);
        let changes = changes::wishes(host, profile, &layout, &mut notes);
        let mut plan = Self {
            schema: PLAN_SCHEMA,
            id: String::new(),
            profile,
            host: host.fingerprint(),
            boot: boot_advice(host, profile, &layout),
            layout,
            changes,
            notes,
        };
        let text = format!("{:?}{:?}{:?}", plan.profile, plan.layout, plan.changes);
        plan.id = format!("{:08x}", xxhash_rust::xxh3::xxh3_64(text.as_bytes()) >> 32);
        plan
    }
}

fn boot_advice(host: &Host, profile: Profile, layout: &Layout) -> Vec<BootAdvice> {
    let mut advice = Vec::new();
    let mut add = |name: &str, value: &str, reason: &str| {
        if host.boot_arguments.get(name).map(String::as_str) != Some(value) {
            advice.push(BootAdvice {
                argument: format!("{name}={value}"),
                reason: reason.to_owned(),
            });
        }
    };
    if profile == Profile::Latency && layout.isolates {
        // The boot CPU keeps the time: the kernel takes it out of the list with a warning.
        let boot: CpuSet = host.cpus.online.iter().take(1).collect();
        let tickless = layout.shard_cpus().minus(&boot).to_string();
        add(
            "nohz_full",
            &tickless,
            "no periodic tick on a CPU with one runnable thread",
        );
        add(
            "rcu_nocbs",
            &tickless,
            "the kernel's deferred freeing runs elsewhere",
        );
        add(
            "irqaffinity",
            &layout.housekeeping.to_string(),
            "interrupts of devices that appear later keep house from the start",
        );
    }
    advice
}
