//! The parts of a table file that are not data: constants, checksums, the footer. The page
//! `docs/formats/table.md` says the same with a byte ruler.

use bytes::Bytes;
use crc_fast::{CrcAlgorithm, Digest};
use torc_env::{SECTOR_BYTES, Token, TreeId};

use super::{Bounds, TableInfo};
use crate::le;

/// First bytes of a footer.
const MAGIC: [u8; 8] = *b"torc.tbl";
/// The version that this program writes, and the newest that it reads.
pub(crate) const VERSION: u16 = 1;
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
const CHECKSUM_AT: usize = 8;
const CHECKED_FROM: usize = 12;
const SECTIONS_AT: usize = 48;
const SECTION_BYTES: usize = 24;
const COUNTS_AT: usize = 120;
const TOKENS_AT: usize = 232;

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
    /// All but the keys, which stand in the bounds section.
    pub(crate) info: TableInfo,
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

impl Mismatch {
    pub(crate) fn new(expected: impl Into<String>, found: impl Into<String>) -> Mismatch {
        Mismatch {
            expected: expected.into(),
            found: found.into(),
        }
    }

    pub(crate) fn checksum(expected: u32, found: u32) -> Mismatch {
        Mismatch::new(
            format!("checksum {expected:08x}"),
            format!("content with checksum {found:08x}"),
        )
    }
}

impl Footer {
    /// The whole sector.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let info = &self.info;
        let mut out = Vec::with_capacity(FOOTER_BYTES);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
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
        let checksum = checksum(
            info.file_id,
            footer_offset(info.bytes),
            &[&out[CHECKED_FROM..]],
        );
        out[CHECKSUM_AT..CHECKED_FROM].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Reads the last sector of the table `file_id`, a file of `file_bytes`.
    pub(crate) fn decode(bytes: &[u8], file_id: u64, file_bytes: u64) -> Result<Footer, Mismatch> {
        assert_eq!(bytes.len(), FOOTER_BYTES, "a footer is one sector");
        if bytes[..8] != MAGIC {
            let found = String::from_utf8_lossy(&bytes[..8]);
            return Err(Mismatch::new("a table's footer", format!("{found:?}")));
        }
        let version = le::u16_at(bytes, 12);
        if version != VERSION {
            let expected = format!("table format version {VERSION}");
            return Err(Mismatch::new(expected, format!("version {version}")));
        }
        let features = le::u16_at(bytes, 14);
        if features != 0 {
            let found = format!("features {features:04x}");
            return Err(Mismatch::new("a table without further features", found));
        }
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
        let section = |index: usize| {
            let at = SECTIONS_AT + index * SECTION_BYTES;
            Section {
                offset: le::u64_at(bytes, at),
                len: le::u64_at(bytes, at + 8),
                checksum: le::u32_at(bytes, at + 16),
            }
        };
        let count = |index: usize| le::u64_at(bytes, COUNTS_AT + 8 * index);
        let bounds = |index: usize| Bounds {
            min: count(index),
            max: count(index + 1),
        };
        let footer = Footer {
            info: TableInfo {
                file_id,
                tree: TreeId(le::u32_at(bytes, 24)),
                bytes: le::u64_at(bytes, 32),
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
            },
            data_end: le::u64_at(bytes, 40),
            filters: section(0),
            fences: section(1),
            bounds: section(2),
        };
        footer.check_layout(file_bytes)?;
        Ok(footer)
    }

    /// Data, filters, fences and bounds lie one behind the other before the footer.
    fn check_layout(&self, file_bytes: u64) -> Result<(), Mismatch> {
        if self.info.bytes != file_bytes {
            let expected = format!("a file of {} bytes", self.info.bytes);
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
        if self.info.entries == 0 || self.info.blocks == 0 {
            return Err(Mismatch::new("a table with records", "none"));
        }
        Ok(())
    }
}

/// Where the footer of a file of `file_bytes` lies; zero for a file that is too short for one.
pub(crate) fn footer_offset(file_bytes: u64) -> u64 {
    file_bytes.saturating_sub(le::len64(FOOTER_BYTES))
}
