//! Switches of the kernel, limits, io_uring, daemons, mitigations.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Unavailable;
use crate::cpuset::CpuSet;
use crate::kernel::{CALLS, Kernel};

/// A file that shows all choices and brackets the one in force: `none [mq-deadline] kyber`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// In force.
    pub current: String,
    /// All of them.
    pub options: Vec<String>,
}

impl Choice {
    /// Reads brackets; a lone word without brackets is the only option.
    pub fn parse(text: &str) -> Option<Self> {
        let mut current = None;
        let mut options = Vec::new();
        for word in text.split_whitespace() {
            let bare = word.trim_start_matches('[').trim_end_matches(']');
            if bare.len() + 2 == word.len() {
                current = Some(bare.to_owned());
            }
            options.push(bare.to_owned());
        }
        if current.is_none() && options.len() == 1 {
            current = options.first().cloned();
        }
        current.map(|current| Self { current, options })
    }

    /// Whether `option` can be chosen.
    pub fn offers(&self, option: &str) -> bool {
        self.options.iter().any(|each| each == option)
    }
}

/// A state in which an idle CPU sleeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdleState {
    /// Name.
    pub name: String,
    /// Microseconds until it works again.
    pub wake_us: u64,
    /// Whether it is switched off.
    pub disabled: bool,
}

/// Guest or not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Virtualisation {
    /// Whether a hypervisor runs this host.
    pub guest: bool,
    /// Product name that the firmware gives.
    pub product: Option<String>,
}

/// Switches of the kernel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Frequency governor of each CPU that has one.
    pub governors: BTreeMap<u32, String>,
    /// Energy preference of each CPU that has one.
    pub energy: BTreeMap<u32, String>,
    /// Idle states of the first CPU.
    pub idle_states: Vec<IdleState>,
    /// Transparent huge pages.
    pub huge_pages: Option<Choice>,
    /// Reserved huge pages, all sizes, in bytes.
    pub huge_pages_reserved_bytes: u64,
    /// Automatic moving of memory between nodes.
    pub numa_balancing: Option<u64>,
    /// Readiness to swap.
    pub swappiness: Option<u64>,
    /// Whether any swap is on.
    pub swap: Option<bool>,
    /// Seconds between two refreshes of the memory statistics.
    pub stat_interval_s: Option<u64>,
    /// Clock source.
    pub clock: Option<String>,
    /// Clock sources to choose from.
    pub clocks: Vec<String>,
    /// Interrupting watchdog.
    pub nmi_watchdog: Option<u64>,
    /// CPUs on which unbound kernel work runs.
    pub workqueue: Option<CpuSet>,
    /// Backlog that a listening socket may ask for.
    pub listen_backlog: Option<u64>,
    /// Half-open connections kept.
    pub syn_backlog: Option<u64>,
    /// Entries of the global RFS table.
    pub flow_entries: Option<u64>,
    /// Open files of the whole host.
    pub file_max: Option<u64>,
}

/// Limits of this process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Locked memory, bytes; `None` is unlimited or unknown, see `known`.
    pub locked_bytes: Option<u64>,
    /// Open files.
    pub open_files: Option<u64>,
    /// Real-time priority.
    pub realtime_priority: Option<u64>,
    /// Whether the limits could be read.
    pub known: bool,
}

/// What io_uring can do here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoUring {
    /// Whether a ring could be made; `None` when nothing was tried (a captured host).
    pub available: Option<bool>,
    /// Why not.
    pub refusal: Option<String>,
    /// `kernel.io_uring_disabled`.
    pub disabled: Option<u64>,
    /// Features.
    pub features: Vec<String>,
    /// Operations that Torc looks for.
    pub operations: Vec<String>,
    /// Ways to set it up that worked.
    pub setup: Vec<String>,
}

/// The daemon that moves interrupts about.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IrqBalance {
    /// Whether it runs.
    pub running: bool,
    /// Its settings that keep it off CPUs or interrupts, as they stand in its file.
    pub bans: Vec<String>,
}

