//! What on a host costs latency or safety, each with what it costs, how to fix it and how sure that is.
//!
//! A finding names a fact that was read; what could not be read is not found fault with.

use serde::{Deserialize, Serialize};

use crate::host::{CoreKind, Host, kernel_version};
use crate::plan::{Plan, Profile};
use crate::render::counted;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Torc does not run, or loses what it promised.
    Serious,
    /// Costs latency or throughput.
    Warning,
    /// Good to know.
    Note,
}

/// How sure it is that this host is affected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sureness {
    /// Was read, and the effect is a rule of the kernel.
    Certain,
    /// Was read; the effect depends on load and hardware: `torc tune prove` tells.
    Likely,
    /// Sources disagree: measure before believing.
    Disputed,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Stable name.
    pub id: &'static str,
    /// How bad.
    pub severity: Severity,
    /// What was found.
    pub found: String,
    /// Why it matters.
    pub reason: &'static str,
    /// What it costs.
    pub cost: &'static str,
    /// What to do.
    pub fix: String,
    /// How sure.
    pub sureness: Sureness,
}

/// All findings, serious ones first.
pub fn check(host: &Host) -> Vec<Finding> {
    let plan = Plan::of(host, Profile::Latency);
    let mut findings = Vec::new();
    kernel(host, &mut findings);
    limits(host, &mut findings);
    processors(host, &plan, &mut findings);
    memory(host, &mut findings);
    devices(host, &plan, &mut findings);
    findings.sort_by_key(|finding: &Finding| finding.severity);
    findings
}

use Severity::{Note, Serious, Warning};
use Sureness::{Certain, Disputed, Likely};

fn kernel(host: &Host, findings: &mut Vec<Finding>) {
    let ring = &host.io_uring;
    if ring.available == Some(false) || ring.disabled == Some(2) {
        findings.push(Finding {
            id: "io_uring-missing",
            severity: Serious,
            found: ring.refusal.clone().unwrap_or_else(|| "kernel.io_uring_disabled = 2".into()),
            reason: "Torc's shards do all their input and output through io_uring",
            cost: "torc server does not start",
            fix: "sysctl kernel.io_uring_disabled=0, or let the container's seccomp profile allow io_uring".into(),
            sureness: Certain,
        });
    } else if ring.disabled == Some(1) {
        findings.push(Finding {
            id: "io_uring-privileged",
            severity: Warning,
            found: "kernel.io_uring_disabled = 1".into(),
            reason: "only processes with CAP_SYS_ADMIN or of the io_uring group get a ring",
            cost: "torc server does not start as an ordinary user",
            fix: "sysctl kernel.io_uring_disabled=0, or put the user into kernel.io_uring_group"
                .into(),
            sureness: Certain,
        });
    }
    if kernel_version(&host.kernel).is_some_and(|version| version < (6, 1)) {
        findings.push(Finding {
            id: "kernel-old",
            severity: Serious,
            found: format!("Linux {}", host.kernel),
            reason: "io_uring's single-issuer and deferred work came with 6.1",
            cost: "torc server does not start",
            fix: "boot Linux 6.1 or later".into(),
            sureness: Certain,
        });
    }
    if ring.available == Some(true) && !ring.setup.iter().any(|flag| flag == "defer_taskrun") {
        findings.push(Finding {
            id: "io_uring-no-defer",
            severity: Warning,
            found: "io_uring refuses DEFER_TASKRUN".into(),
            reason: "completions then interrupt the shard at any point",
            cost: "about half again as much CPU for a small request",
            fix: "boot Linux 6.1 or later".into(),
            sureness: Certain,
        });
    }
    let clock = host.settings.clock.as_deref().unwrap_or("tsc");
    let fast = [
        "tsc",
        "kvm-clock",
        "arch_sys_counter",
        "hyperv_clocksource_tsc_page",
        "timebase",
        "riscv_clocksource",
    ];
    if !fast.contains(&clock) {
        findings.push(Finding {
            id: "clock-slow",
            severity: Warning,
            found: format!("clock source {clock}"),
            reason: "every reading of the clock is then a system call or a device access",
            cost: "0.2 to 2 microseconds for each reading",
            fix: "find in the kernel log why tsc was given up; write tsc to current_clocksource"
                .into(),
            sureness: Certain,
        });
    } else if clock == "kvm-clock" && host.settings.clocks.iter().any(|clock| clock == "tsc") {
        findings.push(Finding {
            id: "clock-kvm",
            severity: Note,
            found: "clock source kvm-clock although tsc is offered".into(),
            reason: "both are read without a system call; tools disagree about which is better in a guest",
            cost: "some nanoseconds for each reading",
            fix: "measure both with `torc tune prove`".into(),
            sureness: Disputed,
        });
    }
    let unmitigated: Vec<&str> = host
        .mitigations
        .iter()
        .filter(|(_, state)| state.starts_with("Vulnerable"))
        .map(|(name, _)| name.as_str())
        .collect();
    if !unmitigated.is_empty() {
        findings.push(Finding {
            id: "mitigations-missing",
            severity: Note,
            found: format!("vulnerable to {}", unmitigated.join(", ")),
            reason: "reported only; this tool never proposes to switch a mitigation off or on",
            cost: "none in time",
            fix: "update firmware or kernel, or ask the host's owner".into(),
            sureness: Certain,
        });
    }
}

