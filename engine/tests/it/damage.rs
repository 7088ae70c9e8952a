//! Tables that rot: found, reported, cut out, and everything else goes on.

use std::path::{Path, PathBuf};
use std::time::Duration;

use torc_engine::inspect::{View, inspect};
use torc_engine::{Decision, Loss, Options, ReadError, Store, WriteError, remove_all};
use torc_env::{Disk, Env, OpenMode, Token, TreeId};
use torc_sim::{DiskOptions, HostId, SimEnv, Simulation};

use crate::faults::{run, world};
use crate::support::{TREE, get, lose, options, put, scan_all, tombstone, value};

fn key(number: u32) -> [u8; 4] {
    number.to_be_bytes()
}

/// Three tables on level 0: everything in the first, even keys again in the second, every tenth key
/// deleted in the third.
async fn fill(store: &Store<SimEnv>) {
    for number in 0..100 {
        put(store, key(number), value(vec![1; 1000], 1))
            .await
            .unwrap();
    }
    store.flush().await.unwrap();
    for number in (0..100).step_by(2) {
        put(store, key(number), value(vec![2; 1000], 2))
            .await
            .unwrap();
    }
    store.flush().await.unwrap();
    for number in (0..100).step_by(10) {
        put(store, key(number), tombstone(3)).await.unwrap();
    }
    store.flush().await.unwrap();
}

fn filled(seed: u64) -> (Simulation, HostId) {
    let (simulation, host) = world(seed, DiskOptions::default());
    run(&simulation, host, |env| async move {
        let (store, _) = Store::open(env, options()).await.unwrap();
        fill(&store).await;
        store.close().await.unwrap();
    });
    simulation.crash(host, 0);
    simulation.restart(host, 1);
    (simulation, host)
}

/// Table files, oldest first, with their lengths.
fn tables(simulation: &Simulation, host: HostId) -> Vec<(PathBuf, u64)> {
    let files = simulation.files(host).into_iter();
    let is_table = |(path, _): &(PathBuf, u64)| path.extension().is_some_and(|ext| ext == "table");
    let mut tables: Vec<_> = files.filter(is_table).collect();
    tables.sort();
    tables
}

async fn try_get(store: &Store<SimEnv>, number: u32) -> Result<bool, ReadError> {
    let key = key(number);
    let record = store.get(TREE, Token::of(TREE, &key), &key).await?;
    Ok(record.is_some())
}

#[test]
fn a_table_that_cannot_be_opened_is_set_aside_and_the_rest_serves() {
    let (simulation, host) = filled(1);
    let (path, len) = tables(&simulation, host)[1].clone();
    assert!(simulation.flip_bits(host, &path, len - 4096 + 40, 1));
    run(&simulation, host, |env| async move {
        let (store, recovery) = Store::open(env, options()).await.unwrap();
        assert_eq!((recovery.tables, recovery.damaged_tables), (3, 1));
        assert_eq!(recovery.losses.len(), 1);
        assert!(!recovery.amnesia, "it is known what is lost");
        assert_eq!(store.stats().counts.corrupt_blocks, 1);
        // What is older than the damage may have been replaced or deleted in it: no key shows an
        // old state. What is newer is there.
        for number in (0..100).step_by(2) {
            let is_there = try_get(&store, number).await.unwrap();
            assert_eq!(is_there, number % 10 == 0, "{number}");
        }
        put(&store, key(2), value("again", 4)).await.unwrap();
        store.compact().await.unwrap();
        store.close().await.unwrap();
    });
    assert!(
        simulation
            .files(host)
            .iter()
            .any(|(found, _)| *found == path.with_extension("damaged"))
    );
    simulation.crash(host, 0);
    simulation.restart(host, 1);
    run(&simulation, host, |env| async move {
        let (store, recovery) = Store::open(env, options()).await.unwrap();
        assert_eq!(recovery.damaged_tables, 0);
        assert_eq!(
            recovery.losses,
            store.losses(),
            "nobody has made up for it yet"
        );
        assert_eq!(recovery.losses[0].tree, Some(TREE));
        let lost = recovery.losses[0].range;
        assert!(
            (0..100)
                .step_by(2)
                .all(|number| lost.contains(Token::of(TREE, &key(number))))
        );
        assert_eq!(get(&store, key(2)).await.unwrap(), "again");
    });
}

