//! Who took a core, and for how long, from the kernel's events.
//!
//! Interrupts and softirqs nest; each is booked the time that is its own. Of threads, only those that
//! ran while the probe was runnable on that core are booked.

use std::collections::BTreeMap;
use std::io;

use super::Culprit;
use crate::trace::{Event, Trace, field};

/// What is recorded. The timer's and other cores' interrupts have events of their own, on x86 only.
pub(super) const EVENTS: [&str; 6] = [
    "sched/sched_switch",
    "irq/irq_handler_entry",
    "irq/irq_handler_exit",
    "irq/softirq_entry",
    "irq/softirq_exit",
    "irq_vectors",
];

/// Threads of the probe are called so, with their CPU behind it.
pub(super) const SPINNER: &str = "torc-spin-";

/// Times and microseconds.
type Account = (u64, u64);

/// What is going on upon one core.
#[derive(Default)]
struct Core {
    /// Interrupts that have begun, the innermost last: name, begin, time of those within.
    open: Vec<(String, u64, u64)>,
    /// The thread that took the core from the probe, and since when.
    thread: Option<(String, u64)>,
}

#[derive(Default)]
struct Blame {
    cores: BTreeMap<u32, Core>,
    accounts: BTreeMap<(u32, String), Account>,
}

impl Blame {
    fn book(&mut self, cpu: u32, what: String, us: u64) {
        let account = self.accounts.entry((cpu, what)).or_default();
        account.0 += 1;
        account.1 += us;
    }

    fn take(&mut self, event: Event<'_>) {
        if event.name == "sched_switch" {
            return self.switch(event);
        }
        let opens = event.name.strip_suffix("_entry");
        let closes = event.name.strip_suffix("_exit");
        let core = self.cores.entry(event.cpu).or_default();
        if let Some(sort) = opens {
            core.open.push((name(sort, event.fields), event.at_us, 0));
        } else if closes.is_some()
            && let Some((what, begun, within)) = core.open.pop()
        {
            let took = event.at_us.saturating_sub(begun);
            if let Some((_, _, outer)) = core.open.last_mut() {
                *outer += took;
            }
            self.book(event.cpu, what, took.saturating_sub(within));
        }
    }

    fn switch(&mut self, event: Event<'_>) {
        let is_probe = |comm: Option<&str>| comm.is_some_and(|comm| comm.starts_with(SPINNER));
        let previous = field(event.fields, "prev_comm");
        let next = field(event.fields, "next_comm");
        let core = self.cores.entry(event.cpu).or_default();
        // A switch happens outside of interrupts; what is open lost its end.
        core.open.clear();
        let ended = core.thread.take();
        let pushed_aside = is_probe(previous)
            && field(event.fields, "prev_state").is_some_and(|s| s.starts_with('R'));
        if !is_probe(next) && (pushed_aside || ended.is_some()) {
            core.thread = next.map(|comm| (format!("thread {comm}"), event.at_us));
        }
        if let Some((what, begun)) = ended {
            self.book(event.cpu, what, event.at_us.saturating_sub(begun));
        }
    }
}

fn name(sort: &str, fields: &str) -> String {
    match sort {
        "irq_handler" => format!("interrupt {}", field(fields, "name").unwrap_or("?")),
        "softirq" => {
            let action = fields.split("action=").nth(1).unwrap_or("?");
            format!("softirq {}", action.trim_end_matches(']'))
        }
        vector => format!("interrupt {}", vector.replace('_', " ")),
    }
}

/// Ends the trace; culprits by CPU, and how many events did not fit.
pub(super) fn read(trace: Trace) -> io::Result<(Vec<(u32, Culprit)>, u64)> {
    let mut blame = Blame::default();
    let dropped = trace.finish(|event| blame.take(event))?;
    let accounts = blame.accounts.into_iter();
    let culprits = accounts.map(|((cpu, what), (times, us))| {
        let culprit = Culprit {
            what,
            times: Some(times),
            us: Some(us),
        };
        (cpu, culprit)
    });
    Ok((culprits.collect(), dropped))
}

#[cfg(test)]
mod tests {
    use super::Blame;
    use crate::trace::Event;

    fn blame(events: &[(u32, u64, &str, &str)]) -> Vec<(u32, String, u64, u64)> {
        let mut blame = Blame::default();
        for &(cpu, at_us, name, fields) in events {
            blame.take(Event {
                cpu,
                at_us,
                name,
                fields,
            });
        }
        let accounts = blame.accounts.into_iter();
        accounts
            .map(|((cpu, what), (times, us))| (cpu, what, times, us))
            .collect()
    }

    #[test]
    fn a_nested_interrupt_is_not_booked_twice() {
        let booked = blame(&[
            (1, 10, "softirq_entry", "vec=1 [action=TIMER]"),
            (1, 12, "irq_handler_entry", "irq=36 name=virtio1-req.0"),
            (0, 13, "local_timer_entry", "vector=236"),
            (1, 15, "irq_handler_exit", "irq=36 ret=handled"),
            (0, 17, "local_timer_exit", "vector=236"),
            (1, 20, "softirq_exit", "vec=1 [action=TIMER]"),
        ]);
        assert_eq!(
            booked,
            [
                (0, "interrupt local timer".into(), 1, 4),
                (1, "interrupt virtio1-req.0".into(), 1, 3),
                (1, "softirq TIMER".into(), 1, 7),
            ]
        );
    }

    #[test]
    fn threads_are_booked_only_while_the_probe_waits() {
        let switch = |from: &str, state: &str, to: &str| {
            format!(
                "prev_comm={from} prev_pid=1 prev_prio=1 prev_state={state} ==> next_comm={to} next_pid=2 next_prio=1"
            )
        };
        let lines = [
            (5, switch("bash", "S", "sshd")),
            (10, switch("torc-spin-0", "R", "kworker/0:1")),
            (14, switch("kworker/0:1", "I", "ksoftirqd/0")),
            (15, switch("ksoftirqd/0", "S", "torc-spin-0")),
            (30, switch("torc-spin-0", "X", "bash")),
            (90, switch("bash", "S", "sshd")),
        ];
        let events: Vec<_> = lines
            .iter()
            .map(|(at, fields)| (0, *at, "sched_switch", fields.as_str()))
            .collect();
        assert_eq!(
            blame(&events),
            [
                (0, "thread ksoftirqd/0".into(), 1, 1),
                (0, "thread kworker/0:1".into(), 1, 4),
            ]
        );
    }
}
