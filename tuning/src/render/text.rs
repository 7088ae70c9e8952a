//! Hosts, findings and plans as text.

use super::line;
use crate::change::Risk;
use crate::check::{Finding, Severity};
use crate::host::{Host, Managed};
use crate::plan::Plan;

fn or_unknown<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "unknown".into(), |value| value.to_string())
}

/// Everything that was read.
pub fn host(host: &Host) -> String {
    let mut out = String::new();
    let cpus = &host.cpus;
    let mut fact = |name: &str, value: String| {
        line(&mut out, format_args!("{name:<18}{value}"));
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
            "{} sockets, {} cores, {} threads online ({})",
            cpus.packages(),
            cpus.cores().len(),
            cpus.online.len(),
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
        fact(
            &format!("irq {}", irq.number),
            format!(
                "{:<28} {:<14} on {:<8} of {}",
                irq.name,
                managed,
                or_unknown(irq.effective.clone()),
                irq.affinity
            ),
        );
    }
    for block in &host.blocks {
        fact(
            &block.name,
            format!(
                "scheduler {} nomerges {} wbt {} rq_affinity {} requests {} cache {} poll {} node {}",
                or_unknown(
                    block
                        .scheduler
                        .as_ref()
                        .map(|choice| choice.current.clone())
                ),
                or_unknown(block.nomerges),
                or_unknown(block.throttle_us),
                or_unknown(block.completion_affinity),
                or_unknown(block.requests),
                or_unknown(block.write_cache.clone()),
                or_unknown(block.poll),
                or_unknown(block.node)
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
                "driver {} state {} speed {} node {} channels {} RSS queues {} napi_defer_hard_irqs {} gro_flush_timeout {}",
                or_unknown(nic.driver.clone()),
                or_unknown(nic.state.clone()),
                or_unknown(nic.speed_mbps),
                or_unknown(nic.node),
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
                    "rx {} RPS {} irq {}",
                    queue.index,
                    queue.cpus.to_mask(),
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
    for (cpu, governor) in &settings.governors {
        fact(&format!("governor cpu{cpu}"), governor.clone());
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
    let limit = |value: Option<u64>| {
        if host.limits.known {
            value.map_or_else(|| "unlimited".into(), |value| value.to_string())
        } else {
            "unknown".into()
        }
    };
    fact(
        "limits",
        format!(
            "memlock {} nofile {} rtprio {}",
            limit(host.limits.locked_bytes),
            limit(host.limits.open_files),
            limit(host.limits.realtime_priority)
        ),
    );
    let ring = &host.io_uring;
    fact(
        "io_uring",
        match (&ring.available, &ring.refusal) {
            (Some(true), _) => format!(
                "features {}; operations {}; setup {}",
                ring.features.join(" "),
                ring.operations.join(" "),
                ring.setup.join(" ")
            ),
            (Some(false), refusal) => format!("refused: {}", or_unknown(refusal.clone())),
            (None, _) => "unknown".into(),
        },
    );
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
    for (name, state) in &host.mitigations {
        fact(&format!("cpu: {name}"), state.clone());
    }
    for unavailable in &host.unavailable {
        fact(
            "not available here",
            format!("{}: {}", unavailable.what, unavailable.reason),
        );
    }
    out
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
        line(
            &mut out,
            format_args!("         sure  {:?}", finding.sureness),
        );
    }
    if findings.is_empty() {
        out.push_str("nothing found\n");
    }
    out
}

/// A plan: layout, old → new with reason, risk and undo, boot arguments, notes.
pub fn plan(plan: &Plan) -> String {
    let mut out = String::new();
    let layout = &plan.layout;
    line(
        &mut out,
        format_args!(
            "plan {} for {}: {} shards, {} changes",
            plan.id,
            plan.profile.name(),
            layout.shards.len(),
            plan.changes.len()
        ),
    );
    line(
        &mut out,
        format_args!(
            "shards on {}; housekeeping {}; spare {}",
            layout.shard_cpus(),
            layout.housekeeping,
            if layout.spare.is_empty() {
                "none".into()
            } else {
                layout.spare.to_string()
            }
        ),
    );
    for (at, change) in plan.changes.iter().enumerate() {
        let risk = match change.risk {
            Risk::Low => "low",
            Risk::Power => "power",
            Risk::Others => "others",
        };
        line(
            &mut out,
            format_args!(
                "{:>3}  {}: {} -> {}",
                at + 1,
                change.knob,
                change.now,
                change.want
            ),
        );
        line(
            &mut out,
            format_args!(
                "     {} (risk {risk}; undo: write {:?} back)",
                change.reason, change.now
            ),
        );
    }
    for advice in &plan.boot {
        line(
            &mut out,
            format_args!("boot {}: {} (printed only)", advice.argument, advice.reason),
        );
    }
    for note in &plan.notes {
        line(&mut out, format_args!("note {note}"));
    }
    out
}