#[test]
fn a_table_that_was_cut_short_is_set_aside_and_a_missing_one_is_asked_for() {
    let (simulation, host) = filled(6);
    let (path, _) = tables(&simulation, host)[0].clone();
    run(&simulation, host, move |env| async move {
        lose(&env, &path, options()).await;
        // What an operator does who has no other.
        env.disk().open(&path, OpenMode::CreateNew).await.unwrap();
        let (store, recovery) = Store::open(env.clone(), options()).await.unwrap();
        assert_eq!((recovery.tables, recovery.damaged_tables), (3, 1));
        assert_eq!(recovery.losses.len(), 1);
        assert_eq!(store.stats().counts.corrupt_blocks, 1);
        assert!(try_get(&store, 2).await.unwrap(), "it is in a newer one");
        assert!(!try_get(&store, 1).await.unwrap());
    });
}

#[test]
fn a_damaged_block_costs_its_own_keys_only_and_stops_no_other_tree() {
    let (simulation, host) = filled(2);
    let (path, _) = tables(&simulation, host)[1].clone();
    assert!(simulation.flip_bits(host, &path, 200, 1));
    run(&simulation, host, |env| async move {
        let (store, recovery) = Store::open(env.clone(), options()).await.unwrap();
        assert!(recovery.losses.is_empty());
        let mut unreadable = Vec::new();
        for number in 0..100 {
            match try_get(&store, number).await {
                Ok(is_there) => assert!(is_there, "{number}"),
                Err(error) => {
                    assert!(matches!(error, ReadError::Corrupt { .. }));
                    unreadable.push(number);
                }
            }
        }
        assert!((1..30).contains(&unreadable.len()), "{unreadable:?}");
        assert_eq!(store.damages().len(), 1);
        assert_eq!(
            store.stats().counts.corrupt_blocks,
            1,
            "one block, found often"
        );

        // A fourth run makes both trees due.
        let other = TreeId(2);
        for round in 0..4u64 {
            put(&store, "more", value("v", 10 + round)).await.unwrap();
            let token = Token::of(other, b"k");
            let decide = |_: Option<&_>| Decision::Write(value("w", round), ());
            let (_, ticket) = store.update(other, token, b"k", decide).await.unwrap();
            ticket.wait().await.unwrap();
            store.flush().await.unwrap();
        }
        env.sleep(Duration::from_secs(10)).await;
        let stats = store.stats();
        assert_eq!(
            stats.counts.failed_compactions, 0,
            "damage is not run into again"
        );
        assert_eq!(stats.counts.compactions, 1, "the other tree is compacted");
        let refused = put(&store, key(unreadable[0]), value("w", 9))
            .await
            .unwrap_err();
        assert!(matches!(refused, WriteError::Read(_)));

        let cut = store.quarantine(&store.damages()).await.unwrap();
        let lost = cut[0].range;
        assert!(!store.is_damaged());
        let losses = store.losses();
        assert_eq!((losses.len(), losses[0].tree), (1, Some(TREE)));
        for number in &unreadable {
            assert!(losses[0].range.contains(Token::of(TREE, &key(*number))));
        }
        for number in 0..100 {
            let is_there = try_get(&store, number).await.unwrap();
            if unreadable.contains(&number) {
                assert!(!is_there, "{number}");
            } else if !lost.contains(Token::of(TREE, &key(number))) {
                assert!(is_there, "{number}");
            }
        }
        env.sleep(Duration::from_secs(10)).await;
        assert_eq!(store.stats().level0_runs, 0, "compaction goes on");
        put(&store, key(unreadable[0]), value("w", 9))
            .await
            .unwrap();
        store.close().await.unwrap();
    });
    simulation.crash(host, 0);
    simulation.restart(host, 1);
    run(&simulation, host, |env| async move {
        let (store, recovery) = Store::open(env.clone(), options()).await.unwrap();
        assert_eq!(
            recovery.losses.len(),
            1,
            "what was cut out is still missing"
        );
        assert!(!recovery.losses[0].is_accepted);
        let accepted = Loss {
            is_accepted: true,
            ..recovery.losses[0]
        };
        store.set_losses(&[accepted]).await.unwrap();
        assert_eq!(store.losses(), [accepted]);
        store.close().await.unwrap();
        drop(store);
        let (store, recovery) = Store::open(env, options()).await.unwrap();
        assert!(recovery.losses[0].is_accepted, "an open does not ask again");
        store.set_losses(&[]).await.unwrap();
        assert!(store.losses().is_empty());
        assert!(scan_all(&store, 100).await.len() > 70);
    });
}