fn limits(host: &Host, findings: &mut Vec<Finding>) {
    const LOCKED_WANTED: u64 = 64 << 20;
    const FILES_WANTED: u64 = 65_536;
    let limits = &host.limits;
    if !limits.known {
        return;
    }
    if let Some(bytes) = limits.locked_bytes.filter(|bytes| *bytes < LOCKED_WANTED) {
        findings.push(Finding {
            id: "memlock-low",
            severity: Warning,
            found: format!("{} KiB of locked memory allowed", bytes / 1024),
            reason: "registered buffers count against it, for all processes of the user together",
            cost: "Torc works without registered buffers, at a few percent of throughput",
            fix: "LimitMEMLOCK=infinity in the unit, or memlock in limits.conf".into(),
            sureness: Certain,
        });
    }
    if let Some(files) = limits.open_files.filter(|files| *files < FILES_WANTED) {
        findings.push(Finding {
            id: "nofile-low",
            severity: if files < 4096 { Serious } else { Warning },
            found: format!("{files} open files allowed"),
            reason: "each connection and each table is an open file",
            cost: "connections are refused when they run out",
            fix: format!("LimitNOFILE={FILES_WANTED} or more in the unit"),
            sureness: Certain,
        });
    }
}

fn processors(host: &Host, plan: &Plan, findings: &mut Vec<Finding>) {
    let slow = host
        .settings
        .governors
        .values()
        .filter(|governor| *governor != "performance")
        .count();
    if slow > 0 {
        findings.push(Finding {
            id: "governor",
            severity: Warning,
            found: format!("{slow} CPUs lower their frequency"),
            reason: "a core that slowed down answers its first requests slowly",
            cost: "tens to hundreds of microseconds at the tail under light load",
            fix: "`torc tune plan --profile latency`".into(),
            sureness: Likely,
        });
    }
    let deepest = host
        .settings
        .idle_states
        .iter()
        .filter(|state| !state.disabled)
        .map(|state| state.wake_us)
        .max();
    if let Some(wake_us) = deepest.filter(|wake_us| *wake_us > 20) {
        findings.push(Finding {
            id: "idle-deep",
            severity: Warning,
            found: format!("idle CPUs may take {wake_us} microseconds to wake"),
            reason: "a shard that slept pays it on its next request",
            cost: "that time at the tail under light load",
            fix: "[shards] cpus = \"auto\": torc server then holds /dev/cpu_dma_latency where it may open it"
                .into(),
            sureness: Likely,
        });
    }
    if host.irqbalance.running {
        findings.push(Finding {
            id: "irqbalance",
            severity: Warning,
            found: "irqbalance runs".into(),
            reason: "it moves interrupts every 10 seconds and undoes a plan",
            cost: "the layout lasts seconds",
            fix: "stop it, or ban Torc's interrupts and check with `torc tune verify --watch`"
                .into(),
            sureness: Certain,
        });
    }
    let shards = plan.layout.shard_cpus();
    let strays = host.interrupts.iter().filter(|irq| {
        let here = irq.lands_on();
        !irq.is_kept_by_kernel() && plan.layout.isolates && here.within(&shards) && !here.is_empty()
    });
    let strays = strays.count();
    if strays > 0 && !plan.changes.is_empty() {
        findings.push(Finding {
            id: "interrupts-stray",
            severity: Warning,
            found: format!("{strays} movable interrupts arrive on CPUs meant for shards"),
            reason: "each one takes a shard off its core",
            cost: "microseconds for each interrupt, at the tail",
            fix: "`torc tune plan`, then `torc tune irqproof`".into(),
            sureness: Likely,
        });
    }
    if host
        .cpus
        .list
        .iter()
        .any(|cpu| cpu.kind == CoreKind::Efficiency)
    {
        findings.push(Finding {
            id: "cores-hybrid",
            severity: Note,
            found: "fast and slow cores are mixed".into(),
            reason: "a shard on a slow core is the slowest of all, and every key of it is",
            cost: "a third to a half of that shard's speed",
            fix: "[shards] cpus = \"auto\" uses fast cores only".into(),
            sureness: Certain,
        });
    }
    if !host.cpus.allowed.is_empty() && !host.cpus.online.within(&host.cpus.allowed) {
        findings.push(Finding {
            id: "cpus-restricted",
            severity: Note,
            found: format!(
                "this process may use CPUs {} of {}",
                host.cpus.allowed, host.cpus.online
            ),
            reason: "a container, cpuset or taskset holds it there",
            cost: "fewer shards",
            fix: "none needed if it is meant so".into(),
            sureness: Certain,
        });
    }
}