pub(super) fn read(
    kernel: &impl Kernel,
    online: &CpuSet,
    unavailable: &mut Vec<Unavailable>,
) -> Settings {
    let sysctl = |name: &str| kernel.number::<u64>(&format!("/proc/sys/{name}"));
    let per_cpu = |file: &str| -> BTreeMap<u32, String> {
        let value = |cpu| kernel.text(&format!("/sys/devices/system/cpu/cpu{cpu}/cpufreq/{file}"));
        online
            .iter()
            .filter_map(|cpu| Some((cpu, value(cpu)?)))
            .collect()
    };
    let governors = per_cpu("scaling_governor");
    if governors.is_empty() {
        unavailable.push(Unavailable {
            what: "frequency governor".into(),
            reason: "no CPU has one (the hypervisor or the firmware rules)".into(),
        });
    }
    let clock = "/sys/devices/system/clocksource/clocksource0";
    Settings {
        governors,
        energy: per_cpu("energy_performance_preference"),
        idle_states: idle_states(kernel, online.first().unwrap_or(0)),
        huge_pages: kernel
            .text("/sys/kernel/mm/transparent_hugepage/enabled")
            .and_then(|text| Choice::parse(&text)),
        huge_pages_reserved_bytes: reserved(kernel),
        numa_balancing: sysctl("kernel/numa_balancing"),
        swappiness: sysctl("vm/swappiness"),
        swap: kernel
            .text("/proc/swaps")
            .map(|text| text.lines().count() > 1),
        stat_interval_s: sysctl("vm/stat_interval"),
        clock: kernel.text(&format!("{clock}/current_clocksource")),
        clocks: kernel
            .text(&format!("{clock}/available_clocksource"))
            .map(|text| text.split_whitespace().map(str::to_owned).collect())
            .unwrap_or_default(),
        nmi_watchdog: sysctl("kernel/nmi_watchdog"),
        workqueue: kernel
            .text("/sys/devices/virtual/workqueue/cpumask")
            .and_then(|mask| CpuSet::parse_mask(&mask).ok()),
        listen_backlog: sysctl("net/core/somaxconn"),
        syn_backlog: sysctl("net/ipv4/tcp_max_syn_backlog"),
        flow_entries: sysctl("net/core/rps_sock_flow_entries"),
        file_max: sysctl("fs/file-max"),
    }
}

fn idle_states(kernel: &impl Kernel, cpu: u32) -> Vec<IdleState> {
    let directory = format!("/sys/devices/system/cpu/cpu{cpu}/cpuidle");
    let mut states = Vec::new();
    for state in kernel.list(&directory).unwrap_or_default() {
        let Some(name) = kernel.text(&format!("{directory}/{state}/name")) else {
            continue;
        };
        states.push(IdleState {
            name,
            wake_us: kernel
                .number(&format!("{directory}/{state}/latency"))
                .unwrap_or(0),
            disabled: kernel.number::<u8>(&format!("{directory}/{state}/disable")) == Some(1),
        });
    }
    states
}

fn reserved(kernel: &impl Kernel) -> u64 {
    const PAGES: &str = "/sys/kernel/mm/hugepages";
    let mut bytes = 0_u64;
    for size in kernel.list(PAGES).unwrap_or_default() {
        let kibibytes = size
            .strip_prefix("hugepages-")
            .and_then(|size| size.strip_suffix("kB")?.parse::<u64>().ok());
        let count = kernel.number::<u64>(&format!("{PAGES}/{size}/nr_hugepages"));
        if let (Some(kibibytes), Some(count)) = (kibibytes, count) {
            bytes = bytes.saturating_add(kibibytes.saturating_mul(1024).saturating_mul(count));
        }
    }
    bytes
}

