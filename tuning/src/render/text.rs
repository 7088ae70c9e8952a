//! Hosts and findings as text.

use std::collections::BTreeMap;

use super::{counted, line, unavailable};
use crate::check::{Finding, Severity, Sureness};
use crate::cpuset::CpuSet;
use crate::host::{Host, Managed};

fn or_unknown<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "unknown".into(), |value| value.to_string())
}

/// Everything that was read.
pub fn host(host: &Host) -> String {
    let mut out = String::new();
    let cpus = &host.cpus;
    let mut fact = |name: &str, value: String| {
        line(&mut out, format_args!("{name:<16}  {value}"));
    };
    fact("kernel", host.kernel.clone());
    let arguments: Vec<String> = host
        .boot_arguments
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    fact(
        "boot arguments",
        if arguments.is_empty() {
            "none that matter".into()
        } else {
            arguments.join(" ")
        },
    );
    fact(
        "guest",
        if host.virtualisation.guest {
            "yes"
        } else {
            "no"
        }
        .into(),
    );
    fact(
        "processors",
        format!(
            "{}, {}, {} online ({})",
            counted(cpus.packages(), "socket"),
            counted(cpus.cores().len(), "core"),
            counted(cpus.online.len(), "thread"),
            cpus.online
        ),
    );
    fact("allowed", cpus.allowed.to_string());
    fact(
        "isolated",
        if cpus.isolated.is_empty() {
            "none".into()
        } else {
            cpus.isolated.to_string()
        },
    );
    fact("smt", or_unknown(cpus.smt.clone()));
    for node in &cpus.nodes {
        fact(
            &format!("node {}", node.id),
            format!(
                "cpus {} memory {} MiB distances {:?}",
                node.cpus,
                node.memory_bytes >> 20,
                node.distances
            ),
        );
    }
    for cache in &cpus.caches {
        fact(
            &format!("cache L{}", cache.level),
            format!(
                "{} KiB {} cpus {}",
                cache.bytes / 1024,
                cache.kind,
                cache.cpus
            ),
        );
    }
    for irq in &host.interrupts {
        let managed = match irq.managed {
            Managed::Yes => "managed",
            Managed::Likely => "likely managed",
            Managed::No => "movable",
        };
        let arrivals: u64 = irq.counts.values().sum();
        fact(
            &format!("irq {}", irq.number),
            format!(
                "{:<28} {managed:<14} on {:<6} of {:<8} {arrivals} so far",
                irq.name,
                or_unknown(irq.effective.clone()),
                irq.affinity.to_string(),
            ),
        );
    }
    for block in &host.blocks {
        fact(
            &block.name,
            format!(
                "node {}, scheduler {}, nomerges {}, rq_affinity {}, wbt {} us, {} requests, {}, poll {}",
                or_unknown(block.node),
                or_unknown(
                    block
                        .scheduler
                        .as_ref()
                        .map(|choice| choice.current.clone())
                ),
                or_unknown(block.nomerges),
                or_unknown(block.completion_affinity),
                or_unknown(block.throttle_us),
                or_unknown(block.requests),
                or_unknown(block.write_cache.clone()),
                or_unknown(block.poll),
            ),
        );
        for queue in &block.queues {
            fact(
                "",
                format!(
                    "queue {} cpus {} irq {}",
                    queue.index,
                    queue.cpus,
                    or_unknown(queue.interrupt)
                ),
            );
        }
    }
    for nic in &host.nics {
        fact(
            &nic.name,
            format!(
                "driver {}, {}, speed {}, node {}",
                or_unknown(nic.driver.clone()),
                or_unknown(nic.state.clone()),
                or_unknown(nic.speed_mbps),
                or_unknown(nic.node),
            ),
        );
        fact(
            "",
            format!(
                "channels {}; RSS over {} queues; napi_defer_hard_irqs {}, gro_flush_timeout {} ns",
                or_unknown(nic.channels.clone()),
                or_unknown(nic.rss_queues),
                or_unknown(nic.napi_defer_hard_irqs),
                or_unknown(nic.gro_flush_timeout_ns)
            ),
        );
        if let Some(coalescing) = &nic.coalescing {
            fact(
                "",
                format!(
                    "coalescing adaptive {} rx {} us tx {} us",
                    coalescing.adaptive, coalescing.receive_us, coalescing.transmit_us
                ),
            );
        }
        for queue in &nic.receive {
            fact(
                "",
                format!(
                    "rx {} RPS {} RFS {} irq {}",
                    queue.index,
                    queue.cpus.to_mask(),
                    or_unknown(queue.flows),
                    or_unknown(queue.interrupt)
                ),
            );
        }
        for queue in &nic.transmit {
            fact(
                "",
                format!(
                    "tx {} XPS {} irq {}",
                    queue.index,
                    queue.cpus.to_mask(),
                    or_unknown(queue.interrupt)
                ),
            );
        }
    }
    let settings = &host.settings;
    for (name, values) in [
        ("governor", &settings.governors),
        ("energy", &settings.energy),
    ] {
        for (value, cpus) in by_value(values) {
            fact(name, format!("{value} on {cpus}"));
        }
    }
    for state in &settings.idle_states {
        fact(
            "idle state",
            format!(
                "{} wakes in {} us{}",
                state.name,
                state.wake_us,
                if state.disabled { ", off" } else { "" }
            ),
        );
    }
    fact(
        "huge pages",
        format!(
            "transparent {}, reserved {} MiB",
            or_unknown(
                settings
                    .huge_pages
                    .as_ref()
                    .map(|choice| choice.current.clone())
            ),
            settings.huge_pages_reserved_bytes >> 20
        ),
    );
    fact("numa balancing", or_unknown(settings.numa_balancing));
    fact(
        "swappiness",
        format!(
            "{} (swap {})",
            or_unknown(settings.swappiness),
            or_unknown(settings.swap)
        ),
    );
    fact(
        "clock source",
        format!(
            "{} of {}",
            or_unknown(settings.clock.clone()),
            settings.clocks.join(" ")
        ),
    );
    let limit = |value: Option<u64>, unit: &str| {
        if host.limits.known {
            value.map_or_else(|| "unlimited".into(), |value| format!("{value}{unit}"))
        } else {
            "unknown".into()
        }
    };
    fact(
        "limits",
        format!(
            "locked memory {}, open files {}, real-time priority {}",
            limit(host.limits.locked_bytes.map(|bytes| bytes >> 10), " KiB"),
            limit(host.limits.open_files, ""),
            limit(host.limits.realtime_priority, "")
        ),
    );
    let ring = &host.io_uring;
    let restriction = match ring.disabled {
        Some(0) => "open to all",
        Some(1) => "privileged processes and the io_uring group only",
        Some(2) => "switched off",
        _ => "unknown",
    };
    fact(
        "io_uring",
        format!("kernel.io_uring_disabled: {restriction}"),
    );
    match (&ring.available, &ring.refusal) {
        (Some(true), _) => {
            fact("", format!("features {}", ring.features.join(" ")));
            fact("", format!("operations {}", ring.operations.join(" ")));
            fact("", format!("setup {}", ring.setup.join(" ")));
        }
        (Some(false), refusal) => fact("", format!("refused: {}", or_unknown(refusal.clone()))),
        (None, _) => fact("", "not tried".into()),
    }
    fact(
        "irqbalance",
        format!(
            "{}{}",
            if host.irqbalance.running {
                "runs"
            } else {
                "not running"
            },
            host.irqbalance
                .bans
                .iter()
                .fold(String::new(), |text, ban| text + "; " + ban)
        ),
    );
    let (well, other): (Vec<_>, Vec<_>) = host
        .mitigations
        .iter()
        .partition(|(_, state)| *state == "Not affected");
    for (name, state) in other {
        fact("weakness", format!("{name}: {state}"));
    }
    let well: Vec<&str> = well.iter().map(|(name, _)| name.as_str()).collect();
    if !well.is_empty() {
        fact("not affected by", well.join(" "));
    }
    unavailable(&mut out, &host.unavailable);
    out
}

