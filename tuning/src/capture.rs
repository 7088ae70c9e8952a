//! A host in one archive: enough for `inspect`, `check` and `plan` on another machine, and a fixture
//! for tests.
//!
//! By allow-list: no addresses, serial numbers, host names, users or processes; of the boot line
//! only the arguments that this tool knows.

use crate::host::{BOOT_ARGUMENTS, discarding_devices};
use crate::kernel::{CALLS, Kernel, Refusal, Tree};

/// Paths to take; `*` stands for every name of a directory.
const WANTED: &[&str] = &[
    "/proc/sys/kernel/osrelease",
    "/proc/sys/kernel/numa_balancing",
    "/proc/sys/kernel/nmi_watchdog",
    "/proc/sys/kernel/io_uring_disabled",
    "/proc/sys/vm/swappiness",
    "/proc/sys/vm/stat_interval",
    "/proc/sys/net/core/somaxconn",
    "/proc/sys/net/core/rps_sock_flow_entries",
    "/proc/sys/net/ipv4/tcp_max_syn_backlog",
    "/proc/sys/fs/file-max",
    "/proc/interrupts",
    "/proc/self/limits",
    "/proc/irq/*/smp_affinity_list",
    "/proc/irq/*/effective_affinity_list",
    "/proc/irq/*/node",
    "/sys/devices/system/cpu/online",
    "/sys/devices/system/cpu/present",
    "/sys/devices/system/cpu/isolated",
    "/sys/devices/system/cpu/nohz_full",
    "/sys/devices/system/cpu/smt/control",
    "/sys/devices/system/cpu/vulnerabilities/*",
    "/sys/devices/system/cpu/*/cpu_capacity",
    "/sys/devices/system/cpu/*/topology/core_cpus_list",
    "/sys/devices/system/cpu/*/topology/thread_siblings_list",
    "/sys/devices/system/cpu/*/topology/physical_package_id",
    "/sys/devices/system/cpu/*/cache/*/level",
    "/sys/devices/system/cpu/*/cache/*/type",
    "/sys/devices/system/cpu/*/cache/*/size",
    "/sys/devices/system/cpu/*/cache/*/shared_cpu_list",
    "/sys/devices/system/cpu/*/cpufreq/scaling_governor",
    "/sys/devices/system/cpu/*/cpufreq/energy_performance_preference",
    "/sys/devices/system/cpu/*/cpuidle/*/name",
    "/sys/devices/system/cpu/*/cpuidle/*/latency",
    "/sys/devices/system/cpu/*/cpuidle/*/disable",
    "/sys/devices/cpu_atom/cpus",
    "/sys/devices/system/node/*/cpulist",
    "/sys/devices/system/node/*/distance",
    "/sys/devices/system/node/*/meminfo",
    "/sys/devices/system/clocksource/clocksource0/current_clocksource",
    "/sys/devices/system/clocksource/clocksource0/available_clocksource",
    "/sys/devices/virtual/workqueue/cpumask",
    "/sys/kernel/mm/transparent_hugepage/enabled",
    "/sys/kernel/mm/hugepages/*/nr_hugepages",
    "/sys/class/dmi/id/product_name",
    "/sys/hypervisor/type",
    "/sys/block/*/size",
    "/sys/block/*/queue/rotational",
    "/sys/block/*/queue/scheduler",
    "/sys/block/*/queue/nomerges",
    "/sys/block/*/queue/wbt_lat_usec",
    "/sys/block/*/queue/rq_affinity",
    "/sys/block/*/queue/nr_requests",
    "/sys/block/*/queue/write_cache",
    "/sys/block/*/queue/io_poll",
    "/sys/block/*/queue/discard_max_bytes",
    "/sys/block/*/dev",
    "/sys/block/*/*/dev",
    "/sys/block/*/mq/*/cpu_list",
    "/sys/block/*/device/vendor",
    "/sys/block/*/device/numa_node",
    "/sys/block/*/device/../numa_node",
    "/sys/block/*/device/device/numa_node",
    "/sys/class/net/*/operstate",
    "/sys/class/net/*/speed",
    "/sys/class/net/*/napi_defer_hard_irqs",
    "/sys/class/net/*/gro_flush_timeout",
    "/sys/class/net/*/queues/*/rps_cpus",
    "/sys/class/net/*/queues/*/rps_flow_cnt",
    "/sys/class/net/*/queues/*/xps_cpus",
    "/sys/class/net/*/queues/*/tx_timeout",
    "/sys/class/net/*/device/vendor",
    "/sys/class/net/*/device/numa_node",
    "/sys/class/net/*/device/../numa_node",
    "/sys/class/net/*/device/msi_irqs/*",
    "/sys/class/net/*/device/../msi_irqs/*",
    "/torc/io_uring/features",
    "/torc/io_uring/operations",
    "/torc/io_uring/setup",
    "/torc/process/allowed",
    "/torc/process/reachable",
];

