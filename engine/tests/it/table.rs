//! Tables: what is written comes back, by key and in order, with one device read a get.

use bytes::Bytes;
use proptest::prelude::*;
use torc_engine::cache::BlockCache;
use torc_engine::table::{Ahead, Bounds, FilterBits, ReadAhead, Table};
use torc_engine::{AheadBudget, Keys};
use torc_engine::{Entry, Kind, ScanFrom};
use torc_env::{Disk, Token, TokenRange};

use crate::table_support::{
    MemoryDisk, Shape, Tokens, entries, entry, noise, now, options, shape, sort, tables_dir,
    tokens, write_table,
};

async fn collect<D: Disk>(table: &Table<D>, from: ScanFrom, range: TokenRange) -> Vec<Entry> {
    let mut iter = table.iter(
        &from,
        range,
        ReadAhead::Foreground(Ahead {
            budget: AheadBudget::new(1 << 20),
            blocks: BlockCache::none(),
            block_bytes: 8 << 10,
            expected: 16 << 10,
            level: 1,
            scanned: std::rc::Rc::default(),
        }),
    );
    let mut found = vec![];
    while let Some(stored) = iter.next().await.unwrap() {
        found.push(stored.entry);
    }
    found
}

fn check_info(table: &Table<impl Disk>, entries: &[Entry]) {
    let info = table.info();
    let count = |is: &dyn Fn(&Entry) -> bool| {
        u64::try_from(entries.iter().filter(|entry| is(entry)).count()).unwrap()
    };
    let bounds = |values: Vec<u64>| Bounds {
        min: values.iter().copied().min().unwrap_or(0),
        max: values.iter().copied().max().unwrap_or(0),
    };
    assert_eq!(info.entries, count(&|_| true));
    assert_eq!(
        info.tombstones,
        count(&|entry| entry.record.kind == Kind::Tombstone)
    );
    // A tombstone needs none.
    let expires =
        |entry: &Entry| entry.record.kind == Kind::Value && entry.record.expires_at_ms != 0;
    assert_eq!(info.expiring, count(&expires));
    assert_eq!(
        info.seqnos,
        bounds(entries.iter().map(|entry| entry.seqno).collect())
    );
    assert_eq!(
        info.stamps,
        bounds(entries.iter().map(|entry| entry.record.stamp).collect())
    );
    let expiring = entries.iter().filter(|entry| expires(entry));
    assert_eq!(
        info.expiries_ms,
        bounds(expiring.map(|entry| entry.record.expires_at_ms).collect())
    );
    let purgeable = entries
        .iter()
        .filter(|entry| entry.record.kind == Kind::Tombstone || entry.record.expires_at_ms != 0);
    let purgeable = purgeable.map(|entry| entry.record.stamp).collect();
    assert_eq!(info.purgeable_stamps, bounds(purgeable));
    let (first, last) = (&entries[0], entries.last().unwrap());
    assert_eq!(
        (info.first_token, &info.first_key),
        (first.token, &first.key)
    );
    assert_eq!((info.last_token, &info.last_key), (last.token, &last.key));
    let value_bytes: usize = entries.iter().map(|entry| entry.record.value.len()).sum();
    assert_eq!(info.value_bytes, u64::try_from(value_bytes).unwrap());
}

