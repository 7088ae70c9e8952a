//! Damaged tables: every flipped bit and every truncation is noticed, or does no harm. A get never
//! takes damage for absence.

use std::path::PathBuf;

use torc_engine::crypt::Sealing;
use torc_engine::inspect::{View, inspect};
use torc_engine::table::{FilterBits, ReadAhead, Table, TableOptions, table_path};
use torc_engine::{Entry, Keys, Kind, ReadError, ScanFrom};
use torc_env::{Token, TokenRange};

use crate::support::keys;
use crate::table_support::{
    MemoryDisk, entry, noise, now, options, sort, tables_dir, write_sealed, write_table,
};

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

/// How the table is encrypted, and what reads it.
fn sealings() -> [(Sealing, Keys); 2] {
    let keys = keys(&[1]);
    let sealed = torc_sim::run(1, {
        let keys = keys.clone();
        |env| async move { Sealing::new(&keys, &env) }
    });
    [(Sealing::default(), Keys::default()), (sealed, keys)]
}

fn disk(records: &[Entry], sealing: &Sealing) -> MemoryDisk {
    let disk = MemoryDisk::default();
    let options = TableOptions {
        block_bytes: 400,
        ..options(FilterBits::Sixteen)
    };
    let info = now(write_sealed(&disk, 1, options, sealing, records)).unwrap();
    assert!(info.blocks > 2, "several blocks");
    disk
}

/// Reads everything in every way. `Ok` when all of it was right, `Err` when damage was reported;
/// anything else panics.
async fn read_all(disk: &MemoryDisk, keys: &Keys, expected: &[Entry]) -> Result<(), ReadError> {
    let table = Table::open(disk, &tables_dir(), 1, keys).await?;
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
    let mut iter = table.iter(&from, TokenRange::ALL, ReadAhead::background(1));
    for entry in expected {
        let found = iter.next().await?;
        assert_eq!(found.map(|stored| stored.entry).as_ref(), Some(entry));
    }
    assert_eq!(iter.next().await?, None);
    damage.map_or(Ok(()), Err)
}

fn is_corrupt(error: &ReadError) -> bool {
    matches!(error, ReadError::Corrupt { .. })
}

/// Whether the checksums alone, read without a key, show damage.
async fn is_damaged_without_key(disk: &MemoryDisk) -> bool {
    let view = View::default();
    inspect(disk, &path(), &view, &mut drop).await.unwrap() > 0
}

#[test]
fn every_flipped_bit_is_noticed_or_harmless() {
    let records = records();
    for (sealing, keys) in sealings() {
        let disk = disk(&records, &sealing);
        let content = disk.content(&path());
        let mut harmless = 0;
        for (offset, byte) in content.iter().enumerate() {
            for mask in (0..8).map(|bit| 1 << bit) {
                disk.flip(&path(), offset, mask);
                match now(read_all(&disk, &keys, &records)) {
                    Ok(()) => {
                        assert_eq!(*byte, 0, "only padding may change unnoticed: {offset}");
                        harmless += 1;
                    }
                    Err(error) => {
                        assert!(is_corrupt(&error), "{offset}.{mask}: {error}");
                        assert!(now(is_damaged_without_key(&disk)), "{offset}.{mask}");
                    }
                }
                disk.flip(&path(), offset, mask);
            }
        }
        // Data and sections are padded to whole sectors; nothing in the footer is padding.
        assert!((1..2 * 4096 * 8).contains(&harmless), "{harmless} bits");
        now(read_all(&disk, &keys, &records)).unwrap();
        assert!(!now(is_damaged_without_key(&disk)));
    }
}

#[test]
fn every_truncation_is_noticed() {
    let records = records();
    for (sealing, keys) in sealings() {
        let disk = disk(&records, &sealing);
        let content = disk.content(&path());
        for len in 0..content.len() {
            disk.set_content(&path(), content[..len].to_vec());
            let error = now(read_all(&disk, &keys, &records)).unwrap_err();
            assert!(is_corrupt(&error), "{len}: {error}");
        }
    }
}

