//! Holds the format against its page, `docs/formats/blob.md`, and the parsers against rubbish.

use std::path::PathBuf;

use torc_env::{AlignedBuf, Disk, Env, File, OpenMode, TreeId};
use torc_sim::SimEnv;
use torc_sim::fuzz::fuzz;

use super::format::BlobFooter;
use super::{Blob, BlobFile, BlobRef, BlobUse, BlobWriter, blob_id, blob_path};
use crate::crypt::{Keys, Sealing, WriterSalt, test_keys};
use crate::dump::assert_on_page;
use crate::table::format::{FOOTER_BYTES, checksum, footer_offset};

const PAGE: &str = include_str!("../../../docs/formats/blob.md");
const ID: u64 = 43;

fn dir() -> PathBuf {
    PathBuf::from("tables")
}

fn values() -> [Vec<u8>; 2] {
    [b"a value ".repeat(12), b"of its own".to_vec()]
}

async fn write(env: &SimEnv, sealing: &Sealing) -> (BlobFile, Vec<BlobRef>) {
    env.disk().create_dir(&dir()).await.unwrap();
    let dir = dir();
    let writer = BlobWriter::create(env.disk().clone(), &dir, ID, TreeId(7), sealing);
    let mut writer = writer.await.unwrap();
    let mut references = Vec::new();
    for value in values() {
        references.push(writer.add(&value).await.unwrap());
    }
    (writer.finish().await.unwrap(), references)
}

async fn content(env: &SimEnv, bytes: u64) -> AlignedBuf {
    let opened = env
        .disk()
        .open(&blob_path(&dir(), ID), OpenMode::Read)
        .await;
    let len = usize::try_from(bytes).unwrap();
    let (result, content) = opened.unwrap().read_at(0, AlignedBuf::zeroed(len)).await;
    assert_eq!(result.unwrap(), len);
    content
}

#[test]
fn a_written_blob_has_the_bytes_on_the_page() {
    torc_sim::run(1, |env| async move {
        let (file, references) = write(&env, &Sealing::default()).await;
        let bytes = content(&env, file.bytes).await;
        assert_on_page(PAGE, "blob.md", &bytes);
        let keys = Keys::default();
        let blob = Blob::open(env.disk(), &dir(), &file, &keys).await.unwrap();
        for (reference, value) in references.iter().zip(values()) {
            assert_eq!(blob.get(reference).await.unwrap(), value);
        }
        assert_on_page(PAGE, "blob.md", &references[1].encode());
        let mut used = Vec::new();
        let of_table = BlobUse {
            file,
            values: 1,
            bytes: references[1].footprint(),
        };
        of_table.encode(&mut used);
        assert_on_page(PAGE, "blob.md", &used);
    });
}

#[test]
fn a_sealed_blob_needs_its_key_and_no_other() {
    torc_sim::run(1, |env| async move {
        let keys = test_keys(&[1]);
        let (file, references) = write(&env, &Sealing::fixed(&keys, WriterSalt::fixed(2))).await;
        assert_eq!(file.key(), keys.active());
        let bytes = content(&env, file.bytes).await;
        assert!(!bytes.windows(7).any(|found| found == b"a value"));
        let blob = Blob::open(env.disk(), &dir(), &file, &keys).await.unwrap();
        for (reference, value) in references.iter().zip(values()) {
            assert_eq!(blob.get(reference).await.unwrap(), value);
        }
        let other = test_keys(&[2]);
        assert!(Blob::open(env.disk(), &dir(), &file, &other).await.is_err());
    });
}

#[test]
fn file_names_give_their_ids_back() {
    let path = blob_path(&dir(), ID);
    assert_eq!(path, PathBuf::from("tables/000000000000002b.blob"));
    assert_eq!(blob_id("000000000000002b.blob"), Some(ID));
    for other in ["2b.blob", "000000000000002b.table", ".blob"] {
        assert_eq!(blob_id(other), None, "{other}");
    }
}

fn some_file(key: Option<u8>) -> BlobFile {
    let keys = key.map(|key| test_keys(&[key])).unwrap_or_default();
    let sealing = Sealing::fixed(&keys, WriterSalt::fixed(3));
    BlobFile {
        file_id: ID,
        bytes: 12_288,
        value_bytes: 6_000,
        key: sealing.blob_key(ID).map(|key| key.reference()),
    }
}

#[test]
fn lists_of_blobs_come_back() {
    let uses: Vec<BlobUse> = [None, Some(1)]
        .into_iter()
        .zip(1..)
        .map(|(key, number)| BlobUse {
            file: BlobFile {
                file_id: number,
                ..some_file(key)
            },
            values: number * 3,
            bytes: number * 1000,
        })
        .collect();
    let encode = |uses: &[BlobUse]| {
        let mut bytes = Vec::new();
        uses.iter().for_each(|used| used.encode(&mut bytes));
        bytes
    };
    let bytes = encode(&uses);
    assert_eq!(BlobUse::decode_all(&bytes).unwrap(), uses);
    for len in (1..bytes.len()).filter(|len| len % 72 > 0) {
        assert!(BlobUse::decode_all(&bytes[..len]).is_none(), "{len} bytes");
    }
    let descending = encode(&[uses[1], uses[0]]);
    assert!(BlobUse::decode_all(&descending).is_none());
}

#[test]
fn no_bytes_make_the_parsers_of_blobs_panic() {
    let file = some_file(None);
    let footer = BlobFooter {
        file,
        tree: TreeId(7),
        data_end: 6_016,
        values: 2,
        raw_bytes: 9_000,
    };
    fuzz("blob footer", &[footer.encode(None)], |input| {
        let mut sector = [0; FOOTER_BYTES];
        let len = input.len().min(FOOTER_BYTES);
        sector[..len].copy_from_slice(&input[..len]);
        let fits = checksum(ID, footer_offset(file.bytes), &[&sector[12..]]);
        sector[8..12].copy_from_slice(&fits.to_le_bytes());
        for keys in [Keys::default(), test_keys(&[1])] {
            if let Ok(found) = BlobFooter::decode(&sector, ID, file.bytes, &keys) {
                assert!(found.data_end <= footer_offset(file.bytes));
            }
        }
    });
    let mut uses = Vec::new();
    for key in [None, Some(1)] {
        let used = BlobUse {
            file: some_file(key),
            values: 1,
            bytes: 100,
        };
        used.encode(&mut uses);
    }
    fuzz("list of blobs", &[uses], |input| {
        drop(BlobUse::decode_all(input));
        BlobRef::decode(input);
    });
}
