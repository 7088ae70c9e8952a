//! A body on disk, with its header: what a block and a separated value are stored as.
//!
//! ```text
//! checksum u32 | codec u8 | 0 u8×3 | stored length u32 | raw length u32 | count u32 | stored body
//! ```
//!
//! The checksum covers header and stored body, and is bound to the file id and to the place. In a sealed
//! file the stored body is encrypted, with its tag behind it.

use bytes::Bytes;
use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};

use super::format::{
    self, BLOCK_HEADER_BYTES, BLOCK_RAW_BYTES_MAX, CODEC_LZ4, CODEC_RAW, Mismatch,
};
use crate::crypt::{DataKey, TAG_BYTES};
use crate::le;

/// Larger bodies are stored as they are: compressing one in a single piece would hold up the shard,
/// and so would decompressing it at every read.
const COMPRESS_BYTES_MAX: usize = 256 << 10;

/// Finishes a body of the file `file_id` that will lie at `offset`: encrypts `stored` if there
/// is a `key`, and returns the header.
pub(crate) fn finish(
    (file_id, offset): (u64, u64),
    codec: u8,
    stored: &mut Vec<u8>,
    raw_len: usize,
    count: usize,
    key: Option<&DataKey>,
) -> [u8; BLOCK_HEADER_BYTES] {
    let mut header = [0; BLOCK_HEADER_BYTES];
    let len32 = |len: usize| u32::try_from(len).expect("bounded by BLOCK_RAW_BYTES_MAX");
    let tag_bytes = key.map_or(0, |_| TAG_BYTES);
    header[4] = codec;
    header[8..12].copy_from_slice(&len32(stored.len() + tag_bytes).to_le_bytes());
    header[12..16].copy_from_slice(&len32(raw_len).to_le_bytes());
    header[16..20].copy_from_slice(&len32(count).to_le_bytes());
    if let Some(key) = key {
        let tag = key.seal(offset, &context(file_id, offset, &header), stored);
        stored.extend_from_slice(&tag);
    }
    let checksum = format::checksum(file_id, offset, &[&header[4..], stored]);
    header[..4].copy_from_slice(&checksum.to_le_bytes());
    header
}

/// Checks, decrypts and decompresses the body that begins `bytes` (and may be followed by padding), read
/// at `offset` of the file; returns it with its count. A raw body is shared, not copied, unless it is
/// encrypted.
pub(crate) fn open(
    bytes: &Bytes,
    (file_id, offset): (u64, u64),
    key: Option<&DataKey>,
) -> Result<(Bytes, usize), Mismatch> {
    if bytes.len() < BLOCK_HEADER_BYTES {
        return Err(Mismatch::new("a header", format!("{} bytes", bytes.len())));
    }
    let len = |at: usize| usize::try_from(le::u32_at(bytes, at)).expect("32 bits fit usize");
    let (stored_len, raw_len, count) = (len(8), len(12), len(16));
    let Some(stored) = bytes[BLOCK_HEADER_BYTES..].get(..stored_len) else {
        let found = format!("{stored_len} in {} bytes", bytes.len());
        return Err(Mismatch::new(
            "a stored length inside of what was read",
            found,
        ));
    };
    let expected = le::u32_at(bytes, 0);
    let header = &bytes[4..BLOCK_HEADER_BYTES];
    let found = format::checksum(file_id, offset, &[header, stored]);
    if expected != found {
        return Err(Mismatch::checksum(expected, found));
    }
    if raw_len > BLOCK_RAW_BYTES_MAX {
        return Err(Mismatch::new(
            "a body below 1 GiB",
            format!("{raw_len} bytes"),
        ));
    }
    let opened = match key {
        Some(key) => {
            let context = context(file_id, offset, &bytes[..BLOCK_HEADER_BYTES]);
            let opened = key.open_copy(offset, &context, stored);
            Bytes::from(opened.map_err(|_| Mismatch::forged())?)
        }
        None => bytes.slice(BLOCK_HEADER_BYTES..BLOCK_HEADER_BYTES + stored_len),
    };
    let body = match bytes[4] {
        CODEC_RAW => opened,
        CODEC_LZ4 => lz4_flex::block::decompress(&opened, raw_len)
            .map_err(|error| Mismatch::new("an LZ4 block", error.to_string()))?
            .into(),
        codec => return Err(Mismatch::new("codec 0 or 1", format!("codec {codec}"))),
    };
    if body.len() != raw_len {
        let expected = format!("a body of {raw_len} bytes");
        return Err(Mismatch::new(expected, format!("{} bytes", body.len())));
    }
    Ok((body, count))
}

/// What is authenticated with a body: where it lies, and its header behind the checksum.
fn context(file_id: u64, offset: u64, header: &[u8]) -> [u8; 16 + BLOCK_HEADER_BYTES - 4] {
    let mut context = [0; 16 + BLOCK_HEADER_BYTES - 4];
    context[..8].copy_from_slice(&file_id.to_le_bytes());
    context[8..16].copy_from_slice(&offset.to_le_bytes());
    context[16..].copy_from_slice(&header[4..BLOCK_HEADER_BYTES]);
    context
}

/// Compresses bodies one after the other, in memory that it keeps.
#[derive(Default)]
pub(crate) struct Compressor {
    /// What the last body became.
    pub(crate) compressed: Vec<u8>,
    table: CompressTable,
}

impl Compressor {
    /// Compresses `body` if that makes it smaller by 1/16, and says with which codec it is to be stored.
    pub(crate) fn compress(&mut self, body: &[u8]) -> u8 {
        if body.len() > COMPRESS_BYTES_MAX {
            return CODEC_RAW;
        }
        self.compressed
            .resize(get_maximum_output_size(body.len()), 0);
        match compress_into_with_table(body, &mut self.compressed, &mut self.table) {
            Ok(len) if len <= body.len() - body.len() / 16 => {
                self.compressed.truncate(len);
                CODEC_LZ4
            }
            _ => CODEC_RAW,
        }
    }
}
