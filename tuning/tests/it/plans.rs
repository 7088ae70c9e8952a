//! Plans for the modelled machines: golden files, and what must hold for each.

use std::path::PathBuf;

use torc_tuning::change::Target;
use torc_tuning::check::check;
use torc_tuning::cpuset::CpuSet;
use torc_tuning::host::Host;
use torc_tuning::kernel::Tree;
use torc_tuning::plan::{Plan, Profile};
use torc_tuning::render;

use crate::machines::{build, disk, shape, shapes};

fn read(tree: &Tree) -> Host {
    Host::read(tree, "model").unwrap()
}

/// Compares with a golden file; `TORC_BLESS=1` writes it anew.
fn golden(name: &str, text: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    if std::env::var_os("TORC_BLESS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let wanted = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        text == wanted,
        "{name} differs; look at it, then TORC_BLESS=1 accepts it:\n{text}"
    );
}

/// What the plan wants of a file, if it wants anything.
fn want(plan: &Plan, path: &str) -> Option<String> {
    let target = Target::File(path.into());
    let mut changes = plan.changes.iter();
    let change = changes.find(|change| change.target == target);
    change.map(|change| change.want.clone())
}

#[test]
fn plans_of_all_machines_are_as_reviewed() {
    for shape in shapes() {
        let host = read(&build(&shape));
        for profile in Profile::ALL {
            let plan = Plan::of(&host, profile);
            let map = render::map(&host, Some(&plan.layout));
            golden(
                &format!("{}.{}.txt", shape.name, profile.name()),
                &(render::plan(&plan, false) + "\n" + &map),
            );
        }
        let plan = Plan::of(&host, Profile::Latency);
        golden(
            &format!("{}.svg", shape.name),
            &render::svg(&host, Some(&plan.layout)),
        );
        golden(
            &format!("{}.check.txt", shape.name),
            &render::findings(&check(&host)),
        );
    }
}

#[test]
fn no_plan_moves_an_interrupt_that_the_kernel_manages() {
    for shape in shapes() {
        let host = read(&build(&shape));
        let managed: Vec<&str> = host
            .interrupts
            .iter()
            .filter(|irq| irq.is_kept_by_kernel())
            .map(|irq| irq.name.as_str())
            .collect();
        assert!(!managed.is_empty(), "{}", shape.name);
        for profile in Profile::ALL {
            for change in Plan::of(&host, profile).changes {
                if let Target::Interrupt(name) = &change.target {
                    assert!(!managed.contains(&name.as_str()), "{}: {name}", shape.name);
                }
            }
        }
    }
}

#[test]
fn managed_vectors_follow_the_kernels_rules() {
    for shape in shapes() {
        let host = read(&build(&shape));
        for block in &host.blocks {
            let mut seen = torc_tuning::cpuset::CpuSet::new();
            for queue in &block.queues {
                assert!(
                    seen.and(&queue.cpus).is_empty(),
                    "{}: a CPU submits through one queue",
                    shape.name
                );
                seen = seen.or(&queue.cpus);
                let irq = host.interrupt(queue.interrupt.unwrap()).unwrap();
                assert_eq!(
                    irq.affinity, queue.cpus,
                    "{}: the vector's mask is its queue's CPUs",
                    shape.name
                );
            }
            assert_eq!(
                seen, host.cpus.online,
                "{}: every CPU has a queue",
                shape.name
            );
        }
    }
}

#[test]
fn every_plan_keeps_house_and_gives_each_shard_a_cpu_of_its_own() {
    for shape in shapes() {
        let host = read(&build(&shape));
        for profile in Profile::ALL {
            let layout = Plan::of(&host, profile).layout;
            let shards = layout.shard_cpus();
            assert_eq!(shards.len(), layout.shards.len(), "{}", shape.name);
            assert!(
                !layout.shards.is_empty() && !layout.housekeeping.is_empty(),
                "{}",
                shape.name
            );
            assert!(
                !layout.isolates || shards.and(&layout.housekeeping).is_empty(),
                "{}",
                shape.name
            );
            let all = shards.or(&layout.housekeeping).or(&layout.spare);
            assert_eq!(all, host.usable(), "{}", shape.name);
            for place in &layout.shards {
                for block in &host.blocks {
                    let queue = &block.queues[place.storage[&block.name] as usize];
                    assert!(queue.cpus.contains(place.cpu), "{}", shape.name);
                }
            }
        }
    }
}