#[test]
fn damage_that_a_compaction_meets_is_noted_and_not_met_again() {
    let (simulation, host) = filled(3);
    let (path, _) = tables(&simulation, host)[0].clone();
    assert!(simulation.flip_bits(host, &path, 200, 1));
    run(&simulation, host, |env| async move {
        let (store, _) = Store::open(env.clone(), options()).await.unwrap();
        for round in 0..4u64 {
            put(&store, "more", value("v", 10 + round)).await.unwrap();
            store.flush().await.unwrap();
        }
        env.sleep(Duration::from_secs(30)).await;
        assert_eq!(store.stats().counts.failed_compactions, 1);
        assert_eq!(store.damages().len(), 1);
        store.quarantine(&store.damages()).await.unwrap();
        env.sleep(Duration::from_secs(30)).await;
        assert_eq!(store.stats().counts.failed_compactions, 1);
        assert_eq!(store.stats().level0_runs, 0);
    });
}

#[test]
fn a_scrub_finds_every_damaged_part_and_nothing_else() {
    let (simulation, host) = filled(4);
    let tables = tables(&simulation, host);
    // A block that no get asks for, the first one of another table, and a footer.
    assert!(simulation.flip_bits(host, &tables[0].0, 200, 1));
    assert!(simulation.flip_bits(host, &tables[1].0, 20, 1));
    let harness = simulation.clone();
    run(&simulation, host, move |env| async move {
        let (store, _) = Store::open(env.clone(), options()).await.unwrap();
        let begun = env.now();
        let report = store.scrub(100_000).await.unwrap();
        assert_eq!((report.tables, report.damaged), (3, 2));
        assert!((100..160).contains(&report.records), "{}", report.records);
        assert!(
            env.now().since(begun) > Duration::from_secs(1),
            "it takes its time"
        );
        assert_eq!(store.damages().len(), 2);
        assert_eq!(store.stats().counts.corrupt_blocks, 2);
        assert_eq!(store.stats().cache.entries, 0);

        // The open table knows its fences; the disk no longer does.
        let (path, len) = &tables[2];
        assert!(harness.flip_bits(host, path, len - 4000, 1));
        assert_eq!(store.scrub(1 << 30).await.unwrap().damaged, 3);
        // Only what was listed goes, whatever was found since.
        let listed = store.damages();
        assert_eq!(store.quarantine(&listed[..1]).await.unwrap().len(), 1);
        assert_eq!(store.damages(), listed[1..]);
        assert_eq!(store.quarantine(&listed).await.unwrap().len(), 2);
        let report = store.scrub(1 << 30).await.unwrap();
        assert_eq!(report.damaged, 0);
        assert!(
            report.records > 0,
            "what lay beside the extent of the last one"
        );
        store.close().await.unwrap();
    });
}

async fn inspected(env: &SimEnv, path: &Path) -> (u64, String) {
    let mut text = String::new();
    let mut print = |line: String| text.push_str(&(line + "\n"));
    let view = View {
        with_records: true,
        ..View::default()
    };
    let damaged = inspect(env.disk(), path, &view, &mut print).await.unwrap();
    (damaged, text)
}

#[test]
fn every_file_of_a_store_is_told_in_words_and_its_damage_too() {
    let (simulation, host) = filled(5);
    let harness = simulation.clone();
    run(&simulation, host, move |env| async move {
        let mut kinds = Vec::new();
        for (path, _) in harness.files(host) {
            let (damaged, text) = inspected(&env, &path).await;
            assert_eq!(damaged, 0, "{}: {text}", path.display());
            let kind = path.extension().unwrap().to_string_lossy().into_owned();
            // Within a block, within a frame that others follow, within the only valid slot.
            let offset = match kind.as_str() {
                "table" => {
                    assert!(text.contains("0 damaged blocks"), "{text}");
                    assert!(text.contains(", seqno "), "{text}");
                    20
                }
                // A spare one.
                "wal" if !text.contains("frame") => continue,
                "wal" => {
                    assert!(text.contains("frame 1 at 0: 1 records"), "{text}");
                    assert!(text.contains("closed"), "{text}");
                    4096 + 80
                }
                "log" => {
                    assert!(text.contains("AddTable(Listed { tree: TreeId(1)"), "{text}");
                    4096 + 70
                }
                _ => {
                    assert!(text.contains("slot at"), "{text}");
                    let slots = text.matches("slot at").count();
                    kinds.push(kind);
                    assert_eq!(slots, 1, "{text}");
                    continue;
                }
            };
            assert!(harness.flip_bits(host, &path, offset, 1));
            let (damaged, text) = inspected(&env, &path).await;
            assert_eq!(damaged, 1, "{}: {text}", path.display());
            assert!(text.contains("DAMAGED"));
            kinds.push(kind);
        }
        kinds.sort();
        kinds.dedup();
        assert_eq!(kinds, ["log", "root", "table", "wal"]);
        let mut print = |_| {};
        let other = Path::new("shard-00/other");
        let refused = inspect(env.disk(), other, &View::default(), &mut print).await;
        assert!(refused.is_err());
    });
}