#[test]
fn a_table_that_grew_is_noticed() {
    let records = records();
    for (sealing, keys) in sealings() {
        let disk = disk(&records, &sealing);
        let content = disk.content(&path());
        for more in [1, 4096, 1 << 20] {
            let mut longer = content.clone();
            longer.resize(content.len() + more, 0);
            disk.set_content(&path(), longer);
            let error = now(read_all(&disk, &keys, &records)).unwrap_err();
            assert!(is_corrupt(&error), "{more}: {error}");
        }
    }
}

/// Gives a block moved to `offset`, and whatever became of it, a checksum that fits: what whoever forges
/// a file does.
fn forge_checksum(content: &mut [u8], offset: usize) {
    let stored = content[offset + 8..offset + 12].try_into().unwrap();
    let end = offset + 20 + usize::try_from(u32::from_le_bytes(stored)).unwrap();
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(&1u64.to_le_bytes());
    digest.update(&u64::try_from(offset).unwrap().to_le_bytes());
    digest.update(&content[offset + 4..end]);
    let sum = u32::try_from(digest.finalize()).unwrap();
    content[offset..offset + 4].copy_from_slice(&sum.to_le_bytes());
}

#[test]
fn forged_blocks_of_a_sealed_table_do_not_open() {
    let mut records: Vec<Entry> = (0..2u8)
        .map(|key| entry([1, key], 1, noise(key.into(), 8050)))
        .collect();
    sort(&mut records);
    let disk = MemoryDisk::default();
    let [_, (sealing, keys)] = sealings();
    let sizes = options(FilterBits::Eight);
    let info = now(write_sealed(&disk, 1, sizes, &sealing, &records)).unwrap();
    assert_eq!(info.blocks, 2);
    let whole = disk.content(&path());
    let swap = |content: &mut Vec<u8>| {
        let (first, second) = content.split_at_mut(8192);
        first.swap_with_slice(&mut second[..8192]);
    };
    let change = |content: &mut Vec<u8>| {
        content[500] ^= 1;
        content[8192 + 500] ^= 1;
    };
    let miscount = |content: &mut Vec<u8>| {
        content[16] ^= 2;
        content[8192 + 16] ^= 2;
    };
    for forge in [&swap as &dyn Fn(&mut Vec<u8>), &change, &miscount] {
        let mut content = whole.clone();
        forge(&mut content);
        forge_checksum(&mut content, 0);
        forge_checksum(&mut content, 8192);
        disk.set_content(&path(), content);
        let table = now(Table::open(&disk, &tables_dir(), 1, &keys)).unwrap();
        for entry in &records {
            let error = now(table.get(entry.token, &entry.key)).unwrap_err();
            assert!(is_corrupt(&error), "{error}");
            assert!(error.to_string().contains("authenticate"), "{error}");
        }
        assert!(!now(is_damaged_without_key(&disk)), "only the key tells");
    }
}

#[test]
fn a_sealed_table_names_the_key_that_it_needs() {
    let records = records();
    let [_, (sealing, given)] = sealings();
    let disk = disk(&records, &sealing);
    for other in [Keys::default(), keys(&[2])] {
        let error = now(read_all(&disk, &other, &records)).unwrap_err();
        let ReadError::Key { source, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!(Some(source.needed), given.active());
        assert_eq!(source.known, other.ids());
    }
    now(read_all(&disk, &keys(&[1, 2]), &records)).unwrap();
}

#[test]
fn a_table_under_another_name_is_noticed() {
    let disk = disk(&records(), &Sealing::default());
    disk.set_content(&table_path(&tables_dir(), 2), disk.content(&path()));
    let error = now(Table::open(&disk, &tables_dir(), 2, &Keys::default())).unwrap_err();
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
    let table = now(Table::open(&disk, &tables_dir(), 1, &Keys::default())).unwrap();
    for entry in &records {
        let error = now(table.get(entry.token, &entry.key)).unwrap_err();
        assert!(is_corrupt(&error), "{error}");
    }
}
