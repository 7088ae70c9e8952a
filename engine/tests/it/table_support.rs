//! What the tests of tables need: records by strategy, a disk in memory.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use bytes::Bytes;
use futures_util::FutureExt as _;
use proptest::prelude::*;
use torc_engine::crypt::Sealing;
use torc_engine::table::{FilterBits, TableInfo, TableOptions, TableWriter, table_path};
use torc_engine::{Entry, JobError, Kind, Record};
use torc_env::disk::Space;
use torc_env::{AlignedBuf, DirEntry, Disk, File, OpenMode, Token, TreeId};

pub const TREE: TreeId = TreeId(7);

pub fn tables_dir() -> PathBuf {
    PathBuf::from("tables")
}

pub fn options(filter: FilterBits) -> TableOptions {
    TableOptions {
        tree: TREE,
        block_bytes: 8192,
        filter,
    }
}

/// A record with the token of its key.
pub fn entry(key: impl AsRef<[u8]>, seqno: u64, value: impl AsRef<[u8]>) -> Entry {
    let key = Bytes::copy_from_slice(key.as_ref());
    Entry {
        token: Token::of(TREE, &key),
        seqno,
        record: Record {
            kind: Kind::Value,
            stamp: 1_000_000 + seqno,
            expires_at_ms: 0,
            value: Bytes::copy_from_slice(value.as_ref()),
        },
        key,
    }
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
    }
    out.truncate(len);
    out
}

pub fn sort(entries: &mut [Entry]) {
    entries.sort_by(|a, b| (a.token, &a.key).cmp(&(b.token, &b.key)));
}

/// Writes `entries`, which are in order, as table `file_id` of the tables' directory.
pub async fn write_table<D: Disk>(
    disk: &D,
    file_id: u64,
    options: TableOptions,
    entries: &[Entry],
) -> Result<TableInfo, JobError> {
    write_sealed(disk, file_id, options, &Sealing::default(), entries).await
}

/// As [`write_table`], encrypted as `sealing` says.
pub async fn write_sealed<D: Disk>(
    disk: &D,
    file_id: u64,
    options: TableOptions,
    sealing: &Sealing,
    entries: &[Entry],
) -> Result<TableInfo, JobError> {
    let path = table_path(&tables_dir(), file_id);
    let disk = disk.clone();
    let mut writer = TableWriter::create(disk, &path, file_id, options, sealing).await?;
    for entry in entries {
        writer.add(&entry.as_ref()).await?;
    }
    writer.finish().await
}

/// How a generated record's token comes about.
#[derive(Debug, Clone, Copy)]
pub enum Tokens {
    /// The key's hash, as everywhere in production.
    Hashed,
    /// Anywhere on the ring.
    Random,
    /// Three tokens for all records.
    Few,
}

pub fn tokens() -> impl Strategy<Value = Tokens> {
    prop_oneof![
        3 => Just(Tokens::Hashed),
        1 => Just(Tokens::Random),
        1 => Just(Tokens::Few),
    ]
}

#[derive(Debug, Clone)]
pub struct Shape {
    key_len: usize,
    value_len: usize,
    noise: u64,
    compressible: bool,
    tombstone: bool,
    stamp: u64,
    expires_at_ms: u64,
    token: u128,
}

/// Lengths over all orders of magnitude up to `max`.
fn log_len(max_bits: u32) -> impl Strategy<Value = usize> {
    (0..=max_bits, any::<usize>()).prop_map(|(bits, len)| len & ((1 << bits) - 1))
}

pub fn shape(value_bits: u32) -> impl Strategy<Value = Shape> {
    (
        (
            log_len(10),
            log_len(value_bits),
            any::<u64>(),
            any::<bool>(),
        ),
        (
            prop::bool::weighted(0.2),
            any::<u64>(),
            prop_oneof![Just(0), any::<u64>()],
            any::<u128>(),
        ),
    )
        .prop_map(
            |((key_len, value_len, noise, compressible), (tombstone, stamp, expires, token))| {
                Shape {
                    key_len: key_len.max(1),
                    value_len,
                    noise,
                    compressible,
                    tombstone,
                    stamp,
                    expires_at_ms: expires,
                    token,
                }
            },
        )
}

