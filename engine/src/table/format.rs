//! The parts of a table file that are not data: constants, checksums, the footer. The page
//! `docs/formats/table.md` says the same with a byte ruler.

use std::borrow::Cow;

use bytes::Bytes;
use crc_fast::{CrcAlgorithm, Digest};
use torc_env::{SECTOR_BYTES, Token, TreeId};

use super::{Bounds, TableInfo};
use crate::crypt::{DataKey, FileUse, KEY_REF_BYTES, KeyRef, Keys, MissingKey, TAG_BYTES};
use crate::error::Newer;
use crate::le;

/// First bytes of a footer.
const MAGIC: [u8; 8] = *b"torc.tbl";
/// The version of a table in the clear.
pub(crate) const VERSION: u16 = 1;
/// The version of a sealed table.
pub(crate) const SEALED_VERSION: u16 = 2;
/// The version of a table with references, and the newest that this program reads.
pub(crate) const BLOBS_VERSION: u16 = 3;
/// Feature: blocks, sections, and the footer's counts are encrypted.
const FEATURE_SEALED: u16 = 1;
/// Feature: records may refer to blobs, which are listed in the bounds.
const FEATURE_BLOBS: u16 = 2;
/// Blocks begin at multiples of this: half of it is lost a block, and it takes six bits off every
/// offset in the fences.
pub(crate) const BLOCK_ALIGN: u64 = 64;
/// One device page, which a block is filled towards.
pub(crate) const PAGE_BYTES: u64 = 4096;
/// The footer: the last sector of the file.
pub(crate) const FOOTER_BYTES: usize = SECTOR_BYTES;
/// Bytes before a block's body.
pub(crate) const BLOCK_HEADER_BYTES: usize = 20;
/// Largest body of a block. Larger ones cannot come from records within the engine's limits unless
/// thousands of keys share one token.
pub(crate) const BLOCK_RAW_BYTES_MAX: usize = 1 << 30;
/// Body as it is.
pub(crate) const CODEC_RAW: u8 = 0;
/// Body as one LZ4 block without a length.
pub(crate) const CODEC_LZ4: u8 = 1;

/// Position of the footer's checksum, and of what it covers up to the end of the sector.
pub(crate) const CHECKSUM_AT: usize = 8;
pub(crate) const CHECKED_FROM: usize = 12;
const SECTIONS_AT: usize = 48;
const SECTION_BYTES: usize = 24;
const COUNTS_AT: usize = 120;
const TOKENS_AT: usize = 232;
/// In a sealed table, the key reference and the tag of what the footer has encrypted.
const KEY_REF_AT: usize = 264;
const TAG_AT: usize = KEY_REF_AT + KEY_REF_BYTES;

/// CRC-32C over `parts` one after the other, bound to a file and a place in it: bytes that belong
/// elsewhere do not pass.
pub(crate) fn checksum(file_id: u64, offset: u64, parts: &[&[u8]]) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    digest.update(&file_id.to_le_bytes());
    digest.update(&offset.to_le_bytes());
    for part in parts {
        digest.update(part);
    }
    u32::try_from(digest.finalize()).expect("a 32-bit checksum")
}

/// Whether a footer, of a table or a blob, is that of the file `file_id` of `file_bytes`, and whole.
pub(crate) fn check_identity(bytes: &[u8], file_id: u64, file_bytes: u64) -> Result<(), Mismatch> {
    let found_id = le::u64_at(bytes, 16);
    if found_id != file_id {
        let expected = format!("the footer of file {file_id:016x}");
        return Err(Mismatch::new(expected, format!("that of {found_id:016x}")));
    }
    let expected = le::u32_at(bytes, CHECKSUM_AT);
    let found = checksum(
        file_id,
        footer_offset(file_bytes),
        &[&bytes[CHECKED_FROM..]],
    );
    if expected != found {
        return Err(Mismatch::checksum(expected, found));
    }
    Ok(())
}

/// Where a section lies, and its checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Section {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) checksum: u32,
}