fn round_trip(shapes: Vec<Shape>, tokens: Tokens, block_bytes: usize, filter: FilterBits) {
    let entries = entries(&shapes, tokens);
    let disk = MemoryDisk::default();
    now(async move {
        let mut options = options(filter);
        options.block_bytes = block_bytes;
        let info = write_table(&disk, 1, options, &entries).await.unwrap();
        let table = Table::open(&disk, &tables_dir(), 1, &Keys::default())
            .await
            .unwrap();
        assert_eq!(table.info(), &info);
        check_info(&table, &entries);

        let all = collect(&table, ScanFrom::Token(Token(0)), TokenRange::ALL).await;
        assert_eq!(all, entries);
        for (index, entry) in entries.iter().enumerate() {
            disk.reads.set(0);
            let found = table.get(entry.token, &entry.key).await.unwrap().unwrap();
            assert_eq!(
                (found.seqno, found.record),
                (entry.seqno, entry.record.clone())
            );
            assert_eq!(disk.reads.get(), 1, "a get is one device read");
            let mut longer = entry.key.to_vec();
            longer.push(0);
            let present = entries.get(index + 1).filter(|next| next.key == longer);
            let present = present.filter(|next| next.token == entry.token);
            let found = table.get(entry.token, &longer).await.unwrap();
            assert_eq!(found.is_some(), present.is_some());
            let elsewhere = Token(entry.token.0 ^ 4);
            assert_eq!(table.get(elsewhere, &entry.key).await.unwrap(), None);

            if index % 7 == 0 {
                let after = ScanFrom::After(entry.token, entry.key.clone());
                let rest = collect(&table, after, TokenRange::ALL).await;
                assert_eq!(rest, entries[index + 1..]);
                let range = TokenRange {
                    first: Token(entry.token.0 / 2),
                    last: entry.token,
                };
                let expected: Vec<&Entry> = entries
                    .iter()
                    .filter(|entry| range.contains(entry.token))
                    .collect();
                let found = collect(&table, ScanFrom::Token(Token(0)), range).await;
                assert_eq!(found.iter().collect::<Vec<_>>(), expected);
            }
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn small_records_come_back(
        shapes in prop::collection::vec(shape(10), 1..400),
        tokens in tokens(),
        block_bytes in 256usize..20_000,
        eight in any::<bool>(),
    ) {
        let filter = if eight { FilterBits::Eight } else { FilterBits::Sixteen };
        round_trip(shapes, tokens, block_bytes, filter);
    }

    #[test]
    fn large_records_come_back(
        shapes in prop::collection::vec(shape(20), 1..12),
        tokens in tokens(),
    ) {
        round_trip(shapes, tokens, 8192, FilterBits::Sixteen);
    }
}

#[test]
fn an_absent_key_hardly_ever_costs_a_device_read() {
    let disk = MemoryDisk::default();
    now(async move {
        let mut present: Vec<Entry> = (0..5000u32)
            .map(|key| entry(key.to_le_bytes(), key.into(), b"v"))
            .collect();
        sort(&mut present);
        for (file_id, filter, reads_max) in
            [(1, FilterBits::Sixteen, 3), (2, FilterBits::Eight, 80)]
        {
            write_table(&disk, file_id, options(filter), &present)
                .await
                .unwrap();
            let table = Table::open(&disk, &tables_dir(), file_id, &Keys::default())
                .await
                .unwrap();
            disk.reads.set(0);
            for key in 5000..15_000u32 {
                let absent = entry(key.to_le_bytes(), 1, b"");
                assert_eq!(table.get(absent.token, &absent.key).await.unwrap(), None);
            }
            assert!(disk.reads.get() <= reads_max, "{} reads", disk.reads.get());
        }
    });
}

#[test]
fn a_get_of_a_small_record_reads_one_page_and_fences_are_small() {
    let disk = MemoryDisk::default();
    now(async move {
        for (file_id, value_len) in [(1, 100), (2, 1000)] {
            let mut entries: Vec<Entry> = (0..20_000u32)
                .map(|key| entry(key.to_le_bytes(), key.into(), noise(key.into(), value_len)))
                .collect();
            sort(&mut entries);
            let info = write_table(&disk, file_id, options(FilterBits::Eight), &entries)
                .await
                .unwrap();
            let content = info.key_bytes + info.value_bytes;
            assert!(
                info.bytes < content * 5 / 4,
                "{} bytes for {content}",
                info.bytes
            );
            let table = Table::open(&disk, &tables_dir(), file_id, &Keys::default())
                .await
                .unwrap();
            // Ten bits a key for the filter, some twenty a block for the fences.
            let memory_max = 20_000 * 12 / 8 + usize::try_from(info.blocks).unwrap() * 3 + 2000;
            assert!(
                table.memory_bytes() <= memory_max,
                "{}",
                table.memory_bytes()
            );
        }
    });
}

#[test]
fn equal_tables_are_equal_bytes() {
    let disk = MemoryDisk::default();
    now(async move {
        let mut entries: Vec<Entry> = (0..3000u32)
            .map(|key| entry(key.to_le_bytes(), key.into(), b"value"))
            .collect();
        sort(&mut entries);
        write_table(&disk, 1, options(FilterBits::Eight), &entries)
            .await
            .unwrap();
        let path = torc_engine::table::table_path(&tables_dir(), 1);
        let first = disk.content(&path);
        disk.remove(&path).await.unwrap();
        write_table(&disk, 1, options(FilterBits::Eight), &entries)
            .await
            .unwrap();
        assert_eq!(disk.content(&path), first);
    });
}

#[test]
fn a_value_kept_by_a_reader_does_not_pin_its_block() {
    let disk = MemoryDisk::default();
    now(async move {
        let mut entries: Vec<Entry> = (0..100u32)
            .map(|key| entry(key.to_le_bytes(), 1, noise(key.into(), 50)))
            .collect();
        sort(&mut entries);
        write_table(&disk, 1, options(FilterBits::Eight), &entries)
            .await
            .unwrap();
        let table = Table::open(&disk, &tables_dir(), 1, &Keys::default())
            .await
            .unwrap();
        let found = table
            .get(entries[0].token, &entries[0].key)
            .await
            .unwrap()
            .unwrap();
        let value: Bytes = found.record.value;
        assert!(value.is_unique(), "a copy of its own");
    });
}
