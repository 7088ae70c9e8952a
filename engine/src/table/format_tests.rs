//! The table's bytes are as documented, and what is documented can be read.

use std::path::PathBuf;

use bytes::Bytes;
use torc_env::{AlignedBuf, Disk, Env, File, OpenMode, Token, TokenRange, TreeId};
use torc_sim::SimEnv;

use super::{
    FilterBits, ReadAhead, Stored, Table, TableOptions, TableWriter, table_id, table_path,
};
use crate::crypt::{Keys, Sealing, WriterSalt, test_keys};
use crate::dump::assert_on_page;
use crate::record::{Entry, Kind, Record, ScanFrom};

const PAGE: &str = include_str!("../../../docs/formats/table.md");
const TREE: TreeId = TreeId(7);
const ID: u64 = 0x2a;

fn dir() -> PathBuf {
    PathBuf::from("tables")
}

fn entry(key: &'static str, seqno: u64, value: impl Into<Bytes>) -> Entry {
    Entry {
        token: Token::of(TREE, key.as_bytes()),
        key: Bytes::from_static(key.as_bytes()),
        seqno,
        record: Record {
            kind: Kind::Value,
            stamp: 0x1122_3344_5500 + seqno,
            expires_at_ms: 0,
            value: value.into(),
        },
    }
}

/// A block that compresses, with two values and a tombstone, and one of a single record that stores
/// its token.
fn entries() -> Vec<Entry> {
    let mut entries = vec![
        entry(
            "greeting",
            1,
            "hello hello hello hello hello hello hello hello hello",
        ),
        entry(
            "green",
            2,
            "hello hello hello hello hello hello hello hello",
        ),
        entry("great", 3, ""),
    ];
    entries[1].record.expires_at_ms = 1_700_000_000_000;
    entries[2].record.kind = Kind::Tombstone;
    let mut last = entry("z", 4, "elsewhere");
    last.token = Token::MAX;
    entries.push(last);
    entries.sort_by_key(|entry| entry.token);
    entries
}

async fn write(env: &SimEnv) {
    write_sealed(env, &Sealing::default()).await;
}

async fn write_sealed(env: &SimEnv, sealing: &Sealing) {
    env.disk().create_dir(&dir()).await.unwrap();
    let options = TableOptions {
        tree: TREE,
        block_bytes: 230,
        filter: FilterBits::Eight,
    };
    let path = table_path(&dir(), ID);
    let mut writer = TableWriter::create(env.disk().clone(), &path, ID, options, sealing)
        .await
        .unwrap();
    for entry in entries() {
        writer.add(&entry.as_ref()).await.unwrap();
    }
    let info = writer.finish().await.unwrap();
    assert_eq!((info.blocks, info.bytes), (2, 12288));
}

async fn read(env: &SimEnv) {
    read_with(env, &Keys::default()).await;
}

async fn read_with(env: &SimEnv, keys: &Keys) {
    let table = Table::open(env.disk(), &dir(), ID, keys).await.unwrap();
    for entry in entries() {
        let found = table.get(entry.token, &entry.key).await.unwrap().unwrap();
        assert_eq!((found.seqno, found.record), (entry.seqno, entry.record));
    }
    let from = ScanFrom::Token(Token(0));
    let mut iter = table.iter(&from, TokenRange::ALL, ReadAhead::background(1));
    for entry in entries() {
        assert_eq!(iter.next().await.unwrap(), Some(Stored::whole(entry)));
    }
    assert_eq!(iter.next().await.unwrap(), None);
}

#[test]
fn a_written_table_has_the_bytes_on_the_page() {
    torc_sim::run(1, |env| async move {
        write(&env).await;
        read(&env).await;
        let file = env
            .disk()
            .open(&table_path(&dir(), ID), OpenMode::Read)
            .await
            .unwrap();
        let (result, bytes) = file.read_at(0, AlignedBuf::zeroed(12288)).await;
        assert_eq!(result.unwrap(), 12288);
        assert_on_page(PAGE, "table.md", &bytes);
    });
}

#[test]
fn the_sealed_bytes_are_those_of_the_page() {
    const SEALED_PAGE: &str = include_str!("../../../docs/formats/encryption.md");
    torc_sim::run(1, |env| async move {
        let keys = test_keys(&[1]);
        write_sealed(&env, &Sealing::fixed(&keys, WriterSalt::fixed(2))).await;
        read_with(&env, &keys).await;
        let path = table_path(&dir(), ID);
        let file = env.disk().open(&path, OpenMode::Read).await.unwrap();
        let (result, bytes) = file.read_at(0, AlignedBuf::zeroed(12288)).await;
        assert_eq!(result.unwrap(), 12288);
        assert_on_page(SEALED_PAGE, "encryption.md", &bytes);
    });
}

/// Stays when the writer changes: what version 1 wrote remains readable.
#[test]
fn the_bytes_on_the_page_are_read() {
    torc_sim::run(1, |env| async move {
        env.disk().create_dir(&dir()).await.unwrap();
        let path = table_path(&dir(), ID);
        let file = env.disk().open(&path, OpenMode::CreateNew).await.unwrap();
        let (result, _) = file
            .write_at(0, AlignedBuf::copy_of(&bytes_on_page()))
            .await;
        result.unwrap();
        read(&env).await;
    });
}

/// The last hexdump of the page.
pub(super) fn bytes_on_page() -> Vec<u8> {
    let mut bytes = vec![];
    let dump = PAGE
        .rsplit("```")
        .nth(1)
        .expect("a dump at the end of the page");
    for line in dump.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(at) = words
            .next()
            .and_then(|at| usize::from_str_radix(at, 16).ok())
        else {
            continue;
        };
        bytes.resize(at, 0);
        bytes.extend(words.map(|byte| u8::from_str_radix(byte, 16).unwrap()));
    }
    bytes
}

#[test]
fn file_names_give_their_ids_back() {
    let path = table_path(&dir(), ID);
    assert_eq!(path, PathBuf::from("tables/000000000000002a.table"));
    assert_eq!(table_id("000000000000002a.table"), Some(ID));
    for other in [
        "2a.table",
        "000000000000002a.tmp",
        "00000000000000zz.table",
        ".table",
    ] {
        assert_eq!(table_id(other), None, "{other}");
    }
}