/// Boot arguments that touch what this tool looks at.
pub(crate) const BOOT_ARGUMENTS: [&str; 17] = [
    "isolcpus",
    "nohz_full",
    "rcu_nocbs",
    "rcu_nocb_poll",
    "mitigations",
    "intel_idle.max_cstate",
    "processor.max_cstate",
    "idle",
    "intel_pstate",
    "amd_pstate",
    "tsc",
    "clocksource",
    "nosmt",
    "nvme.poll_queues",
    "transparent_hugepage",
    "irqaffinity",
    "skew_tick",
];

pub(super) fn boot_arguments(kernel: &impl Kernel) -> BTreeMap<String, String> {
    let line = kernel.text("/proc/cmdline").unwrap_or_default();
    line.split_whitespace()
        .map(|word| word.split_once('=').unwrap_or((word, "")))
        .filter(|(name, _)| BOOT_ARGUMENTS.contains(name))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

pub(super) fn virtualisation(kernel: &impl Kernel) -> Virtualisation {
    let information = kernel.text("/proc/cpuinfo").unwrap_or_default();
    let flagged = information
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_whitespace().any(|flag| flag == "hypervisor"));
    let product = kernel.text("/sys/class/dmi/id/product_name");
    let named = product.as_deref().is_some_and(|name| {
        ["KVM", "Virtual", "VMware"]
            .iter()
            .any(|word| name.contains(word))
    });
    Virtualisation {
        guest: flagged || named || kernel.text("/sys/hypervisor/type").is_some(),
        product,
    }
}

pub(super) fn limits(kernel: &impl Kernel) -> Limits {
    let Some(table) = kernel.text("/proc/self/limits") else {
        return Limits::default();
    };
    let soft = |name: &str| {
        let line = table.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    Limits {
        locked_bytes: soft("Max locked memory"),
        open_files: soft("Max open files"),
        realtime_priority: soft("Max realtime priority"),
        known: true,
    }
}

pub(super) fn io_uring(kernel: &impl Kernel) -> IoUring {
    let words = |file: &str| -> Result<Vec<String>, _> {
        let bytes = kernel.read(&format!("{CALLS}/io_uring/{file}"))?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        Ok::<_, crate::kernel::Refusal>(text.split_whitespace().map(str::to_owned).collect())
    };
    let features = words("features");
    let (available, refusal) = match &features {
        Ok(_) => (Some(true), None),
        Err(refusal) if refusal.is_absent() => (None, None),
        Err(refusal) => (Some(false), Some(refusal.error.to_string())),
    };
    IoUring {
        available,
        refusal,
        disabled: kernel.number("/proc/sys/kernel/io_uring_disabled"),
        features: features.unwrap_or_default(),
        operations: words("operations").unwrap_or_default(),
        setup: words("setup").unwrap_or_default(),
    }
}

pub(super) fn irqbalance(kernel: &impl Kernel) -> IrqBalance {
    let is_it = |process: &String| {
        process.bytes().all(|byte| byte.is_ascii_digit())
            && kernel.text(&format!("/proc/{process}/comm")).as_deref() == Some("irqbalance")
    };
    let files = ["/etc/default/irqbalance", "/etc/sysconfig/irqbalance"];
    let settings = files
        .iter()
        .find_map(|file| kernel.text(file))
        .unwrap_or_default();
    IrqBalance {
        running: kernel.list("/proc").unwrap_or_default().iter().any(is_it),
        bans: settings
            .lines()
            .map(str::trim)
            .filter(|line| {
                line.starts_with("IRQBALANCE_BANNED") || line.starts_with("IRQBALANCE_ARGS")
            })
            .map(str::to_owned)
            .collect(),
    }
}

pub(super) fn mitigations(kernel: &impl Kernel) -> BTreeMap<String, String> {
    const DIRECTORY: &str = "/sys/devices/system/cpu/vulnerabilities";
    kernel
        .list(DIRECTORY)
        .unwrap_or_default()
        .into_iter()
        .filter_map(|name| {
            let text = kernel.text(&format!("{DIRECTORY}/{name}"))?;
            Some((name, text))
        })
        .collect()
}
