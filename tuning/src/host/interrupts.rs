//! Device interrupts, and which of them the kernel keeps for itself.
//!
//! A *managed* interrupt's affinity belongs to the kernel: it spreads the vectors of a multiqueue
//! device over the CPUs and keeps each queue's completions on the CPUs of its queue. Recent kernels
//! say so by a read-only `smp_affinity`; older ones only by refusing the write, so there the name of
//! the driver decides and the evidence says that it is likely, not certain.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Unavailable;
use crate::cpuset::CpuSet;
use crate::kernel::Kernel;

/// Whether the kernel lets others move an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Managed {
    /// It does not: the file is read-only.
    Yes,
    /// It probably does not: a queue of a driver that asks for managed vectors.
    Likely,
    /// It does.
    No,
}

/// One device interrupt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interrupt {
    /// Number in this boot; names nothing beyond it.
    pub number: u32,
    /// What the driver calls it, e.g. `nvme0q3`, `virtio2-input.0`. This names it.
    pub name: String,
    /// CPUs on which it may arrive.
    pub affinity: CpuSet,
    /// CPUs on which it does arrive.
    pub effective: Option<CpuSet>,
    /// Whether the kernel keeps it.
    pub managed: Managed,
    /// Memory node of its device.
    pub node: Option<u32>,
    /// How often it arrived on each CPU since boot.
    pub counts: BTreeMap<u32, u64>,
}

impl Interrupt {
    /// The number at the end of the name: its queue, as drivers count.
    pub fn trailing_number(&self) -> Option<u32> {
        let name = self.name.split('@').next().unwrap_or(&self.name);
        let digits = name.bytes().rev().take_while(u8::is_ascii_digit).count();
        name[name.len() - digits..].parse().ok()
    }

    /// Where it arrives: where the kernel says that it does, else where it may.
    pub fn lands_on(&self) -> &CpuSet {
        self.effective.as_ref().unwrap_or(&self.affinity)
    }

    /// Whether no plan may write to it.
    pub fn is_kept_by_kernel(&self) -> bool {
        self.managed != Managed::No
    }
}

pub(super) fn read(kernel: &impl Kernel, unavailable: &mut Vec<Unavailable>) -> Vec<Interrupt> {
    let Some(table) = kernel.text("/proc/interrupts") else {
        unavailable.push(Unavailable {
            what: "interrupts".into(),
            reason: "/proc/interrupts cannot be read".into(),
        });
        return Vec::new();
    };
    let mut interrupts: Vec<_> = parse_table(&table)
        .into_iter()
        .filter_map(|(number, name, counts)| read_one(kernel, number, name, counts))
        .collect();
    interrupts.sort_by_key(|irq| irq.number);
    if interrupts.is_empty() {
        unavailable.push(Unavailable {
            what: "interrupt affinities".into(),
            reason: "/proc/irq is not shown here (a container?)".into(),
        });
    }
    interrupts
}

type Row = (u32, String, BTreeMap<u32, u64>);

/// Rows of `/proc/interrupts` that have a number. The name is all that follows the trigger column, so
/// that shared lines keep each of their drivers.
pub(crate) fn parse_table(table: &str) -> Vec<Row> {
    let mut lines = table.lines();
    let header: Vec<u32> = lines
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .filter_map(|cpu| cpu.strip_prefix("CPU")?.parse().ok())
        .collect();
    let mut rows = Vec::new();
    for line in lines {
        let Some((number, rest)) = line.split_once(':') else {
            continue;
        };
        let Ok(number) = number.trim().parse() else {
            continue;
        };
        let mut words = rest.split_whitespace().peekable();
        let mut counts = BTreeMap::new();
        for &cpu in &header {
            let Some(count) = words.peek().and_then(|word| word.parse().ok()) else {
                break;
            };
            words.next();
            counts.insert(cpu, count);
        }
        // Chip, hardware number with trigger, then the drivers' names.
        let tail: Vec<&str> = words.collect();
        let from = tail
            .iter()
            .position(|word| {
                word.ends_with("-edge")
                    || word.ends_with("-fasteoi")
                    || *word == "Edge"
                    || *word == "Level"
            })
            .map_or(tail.len().saturating_sub(1), |at| at + 1);
        rows.push((number, tail[from.min(tail.len())..].join(" "), counts));
    }
    rows
}

