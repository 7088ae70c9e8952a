//! Which files have to say what for a layout. Every wish names its reason; a file that already says
//! it gives no change.

use super::{Layout, Profile, network};
use crate::change::{Change, Disturbed, Risk, Syntax, Target};
use crate::cpuset::CpuSet;
use crate::host::{Block, Host, Nic};

pub(super) struct Wishes(Vec<Change>);

/// A wish that is kept only if it is not fulfilled.
pub(super) struct Wish {
    pub knob: String,
    pub target: Target,
    pub syntax: Syntax,
    pub now: Option<String>,
    pub want: String,
    pub reason: &'static str,
    pub risk: Risk,
}

impl Wishes {
    pub(super) fn add(&mut self, wish: Wish) -> Option<&mut Change> {
        // What this host does not show cannot be planned.
        let now = wish.now?;
        let change = Change {
            knob: wish.knob,
            target: wish.target,
            syntax: wish.syntax,
            want: wish.want,
            at_most: None,
            disturbs: Vec::new(),
            reason: wish.reason.to_owned(),
            risk: wish.risk,
            now,
        };
        if change.is_met_by(change.now.as_bytes()) {
            return None;
        }
        self.0.push(change);
        self.0.last_mut()
    }
}

pub(super) fn wishes(
    host: &Host,
    profile: Profile,
    layout: &Layout,
    notes: &mut Vec<String>,
) -> Vec<Change> {
    let mut wishes = Wishes(Vec::new());
    for block in &host.blocks {
        storage(&mut wishes, host, block, profile);
    }
    if profile == Profile::Shared {
        notes.push(
            "queues of the network, schedulers and settings of the whole host are left alone: others \
             work here too"
                .into(),
        );
    } else {
        let up = |nic: &&Nic| nic.state.as_deref() != Some("down");
        for nic in host.nics.iter().filter(up) {
            network::wishes(&mut wishes, host, nic, profile, layout);
            notes.extend(network::unowned_queues(nic, layout));
        }
        if host.nics.iter().any(|nic| up(&nic)) && layout.shards.len() > 1 {
            notes.extend(network::followed(&mut wishes, host.settings.flow_entries));
        }
        if layout.isolates {
            strays(&mut wishes, host, layout);
        }
        whole_host(&mut wishes, host, profile, layout);
    }
    if host.irqbalance.running {
        notes.push(
            "irqbalance runs and moves interrupts back within 10 s: ban Torc's interrupts in its file, \
             or stop it; `torc tune verify --watch` tells whether that took"
                .into(),
        );
    }
    wishes.0
}

fn storage(wishes: &mut Wishes, host: &Host, block: &Block, profile: Profile) {
    // Virtual disks say that they turn and lie on flash.
    let turns = block.rotational && !host.virtualisation.guest;
    if turns || block.queues.is_empty() {
        return;
    }
    let file = |name: &str| format!("/sys/block/{}/queue/{name}", block.name);
    let number = |name: &str, now: Option<u64>, want: u64, reason| Wish {
        knob: format!("{} {name}", block.name),
        target: Target::File(file(name)),
        syntax: Syntax::Number,
        now: now.map(|now| now.to_string()),
        want: want.to_string(),
        reason,
        risk: Risk::Low,
    };
    // A queue of one CPU completes there anyhow.
    let is_shared = block.queues.iter().any(|queue| queue.cpus.len() > 1);
    let affinity = number(
        "rq_affinity",
        block.completion_affinity.filter(|_| is_shared),
        2,
        "completes on the shard that asked, not on the CPU that took the interrupt",
    );
    // Felt by nobody but the one who asks the disk.
    if profile == Profile::Shared {
        wishes.add(affinity);
        return;
    }
    // First: it resets what follows to its own defaults.
    if let Some(scheduler) = &block.scheduler
        && scheduler.offers("none")
    {
        let change = wishes.add(Wish {
            knob: format!("{} scheduler", block.name),
            target: Target::File(file("scheduler")),
            syntax: Syntax::Bracketed,
            now: Some(scheduler.current.clone()),
            want: "none".into(),
            reason: "the device orders its own queue; a scheduler adds a lock and a delay",
            risk: Risk::Low,
        });
        if let Some(change) = change {
            for name in ["nr_requests", "wbt_lat_usec"] {
                change.disturbs.push(Disturbed {
                    path: file(name),
                    syntax: Syntax::Number,
                });
            }
        }
    }
    wishes.add(affinity);
    wishes.add(number(
        "nomerges",
        block.nomerges,
        2,
        "point reads have no neighbours to merge with; looking costs time",
    ));
    wishes.add(number(
        "wbt_lat_usec",
        block.throttle_us,
        0,
        "Torc paces its own background writes; throttling by guesswork delays the log",
    ));
}