/// Records in order, one a key.
pub fn entries(shapes: &[Shape], tokens: Tokens) -> Vec<Entry> {
    let mut entries: Vec<Entry> = shapes
        .iter()
        .zip(1..)
        .map(|(shape, seqno)| {
            let key = Bytes::from(noise(shape.noise, shape.key_len));
            let value = if shape.compressible {
                vec![shape.key_len.to_le_bytes()[0]; shape.value_len]
            } else {
                noise(shape.noise ^ 1, shape.value_len)
            };
            Entry {
                token: match tokens {
                    Tokens::Hashed => Token::of(TREE, &key),
                    Tokens::Random => Token(shape.token),
                    Tokens::Few => Token(shape.token % 3),
                },
                key,
                seqno,
                record: Record {
                    kind: if shape.tombstone {
                        Kind::Tombstone
                    } else {
                        Kind::Value
                    },
                    stamp: shape.stamp,
                    expires_at_ms: shape.expires_at_ms,
                    value: value.into(),
                },
            }
        })
        .collect();
    sort(&mut entries);
    entries.dedup_by(|a, b| (a.token, &a.key) == (b.token, &b.key));
    entries
}

/// A disk in memory that answers at once and counts its reads: for tests that read tables a hundred
/// thousand times. Nothing else of a disk matters to them.
#[derive(Clone, Default)]
pub struct MemoryDisk {
    files: Rc<RefCell<BTreeMap<PathBuf, MemoryFile>>>,
    pub reads: Rc<Cell<usize>>,
}

#[derive(Clone)]
pub struct MemoryFile {
    content: Rc<RefCell<Vec<u8>>>,
    reads: Rc<Cell<usize>>,
}

impl MemoryDisk {
    pub fn flip(&self, path: &Path, offset: usize, mask: u8) {
        self.files.borrow()[path].content.borrow_mut()[offset] ^= mask;
    }

    pub fn content(&self, path: &Path) -> Vec<u8> {
        self.files.borrow()[path].content.borrow().clone()
    }

    pub fn set_content(&self, path: &Path, content: Vec<u8>) {
        let file = MemoryFile {
            content: Rc::new(RefCell::new(content)),
            reads: self.reads.clone(),
        };
        self.files.borrow_mut().insert(path.to_owned(), file);
    }
}

/// The output of a future that only waits for a [`MemoryDisk`].
pub fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("memory answers at once")
}

impl Disk for MemoryDisk {
    type File = MemoryFile;

    async fn open(&self, path: &Path, mode: OpenMode) -> io::Result<MemoryFile> {
        if mode == OpenMode::CreateNew {
            self.set_content(path, Vec::new());
        }
        let files = self.files.borrow();
        files
            .get(path)
            .cloned()
            .ok_or(io::ErrorKind::NotFound.into())
    }

    async fn remove(&self, path: &Path) -> io::Result<()> {
        self.files.borrow_mut().remove(path);
        Ok(())
    }

    async fn rename(&self, _: &Path, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn hard_link(&self, _: &Path, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn remove_dir(&self, _: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn list(&self, _: &Path) -> io::Result<Vec<DirEntry>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn create_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    async fn sync_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    async fn space(&self) -> io::Result<Space> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn give_way(&self) {}
}

impl File for MemoryFile {
    async fn read_at(&self, offset: u64, mut buf: AlignedBuf) -> (io::Result<usize>, AlignedBuf) {
        assert!(offset.is_multiple_of(4096) && buf.len().is_multiple_of(4096));
        self.reads.set(self.reads.get() + 1);
        let content = self.content.borrow();
        let from = usize::try_from(offset).unwrap().min(content.len());
        let len = buf.len().min(content.len() - from);
        buf[..len].copy_from_slice(&content[from..from + len]);
        (Ok(len), buf)
    }

    async fn write_at(&self, offset: u64, buf: AlignedBuf) -> (io::Result<()>, AlignedBuf) {
        assert!(offset.is_multiple_of(4096) && buf.len().is_multiple_of(4096));
        let from = usize::try_from(offset).unwrap();
        let mut content = self.content.borrow_mut();
        let end = (from + buf.len()).max(content.len());
        content.resize(end, 0);
        content[from..from + buf.len()].copy_from_slice(&buf);
        (Ok(()), buf)
    }

    async fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    async fn allocate(&self, len: u64) -> io::Result<()> {
        self.set_len(len).await
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).unwrap();
        self.content.borrow_mut().resize(len, 0);
        Ok(())
    }

    async fn len(&self) -> io::Result<u64> {
        Ok(u64::try_from(self.content.borrow().len()).unwrap())
    }
}