/// Takes a host.
pub fn capture(kernel: &impl Kernel) -> Tree {
    let mut tree = Tree::new();
    for pattern in WANTED {
        for path in expand(kernel, pattern) {
            // What this host does not have is not in its capture either.
            drop(add(kernel, &mut tree, &path));
        }
    }
    for nic in kernel.list("/sys/class/net").unwrap_or_default() {
        for file in [
            "rx-usecs",
            "tx-usecs",
            "rx-frames",
            "adaptive-rx",
            "channels",
            "rss",
        ] {
            drop(add(
                kernel,
                &mut tree,
                &format!("{CALLS}/ethtool/{nic}/{file}"),
            ));
        }
        // Of the driver only its name is wanted, and that is where the link leads.
        let link = format!("/sys/class/net/{nic}/device/driver");
        let device = kernel.resolve(&format!("/sys/class/net/{nic}/device"));
        if let (Ok(device), Ok(driver)) = (device, kernel.resolve(&link)) {
            tree.file(format!("{driver}/captured"), "");
            let link = format!("{device}/driver");
            let target = relative(&link, &driver);
            tree.link(link, target);
        }
    }
    filtered(kernel, &mut tree);
    tree
}

fn expand(kernel: &impl Kernel, pattern: &str) -> Vec<String> {
    let Some((head, rest)) = pattern.split_once('*') else {
        return vec![pattern.to_owned()];
    };
    let names = kernel.list(head.trim_end_matches('/')).unwrap_or_default();
    names
        .iter()
        .flat_map(|name| expand(kernel, &format!("{head}{name}{rest}")))
        .collect()
}

/// Adds a file at its real place and every link on the way to it.
fn add(kernel: &impl Kernel, tree: &mut Tree, path: &str) -> Result<(), Refusal> {
    let contents = kernel.read(path)?;
    let mode = kernel.mode(path)?;
    if path.starts_with(CALLS) {
        tree.file_with_mode(path, contents, mode);
        return Ok(());
    }
    let mut real = String::new();
    for step in path.split('/').filter(|step| !step.is_empty()) {
        if step == ".." {
            real.truncate(real.rfind('/').unwrap_or(0));
            continue;
        }
        let here = format!("{real}/{step}");
        // `/proc/self` is this process; its capture is no link to a number.
        real = if here.starts_with("/proc/self") {
            here.clone()
        } else {
            kernel.resolve(&here)?
        };
        if real != here {
            tree.link(here.clone(), relative(&here, &real));
        }
    }
    tree.file_with_mode(real, contents, mode);
    Ok(())
}

/// The way from a link to its target, without leaving the archive when it is unpacked somewhere.
fn relative(link: &str, target: &str) -> String {
    let link: Vec<&str> = link.split('/').skip(1).collect();
    let target: Vec<&str> = target.split('/').skip(1).collect();
    let directory = &link[..link.len() - 1];
    let common = directory
        .iter()
        .zip(&target)
        .take_while(|(a, b)| a == b)
        .count();
    let mut steps = vec![".."; directory.len() - common];
    steps.extend(&target[common..]);
    steps.join("/")
}