pub(super) fn move_interrupt(
    wishes: &mut Wishes,
    host: &Host,
    number: Option<u32>,
    cpus: &CpuSet,
    reason: &'static str,
) {
    let Some(irq) = number.and_then(|number| host.interrupt(number)) else {
        return;
    };
    let target = Target::Interrupt(irq.name.clone());
    let already = wishes.0.iter().any(|change| change.target == target);
    if irq.is_kept_by_kernel() || already {
        return;
    }
    wishes.add(Wish {
        knob: format!("irq {}", irq.name),
        target,
        syntax: Syntax::List,
        now: Some(irq.affinity.to_string()),
        want: cpus.to_string(),
        reason,
        risk: Risk::Low,
    });
}

/// Interrupts of all other devices keep off the shards' CPUs.
fn strays(wishes: &mut Wishes, host: &Host, layout: &Layout) {
    let queues = host
        .nics
        .iter()
        .flat_map(|nic| nic.receive.iter().chain(&nic.transmit))
        .filter_map(|queue| queue.interrupt);
    let placed: Vec<u32> = queues.collect();
    for irq in &host.interrupts {
        let named_once = host
            .interrupts
            .iter()
            .filter(|other| other.name == irq.name)
            .count()
            == 1;
        if placed.contains(&irq.number)
            || !named_once
            || irq.name.is_empty()
            || irq.affinity.and(&layout.shard_cpus()).is_empty()
        {
            continue;
        }
        move_interrupt(
            wishes,
            host,
            Some(irq.number),
            &layout.housekeeping,
            "it has no shard: off the shards' cores",
        );
    }
}

fn whole_host(wishes: &mut Wishes, host: &Host, profile: Profile, layout: &Layout) {
    let settings = &host.settings;
    let sysctl = |name: &str, now: Option<u64>, want: u64, reason| Wish {
        knob: name.replace('/', "."),
        target: Target::File(format!("/proc/sys/{name}")),
        syntax: Syntax::Number,
        now: now.map(|now| now.to_string()),
        want: want.to_string(),
        reason,
        risk: Risk::Others,
    };
    for (cpu, governor) in &settings.governors {
        wishes.add(Wish {
            knob: format!("cpu{cpu} governor"),
            target: Target::File(format!(
                "/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor"
            )),
            syntax: Syntax::Word,
            now: Some(governor.clone()),
            want: "performance".into(),
            reason: "a core that slowed down answers its first requests slowly",
            risk: Risk::Power,
        });
    }
    if let Some(huge_pages) = &settings.huge_pages
        && huge_pages.current == "always"
    {
        wishes.add(Wish {
            knob: "transparent huge pages".into(),
            target: Target::File("/sys/kernel/mm/transparent_hugepage/enabled".into()),
            syntax: Syntax::Bracketed,
            now: Some(huge_pages.current.clone()),
            want: "madvise".into(),
            reason: "pages are gathered behind the program's back; Torc asks where it wants them",
            risk: Risk::Others,
        });
    }
    wishes.add(sysctl(
        "kernel/numa_balancing",
        settings.numa_balancing,
        0,
        "shards are pinned beside their memory; sampling only costs page faults",
    ));
    if settings.swappiness.is_some_and(|now| now > 1) {
        wishes.add(sysctl(
            "vm/swappiness",
            settings.swappiness,
            1,
            "a swapped-out page is a stall of milliseconds",
        ));
    }
    if settings.listen_backlog.is_some_and(|now| now < 4096) {
        wishes.add(sysctl(
            "net/core/somaxconn",
            settings.listen_backlog,
            4096,
            "a burst of new connections is not turned away",
        ));
    }
    if settings.syn_backlog.is_some_and(|now| now < 4096) {
        wishes.add(sysctl(
            "net/ipv4/tcp_max_syn_backlog",
            settings.syn_backlog,
            4096,
            "a burst of new connections is not turned away",
        ));
    }
    if profile == Profile::Latency {
        wishes.add(sysctl(
            "vm/stat_interval",
            settings.stat_interval_s,
            10,
            "statistics wake every CPU each second",
        ));
        wishes.add(sysctl(
            "kernel/nmi_watchdog",
            settings.nmi_watchdog,
            0,
            "it interrupts every CPU and takes a counter",
        ));
    }
    if layout.isolates && settings.workqueue.is_some() {
        wishes.add(Wish {
            knob: "kernel work".into(),
            target: Target::File("/sys/devices/virtual/workqueue/cpumask".into()),
            syntax: Syntax::Mask,
            now: settings.workqueue.as_ref().map(CpuSet::to_mask),
            want: layout.housekeeping.to_mask(),
            reason: "deferred kernel work keeps off the shards' cores",
            risk: Risk::Low,
        });
    }
}
