//! The frame: the unit in which the WAL and the manifest's log are written, checked and chained.
//!
//! ```text
//!  0         4      6      8               16              24              32
//! +---------+------+------+---------------+---------------+---------------+
//! | magic   | ver. | flags| log           | sequence      | previous      |
//! +---------+------+------+---------------+---------------+---------------+
//! | durable through       | payload | recs | first seqno   | body  | header|
//! | 32                    | 40      | 44   | 48            | 56    | 60    | 64
//! +-----------------------+---------+------+---------------+-------+-------+
//! | payload, then zeros to a multiple of 4096                              |
//! +------------------------------------------------------------------------+
//! ```
//!
//! Little-endian. `body` is the CRC32C of everything behind the header, zeros included; `header`
//! that of the 60 bytes before it; so a flip of any single bit of a frame is found. `previous` is the
//! hash of the frame before (xxh3-64 of its header, which holds its body's checksum): frames form
//! a chain, across the files of a log too. `durable through` is the highest sequence known to be durable
//! when this frame was composed: a frame at or below such a mark that cannot be read is rot, not
//! an unfinished write. Pages: `docs/formats/wal.md`, `docs/formats/manifest.md`.
//!
//! A *sealed* frame has the version behind the plain one's. Its payload is the encrypted records, the
//! tag, and the key reference ([`crate::crypt`]); what stands before `body` in its header is authenticated with
//! them, and the checksums are those of what is stored. So frames are found, checked and chained without
//! a key.

use torc_env::SECTOR_BYTES;
use xxhash_rust::xxh3::xxh3_64;

use crate::codec::{Reader, Writer};
use crate::crypt::{DataKey, SEAL_BYTES, TAG_BYTES};

/// Bytes of a frame's header.
pub(crate) const HEADER_BYTES: usize = 64;
/// Bytes of the header that its checksum covers.
const CHECKED_BYTES: usize = 60;
/// Bytes of the header that are authenticated with a sealed payload: all before the checksums.
pub(crate) const CONTEXT_BYTES: usize = 56;
/// Largest payload that a reader believes in, in bytes: above every record's limit.
pub(crate) const PAYLOAD_BYTES_MAX: u32 = 1 << 30;

/// What tells one log's frames from another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    pub(crate) magic: u32,
    pub(crate) version: u16,
    /// The version of sealed frames, if there may be any.
    pub(crate) sealed_version: Option<u16>,
}

impl Format {
    /// The newest version that this program reads.
    pub(crate) fn newest(self) -> u16 {
        self.sealed_version.unwrap_or(self.version)
    }
}

/// A frame's header without its checksums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Whether the payload is encrypted.
    pub(crate) sealed: bool,
    /// Meaning is the log's.
    pub(crate) flags: u16,
    /// The file's identity: frames of a recycled file's former life carry another one.
    pub(crate) log: u64,
    /// Counts the frames of a log, across its files, from 1.
    pub(crate) sequence: u64,
    /// Hash of the frame before; 0 for the first.
    pub(crate) previous: u64,
    /// Highest sequence known durable.
    pub(crate) durable_through: u64,
    /// Bytes of payload as stored: what sealing adds counts.
    pub(crate) payload_len: u32,
    /// Records in the payload.
    pub(crate) record_count: u32,
    /// Sequence number of the first record; the others count on.
    pub(crate) first_seqno: u64,
}

/// Why bytes are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Damage {
    /// No frame begins here.
    #[error("no frame begins here")]
    NoFrame,
    /// A whole header of a version that is not known.
    #[error("frame of version {found}")]
    Version {
        /// The version.
        found: u16,
        /// The log that it belongs to.
        log: u64,
    },
    /// The header's checksum does not fit.
    #[error("header checksum {found:08x}, expected {expected:08x}")]
    Header {
        /// Computed.
        expected: u32,
        /// In the header.
        found: u32,
    },
    /// The body's checksum does not fit, or the body is cut off.
    #[error("body checksum does not fit or the body is cut off")]
    Body,
}

impl Header {
    /// Whole size of the frame: header, payload and padding.
    pub(crate) fn frame_bytes(&self) -> usize {
        frame_bytes(usize::try_from(self.payload_len).expect("an address has at least 32 bits"))
    }

    /// Finishes a frame whose records are in place behind the header: encrypts them if there is a `key`,
    /// pads the frame with zeros, fills in the header and returns the frame's hash. `frame` is as long as
    /// [`Header::frame_bytes`].
    pub(crate) fn finish(&self, format: Format, frame: &mut [u8], key: Option<&DataKey>) -> u64 {
        assert_eq!(frame.len(), self.frame_bytes(), "length of the frame");
        assert_eq!(self.sealed, key.is_some(), "a sealed frame has a key");
        let version = match format.sealed_version {
            Some(sealed) if self.sealed => sealed,
            None if self.sealed => panic!("frames of this kind are not sealed"),
            _ => format.version,
        };
        let (header, body) = frame.split_at_mut(HEADER_BYTES);
        let mut fields = Writer::new(header);
        fields.u32(format.magic).u16(version).u16(self.flags);
        fields.u64(self.log).u64(self.sequence).u64(self.previous);
        fields.u64(self.durable_through);
        fields.u32(self.payload_len).u32(self.record_count);
        fields.u64(self.first_seqno);
        assert_eq!(fields.position(), CONTEXT_BYTES, "layout of the header");
        let payload_len =
            usize::try_from(self.payload_len).expect("an address has at least 32 bits");
        let (payload, padding) = body.split_at_mut(payload_len);
        padding.fill(0);
        if let Some(key) = key {
            let (records, behind) = payload.split_at_mut(payload_len - SEAL_BYTES);
            let tag = key.seal(self.sequence, &header[..CONTEXT_BYTES], records);
            behind[..TAG_BYTES].copy_from_slice(&tag);
            behind[TAG_BYTES..].copy_from_slice(&key.reference().encode());
        }
        let body_crc = crc_fast::crc32_iscsi(body);
        header[CONTEXT_BYTES..CHECKED_BYTES].copy_from_slice(&body_crc.to_le_bytes());
        let header_crc = crc_fast::crc32_iscsi(&frame[..CHECKED_BYTES]);
        frame[CHECKED_BYTES..HEADER_BYTES].copy_from_slice(&header_crc.to_le_bytes());
        xxh3_64(&frame[..HEADER_BYTES])
    }

