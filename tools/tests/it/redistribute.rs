//! The number of shards changes between two starts.

use std::process::Command;

use crate::cluster::{Cluster, TORC, text, wait_until};

fn set_shards(cluster: &Cluster, node: usize, count: u16) {
    let path = cluster.home(node).join("torc.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let lines = text.lines().map(|line| match line.starts_with("count = ") {
        true => format!("count = {count}\n"),
        false => format!("{line}\n"),
    });
    std::fs::write(&path, lines.collect::<String>()).unwrap();
}

/// The node serves before the cluster has agreed on how many shards it has now.
fn wait_for_shards(cluster: &Cluster, count: u16) {
    let wanted = format!("\"shards\":{count}");
    wait_until(
        || format!("the status does not say {wanted}"),
        || cluster.torc(&["status", "--json"]).contains(&wanted),
    );
}

#[test]
fn a_killed_node_starts_with_other_numbers_of_shards_and_has_everything() {
    let mut cluster = Cluster::start(1, 1, &[]);
    for (round, shards) in [2, 4, 1].into_iter().enumerate() {
        for number in 0..60 {
            cluster.torc(&[
                "put",
                &format!("key-{round}-{number}"),
                &format!("{round}/{number}"),
            ]);
        }
        cluster.torc(&["delete", &format!("key-{round}-0")]);
        cluster.kill(0);
        set_shards(&cluster, 0, shards);
        cluster.spawn(0);
        cluster.wait_ready();
        wait_for_shards(&cluster, shards);
        for past in 0..=round {
            let gone = cluster
                .command(&["get", &format!("key-{past}-0")])
                .output()
                .unwrap();
            assert!(!gone.status.success());
            for number in 1..60 {
                let found = cluster.torc(&["get", &format!("key-{past}-{number}")]);
                assert_eq!(found.trim(), format!("{past}/{number}"));
            }
        }
    }
}

#[test]
fn hints_for_a_node_that_is_down_outlive_a_change_of_the_number_of_shards() {
    let mut cluster = Cluster::start(3, 2, &["cluster.repair_interval_s=86400"]);
    cluster.kill(2);
    for number in 0..40 {
        cluster.torc(&["put", &format!("key-{number}"), "value"]);
    }
    let hints = |cluster: &Cluster, node: usize| {
        let metrics = cluster.metrics(node);
        let lines = metrics
            .lines()
            .filter(|line| line.starts_with("torc_hints "));
        lines
            .map(|line| line[11..].trim().parse::<u64>().unwrap())
            .sum::<u64>()
    };
    let before = hints(&cluster, 0);
    assert!(before > 0, "{}", cluster.metrics(0));
    cluster.kill(0);
    set_shards(&cluster, 0, 3);
    cluster.spawn(0);
    cluster.wait_ready();
    wait_until(|| "hints were lost".into(), || hints(&cluster, 0) >= before);
}

#[test]
fn a_change_of_the_number_of_shards_that_fails_leaves_nothing_behind() {
    let mut cluster = Cluster::start(1, 1, &[]);
    cluster.torc(&["put", "key", "value"]);
    cluster.kill(0);
    let config = cluster.home(0).join("torc.toml");
    // Files run out when some of the new stores are there already.
    let script = format!(
        "ulimit -n 120; exec {TORC} server --config {} --set shards.count=64",
        config.display()
    );
    let refused = Command::new("sh").args(["-c", &script]).output().unwrap();
    let message = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{message}");
    assert!(message.contains("cannot redistribute"), "{message}");
    let entries = std::fs::read_dir(cluster.home(0).join("data")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let stores: Vec<_> = names.filter(|name| name.starts_with("shard-")).collect();
    assert_eq!(stores, ["shard-00"]);
    cluster.spawn(0);
    cluster.wait_ready();
    assert_eq!(cluster.torc(&["get", "key"]).trim(), "value");
}