fn read_one(
    kernel: &impl Kernel,
    number: u32,
    name: String,
    counts: BTreeMap<u32, u64>,
) -> Option<Interrupt> {
    let directory = format!("/proc/irq/{number}");
    let list = |file: &str| {
        let text = kernel.text(&format!("{directory}/{file}"))?;
        CpuSet::parse_list(&text).ok()
    };
    let affinity = list("smp_affinity_list")?;
    let mode = kernel
        .mode(&format!("{directory}/smp_affinity_list"))
        .ok()?;
    let managed = if mode & 0o222 == 0 {
        Managed::Yes
    } else if is_managed_queue(&name) {
        Managed::Likely
    } else {
        Managed::No
    };
    Some(Interrupt {
        number,
        affinity,
        effective: list("effective_affinity_list").filter(|cpus| !cpus.is_empty()),
        managed,
        node: kernel
            .number::<i64>(&format!("{directory}/node"))
            .and_then(|node| u32::try_from(node).ok()),
        counts,
        name,
    })
}

/// NVMe's queues above the administrative one, virtio-blk's and virtio-scsi's request queues, and the
/// vectors of storage adapters whose drivers ask for managed ones.
fn is_managed_queue(name: &str) -> bool {
    const ADAPTERS: [&str; 6] = [
        "megasas", "mpt3sas", "smartpqi", "lpfc", "qla2xxx", "hisi_sas",
    ];
    let nvme = name
        .strip_prefix("nvme")
        .and_then(|rest| rest.split_once('q'))
        .is_some_and(|(_, queue)| queue.parse::<u32>().is_ok_and(|queue| queue > 0));
    let adapter = ADAPTERS.iter().any(|driver| name.starts_with(driver));
    nvme || adapter
        || (name.starts_with("virtio") && (name.contains("-req.") || name.contains("-request")))
}

/// Numbers of the interrupts of this moment, by name.
#[derive(Clone, Debug, Default)]
pub struct InterruptNumbers(BTreeMap<String, u32>);

impl InterruptNumbers {
    /// As the kernel lists them now. On a large host that list takes the kernel milliseconds.
    pub fn read(kernel: &impl Kernel) -> Self {
        let table = kernel.text("/proc/interrupts").unwrap_or_default();
        let mut numbers = BTreeMap::new();
        for (number, name, _) in parse_table(&table) {
            numbers.entry(name).or_insert(number);
        }
        Self(numbers)
    }

    /// Number of the interrupt that is called `name`.
    pub fn get(&self, name: &str) -> Option<u32> {
        self.0.get(name).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::{is_managed_queue, parse_table};

    #[test]
    fn rows_of_both_architectures_are_read() {
        let x86 = "           CPU0       CPU1       \n 36:          0     103259 PCI-MSIX-0000:00:02.0   1-edge      virtio1-req.0\nNMI:          0          0   Non-maskable interrupts\n";
        let rows = parse_table(x86);
        assert_eq!(rows.len(), 1);
        assert_eq!((rows[0].0, rows[0].1.as_str()), (36, "virtio1-req.0"));
        assert_eq!(rows[0].2[&1], 103_259);
        let arm = "           CPU0       CPU2\n 11:   5   7   GICv3  27 Level     arch_timer\n 54:  1  0  ITS-MSI 1048577 Edge      nvme0q1, other\n";
        let rows = parse_table(arm);
        assert_eq!(rows[0].1, "arch_timer");
        assert_eq!(rows[0].2[&2], 7);
        assert_eq!(rows[1].1, "nvme0q1, other");
    }

    #[test]
    fn queues_that_drivers_manage_are_known_by_name() {
        for name in ["nvme0q1", "nvme12q64", "virtio1-req.0", "megasas0-msix7"] {
            assert!(is_managed_queue(name), "{name}");
        }
        for name in [
            "nvme0q0",
            "virtio2-input.0",
            "eth0-TxRx-3",
            "mlx5_comp3@pci:0000:17:00.0",
        ] {
            assert!(!is_managed_queue(name), "{name}");
        }
    }
}