    /// Reads a header from the beginning of `bytes`; the body is not looked at.
    pub(crate) fn parse(format: Format, bytes: &[u8]) -> Result<Header, Damage> {
        let header = bytes.get(..HEADER_BYTES).ok_or(Damage::NoFrame)?;
        Self::fields(format, header).ok_or(Damage::NoFrame)?
    }

    fn fields(format: Format, bytes: &[u8]) -> Option<Result<Header, Damage>> {
        let mut fields = Reader::new(bytes);
        if fields.u32()? != format.magic {
            return None;
        }
        let version = fields.u16()?;
        let header = Header {
            sealed: Some(version) == format.sealed_version,
            flags: fields.u16()?,
            log: fields.u64()?,
            sequence: fields.u64()?,
            previous: fields.u64()?,
            durable_through: fields.u64()?,
            payload_len: fields.u32()?,
            record_count: fields.u32()?,
            first_seqno: fields.u64()?,
        };
        let _body_crc = fields.u32()?;
        let found = fields.u32()?;
        let expected = crc_fast::crc32_iscsi(&bytes[..CHECKED_BYTES]);
        if found != expected {
            return Some(Err(Damage::Header { expected, found }));
        }
        if version != format.version && !header.sealed {
            return Some(Err(Damage::Version {
                found: version,
                log: header.log,
            }));
        }
        if header.payload_len > PAYLOAD_BYTES_MAX {
            return Some(Err(Damage::Body));
        }
        Some(Ok(header))
    }

    /// Checks the body of a frame whose header was parsed from the same bytes, and returns its
    /// payload, sealed if it is, and the frame's hash.
    pub(crate) fn verify<'a>(&self, bytes: &'a [u8]) -> Result<(&'a [u8], u64), Damage> {
        let frame = bytes.get(..self.frame_bytes()).ok_or(Damage::Body)?;
        let (header, body) = frame.split_at(HEADER_BYTES);
        let stored = Reader::new(&header[CHECKED_BYTES - 4..]).u32();
        if stored != Some(crc_fast::crc32_iscsi(body)) {
            return Err(Damage::Body);
        }
        let payload_len =
            usize::try_from(self.payload_len).expect("an address has at least 32 bits");
        Ok((&body[..payload_len], xxh3_64(header)))
    }
}

/// Size of a frame with a payload of `payload_len` bytes.
pub(crate) fn frame_bytes(payload_len: usize) -> usize {
    (HEADER_BYTES + payload_len).next_multiple_of(SECTOR_BYTES)
}

/// A point of a log: its last frame's sequence and hash. What comes next must continue it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// Counts the frames of a log from 1; 0 before the first.
    pub sequence: u64,
    /// xxh3-64 of the frame's header.
    pub hash: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: Format = Format {
        magic: 0x1234_5678,
        version: 1,
        sealed_version: None,
    };

    fn frame(payload: &[u8]) -> (Header, Vec<u8>) {
        let header = Header {
            sealed: false,
            flags: 1,
            log: 2,
            sequence: 3,
            previous: 4,
            durable_through: 5,
            payload_len: u32::try_from(payload.len()).unwrap(),
            record_count: 6,
            first_seqno: 7,
        };
        let mut bytes = vec![0xAA; header.frame_bytes()];
        bytes[HEADER_BYTES..HEADER_BYTES + payload.len()].copy_from_slice(payload);
        header.finish(FORMAT, &mut bytes, None);
        (header, bytes)
    }

    fn read(bytes: &[u8]) -> Result<(Header, Vec<u8>), Damage> {
        let header = Header::parse(FORMAT, bytes)?;
        let (payload, _) = header.verify(bytes)?;
        Ok((header, payload.to_vec()))
    }

    #[test]
    fn a_frame_comes_back_whole() {
        for payload in [&b""[..], b"payload", &[9; 4032], &[9; 4033]] {
            let (header, bytes) = frame(payload);
            assert_eq!(bytes.len() % SECTOR_BYTES, 0);
            assert_eq!(read(&bytes), Ok((header, payload.to_vec())));
        }
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let (_, mut bytes) = frame(&[3; 300]);
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&bytes).is_err(), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        assert!(read(&bytes).is_ok());
    }

    #[test]
    fn every_truncation_is_found() {
        let (_, bytes) = frame(&[3; 300]);
        for len in 0..bytes.len() {
            assert!(read(&bytes[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn another_version_is_named() {
        let newer = Format {
            version: 2,
            ..FORMAT
        };
        let (header, mut bytes) = frame(b"");
        header.finish(newer, &mut bytes, None);
        assert_eq!(read(&bytes), Err(Damage::Version { found: 2, log: 2 }));
    }
}