#[test]
fn queues_of_a_shard_arrive_on_its_cpu_and_all_others_keep_house() {
    for shape in shapes() {
        let host = read(&build(&shape));
        for profile in [Profile::Latency, Profile::Throughput] {
            let plan = Plan::of(&host, profile);
            let want = |target: &Target| {
                let mut changes = plan.changes.iter();
                let change = changes.find(|change| change.target == *target);
                change.map(|change| CpuSet::parse_list(&change.want).unwrap())
            };
            for nic in &host.nics {
                for queue in &nic.receive {
                    let irq = host.interrupt(queue.interrupt.unwrap()).unwrap();
                    let want = want(&Target::Interrupt(irq.name.clone()));
                    let owners = plan.layout.owners("eth0", queue.index);
                    let what = format!("{} {}", shape.name, irq.name);
                    match owners.first() {
                        Some(shard) => {
                            let cpu = plan.layout.shards[*shard].cpu;
                            assert_eq!(want, Some(CpuSet::of(cpu)), "{what}");
                        }
                        None if plan.layout.isolates => {
                            let want = want.unwrap();
                            assert!(want.within(&plan.layout.housekeeping), "{what}");
                        }
                        None => assert_eq!(want, None, "{what}"),
                    }
                }
            }
        }
    }
}

#[test]
fn shards_that_are_siblings_share_a_queue_where_there_is_one_for_each_core() {
    let host = read(&build(&shape("two-sockets-smt")));
    let plan = Plan::of(&host, Profile::Throughput);
    // 60 shards on 30 cores, and 32 queues.
    for (core, pair) in plan.layout.shards.chunks(2).enumerate() {
        let queue = u32::try_from(core).unwrap();
        assert_eq!(plan.layout.owners("eth0", queue), [2 * core, 2 * core + 1]);
        let senders = format!("/sys/class/net/eth0/queues/tx-{core}/xps_cpus");
        let senders = want(&plan, &senders).unwrap();
        let pair: CpuSet = pair.iter().map(|place| place.cpu).collect();
        assert_eq!(CpuSet::parse_mask(&senders).unwrap(), pair);
    }
    assert_eq!(plan.layout.owners("eth0", 30), [0; 0]);
}

#[test]
fn packets_follow_the_shard_that_reads_them() {
    let table = "/proc/sys/net/core/rps_sock_flow_entries";
    for shape in shapes() {
        let host = read(&build(&shape));
        for profile in [Profile::Latency, Profile::Throughput] {
            let plan = Plan::of(&host, profile);
            assert_eq!(want(&plan, table).as_deref(), Some("32768"));
            let queues = host.nics[0].receive.iter();
            let flows = queues.map(|queue| {
                let index = queue.index;
                let file = format!("/sys/class/net/eth0/queues/rx-{index}/rps_flow_cnt");
                want(&plan, &file).unwrap().parse::<u64>().unwrap()
            });
            let flows: Vec<u64> = flows.collect();
            // The kernel keeps powers of two only.
            assert!(flows.iter().all(|flows| flows.is_power_of_two()));
            let all: u64 = flows.iter().sum();
            assert!((32_768..65_536).contains(&all), "{all}");
        }
    }
    // Somebody who set more knows why.
    let mut tree = build(&shape("two-core-vm"));
    tree.file(table, "65536\n");
    let plan = Plan::of(&read(&tree), Profile::Latency);
    assert_eq!(want(&plan, table), None);
    let names_table = |note: &String| note.contains("rps_sock_flow_entries");
    assert!(!plan.notes.iter().any(names_table));
    // The first network namespace alone has it.
    tree.remove(table);
    let plan = Plan::of(&read(&tree), Profile::Latency);
    assert_eq!(want(&plan, table), None);
    assert!(plan.notes.iter().any(names_table));
}

#[test]
fn on_a_shared_host_shards_are_near_the_card_and_then_near_the_disk() {
    // Node 3 has the card, node 2 the disk; CPU 24 keeps house.
    let host = read(&build(&shape("amd-ccx-nps4")));
    let layout = Plan::of(&host, Profile::Shared).layout;
    assert_eq!(layout.shard_cpus().to_string(), "16-23,25-31");
}

#[test]
fn completions_are_sent_on_only_where_cpus_share_a_queue() {
    for (name, is_shared) in [("one-socket-8-cores", false), ("arm-64-cores", true)] {
        let plan = Plan::of(&read(&build(&shape(name))), Profile::Latency);
        let affinity = want(&plan, "/sys/block/nvme0n1/queue/rq_affinity");
        assert_eq!(affinity.is_some(), is_shared, "{name}");
    }
}

#[test]
fn a_shared_host_is_changed_only_where_nobody_else_feels_it() {
    for shape in shapes() {
        let plan = Plan::of(&read(&build(&shape)), Profile::Shared);
        for change in &plan.changes {
            assert!(change.knob.ends_with(" rq_affinity"), "{}", change.knob);
        }
    }
}

