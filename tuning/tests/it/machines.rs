//! Modelled machines. Queues are spread over CPUs as the kernel spreads managed vectors (its
//! `group_cpus_evenly`).

use std::collections::BTreeMap;

use torc_tuning::cpuset::CpuSet;
use torc_tuning::kernel::Tree;

/// What a machine is made of.
#[derive(Clone)]
pub struct Shape {
    pub name: &'static str,
    pub sockets: u32,
    pub nodes_a_socket: u32,
    pub cores_a_node: u32,
    pub threads: u32,
    /// Cores that share a last-level cache.
    pub cores_a_cache: u32,
    /// Slow cores at the end, without siblings.
    pub slow_cores: u32,
    pub nvme: Vec<(u32, u32)>,
    pub virtio_disk_queues: u32,
    pub nic: Option<(&'static str, u32, u32)>,
    pub guest: bool,
    pub arm: bool,
    pub governor: bool,
    pub scheduler: &'static str,
    /// Old kernels leave managed interrupts' files writable.
    pub old_kernel: bool,
}

/// Numbers of the threads of a core.
struct Numbers {
    cores: u32,
    threads: u32,
    /// Siblings are neighbours, as desktops and hypervisors count; else all cores' first threads come
    /// first, as servers do.
    neighbours: bool,
}

impl Numbers {
    fn cpu(&self, core: u32, thread: u32) -> u32 {
        if self.neighbours {
            core * self.threads + thread
        } else {
            core + thread * self.cores
        }
    }
    fn core(&self, core: u32) -> CpuSet {
        (0..self.threads)
            .map(|thread| self.cpu(core, thread))
            .collect()
    }
}

pub fn shapes() -> Vec<Shape> {
    let base = Shape {
        name: "",
        sockets: 1,
        nodes_a_socket: 1,
        cores_a_node: 8,
        threads: 1,
        cores_a_cache: 8,
        slow_cores: 0,
        nvme: vec![(0, 8)],
        virtio_disk_queues: 0,
        nic: Some(("ice", 8, 0)),
        guest: false,
        arm: false,
        governor: true,
        scheduler: "[mq-deadline] kyber none",
        old_kernel: false,
    };
    vec![
        Shape {
            name: "one-socket-8-cores",
            ..base.clone()
        },
        Shape {
            name: "two-sockets-smt",
            sockets: 2,
            cores_a_node: 16,
            threads: 2,
            cores_a_cache: 16,
            nvme: vec![(0, 64), (1, 64)],
            nic: Some(("mlx5_core", 32, 1)),
            ..base.clone()
        },
        Shape {
            name: "amd-ccx-nps4",
            nodes_a_socket: 4,
            cores_a_node: 8,
            threads: 2,
            cores_a_cache: 4,
            nvme: vec![(2, 32)],
            nic: Some(("mlx5_core", 63, 3)),
            ..base.clone()
        },
        Shape {
            name: "arm-64-cores",
            cores_a_node: 64,
            cores_a_cache: 64,
            nvme: vec![(0, 32)],
            nic: Some(("ena", 16, 0)),
            arm: true,
            governor: false,
            scheduler: "[none] mq-deadline",
            ..base.clone()
        },
        Shape {
            name: "cloud-vm-virtio",
            cores_a_node: 8,
            threads: 2,
            nvme: Vec::new(),
            virtio_disk_queues: 16,
            nic: Some(("virtio_net", 16, 0)),
            guest: true,
            governor: false,
            scheduler: "[none] mq-deadline kyber bfq",
            ..base.clone()
        },
        Shape {
            name: "nvme-few-queues",
            cores_a_node: 16,
            threads: 2,
            cores_a_cache: 16,
            nvme: vec![(0, 4)],
            nic: Some(("ixgbe", 4, 0)),
            old_kernel: true,
            ..base.clone()
        },
        Shape {
            name: "hybrid-cores",
            cores_a_node: 6,
            threads: 2,
            cores_a_cache: 14,
            slow_cores: 8,
            nvme: vec![(0, 20)],
            nic: Some(("igc", 4, 0)),
            ..base.clone()
        },
        Shape {
            name: "two-core-vm",
            cores_a_node: 2,
            cores_a_cache: 2,
            nvme: Vec::new(),
            virtio_disk_queues: 1,
            nic: Some(("virtio_net", 1, 0)),
            guest: true,
            governor: false,
            scheduler: "[none] mq-deadline kyber bfq",
            ..base
        },
    ]
}

pub fn shape(name: &str) -> Shape {
    shapes()
        .into_iter()
        .find(|shape| shape.name == name)
        .unwrap()
}

/// The files of such a machine.
pub fn build(shape: &Shape) -> Tree {
    let mut tree = Tree::new();
    let fast = shape.sockets * shape.nodes_a_socket * shape.cores_a_node;
    let numbers = Numbers {
        cores: fast,
        threads: shape.threads,
        neighbours: shape.guest || shape.slow_cores > 0,
    };
    let threads = fast * shape.threads;
    let total = threads + shape.slow_cores;
    let all: CpuSet = (0..total).collect();
    let release = if shape.old_kernel { "6.1.90" } else { "6.12.8" };
    tree.file("/proc/sys/kernel/osrelease", format!("{release}\n"))
        .file(
            "/proc/sys/kernel/random/boot_id",
            "11111111-2222-3333-4444-555555555555\n",
        )
        .file("/proc/cmdline", "root=/dev/secret quiet mitigations=auto\n")
        .file(
            "/proc/cpuinfo",
            if shape.guest {
                "flags : fpu hypervisor\n"
            } else {
                "flags : fpu\n"
            },
        )
        .file("/sys/devices/system/cpu/online", format!("{all}\n"))
        .file("/sys/devices/system/cpu/present", format!("{all}\n"))
        .file("/sys/devices/system/cpu/isolated", "\n")
        .file(
            "/sys/devices/system/cpu/smt/control",
            if shape.threads > 1 {
                "on\n"
            } else {
                "notsupported\n"
            },
        );
    // Cores in order, the slow ones last, each with its threads, node and cache.
    let mut cores: Vec<(CpuSet, u32, u32)> = (0..fast)
        .map(|core| {
            (
                numbers.core(core),
                core / shape.cores_a_node,
                core / shape.cores_a_cache,
            )
        })
        .collect();
    for slow in 0..shape.slow_cores {
        cores.push((CpuSet::of(threads + slow), 0, 0));
    }
    for (at, (siblings, node, cache)) in cores.iter().enumerate() {
        let mates: CpuSet = cores
            .iter()
            .filter(|(_, _, other)| other == cache)
            .flat_map(|(cpus, _, _)| cpus.iter().collect::<Vec<_>>())
            .collect();
        for cpu in siblings.iter() {
            let directory = format!("/sys/devices/system/cpu/cpu{cpu}");
            tree.file(
                format!("{directory}/topology/core_cpus_list"),
                format!("{siblings}\n"),
            )
            .file(format!("{directory}/topology/core_id"), format!("{at}\n"))
            .file(
                format!("{directory}/topology/physical_package_id"),
                format!("{}\n", node / shape.nodes_a_socket),
            )
            .file(format!("{directory}/cache/index3/level"), "3\n")
            .file(format!("{directory}/cache/index3/type"), "Unified\n")
            .file(format!("{directory}/cache/index3/size"), "32768K\n")
            .file(
                format!("{directory}/cache/index3/shared_cpu_list"),
                format!("{mates}\n"),
            );
            if shape.arm {
                tree.file(format!("{directory}/cpu_capacity"), "1024\n");
            }
            if shape.governor {
                tree.file(
                    format!("{directory}/cpufreq/scaling_governor"),
                    "powersave\n",
                );
            }
        }
    }
    if shape.slow_cores > 0 {
        let slow: CpuSet = (threads..total).collect();
        tree.file("/sys/devices/cpu_atom/cpus", format!("{slow}\n"));
    }
    let nodes = shape.sockets * shape.nodes_a_socket;
    for node in 0..nodes {
        let cpus: CpuSet = cores
            .iter()
            .filter(|(_, home, _)| *home == node)
            .flat_map(|(cpus, _, _)| cpus.iter().collect::<Vec<_>>())
            .collect();
        let distances: Vec<String> = (0..nodes)
            .map(|other| if other == node { "10" } else { "21" }.into())
            .collect();
        let directory = format!("/sys/devices/system/node/node{node}");
        tree.file(format!("{directory}/cpulist"), format!("{cpus}\n"))
            .file(
                format!("{directory}/distance"),
                format!("{}\n", distances.join(" ")),
            )
            .file(
                format!("{directory}/meminfo"),
                format!("Node {node} MemTotal:       33554432 kB\n"),
            );
    }
    settings(&mut tree, &all, nodes);
    let mut interrupts = Vec::new();
    let mut number = 40;
    for (at, (node, queues)) in shape.nvme.iter().enumerate() {
        let admin = Irq {
            number,
            name: format!("nvme{at}q0"),
            cpus: all.clone(),
            managed: false,
            node: *node,
        };
        interrupts.push(admin);
        number += 1;
        disk(&mut tree, &format!("nvme{at}n1"), *node, shape.scheduler);
        for (queue, cpus) in spread(&cores, *queues).into_iter().enumerate() {
            tree.file(
                format!("/sys/block/nvme{at}n1/mq/{queue}/cpu_list"),
                spaced(&cpus),
            );
            let name = format!("nvme{at}q{}", queue + 1);
            interrupts.push(Irq {
                number,
                name,
                cpus,
                managed: true,
                node: *node,
            });
            number += 1;
        }
    }
    if shape.virtio_disk_queues > 0 {
        disk(&mut tree, "vda", 0, shape.scheduler);
        tree.remove("/sys/block/vda/device");
        tree.file(
            "/sys/devices/pci0000:00/0000:00:02.0/virtio1/vendor",
            "0x1af4\n",
        )
        .link(
            "/sys/block/vda/device",
            "../../devices/pci0000:00/0000:00:02.0/virtio1",
        );
        for (queue, cpus) in spread(&cores, shape.virtio_disk_queues)
            .into_iter()
            .enumerate()
        {
            tree.file(format!("/sys/block/vda/mq/{queue}/cpu_list"), spaced(&cpus));
            let name = format!("virtio1-req.{queue}");
            interrupts.push(Irq {
                number,
                name,
                cpus,
                managed: true,
                node: 0,
            });
            number += 1;
        }
    }
    if let Some((driver, queues, node)) = shape.nic {
        network(
            &mut tree,
            driver,
            queues,
            node,
            &all,
            &mut number,
            &mut interrupts,
        );
    }
    for (irq, managed_file) in interrupts
        .iter()
        .map(|irq| (irq, irq.managed && !shape.old_kernel))
    {
        let directory = format!("/proc/irq/{}", irq.number);
        let mode = if managed_file { 0o444 } else { 0o644 };
        tree.file_with_mode(
            format!("{directory}/smp_affinity_list"),
            format!("{}\n", irq.cpus),
            mode,
        )
        .file_with_mode(
            format!("{directory}/effective_affinity_list"),
            format!("{}\n", irq.cpus.first().unwrap()),
            0o444,
        )
        .file_with_mode(
            format!("{directory}/node"),
            format!("{}\n", if shape.guest { -1 } else { i64::from(irq.node) }),
            0o444,
        );
    }
    tree.file("/proc/interrupts", table(&interrupts, &all));
    tree
}

struct Irq {
    number: u32,
    name: String,
    cpus: CpuSet,
    managed: bool,
    node: u32,
}

fn spaced(cpus: &CpuSet) -> String {
    let words: Vec<String> = cpus.iter().map(|cpu| cpu.to_string()).collect();
    format!("{}\n", words.join(", "))
}

/// Groups of CPUs for `queues` vectors: with fewer groups than nodes, whole nodes in turn; else each
/// node gets groups by its share of the CPUs, and a group takes the lowest CPU that is left and then
/// its siblings, as long as it has room.
fn spread(cores: &[(CpuSet, u32, u32)], queues: u32) -> Vec<CpuSet> {
    let mut nodes: BTreeMap<u32, CpuSet> = BTreeMap::new();
    for (cpus, node, _) in cores {
        let all = nodes.entry(*node).or_default();
        *all = all.or(cpus);
    }
    let mut cpus_left: usize = nodes.values().map(CpuSet::len).sum();
    let mut groups_left = (queues as usize).min(cpus_left);
    if groups_left <= nodes.len() {
        let mut groups = vec![CpuSet::new(); groups_left];
        for (at, cpus) in nodes.values().enumerate() {
            groups[at % groups_left] = groups[at % groups_left].or(cpus);
        }
        return groups;
    }
    let mut groups = Vec::new();
    for mut left in nodes.into_values() {
        let cpus = left.len();
        let count = (groups_left * cpus / cpus_left).max(1);
        groups_left -= count;
        cpus_left -= cpus;
        for at in 0..count {
            let room = cpus / count + usize::from(at < cpus % count);
            let mut group = CpuSet::new();
            while group.len() < room {
                let first = left.first().unwrap();
                let (core, _, _) = cores.iter().find(|core| core.0.contains(first)).unwrap();
                let taken: CpuSet = core.and(&left).iter().take(room - group.len()).collect();
                left = left.minus(&taken);
                group = group.or(&taken);
            }
            groups.push(group);
        }
    }
    groups
}

#[test]
fn vectors_are_spread_as_the_kernel_spreads_them() {
    let two_sockets = |threads: u32| -> Vec<(CpuSet, u32, u32)> {
        let numbers = Numbers {
            cores: 8,
            threads,
            neighbours: false,
        };
        (0..8)
            .map(|core| (numbers.core(core), core / 4, 0))
            .collect()
    };
    let spread = |threads: u32, queues: u32| -> Vec<String> {
        let groups = spread(&two_sockets(threads), queues);
        groups.iter().map(ToString::to_string).collect()
    };
    assert_eq!(spread(1, 2), ["0-3", "4-7"]);
    assert_eq!(spread(1, 3), ["0-3", "4-5", "6-7"]);
    assert_eq!(
        spread(2, 8),
        ["0,8", "1,9", "2,10", "3,11", "4,12", "5,13", "6,14", "7,15"]
    );
    assert_eq!(
        spread(2, 6),
        ["0-1,8", "2-3,10", "9,11", "4-5,12", "6-7,14", "13,15"]
    );
    // As many as CPUs: in the order of their numbers within a node.
    assert_eq!(spread(2, 16)[..5], ["0", "1", "2", "3", "8"]);
}

/// A disk without hardware queues.
pub fn disk(tree: &mut Tree, name: &str, node: u32, scheduler: &str) {
    let queue = format!("/sys/block/{name}/queue");
    tree.file(format!("{queue}/rotational"), "0\n")
        .file(format!("{queue}/scheduler"), format!("{scheduler}\n"))
        .file(format!("{queue}/nomerges"), "0\n")
        .file(format!("{queue}/rq_affinity"), "1\n")
        .file(format!("{queue}/nr_requests"), "1023\n")
        .file(format!("{queue}/wbt_lat_usec"), "2000\n")
        .file(format!("{queue}/write_cache"), "write through\n")
        .file(format!("{queue}/io_poll"), "0\n")
        .file(format!("{queue}/discard_max_bytes"), "2147450880\n")
        .file(
            format!("/sys/block/{name}/device/numa_node"),
            format!("{node}\n"),
        );
}

fn network(
    tree: &mut Tree,
    driver: &str,
    queues: u32,
    node: u32,
    all: &CpuSet,
    number: &mut u32,
    interrupts: &mut Vec<Irq>,
) {
    let device = "/sys/devices/pci0000:80/0000:80:01.0";
    let virtio = driver == "virtio_net";
    let home = if virtio {
        format!("{device}/virtio2")
    } else {
        device.to_owned()
    };
    let up = if virtio { "../../.." } else { "../.." };
    tree.link("/sys/class/net/eth0", format!("../../..{home}/net/eth0"))
        .link(
            format!("{home}/net/eth0/device"),
            format!("{up}/{}", home.rsplit('/').next().unwrap()),
        )
        .file(format!("/sys/bus/pci/drivers/{driver}/uevent"), "")
        .link(
            format!("{home}/driver"),
            format!("/sys/bus/pci/drivers/{driver}"),
        )
        .file(
            format!("{device}/numa_node"),
            format!("{}\n", if virtio { -1 } else { i64::from(node) }),
        )
        .file(format!("{home}/net/eth0/operstate"), "up\n")
        .file(format!("{home}/net/eth0/napi_defer_hard_irqs"), "0\n")
        .file(format!("{home}/net/eth0/gro_flush_timeout"), "0\n");
    // `device` of a virtio interface leads to the virtio device itself, of others to the PCI one.
    tree.link(format!("{home}/net/eth0/device"), "../..");
    if !virtio {
        tree.file("/torc/ethtool/eth0/rx-usecs", "50\n")
            .file("/torc/ethtool/eth0/tx-usecs", "50\n")
            .file("/torc/ethtool/eth0/adaptive-rx", "1\n")
            .file("/torc/ethtool/eth0/rss", {
                let table: Vec<String> = (0..128).map(|at| (at % queues).to_string()).collect();
                table.join(" ") + "\n"
            });
    }
    // Printed as wide as the machine.
    let words = all.iter().next_back().unwrap() / 32 + 1;
    let none = vec!["00000000"; words as usize].join(",") + "\n";
    for queue in 0..queues {
        let directory = format!("{home}/net/eth0/queues");
        tree.file(format!("{directory}/rx-{queue}/rps_cpus"), &none)
            .file(format!("{directory}/rx-{queue}/rps_flow_cnt"), "0\n")
            .file(format!("{directory}/tx-{queue}/xps_cpus"), &none);
        let names = match driver {
            "virtio_net" => vec![
                format!("virtio2-input.{queue}"),
                format!("virtio2-output.{queue}"),
            ],
            "mlx5_core" => vec![format!("mlx5_comp{queue}@pci:0000:80:01.0")],
            "ena" => vec![format!("eth0-Tx-Rx-{queue}")],
            _ => vec![format!("{driver}-eth0-TxRx-{queue}")],
        };
        for name in names {
            tree.file(format!("{device}/msi_irqs/{number}"), "msix\n");
            interrupts.push(Irq {
                number: *number,
                name,
                cpus: all.clone(),
                managed: false,
                node,
            });
            *number += 1;
        }
    }
}

fn settings(tree: &mut Tree, all: &CpuSet, nodes: u32) {
    tree.file(
        "/proc/sys/kernel/numa_balancing",
        format!("{}\n", u32::from(nodes > 1)),
    )
    .file("/proc/sys/kernel/nmi_watchdog", "1\n")
    .file("/proc/sys/kernel/io_uring_disabled", "0\n")
    .file("/proc/sys/vm/swappiness", "60\n")
    .file("/proc/sys/vm/stat_interval", "1\n")
    .file("/proc/sys/net/core/somaxconn", "4096\n")
    .file("/proc/sys/net/ipv4/tcp_max_syn_backlog", "1024\n")
    .file("/proc/sys/net/core/rps_sock_flow_entries", "0\n")
    .file("/proc/swaps", "Filename Type Size Used Priority\n")
    .file(
        "/sys/kernel/mm/transparent_hugepage/enabled",
        "[always] madvise never\n",
    )
    .file(
        "/sys/devices/system/clocksource/clocksource0/current_clocksource",
        "tsc\n",
    )
    .file(
        "/sys/devices/system/clocksource/clocksource0/available_clocksource",
        "tsc hpet\n",
    )
    .file("/sys/devices/virtual/workqueue/cpumask", {
        let mask = all.to_mask();
        let (head, rest) = mask
            .split_once(',')
            .map_or((mask.as_str(), None), |(head, rest)| (head, Some(rest)));
        rest.map_or_else(
            || format!("{head:0>8}\n"),
            |rest| format!("{head:0>8},{rest}\n"),
        )
    });
}

fn table(interrupts: &[Irq], all: &CpuSet) -> String {
    let mut text = String::from("     ");
    for cpu in all.iter() {
        text.push_str(&format!(" CPU{cpu}"));
    }
    text.push('\n');
    for irq in interrupts {
        text.push_str(&format!("{:>4}:", irq.number));
        for cpu in all.iter() {
            text.push_str(&format!(
                " {}",
                u32::from(irq.cpus.first() == Some(cpu)) * 100
            ));
        }
        text.push_str(&format!(
            " PCI-MSIX-0000:80:01.0 {}-edge {}",
            irq.number, irq.name
        ));
        text.push('\n');
    }
    text
}