/// Blocks begin anywhere in a sector, and reads at its beginning: what is missing must be charged to the block that was asked
/// for, or the wrong one would be cut out again and again.
#[test]
fn what_a_table_lacks_that_is_cut_short_while_it_is_open_is_cut_out_and_nothing_else_fails() {
    let (simulation, host) = world(12, DiskOptions::default());
    let store = run(&simulation, host, |env| async move {
        let options = Options {
            cache_bytes: 0,
            block_bytes: 1000,
            ..options()
        };
        let (store, _) = Store::open(env, options).await.unwrap();
        for number in 0..100 {
            // Of which nothing compresses.
            let bytes = (0..20).flat_map(|part| {
                Token::of(TREE, &[key(number), [part; 4]].concat())
                    .0
                    .to_le_bytes()
            });
            put(&store, key(number), value(bytes.collect::<Vec<u8>>(), 1))
                .await
                .unwrap();
        }
        store.flush().await.unwrap();
        store
    });
    for (path, _) in tables(&simulation, host) {
        assert!(simulation.cut_short(host, &path, 100));
    }
    // In the first sector, and not in the first block.
    let mut numbers: Vec<u32> = (0..100).collect();
    numbers.sort_by_key(|number| Token::of(TREE, &key(*number)));
    let asked = numbers[5];
    run(&simulation, host, move |_| async move {
        assert!(try_get(&store, asked).await.is_err());
        store.quarantine(&store.damages()).await.unwrap();
        assert!(!try_get(&store, asked).await.unwrap(), "it is cut out");
    });
}

#[test]
fn a_missing_manifest_or_log_segment_is_named_with_what_to_do() {
    let (simulation, host) = filled(11);
    let mut kinds = Vec::new();
    for (path, _) in simulation.files(host) {
        let kind = path.extension().unwrap().to_string_lossy().into_owned();
        // A segment that holds nothing yet is not missed.
        let is_spare = !simulation
            .content(host, &path)
            .unwrap()
            .starts_with(b"TWAL");
        if kind == "table" || kind == "wal" && is_spare {
            continue;
        }
        kinds.push(kind);
        run(&simulation, host, move |env| async move {
            let aside = path.with_extension("away");
            env.disk().rename(&path, &aside).await.unwrap();
            let opened = Store::open(env.clone(), options()).await;
            let error = opened.err().unwrap();
            let what = error.to_string();
            assert!(what.contains(&*path.to_string_lossy()), "{what}");
            assert!(
                what.contains("put it back") && what.contains("torc restore"),
                "{what}"
            );
            env.disk().rename(&aside, &path).await.unwrap();
        });
    }
    for kind in ["wal", "log", "root"] {
        assert!(kinds.iter().any(|found| found == kind), "{kinds:?}");
    }
    run(&simulation, host, |env| async move {
        let (store, recovery) = Store::open(env, options()).await.unwrap();
        assert!(recovery.clean && !recovery.amnesia);
        assert_eq!(get(&store, key(2)).await.unwrap(), vec![2; 1000]);
    });
}

#[test]
fn a_store_that_is_gone_has_lost_everything_and_a_fresh_one_nothing() {
    let known = || Options {
        was_here: true,
        ..options()
    };
    let (simulation, host) = filled(9);
    run(&simulation, host, move |env| async move {
        let (store, recovery) = Store::open(env.clone(), known()).await.unwrap();
        assert!(recovery.losses.is_empty(), "it is there");
        store.close().await.unwrap();
        drop(store);
        remove_all(env.disk(), &options().dir).await.unwrap();
        for _ in 0..2 {
            let (store, recovery) = Store::open(env.clone(), known()).await.unwrap();
            assert_eq!(recovery.losses.len(), 1);
            assert_eq!(recovery.losses[0].tree, None);
            put(&store, key(1), value("v", 9)).await.unwrap();
            store.close().await.unwrap();
        }
        remove_all(env.disk(), &options().dir).await.unwrap();
        let (_, recovery) = Store::open(env, options()).await.unwrap();
        assert!(recovery.losses.is_empty());
    });
}
