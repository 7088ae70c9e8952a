//! Blobs: files of large values, which tables refer to instead of holding them.
//!
//! A flush or compaction that meets a value above the threshold writes it to a blob ([`BlobWriter`]) and
//! a reference of 24 bytes ([`BlobRef`]) to its table; later compactions carry the reference on and
//! leave the value where it is (L. Lu et al., "WiscKey", 2016). A table lists the blobs that it refers
//! to, with what of each is alive in it ([`BlobUse`]): no other list of them exists. The format is
//! `docs/formats/blob.md`.
//!
//! Invariants: a blob is durable, name included, before a table that refers to it is finished; it is never
//! written again; it goes when no table of its store refers to it. A value is verified whenever it is
//! read, against the blob's id and the place.
//!
//! Nothing here knows which blobs are in use, or which are worth emptying: that is the store's
//! [`tables`](crate::store) and [`crate::compaction`].

mod format;
#[cfg(test)]
mod format_tests;
mod reader;
mod writer;

use std::path::{Path, PathBuf};

use crate::crypt::{KEY_REF_BYTES, KeyId, KeyRef};
use crate::le;

pub(crate) use format::BlobFooter;
pub use reader::Blob;
pub use writer::BlobWriter;

/// Bytes of a [`BlobRef`].
pub const BLOB_REF_BYTES: usize = 24;
/// Bytes of a [`BlobUse`].
pub(crate) const BLOB_USE_BYTES: usize = 48 + KEY_REF_BYTES;

/// Where a blob lies in the directory of tables `dir`.
pub fn blob_path(dir: &Path, file_id: u64) -> PathBuf {
    dir.join(format!("{file_id:016x}.blob"))
}

/// The file id in the name of a blob, if it is one.
pub fn blob_id(name: &str) -> Option<u64> {
    let id = name.strip_suffix(".blob")?;
    (id.len() == 16).then(|| u64::from_str_radix(id, 16).ok())?
}

/// Where a value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobRef {
    /// The blob.
    pub file_id: u64,
    /// Where the value's header begins.
    pub offset: u64,
    /// Bytes from there to the end of what is stored.
    pub stored_len: u32,
    /// Bytes of the value.
    pub raw_len: u32,
}

impl BlobRef {
    /// As it stands in a table.
    pub(crate) fn encode(&self) -> [u8; BLOB_REF_BYTES] {
        let mut bytes = [0; BLOB_REF_BYTES];
        bytes[..8].copy_from_slice(&self.file_id.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.offset.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.stored_len.to_le_bytes());
        bytes[20..].copy_from_slice(&self.raw_len.to_le_bytes());
        bytes
    }

    /// `None` unless there are as many bytes as a reference has.
    pub(crate) fn decode(bytes: &[u8]) -> Option<BlobRef> {
        (bytes.len() == BLOB_REF_BYTES).then(|| BlobRef {
            file_id: le::u64_at(bytes, 0),
            offset: le::u64_at(bytes, 8),
            stored_len: le::u32_at(bytes, 16),
            raw_len: le::u32_at(bytes, 20),
        })
    }

    /// Bytes of the blob that hold the value, with the padding behind it.
    pub(crate) fn footprint(&self) -> u64 {
        footprint(self.stored_len)
    }
}

/// See [`BlobRef::footprint`].
fn footprint(stored_len: u32) -> u64 {
    u64::from(stored_len).next_multiple_of(crate::table::format::BLOCK_ALIGN)
}

/// A finished blob: all that is needed to read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobFile {
    /// Names the file ([`blob_path`]). Tables and blobs of a data directory have no id in common.
    pub file_id: u64,
    /// Length of the file.
    pub bytes: u64,
    /// What its values take of it: the rest is footer and padding.
    pub value_bytes: u64,
    pub(crate) key: Option<KeyRef>,
}

impl BlobFile {
    /// The master key that it is sealed with; `None` when it is in the clear.
    pub fn key(&self) -> Option<KeyId> {
        self.key.map(|key| key.id)
    }
}

/// What a table has of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobUse {
    /// The blob.
    pub file: BlobFile,
    /// References to it in the table.
    pub values: u64,
    /// What these values take of the blob.
    pub bytes: u64,
}

impl BlobUse {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let file = &self.file;
        for number in [
            file.file_id,
            file.bytes,
            file.value_bytes,
            self.values,
            self.bytes,
            u64::from(file.key.is_some()),
        ] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        let key = file.key.map_or([0; KEY_REF_BYTES], KeyRef::encode);
        out.extend_from_slice(&key);
    }

    /// Reads the list at the end of a table's bounds; `None` when it is none.
    pub(crate) fn decode_all(bytes: &[u8]) -> Option<Vec<BlobUse>> {
        let (items, rest) = bytes.as_chunks::<BLOB_USE_BYTES>();
        if !rest.is_empty() {
            return None;
        }
        let uses: Vec<BlobUse> = items.iter().map(Self::decode).collect::<Option<_>>()?;
        let ascends = uses
            .windows(2)
            .all(|pair| pair[0].file.file_id < pair[1].file.file_id);
        ascends.then_some(uses)
    }

    fn decode(bytes: &[u8; BLOB_USE_BYTES]) -> Option<BlobUse> {
        let key = match le::u64_at(bytes, 40) {
            0 => None,
            1 => Some(KeyRef::decode(&bytes[48..])?),
            _ => return None,
        };
        Some(BlobUse {
            file: BlobFile {
                file_id: le::u64_at(bytes, 0),
                bytes: le::u64_at(bytes, 8),
                value_bytes: le::u64_at(bytes, 16),
                key,
            },
            values: le::u64_at(bytes, 24),
            bytes: le::u64_at(bytes, 32),
        })
    }
}
