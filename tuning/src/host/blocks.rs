//! Block devices and the hardware queues that lead to them.

use serde::{Deserialize, Serialize};

use super::{Choice, Interrupt};
use crate::cpuset::CpuSet;
use crate::kernel::Kernel;

/// A hardware queue: requests submitted on its CPUs complete through its interrupt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HardwareQueue {
    /// Number.
    pub index: u32,
    /// CPUs that submit through it.
    pub cpus: CpuSet,
    /// Interrupt that completes its requests.
    pub interrupt: Option<u32>,
}

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// Name, e.g. `nvme0n1`.
    pub name: String,
    /// Memory node of the device.
    pub node: Option<u32>,
    /// Whether it turns.
    pub rotational: bool,
    /// I/O scheduler.
    pub scheduler: Option<Choice>,
    /// 2 tries no merge of neighbouring requests.
    pub nomerges: Option<u64>,
    /// Target of writeback throttling in microseconds; 0 is off, absent when not built in.
    pub throttle_us: Option<u64>,
    /// 2 completes on the submitting CPU.
    pub completion_affinity: Option<u64>,
    /// Requests that the queue holds.
    pub requests: Option<u64>,
    /// `write back` or `write through`.
    pub write_cache: Option<String>,
    /// Whether completions may be polled for.
    pub poll: Option<bool>,
    /// Whether it discards, and a file system on it tells it of every block that is freed (mounted with `discard`).
    #[serde(default)]
    pub discards_at_once: bool,
    /// Hardware queues.
    pub queues: Vec<HardwareQueue>,
}

impl Block {
    /// The queue through which `cpu` submits.
    pub fn queue_of(&self, cpu: u32) -> Option<&HardwareQueue> {
        self.queues.iter().find(|queue| queue.cpus.contains(cpu))
    }
}

pub(super) fn read(kernel: &impl Kernel, interrupts: &[Interrupt]) -> Vec<Block> {
    let discarding = discarding_devices(kernel);
    let mut blocks = Vec::new();
    for name in kernel.list("/sys/block").unwrap_or_default() {
        // Memory disks and unused loop devices have no place on the map.
        let unused_loop = name.starts_with("loop")
            && kernel.text(&format!("/sys/block/{name}/size")).as_deref() == Some("0");
        if unused_loop || name.starts_with("ram") || name.starts_with("zram") {
            continue;
        }
        blocks.extend(read_one(kernel, &name, interrupts, &discarding));
    }
    blocks
}

/// Numbers (`259:1`) of the devices whose file system is mounted with `discard`, in order.
pub(crate) fn discarding_devices(kernel: &impl Kernel) -> Vec<String> {
    let mounts = kernel.text("/proc/self/mountinfo").unwrap_or_default();
    let mut devices: Vec<String> = mounts.lines().filter_map(discarding_device).collect();
    devices.sort();
    devices.dedup();
    devices
}

/// The device of a line of mountinfo: `36 35 259:1 / /mnt rw,noatime shared:1 - ext4 /dev/root rw,discard`.
fn discarding_device(line: &str) -> Option<String> {
    let (mount, file_system) = line.split_once(" - ")?;
    let options = file_system.split(' ').nth(2)?;
    let discards = options.split(',').any(|option| option == "discard");
    let device = mount.split(' ').nth(2)?;
    discards.then(|| device.to_owned())
}

/// Numbers of a device and its partitions.
fn device_numbers(kernel: &impl Kernel, name: &str) -> Vec<String> {
    let home = format!("/sys/block/{name}");
    let parts = kernel.list(&home).unwrap_or_default();
    let parts = parts.iter().map(|part| format!("{home}/{part}/dev"));
    let files = std::iter::once(format!("{home}/dev")).chain(parts);
    files.filter_map(|file| kernel.text(&file)).collect()
}

fn read_one(
    kernel: &impl Kernel,
    name: &str,
    interrupts: &[Interrupt],
    discarding: &[String],
) -> Option<Block> {
    let queue = format!("/sys/block/{name}/queue");
    let number = |file: &str| kernel.number::<u64>(&format!("{queue}/{file}"));
    let mut queues = Vec::new();
    for index in kernel
        .list(&format!("/sys/block/{name}/mq"))
        .unwrap_or_default()
    {
        let cpus = kernel.text(&format!("/sys/block/{name}/mq/{index}/cpu_list"));
        let (Ok(index), Some(cpus)) = (index.parse(), cpus) else {
            continue;
        };
        queues.push(HardwareQueue {
            index,
            cpus: CpuSet::parse_list(&cpus).ok()?,
            interrupt: queue_interrupt(kernel, name, index, interrupts),
        });
    }
    Some(Block {
        name: name.to_owned(),
        node: node_of(kernel, &format!("/sys/block/{name}/device")),
        rotational: number("rotational")? == 1,
        scheduler: kernel
            .text(&format!("{queue}/scheduler"))
            .and_then(|text| Choice::parse(&text)),
        nomerges: number("nomerges"),
        throttle_us: number("wbt_lat_usec"),
        completion_affinity: number("rq_affinity"),
        requests: number("nr_requests"),
        write_cache: kernel.text(&format!("{queue}/write_cache")),
        poll: number("io_poll").map(|poll| poll == 1),
        discards_at_once: number("discard_max_bytes").is_some_and(|bytes| bytes > 0)
            && device_numbers(kernel, name)
                .iter()
                .any(|number| discarding.contains(number)),
        queues,
    })
}

/// Memory node of a device, looked for at its parents as well: a namespace or virtual device has
/// none of its own. `-1` means unknown, not node 0.
pub(super) fn node_of(kernel: &impl Kernel, device: &str) -> Option<u32> {
    ["numa_node", "../numa_node", "device/numa_node"]
        .iter()
        .find_map(|file| kernel.number::<i64>(&format!("{device}/{file}")))
        .and_then(|node| u32::try_from(node).ok())
}

fn queue_interrupt(
    kernel: &impl Kernel,
    block: &str,
    index: u32,
    interrupts: &[Interrupt],
) -> Option<u32> {
    let name = if let Some(controller) = nvme_controller(block) {
        // Queue 0 is the administrative one.
        format!("{controller}q{}", index + 1)
    } else {
        let device = kernel.resolve(&format!("/sys/block/{block}/device")).ok()?;
        format!("{}-req.{index}", device.rsplit('/').next()?)
    };
    let mut all = interrupts.iter();
    all.find(|irq| irq.name == name).map(|irq| irq.number)
}

/// `nvme0` of `nvme0n1`, and of `nvme0c1n1` as multipath names it.
fn nvme_controller(block: &str) -> Option<&str> {
    let digits = block.strip_prefix("nvme")?;
    let length = digits.bytes().take_while(u8::is_ascii_digit).count();
    (length > 0).then(|| &block[..4 + length])
}
