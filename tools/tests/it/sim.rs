//! `torc sim`.

use crate::cluster::{run, text};

#[test]
fn a_seed_replays_bit_for_bit() {
    let one = run(&["sim", "--seed", "7", "--seeds", "3"]);
    let two = run(&["sim", "--seed", "7", "--seeds", "3"]);
    let (one, two) = (text(&one.stdout), text(&two.stdout));
    assert_eq!(one, two);
    assert_eq!(one.matches(" hash ").count(), 3, "{one}");
    let hashes: std::collections::BTreeSet<&str> = one
        .lines()
        .filter_map(|line| line.split(" hash ").nth(1)?.split(' ').next())
        .collect();
    assert_eq!(hashes.len(), 3, "each seed is a run of its own");
}