/// Files of which only a part may leave the host.
fn filtered(kernel: &impl Kernel, tree: &mut Tree) {
    let line = kernel.text("/proc/cmdline").unwrap_or_default();
    let kept: Vec<&str> = line
        .split_whitespace()
        .filter(|word| BOOT_ARGUMENTS.contains(&word.split('=').next().unwrap_or(word)))
        .collect();
    tree.file("/proc/cmdline", kept.join(" ") + "\n");
    let information = kernel.text("/proc/cpuinfo").unwrap_or_default();
    if let Some(flags) = information.lines().find(|line| line.starts_with("flags")) {
        tree.file("/proc/cpuinfo", format!("{flags}\n"));
    }
    if let Some(swaps) = kernel.text("/proc/swaps") {
        let on = if swaps.lines().count() > 1 {
            "Filename\nswap\n"
        } else {
            "Filename\n"
        };
        tree.file("/proc/swaps", on);
    }
    // Where file systems are mounted may name persons and places: only which devices discard is taken.
    let discarding = discarding_devices(kernel);
    let mounts = discarding
        .iter()
        .map(|device| format!("0 0 {device} / / rw - any none rw,discard\n"));
    tree.file("/proc/self/mountinfo", mounts.collect::<String>());
    for process in kernel.list("/proc").unwrap_or_default() {
        let comm = format!("/proc/{process}/comm");
        let is_number = process.bytes().all(|byte| byte.is_ascii_digit());
        if is_number && kernel.text(&comm).as_deref() == Some("irqbalance") {
            tree.file(comm, "irqbalance\n");
        }
    }
    for file in ["/etc/default/irqbalance", "/etc/sysconfig/irqbalance"] {
        let Some(settings) = kernel.text(file) else {
            continue;
        };
        let lines = settings
            .lines()
            .filter(|line| line.trim().starts_with("IRQBALANCE_"));
        let bans: Vec<&str> = lines.collect();
        tree.file(file, bans.join("\n") + "\n");
    }
}

#[cfg(test)]
mod tests {
    use super::{capture, relative};
    use crate::host::Host;
    use crate::kernel::{Kernel as _, Live, Tree};

    #[test]
    fn links_stay_inside_the_archive() {
        assert_eq!(
            relative("/sys/class/net/eth0", "/sys/devices/pci/net/eth0"),
            "../../devices/pci/net/eth0"
        );
        assert_eq!(relative("/sys/a/b", "/sys/a/c"), "c");
    }

    #[test]
    fn this_host_reads_the_same_from_its_capture() {
        let live = Live::machine();
        let Ok(mut host) = Host::read(&live, "this machine") else {
            return;
        };
        let tree = capture(&live);
        let archive = tree.to_archive().unwrap();
        let tree = Tree::from_archive(&archive).unwrap();
        let mut captured = Host::read(&tree, "capture").unwrap();
        // Counters move on between the two readings.
        for host in [&mut host, &mut captured] {
            for irq in &mut host.interrupts {
                irq.counts.clear();
                irq.effective = None;
            }
        }
        assert_eq!(captured, host);
        assert!(archive.len() < 4 << 20, "{} bytes", archive.len());
    }

    #[test]
    fn the_boot_line_and_addresses_stay_at_home() {
        let mut tree = Tree::new();
        tree.file(
            "/proc/cmdline",
            "root=UUID=secret token=abc nohz_full=1-3 quiet\n",
        )
        .file("/sys/class/net/eth0/address", "02:00:00:00:00:01\n")
        .file("/sys/class/net/eth0/operstate", "up\n")
        .file("/proc/sys/kernel/hostname", "alice\n")
        .file("/proc/sys/kernel/random/boot_id", "x\n")
        .file(
            "/proc/self/mountinfo",
            "36 35 259:1 / /mnt/alice rw shared:1 - ext4 /dev/alice rw,discard\n",
        );
        let taken = capture(&tree);
        assert_eq!(
            taken.text("/proc/cmdline").as_deref(),
            Some("nohz_full=1-3")
        );
        assert!(taken.read("/sys/class/net/eth0/operstate").is_ok());
        assert_eq!(
            taken.text("/proc/self/mountinfo").as_deref(),
            Some("0 0 259:1 / / rw - any none rw,discard")
        );
        for path in [
            "/sys/class/net/eth0/address",
            "/proc/sys/kernel/hostname",
            "/proc/sys/kernel/random/boot_id",
        ] {
            assert!(taken.read(path).is_err(), "{path}");
        }
    }
}
