//! Messages of a fixed length between a magic and a checksum: the handshakes.
//!
//! Layout: four bytes of magic, the fields, a CRC-32C of all before it, little-endian.

use bytes::{Buf, BufMut, BytesMut};

const MAGIC_BYTES: usize = 4;
const CHECKSUM_BYTES: usize = 4;

/// Why bytes are not the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SealError {
    /// The peer speaks something else; these are its first bytes, zero where they have not come.
    Magic([u8; MAGIC_BYTES]),
    /// The bytes were changed on the way.
    Checksum,
}

/// Appends a message: `magic`, what `fields` writes, and their checksum.
pub fn seal(out: &mut BytesMut, magic: [u8; 4], fields: impl FnOnce(&mut BytesMut)) {
    let start = out.len();
    out.put_slice(&magic);
    fields(out);
    reseal(out, start);
}

/// Appends the checksum of what stands from `start` on.
pub fn reseal(out: &mut BytesMut, start: usize) {
    let checksum = crc_fast::crc32_iscsi(&out[start..]);
    out.put_u32_le(checksum);
}

/// Takes a message of `len` bytes off the front of `input` and returns its fields; `None` when more
/// bytes are needed.
///
/// # Errors
/// When it is no such message; a wrong magic is noticed at its first wrong byte.
pub fn open(
    input: &mut BytesMut,
    magic: [u8; 4],
    len: usize,
) -> Result<Option<BytesMut>, SealError> {
    let seen = input.len().min(MAGIC_BYTES);
    if input[..seen] != magic[..seen] {
        let mut found = [0; MAGIC_BYTES];
        found[..seen].copy_from_slice(&input[..seen]);
        return Err(SealError::Magic(found));
    }
    if input.len() < len {
        return Ok(None);
    }
    let mut bytes = input.split_to(len);
    let mut checksum = bytes.split_off(len - CHECKSUM_BYTES);
    if crc_fast::crc32_iscsi(&bytes) != checksum.get_u32_le() {
        return Err(SealError::Checksum);
    }
    bytes.advance(MAGIC_BYTES);
    Ok(Some(bytes))
}