/// What the last sector of a table says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Footer {
    /// All but the keys and the blobs, which stand in the bounds section.
    pub(crate) info: TableInfo,
    /// Whether the bounds section lists blobs.
    pub(crate) has_blobs: bool,
    /// End of the last block's padding; the filter section begins here.
    pub(crate) data_end: u64,
    pub(crate) filters: Section,
    pub(crate) fences: Section,
    pub(crate) bounds: Section,
}

/// What is wrong with bytes that were read: what should have been there, and what was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mismatch {
    pub(crate) expected: String,
    pub(crate) found: String,
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "expected {}, found {}", self.expected, self.found)
    }
}

impl Mismatch {
    pub(crate) fn new(expected: impl Into<String>, found: impl Into<String>) -> Mismatch {
        Mismatch {
            expected: expected.into(),
            found: found.into(),
        }
    }

    pub(crate) fn forged() -> Mismatch {
        Mismatch::new(
            "bytes sealed with the table's key for this place",
            "some that do not authenticate",
        )
    }

    pub(crate) fn checksum(expected: u32, found: u32) -> Mismatch {
        Mismatch::new(
            format!("checksum {expected:08x}"),
            format!("content with checksum {found:08x}"),
        )
    }
}

/// What a footer says of the table, its counts and tokens apart: all that can be read without a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outline {
    pub(crate) data_end: u64,
    pub(crate) filters: Section,
    pub(crate) fences: Section,
    pub(crate) bounds: Section,
    /// The key that it is sealed with.
    pub(crate) key: Option<KeyRef>,
    /// Whether it lists blobs.
    pub(crate) has_blobs: bool,
}

/// Why a footer cannot be read.
#[derive(Debug)]
pub(crate) enum Unreadable {
    Mismatch(Mismatch),
    Newer(Newer),
    Key(MissingKey),
}

impl From<Mismatch> for Unreadable {
    fn from(mismatch: Mismatch) -> Unreadable {
        Unreadable::Mismatch(mismatch)
    }
}

/// What is authenticated with the footer's encrypted part: where it lies, and what stands before it and
/// the tag behind the checksum.
fn context(file_id: u64, offset: u64, footer: &[u8]) -> Vec<u8> {
    let mut context = Vec::with_capacity(16 + COUNTS_AT - CHECKED_FROM + KEY_REF_BYTES);
    context.extend_from_slice(&file_id.to_le_bytes());
    context.extend_from_slice(&offset.to_le_bytes());
    context.extend_from_slice(&footer[CHECKED_FROM..COUNTS_AT]);
    context.extend_from_slice(&footer[KEY_REF_AT..TAG_AT]);
    context
}