fn memory(host: &Host, findings: &mut Vec<Finding>) {
    let settings = &host.settings;
    if settings
        .huge_pages
        .as_ref()
        .is_some_and(|choice| choice.current == "always")
    {
        findings.push(Finding {
            id: "thp-always",
            severity: Warning,
            found: "transparent huge pages: always".into(),
            reason: "pages are gathered behind the program's back",
            cost: "stalls of milliseconds, and memory",
            fix: "madvise: Torc asks where it wants them".into(),
            sureness: Disputed,
        });
    }
    if settings.numa_balancing.is_some_and(|on| on > 0) && host.cpus.nodes.len() > 1 {
        findings.push(Finding {
            id: "numa-balancing",
            severity: Warning,
            found: "automatic NUMA balancing is on".into(),
            reason: "it unmaps pages to see who touches them; shards are pinned beside theirs already",
            cost: "page faults at the tail",
            fix: "sysctl kernel.numa_balancing=0".into(),
            sureness: Likely,
        });
    }
    if settings.swap == Some(true)
        && settings
            .swappiness
            .is_some_and(|swappiness| swappiness > 10)
    {
        findings.push(Finding {
            id: "swap",
            severity: Warning,
            found: format!(
                "swap is on, swappiness {}",
                settings.swappiness.unwrap_or(0)
            ),
            reason: "a page of a shard that was swapped out is read back while the shard waits",
            cost: "milliseconds",
            fix: "swapoff -a, or swappiness 1 and MemorySwapMax=0 in the unit".into(),
            sureness: Certain,
        });
    }
}

fn devices(host: &Host, plan: &Plan, findings: &mut Vec<Finding>) {
    let shards = plan.layout.shards.len();
    for block in &host.blocks {
        if block.rotational && !block.queues.is_empty() {
            findings.push(Finding {
                id: "disk-turns",
                severity: Note,
                found: format!("{} says that it turns", block.name),
                reason: "Torc is made for flash; virtual disks often say so without turning",
                cost: "milliseconds for each read if it is true",
                fix: "`torc tune disk` measures it".into(),
                sureness: Disputed,
            });
        }
        let scheduler = block.scheduler.as_ref();
        if let Some(scheduler) = scheduler
            .filter(|choice| choice.current != "none" && choice.offers("none"))
            .filter(|_| !block.rotational || host.virtualisation.guest)
        {
            findings.push(Finding {
                id: "io-scheduler",
                severity: Warning,
                found: format!("{} uses {}", block.name, scheduler.current),
                reason: "the device orders its own queue",
                cost: "a lock and a delay for each request",
                fix: "`torc tune apply` chooses the scheduler called none".into(),
                sureness: Likely,
            });
        }
        if block.discards_at_once {
            findings.push(Finding {
                id: "mount-discard",
                severity: Warning,
                found: format!("a file system on {} is mounted with discard", block.name),
                reason: "when a table is removed, the device is told of all its blocks at once, and what comes behind waits",
                cost: "tens to hundreds of milliseconds at the tail whenever tables are merged",
                fix: "mount what holds the data with nodiscard, and run fstrim.timer".into(),
                sureness: Likely,
            });
        }
        if !block.queues.is_empty() && block.queues.len() < shards {
            findings.push(Finding {
                id: "queues-few",
                severity: Note,
                found: format!(
                    "{}: {} for {}",
                    block.name,
                    counted(block.queues.len(), "queue"),
                    counted(shards, "shard")
                ),
                reason: "shards that share a queue complete on each other's cores and share its lock",
                cost: "a microsecond or two for each request",
                fix: "nothing at run time; devices with more queues exist".into(),
                sureness: Certain,
            });
        }
    }
    for nic in &host.nics {
        if nic
            .coalescing
            .as_ref()
            .is_some_and(|coalescing| coalescing.adaptive)
        {
            findings.push(Finding {
                id: "coalescing-adaptive",
                severity: Note,
                found: format!("{} adapts its interrupt delay", nic.name),
                reason: "the delay of a packet depends on those before it",
                cost: "up to tens of microseconds, varying",
                fix: "fixed at 4 microseconds by `torc tune apply --profile latency`".into(),
                sureness: Likely,
            });
        }
    }
}
