//! Damaged tables: every flipped bit and every truncation is noticed, or does no harm. A get never
//! takes damage for absence.

use std::path::PathBuf;

use torc_engine::table::{FilterBits, ReadAhead, Table, TableOptions, table_path};
use torc_engine::{Entry, Kind, ReadError, ScanFrom};
use torc_env::{Token, TokenRange};

use crate::table_support::{MemoryDisk, entry, noise, now, options, sort, tables_dir, write_table};

/// A dozen records in several small blocks, some of them compressible.
fn records() -> Vec<Entry> {
    let mut entries: Vec<Entry> = (0..12u32)
        .map(|key| {
            let value = if key % 2 == 0 {
                noise(key.into(), 30)
            } else {
                vec![b'v'; 200]
            };
            entry(format!("key-{key}"), key.into(), value)
        })
        .collect();
    entries[7].record.kind = Kind::Tombstone;
    entries[9].record.expires_at_ms = 1_700_000_000_000;
    sort(&mut entries);
    entries
}

fn path() -> PathBuf {
    table_path(&tables_dir(), 1)
}

fn disk(records: &[Entry]) -> MemoryDisk {
    let disk = MemoryDisk::default();
    let options = TableOptions {
        block_bytes: 400,
        ..options(FilterBits::Sixteen)
    };
    let info = now(write_table(&disk, 1, options, records)).unwrap();
    assert!(info.blocks > 2, "several blocks");
    disk
}

/// Reads everything in every way. `Ok` when all of it was right, `Err` when damage was reported;
/// anything else panics.
async fn read_all(disk: &MemoryDisk, expected: &[Entry]) -> Result<(), ReadError> {
    let table = Table::open(disk, &tables_dir(), 1).await?;
    let mut damage = None;
    for entry in expected {
        match table.get(entry.token, &entry.key).await {
            Ok(Some(found)) => {
                assert_eq!((found.seqno, &found.record), (entry.seqno, &entry.record));
            }
            Ok(None) => panic!("damage taken for absence"),
            Err(error) => damage = Some(error),
        }
    }
    let from = ScanFrom::Token(Token(0));
    let mut iter = table.iter(&from, TokenRange::ALL, ReadAhead::Background);
    for entry in expected {
        assert_eq!(iter.next().await?.as_ref(), Some(entry));
    }
    assert_eq!(iter.next().await?, None);
    damage.map_or(Ok(()), Err)
}

fn is_corrupt(error: &ReadError) -> bool {
    matches!(error, ReadError::Corrupt { .. })
}

#[test]
fn every_flipped_bit_is_noticed_or_harmless() {
    let records = records();
    let disk = disk(&records);
    let content = disk.content(&path());
    let mut harmless = 0;
    for (offset, byte) in content.iter().enumerate() {
        for mask in (0..8).map(|bit| 1 << bit) {
            disk.flip(&path(), offset, mask);
            match now(read_all(&disk, &records)) {
                Ok(()) => {
                    assert_eq!(*byte, 0, "only padding may change unnoticed: {offset}");
                    harmless += 1;
                }
                Err(error) => assert!(is_corrupt(&error), "{offset}.{mask}: {error}"),
            }
            disk.flip(&path(), offset, mask);
        }
    }
    // Data and sections are padded to whole sectors; nothing in the footer is padding.
    assert!((1..2 * 4096 * 8).contains(&harmless), "{harmless} bits");
    now(read_all(&disk, &records)).unwrap();
}

#[test]
fn every_truncation_is_noticed() {
    let records = records();
    let disk = disk(&records);
    let content = disk.content(&path());
    for len in 0..content.len() {
        disk.set_content(&path(), content[..len].to_vec());
        let error = now(read_all(&disk, &records)).unwrap_err();
        assert!(is_corrupt(&error), "{len}: {error}");
    }
}

#[test]
fn a_table_that_grew_is_noticed() {
    let records = records();
    let disk = disk(&records);
    let content = disk.content(&path());
    for more in [1, 4096, 1 << 20] {
        let mut longer = content.clone();
        longer.resize(content.len() + more, 0);
        disk.set_content(&path(), longer);
        let error = now(read_all(&disk, &records)).unwrap_err();
        assert!(is_corrupt(&error), "{more}: {error}");
    }
}

#[test]
fn a_table_under_another_name_is_noticed() {
    let disk = disk(&records());
    disk.set_content(&table_path(&tables_dir(), 2), disk.content(&path()));
    let error = now(Table::open(&disk, &tables_dir(), 2)).unwrap_err();
    let expected = "expected the footer of file 0000000000000002, found that of 0000000000000001";
    assert!(error.to_string().contains(expected), "{error}");
}

#[test]
fn a_block_in_the_place_of_another_is_noticed() {
    // Two records of one block each, both of the same shape and page-aligned.
    let mut records: Vec<Entry> = (0..2u8)
        .map(|key| entry([1, key], 1, noise(key.into(), 8100)))
        .collect();
    sort(&mut records);
    let disk = MemoryDisk::default();
    let info = now(write_table(&disk, 1, options(FilterBits::Eight), &records)).unwrap();
    assert_eq!(info.blocks, 2);
    let mut content = disk.content(&path());
    let (first, second) = content.split_at_mut(8192);
    first.swap_with_slice(&mut second[..8192]);
    disk.set_content(&path(), content);
    let table = now(Table::open(&disk, &tables_dir(), 1)).unwrap();
    for entry in &records {
        let error = now(table.get(entry.token, &entry.key)).unwrap_err();
        assert!(is_corrupt(&error), "{error}");
    }
}
