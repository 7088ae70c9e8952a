use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use torc_env::{AlignedBuf, Bytes, Class, Disk, Env, File, OpenMode, ShardId};
use torc_sim::{Options, Rng, Simulation};

/// A small busy world: two hosts write and call each other while one is crashed and restarted.
fn busy(seed: u64) -> Simulation {
    let options = Options::draw(&mut Rng::stream(seed, "options"));
    let simulation = Simulation::new(seed, options);
    let hosts = [simulation.add_host(2), simulation.add_host(2)];
    let start = {
        let simulation = simulation.clone();
        move |host| {
            for shard in [0, 1].map(ShardId) {
                let env = simulation.env(host, shard);
                let answering = env.clone();
                simulation.serve(
                    host,
                    shard,
                    Rc::new(move |origin, request| {
                        let env = answering.clone();
                        Box::pin(async move {
                            env.sleep(Duration::from_micros(env.random() % 100)).await;
                            Bytes::from(format!("{origin:?} {request:?}"))
                        })
                    }),
                );
                let to = hosts.map(|host| simulation.address(host, shard));
                let path = format!("file {} {}", shard, env.now().0);
                let own = env.clone();
                env.spawn(Class::Foreground, async move {
                    let disk = own.disk();
                    let file = disk.open(Path::new(&path), OpenMode::CreateNew).await;
                    let file = file.unwrap();
                    for round in 0..20 {
                        let deadline = own.now() + Duration::from_millis(20);
                        let request = Bytes::copy_from_slice(&[round]);
                        let to = to[usize::from(round % 2)];
                        let call = own.call(to, Class::Replication, request, deadline);
                        let buf = AlignedBuf::copy_of(&[round; 4096]);
                        let write = file.write_at(u64::from(round) * 4096, buf);
                        let (_answer, _written) = futures_util::join!(call, write);
                        own.give_way().await;
                    }
                });
            }
        }
    };
    for host in hosts {
        start(host);
    }
    let nemesis = simulation.clone();
    let run = simulation.run(async move {
        nemesis.sleep(Duration::from_millis(2)).await;
        nemesis.crash(hosts[0], 3);
        nemesis.sleep(Duration::from_millis(2)).await;
        nemesis.restart(hosts[0], 2);
        start(hosts[0]);
        nemesis.sleep(Duration::from_millis(200)).await;
    });
    run.unwrap();
    simulation
}

#[test]
fn one_seed_always_gives_one_history() {
    let mut hashes = std::collections::BTreeSet::new();
    for seed in 0..50 {
        let hash = busy(seed).hash();
        assert_eq!(hash, busy(seed).hash(), "seed {seed} ran differently");
        hashes.insert(hash);
    }
    assert_eq!(hashes.len(), 50, "different seeds give different histories");
}

#[test]
fn a_note_is_part_of_the_history() {
    let noted = |text: &str| {
        let simulation = Simulation::new(1, Options::default());
        simulation.keep_lines();
        simulation.note(format_args!("{text}"));
        (simulation.hash(), simulation.lines().join("\n"))
    };
    assert_ne!(noted("a").0, noted("b").0);
    assert!(noted("a").1.ends_with(" a"));
}
