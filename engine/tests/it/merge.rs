//! The merge against a sorted map.

use std::collections::BTreeMap;

use proptest::prelude::*;
use torc_engine::cache::BlockCache;
use torc_engine::merge::{Merge, RunIter, Source};
use torc_engine::table::{Ahead, FilterBits, ReadAhead, Table};
use torc_engine::{AheadBudget, Keys};
use torc_engine::{Entry, ScanFrom};
use torc_env::{Token, TokenRange};

use crate::table_support::{
    MemoryDisk, Shape, Tokens, entries, now, options, shape, sort, tables_dir, tokens, write_table,
};

type Model = BTreeMap<(Token, Vec<u8>), Entry>;

/// Puts the newest of two records of one key into the model.
fn note(model: &mut Model, entry: &Entry) {
    let place = (entry.token, entry.key.to_vec());
    let newer = model
        .get(&place)
        .is_none_or(|known| known.seqno < entry.seqno);
    if newer {
        model.insert(place, entry.clone());
    }
}

/// Deals records out over sources; some go to several, with different sequence numbers.
fn deal(entries: &[Entry], sources: usize, picks: &[u8]) -> Vec<Vec<Entry>> {
    let mut dealt = vec![vec![]; sources];
    for ((entry, pick), seqno) in entries.iter().zip(picks.iter().cycle()).zip(1..) {
        for (source, list) in dealt.iter_mut().enumerate() {
            if pick >> (source % 8) & 1 == 1 {
                let mut copy = entry.clone();
                // Not in order of sources: the sequence number alone decides.
                copy.seqno =
                    seqno * 16 + u64::from(pick.rotate_left(u32::try_from(source).unwrap()) % 16);
                copy.record.stamp = u64::try_from(source).unwrap();
                list.push(copy);
            }
        }
    }
    dealt
}

async fn check(shapes: Vec<Shape>, tokens: Tokens, picks: Vec<u8>, tables: usize, from: u128) {
    let disk = MemoryDisk::default();
    let entries = entries(&shapes, tokens);
    let mut dealt = deal(&entries, tables + 2, &picks);
    for list in &mut dealt {
        sort(list);
    }
    let from = ScanFrom::Token(Token(from));
    let mut model = Model::new();
    let mut sources = vec![];
    for (index, list) in dealt.iter().enumerate() {
        let kept = list
            .iter()
            .filter(|entry| !from.is_after(entry.token, &entry.key));
        let kept: Vec<Entry> = kept.cloned().collect();
        if index < 2 {
            sources.push(Source::Memory(kept.clone().into_iter()));
        } else {
            // A run of up to two tables, cut between two tokens.
            let middle = list
                .get(list.len() / 2)
                .map_or(Token(0), |entry| entry.token);
            let (low, high): (Vec<_>, Vec<_>) =
                list.iter().cloned().partition(|entry| entry.token < middle);
            let mut run = vec![];
            for (half, list) in [low, high].into_iter().enumerate() {
                if let (Some(first), Some(last)) = (list.first(), list.last()) {
                    let range = TokenRange {
                        first: first.token,
                        last: last.token,
                    };
                    let file_id = u64::try_from(index * 2 + half).unwrap();
                    write_table(&disk, file_id, options(FilterBits::Eight), &list)
                        .await
                        .unwrap();
                    let table = Table::open(&disk, &tables_dir(), file_id, &Keys::default())
                        .await
                        .unwrap();
                    run.push((table, range));
                }
            }
            sources.push(Source::Run(RunIter::new(
                run,
                from.clone(),
                ReadAhead::Foreground(Ahead {
                    budget: AheadBudget::new(1 << 20),
                    blocks: BlockCache::none(),
                    block_bytes: 8 << 10,
                    expected: 16 << 10,
                    level: 1,
                    scanned: std::rc::Rc::default(),
                }),
            )));
        }
        kept.iter().for_each(|entry| note(&mut model, entry));
    }
    let given: usize = dealt
        .iter()
        .flatten()
        .filter(|e| !from.is_after(e.token, &e.key))
        .count();
    let mut merge = Merge::new(sources);
    let mut expected = model.values();
    while let Some(stored) = merge.next().await.unwrap() {
        let entry = stored.entry;
        let wanted = expected.next().unwrap();
        // Two sources may hold the same record; which of them it comes from does not matter.
        assert_eq!(
            (entry.token, &entry.key, entry.seqno),
            (wanted.token, &wanted.key, wanted.seqno)
        );
        assert_eq!(entry.record.value, wanted.record.value);
    }
    assert!(expected.next().is_none());
    let superseded = usize::try_from(merge.superseded()).unwrap();
    assert_eq!(superseded, given - model.len());
}

proptest! {
    #[test]
    fn the_newest_record_of_every_key_comes_out_in_order(
        shapes in prop::collection::vec(shape(8), 1..120),
        tokens in tokens(),
        picks in prop::collection::vec(any::<u8>(), 1..40),
        tables in 0usize..5,
        from in prop_oneof![2 => Just(0), 1 => any::<u128>()],
    ) {
        now(check(shapes, tokens, picks, tables, from));
    }
}
