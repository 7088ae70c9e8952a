//! The footer of a blob. Values are read without it: all that they need stands in the tables. It is for
//! whoever looks at the file by itself: inspection, scrub, backup.

use torc_env::{SECTOR_BYTES, TreeId};

use super::BlobFile;
use crate::crypt::{DataKey, FileUse, KEY_REF_BYTES, KeyRef, Keys, TAG_BYTES};
use crate::error::Newer;
use crate::le;
use crate::table::format::{
    CHECKED_FROM, CHECKSUM_AT, FOOTER_BYTES, Mismatch, Unreadable, check_identity, checksum,
    footer_offset,
};

const MAGIC: [u8; 8] = *b"torc.blb";
const VERSION: u16 = 1;
/// Feature: values are encrypted.
const FEATURE_SEALED: u16 = 1;
const KEY_REF_AT: usize = 64;
const TAG_AT: usize = KEY_REF_AT + KEY_REF_BYTES;

/// What the last sector of a blob says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlobFooter {
    pub(crate) file: BlobFile,
    pub(crate) tree: TreeId,
    /// End of the last value's padding.
    pub(crate) data_end: u64,
    /// Values in it.
    pub(crate) values: u64,
    /// Sum of the values' lengths, before compression.
    pub(crate) raw_bytes: u64,
}

impl BlobFooter {
    /// The whole sector; authenticated if there is a `key`.
    pub(crate) fn encode(&self, key: Option<&DataKey>) -> Vec<u8> {
        let file = &self.file;
        let mut out = Vec::with_capacity(FOOTER_BYTES);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&VERSION.to_le_bytes());
        let features = key.map_or(0, |_| FEATURE_SEALED);
        out.extend_from_slice(&features.to_le_bytes());
        out.extend_from_slice(&file.file_id.to_le_bytes());
        out.extend_from_slice(&self.tree.0.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        for number in [file.bytes, self.data_end, self.values, self.raw_bytes] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.resize(FOOTER_BYTES, 0);
        let offset = footer_offset(file.bytes);
        if let Some(key) = key {
            out[KEY_REF_AT..TAG_AT].copy_from_slice(&key.reference().encode());
            let tag = key.seal(offset, &out[CHECKED_FROM..TAG_AT], &mut []);
            out[TAG_AT..TAG_AT + TAG_BYTES].copy_from_slice(&tag);
        }
        let checksum = checksum(file.file_id, offset, &[&out[CHECKED_FROM..]]);
        out[CHECKSUM_AT..CHECKED_FROM].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Reads the last sector of the blob `file_id`, a file of `file_bytes`. One that is sealed with a key
    /// which is not among `keys` is not authenticated.
    pub(crate) fn decode(
        bytes: &[u8],
        file_id: u64,
        file_bytes: u64,
        keys: &Keys,
    ) -> Result<BlobFooter, Unreadable> {
        assert_eq!(bytes.len(), FOOTER_BYTES, "a footer is one sector");
        let key = Self::check(bytes, file_id, file_bytes)?;
        if let Some(reference) = key
            && let Ok(key) = keys.find(reference, FileUse::Blob(file_id))
        {
            let mut tag = [0; TAG_BYTES];
            tag.copy_from_slice(&bytes[TAG_AT..TAG_AT + TAG_BYTES]);
            let offset = footer_offset(file_bytes);
            key.open(offset, &bytes[CHECKED_FROM..TAG_AT], &mut [], tag)
                .map_err(|_| Mismatch::forged())?;
        }
        let data_end = le::u64_at(bytes, 40);
        if data_end > footer_offset(file_bytes) {
            let found = format!("an end at {data_end}");
            return Err(Mismatch::new("values before the footer", found).into());
        }
        Ok(BlobFooter {
            file: BlobFile {
                file_id,
                bytes: file_bytes,
                value_bytes: 0,
                key,
            },
            tree: TreeId(le::u32_at(bytes, 24)),
            data_end,
            values: le::u64_at(bytes, 48),
            raw_bytes: le::u64_at(bytes, 56),
        })
    }

    /// Checks what makes the sector a blob's footer; returns the reference of a sealed one's key. What the checksum
    /// does not vouch for is no version.
    fn check(bytes: &[u8], file_id: u64, file_bytes: u64) -> Result<Option<KeyRef>, Unreadable> {
        if bytes[..8] != MAGIC {
            let found = String::from_utf8_lossy(&bytes[..8]);
            return Err(Mismatch::new("a blob's footer", format!("{found:?}")).into());
        }
        check_identity(bytes, file_id, file_bytes)?;
        let version = le::u16_at(bytes, 12);
        if version != VERSION {
            return Err(Unreadable::Newer(Newer::Version {
                found: version,
                known: VERSION,
            }));
        }
        let features = le::u16_at(bytes, 14);
        if features & !FEATURE_SEALED != 0 {
            return Err(Unreadable::Newer(Newer::Features {
                version,
                found: features,
            }));
        }
        let found = le::u64_at(bytes, 32);
        if found != file_bytes || !file_bytes.is_multiple_of(le::len64(SECTOR_BYTES)) {
            let expected = format!("a file of {found} bytes");
            return Err(Mismatch::new(expected, format!("{file_bytes} bytes")).into());
        }
        if features & FEATURE_SEALED == 0 {
            return Ok(None);
        }
        let key = KeyRef::decode(&bytes[KEY_REF_AT..]);
        key.map(Some)
            .ok_or_else(|| Mismatch::new("a key's name", "none").into())
    }
}