impl Footer {
    /// The whole sector, its counts and tokens encrypted if there is a `key`.
    pub(crate) fn encode(&self, key: Option<&DataKey>) -> Vec<u8> {
        let info = &self.info;
        let mut out = Vec::with_capacity(FOOTER_BYTES);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[0; 4]);
        let sealed = key.map_or(0, |_| FEATURE_SEALED);
        let (version, features) = match (info.blobs.is_empty(), sealed) {
            (true, 0) => (VERSION, 0),
            (true, _) => (SEALED_VERSION, sealed),
            (false, _) => (BLOBS_VERSION, sealed | FEATURE_BLOBS),
        };
        out.extend_from_slice(&version.to_le_bytes());
        out.extend_from_slice(&features.to_le_bytes());
        out.extend_from_slice(&info.file_id.to_le_bytes());
        out.extend_from_slice(&info.tree.0.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&info.bytes.to_le_bytes());
        out.extend_from_slice(&self.data_end.to_le_bytes());
        for section in [self.filters, self.fences, self.bounds] {
            out.extend_from_slice(&section.offset.to_le_bytes());
            out.extend_from_slice(&section.len.to_le_bytes());
            out.extend_from_slice(&section.checksum.to_le_bytes());
            out.extend_from_slice(&[0; 4]);
        }
        debug_assert_eq!(out.len(), COUNTS_AT);
        let counts = [
            info.blocks,
            info.entries,
            info.tombstones,
            info.expiring,
            info.key_bytes,
            info.value_bytes,
            info.seqnos.min,
            info.seqnos.max,
            info.stamps.min,
            info.stamps.max,
            info.expiries_ms.min,
            info.expiries_ms.max,
            info.purgeable_stamps.min,
            info.purgeable_stamps.max,
        ];
        for count in counts {
            out.extend_from_slice(&count.to_le_bytes());
        }
        debug_assert_eq!(out.len(), TOKENS_AT);
        out.extend_from_slice(&info.first_token.0.to_le_bytes());
        out.extend_from_slice(&info.last_token.0.to_le_bytes());
        out.resize(FOOTER_BYTES, 0);
        let offset = footer_offset(info.bytes);
        if let Some(key) = key {
            out[KEY_REF_AT..TAG_AT].copy_from_slice(&key.reference().encode());
            let context = context(info.file_id, offset, &out);
            let tag = key.seal(offset, &context, &mut out[COUNTS_AT..KEY_REF_AT]);
            out[TAG_AT..TAG_AT + TAG_BYTES].copy_from_slice(&tag);
        }
        let checksum = checksum(info.file_id, offset, &[&out[CHECKED_FROM..]]);
        out[CHECKSUM_AT..CHECKED_FROM].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Reads the last sector of the table `file_id`, a file of `file_bytes`, and returns with it the key of
    /// a sealed one.
    pub(crate) fn decode(
        bytes: &[u8],
        file_id: u64,
        file_bytes: u64,
        keys: &Keys,
    ) -> Result<(Footer, Option<DataKey>), Unreadable> {
        let outline = Outline::decode(bytes, file_id, file_bytes)?;
        let Some(reference) = outline.key else {
            return Ok((Footer::fields(bytes, file_id, file_bytes, outline)?, None));
        };
        let key = keys.find(reference, FileUse::Table(file_id));
        let key = key.map_err(Unreadable::Key)?;
        let offset = footer_offset(file_bytes);
        let mut opened = bytes.to_vec();
        let mut tag = [0; TAG_BYTES];
        tag.copy_from_slice(&bytes[TAG_AT..TAG_AT + TAG_BYTES]);
        let context = context(file_id, offset, bytes);
        key.open(offset, &context, &mut opened[COUNTS_AT..KEY_REF_AT], tag)
            .map_err(|_| Mismatch::forged())?;
        let mut footer = Footer::fields(&opened, file_id, file_bytes, outline)?;
        footer.info.key = Some(reference.id);
        Ok((footer, Some(key)))
    }
}

impl Outline {
    /// Checks the last sector of the table `file_id`, a file of `file_bytes`, and reads what of it is in
    /// the clear. What the checksum does not vouch for is no version.
    pub(crate) fn decode(
        bytes: &[u8],
        file_id: u64,
        file_bytes: u64,
    ) -> Result<Outline, Unreadable> {
        assert_eq!(bytes.len(), FOOTER_BYTES, "a footer is one sector");
        if bytes[..8] != MAGIC {
            let found = String::from_utf8_lossy(&bytes[..8]);
            return Err(Mismatch::new("a table's footer", format!("{found:?}")).into());
        }
        check_identity(bytes, file_id, file_bytes)?;
        let version = le::u16_at(bytes, 12);
        let features = le::u16_at(bytes, 14);
        let known = match version {
            VERSION => features == 0,
            SEALED_VERSION => features == FEATURE_SEALED,
            BLOBS_VERSION => features & !FEATURE_SEALED == FEATURE_BLOBS,
            _ => {
                return Err(Unreadable::Newer(Newer::Version {
                    found: version,
                    known: BLOBS_VERSION,
                }));
            }
        };
        let is_sealed = features & FEATURE_SEALED != 0;
        if !known {
            return Err(Unreadable::Newer(Newer::Features {
                version,
                found: features,
            }));
        }
        let section = |index: usize| {
            let at = SECTIONS_AT + index * SECTION_BYTES;
            Section {
                offset: le::u64_at(bytes, at),
                len: le::u64_at(bytes, at + 8),
                checksum: le::u32_at(bytes, at + 16),
            }
        };
        let outline = Outline {
            data_end: le::u64_at(bytes, 40),
            filters: section(0),
            fences: section(1),
            bounds: section(2),
            key: is_sealed
                .then(|| KeyRef::decode(&bytes[KEY_REF_AT..]))
                .flatten(),
            has_blobs: features & FEATURE_BLOBS != 0,
        };
        outline.check_layout(le::u64_at(bytes, 32), file_bytes)?;
        Ok(outline)
    }