#[test]
fn shards_go_to_the_cpus_that_the_boot_line_isolates() {
    let mut tree = build(&shape("one-socket-8-cores"));
    // The boot line keeps everyone off them, but this process may ask for all but CPU 5.
    tree.file("/sys/devices/system/cpu/isolated", "2-5\n")
        .file("/torc/process/allowed", "0-1,6-7\n")
        .file("/torc/process/reachable", "0-4,6-7\n");
    let layout = Plan::of(&read(&tree), Profile::Latency).layout;
    assert_eq!(layout.shard_cpus().to_string(), "2-4");
    assert_eq!(layout.housekeeping.to_string(), "0-1,6-7");
}

#[test]
fn a_capture_gives_the_same_plan_as_its_host() {
    for shape in shapes() {
        let tree = build(&shape);
        let again = Tree::from_archive(&tree.to_archive().unwrap()).unwrap();
        let (host, captured) = (read(&tree), read(&again));
        assert_eq!(host, captured);
        assert_eq!(
            Plan::of(&host, Profile::Latency),
            Plan::of(&captured, Profile::Latency)
        );
    }
}

/// A plan that containers or loop mounts could spoil would be refused, or not followed by a server
/// that starts, at random.
#[test]
fn a_plan_fits_its_host_whatever_devices_software_makes_and_no_host_of_another_disk() {
    for shape in shapes() {
        let mut tree = build(&shape);
        let planned_for = read(&tree).fingerprint();
        disk(&mut tree, "loop0", 0, "[none]");
        tree.file("/sys/block/loop0/size", "8192\n")
            .file("/sys/block/loop0/mq/0/cpu_list", "0\n");
        for queue in ["rx-0", "rx-1", "tx-0", "tx-1"] {
            tree.file(
                format!("/sys/class/net/veth1/queues/{queue}/rps_cpus"),
                "0\n",
            );
        }
        let host = read(&tree);
        assert!(host.blocks.iter().any(|block| block.name == "loop0"));
        assert!(host.nics.iter().any(|nic| nic.name == "veth1"));
        assert_eq!(host.fingerprint(), planned_for, "{}", shape.name);
    }
    let mut other = shape("nvme-few-queues");
    let planned_for = read(&build(&other)).fingerprint();
    other.nvme.pop();
    assert_ne!(read(&build(&other)).fingerprint(), planned_for);
}

#[test]
fn hosts_plans_and_findings_survive_json() {
    let host = read(&build(&shape("hybrid-cores")));
    let text = serde_json::to_string(&host).unwrap();
    assert_eq!(serde_json::from_str::<Host>(&text).unwrap(), host);
    let plan = Plan::of(&host, Profile::Throughput);
    let text = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan);
}

#[test]
fn a_wrong_root_or_unknown_kernel_gives_one_clear_message() {
    let text = Host::read(&Tree::new(), "empty").unwrap_err().to_string();
    assert!(
        text.starts_with("empty does not hold a Linux host"),
        "{text}"
    );
    assert_eq!(text.lines().count(), 1);
    for release in ["2.6.32", "plan9", ""] {
        let mut tree = build(&shape("two-core-vm"));
        tree.file("/proc/sys/kernel/osrelease", release);
        let text = Host::read(&tree, "odd").unwrap_err().to_string();
        assert!(
            text.contains("unknown") && text.lines().count() == 1,
            "{text}"
        );
    }
}

#[test]
fn a_disk_that_is_told_of_every_freed_block_is_found() {
    let found = |mounts: &str, discard_max_bytes: &str| {
        let mut tree = build(&shape("two-core-vm"));
        tree.file("/sys/block/vda/dev", "254:0\n")
            .file("/sys/block/vda/vda1/dev", "254:1\n")
            .file("/sys/block/vda/queue/discard_max_bytes", discard_max_bytes)
            .file("/proc/self/mountinfo", mounts);
        let findings = check(&read(&tree));
        let mut findings = findings.iter();
        findings.any(|finding| finding.id == "mount-discard" && finding.found.contains(" vda "))
    };
    let mount = |number: &str, options: &str| {
        format!(
            "22 1 0:21 / /proc rw - proc proc rw\n\
             36 1 {number} / /data rw,noatime shared:1 - ext4 /dev/root {options}\n"
        )
    };
    assert!(found(&mount("254:0", "rw,discard"), "4096\n"));
    assert!(
        found(&mount("254:1", "rw,discard,errors=panic"), "4096\n"),
        "a partition"
    );
    assert!(!found(&mount("254:1", "rw,nodiscard"), "4096\n"));
    assert!(!found(&mount("254:1", "rw,discard"), "0\n"), "it cannot");
    assert!(
        !found(&mount("254:2", "rw,discard"), "4096\n"),
        "another disk"
    );
    assert!(!found("", "4096\n"));
}