/// CPUs by what they have.
fn by_value(values: &BTreeMap<u32, String>) -> BTreeMap<&str, CpuSet> {
    let mut cpus: BTreeMap<&str, CpuSet> = BTreeMap::new();
    for (cpu, value) in values {
        cpus.entry(value).or_default().insert(*cpu);
    }
    cpus
}

/// Findings, each with reason, cost, fix and sureness.
pub fn findings(findings: &[Finding]) -> String {
    let mut out = String::new();
    for finding in findings {
        let severity = match finding.severity {
            Severity::Serious => "SERIOUS",
            Severity::Warning => "warning",
            Severity::Note => "note",
        };
        line(
            &mut out,
            format_args!("{severity:<8} {}: {}", finding.id, finding.found),
        );
        line(&mut out, format_args!("         why   {}", finding.reason));
        line(&mut out, format_args!("         cost  {}", finding.cost));
        line(&mut out, format_args!("         fix   {}", finding.fix));
        let sureness = match finding.sureness {
            Sureness::Certain => "certain",
            Sureness::Likely => "likely: `torc tune prove` tells for this host",
            Sureness::Disputed => "disputed: measure before believing",
        };
        line(&mut out, format_args!("         sure  {sureness}"));
    }
    if findings.is_empty() {
        out.push_str("nothing found\n");
    }
    out
}