    /// Data, filters, fences and bounds lie one behind the other before the footer.
    fn check_layout(&self, expected_bytes: u64, file_bytes: u64) -> Result<(), Mismatch> {
        if expected_bytes != file_bytes {
            let expected = format!("a file of {expected_bytes} bytes");
            return Err(Mismatch::new(expected, format!("{file_bytes} bytes")));
        }
        let mut end = self.data_end;
        for section in [self.filters, self.fences, self.bounds] {
            if section.offset != end {
                let expected = format!("a section at {end}");
                return Err(Mismatch::new(expected, format!("at {}", section.offset)));
            }
            end = end.saturating_add(section.len);
        }
        if end > footer_offset(file_bytes) {
            return Err(Mismatch::new(
                "sections before the footer",
                format!("an end at {end}"),
            ));
        }
        Ok(())
    }
}

impl Footer {
    /// Reads counts and tokens, in the clear by now.
    fn fields(
        bytes: &[u8],
        file_id: u64,
        file_bytes: u64,
        outline: Outline,
    ) -> Result<Footer, Mismatch> {
        let count = |index: usize| le::u64_at(bytes, COUNTS_AT + 8 * index);
        let bounds = |index: usize| Bounds {
            min: count(index),
            max: count(index + 1),
        };
        let footer = Footer {
            info: TableInfo {
                file_id,
                tree: TreeId(le::u32_at(bytes, 24)),
                bytes: file_bytes,
                key: None,
                blocks: count(0),
                entries: count(1),
                tombstones: count(2),
                expiring: count(3),
                key_bytes: count(4),
                value_bytes: count(5),
                seqnos: bounds(6),
                stamps: bounds(8),
                expiries_ms: bounds(10),
                purgeable_stamps: bounds(12),
                first_token: Token(le::u128_at(bytes, TOKENS_AT)),
                last_token: Token(le::u128_at(bytes, TOKENS_AT + 16)),
                first_key: Bytes::new(),
                last_key: Bytes::new(),
                blobs: Vec::new(),
            },
            has_blobs: outline.has_blobs,
            data_end: outline.data_end,
            filters: outline.filters,
            fences: outline.fences,
            bounds: outline.bounds,
        };
        if footer.info.entries == 0 || footer.info.blocks == 0 {
            return Err(Mismatch::new("a table with records", "none"));
        }
        Ok(footer)
    }
}

/// Where the footer of a file of `file_bytes` lies; zero for a file that is too short for one.
pub(crate) fn footer_offset(file_bytes: u64) -> u64 {
    file_bytes.saturating_sub(le::len64(FOOTER_BYTES))
}

/// Encrypts a section that will lie at `offset` of the table `file_id`, if there is a `key`.
pub(crate) fn seal_section(key: Option<&DataKey>, file_id: u64, offset: u64, bytes: &mut Vec<u8>) {
    if let Some(key) = key {
        let tag = key.seal(offset, &file_id.to_le_bytes(), bytes);
        bytes.extend_from_slice(&tag);
    }
}

/// The content of the section that lies at `offset` of the table `file_id`.
pub(crate) fn open_section<'a>(
    key: Option<&DataKey>,
    file_id: u64,
    offset: u64,
    bytes: &'a [u8],
) -> Result<Cow<'a, [u8]>, Mismatch> {
    let Some(key) = key else {
        return Ok(Cow::Borrowed(bytes));
    };
    key.open_copy(offset, &file_id.to_le_bytes(), bytes)
        .map(Cow::Owned)
        .map_err(|_| Mismatch::forged())
}
