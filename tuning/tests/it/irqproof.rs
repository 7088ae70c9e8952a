//! Proofs of where interrupts, completions and packets land, from made-up counts on modelled machines.

use std::collections::BTreeMap;

use torc_tuning::host::Host;
use torc_tuning::irqproof::{Arrivals, IrqProof, Landed, Proof, Seen, prove};
use torc_tuning::plan::{Layout, Plan, Profile};
use torc_tuning::render;

use crate::machines::{build, shape};

fn machine(name: &str) -> (Host, Layout) {
    let host = Host::read(&build(&shape(name)), "model").unwrap();
    let layout = Plan::of(&host, Profile::Latency).layout;
    (host, layout)
}

fn unseen() -> Landed {
    Landed {
        completions: Err("not traced".into()),
        sockets: Err("no server named".into()),
    }
}

/// The host after so many more interrupts of this name on each CPU.
fn after(host: &Host, name: &str, arrivals: &[(u32, u64)]) -> Host {
    let mut host = host.clone();
    let irq = host.interrupts.iter_mut().find(|irq| irq.name == name);
    let counts = &mut irq.unwrap().counts;
    for (cpu, count) in arrivals {
        *counts.entry(*cpu).or_default() += count;
    }
    host
}

fn of<'a>(proof: &'a IrqProof, what: &str) -> &'a Proof {
    let mut proofs = proof.proofs.iter();
    proofs.find(|proof| proof.what.contains(what)).unwrap()
}

#[test]
fn an_interrupt_on_its_shards_cpu_is_as_planned_and_elsewhere_it_strays() {
    let (before, layout) = machine("one-socket-8-cores");
    // Shard 2 is on CPU 3 and has receive queue 2.
    let seen = |arrivals: &[(u32, u64)]| {
        let after = after(&before, "ice-eth0-TxRx-2", arrivals);
        let proof = prove(&before, &after, &layout, &unseen());
        let queue = of(&proof, "TxRx-2").clone();
        assert_eq!(
            (queue.shards, queue.planned.to_string()),
            (vec![2], "3".into())
        );
        assert_eq!(proof.has_strays(), matches!(queue.seen, Seen::Stray { .. }));
        queue.seen
    };
    assert_eq!(seen(&[]), Seen::Quiet);
    assert_eq!(seen(&[(3, 95), (0, 5)]), Seen::AsPlanned { arrivals: 100 });
    let Seen::Stray { share, arrivals } = seen(&[(3, 94), (0, 6)]) else {
        panic!("six in a hundred stray");
    };
    assert!((share - 0.94).abs() < 1e-9);
    assert_eq!(arrivals, Arrivals::from([(0, 6), (3, 94)]));
}

#[test]
fn a_queue_without_a_shard_is_to_keep_house_and_on_a_small_host_goes_where_it_likes() {
    let (before, layout) = machine("one-socket-8-cores");
    let stray = after(&before, "ice-eth0-TxRx-7", &[(4, 10)]);
    let proof = prove(&before, &stray, &layout, &unseen());
    assert!(matches!(of(&proof, "TxRx-7").seen, Seen::Stray { .. }));
    let (before, layout) = machine("two-core-vm");
    let anywhere = after(&before, "virtio2-input.0", &[(0, 5), (1, 5)]);
    let proof = prove(&before, &anywhere, &layout, &unseen());
    assert!(!proof.has_strays());
}

#[test]
fn a_queue_that_shards_share_is_proven_once_for_all_of_them() {
    let (before, layout) = machine("two-core-vm");
    let one_cpu = after(&before, "virtio1-req.0", &[(1, 50)]);
    let proof = prove(&before, &one_cpu, &layout, &unseen());
    let queue = of(&proof, "virtio1-req.0");
    assert_eq!(queue.shards, [0, 1]);
    assert_eq!(queue.seen, Seen::AsPlanned { arrivals: 50 });
}

#[test]
fn a_managed_interrupt_may_arrive_on_any_cpu_of_its_queue() {
    let (before, layout) = machine("nvme-few-queues");
    // The kernel chooses among 0-3 and 16-19: CPU 0 keeps house, 1-3 carry shards, 17 is spare.
    let strays = |cpu: u32| {
        let after = after(&before, "nvme0q1", &[(cpu, 10)]);
        let proof = prove(&before, &after, &layout, &unseen());
        let queue = of(&proof, "nvme0q1");
        assert_eq!(queue.shards, [0, 1, 2]);
        assert_eq!(queue.planned.to_string(), "0-3,16-19");
        proof.has_strays()
    };
    assert!(!strays(0) && !strays(2) && !strays(17));
    assert!(strays(4));
}

#[test]
fn on_a_shared_host_the_cards_queues_go_where_they_like() {
    let (before, _) = machine("one-socket-8-cores");
    let layout = Plan::of(&before, Profile::Shared).layout;
    let after = after(&before, "ice-eth0-TxRx-2", &[(7, 10)]);
    assert!(!prove(&before, &after, &layout, &unseen()).has_strays());
}

#[test]
fn completions_and_packets_are_held_to_the_shards_cpu() {
    let (host, layout) = machine("one-socket-8-cores");
    let landed = Landed {
        completions: Ok(BTreeMap::from([
            (("nvme0n1".to_owned(), 1), Arrivals::from([(1, 10)])),
            (("nvme0n1".to_owned(), 2), Arrivals::from([(1, 10)])),
            (("other".to_owned(), 1), Arrivals::from([(7, 10)])),
        ])),
        sockets: Ok(BTreeMap::from([
            (0, Arrivals::from([(1, 3)])),
            (1, Arrivals::from([(0, 3)])),
        ])),
    };
    let proof = prove(&host, &host, &layout, &landed);
    let seen = |what: &str, shard: usize| {
        let mut proofs = proof.proofs.iter();
        let proof = proofs.find(|proof| proof.what == what && proof.shards == [shard]);
        proof.unwrap().seen.clone()
    };
    let completions = "completions of nvme0n1";
    assert_eq!(seen(completions, 0), Seen::AsPlanned { arrivals: 10 });
    assert!(matches!(seen(completions, 1), Seen::Stray { .. }));
    assert_eq!(seen(completions, 2), Seen::Quiet);
    let packets = "packets of the sockets";
    assert_eq!(seen(packets, 0), Seen::AsPlanned { arrivals: 3 });
    assert!(matches!(seen(packets, 1), Seen::Stray { .. }));
    assert_eq!(proof.unavailable, []);
}

#[test]
fn what_could_not_be_counted_is_named_with_the_reason() {
    let (host, layout) = machine("two-core-vm");
    let proof = prove(&host, &host, &layout, &unseen());
    let text = render::irqproof(&proof);
    for reason in ["not traced", "no server named"] {
        let line = text.lines().find(|line| line.ends_with(reason)).unwrap();
        assert!(line.starts_with("not available here: "), "{line}");
    }
}
