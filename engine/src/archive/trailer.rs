//! The last sector of an archived segment.
//!
//! ```text
//!  0        8         10        12       14       16
//! +--------+---------+---------+--------+--------+
//! | magic  | version | layout  | shard  | shards |
//! +--------+---------+----+----+--------+--------+--------+----------+
//! | node (u128)           | lineage | segment | body bytes | key id   |
//! | 16                    | 32      | 40      | 48         | 56       | 64
//! +----------+----------+-+-------+-+---------+-+----------+---------+
//! | first    | previous | last    | last hash   | reach    | body xxh3-128     |
//! | 64       | 72       | 80      | 88          | 96       | 104               | 120
//! +----------+----------+---------+-------------+----------+-------------------+
//! | crc32c of all before it | zeros                                             |
//! | 120                     | 124                                               | 4096
//! ```
//!
//! Little-endian.

use torc_env::SECTOR_BYTES;
use xxhash_rust::xxh3::xxh3_128;

use super::SegmentId;
use crate::codec::{Reader, Writer};
use crate::crypt::KeyId;

const MAGIC: [u8; 8] = *b"torc.wal";
const VERSION: u16 = 1;
/// Bytes that the checksum covers.
const CHECKED_BYTES: usize = 120;
/// Bytes of a trailer that are used.
const USED_BYTES: usize = CHECKED_BYTES + 4;

/// Whose log it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The node's uuid.
    pub node: u128,
    /// The lineage of its data: the log begins anew in each.
    pub lineage: u64,
    /// The layout of its data: the log begins anew in each.
    pub layout: u16,
    /// Shards in that layout.
    pub shards: u16,
    /// Which of them.
    pub shard: u16,
}

/// What an archived segment says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// Whose log it is.
    pub origin: Origin,
    /// Which segment.
    pub segment: SegmentId,
    /// Bytes of frames before the trailer.
    pub body_bytes: u64,
    /// The master key of the last frame; `None` when it is in the clear.
    pub key: Option<KeyId>,
    /// Sequence of the first frame. Those from it to `last` are here, and follow each other.
    pub first: u64,
    /// Hash of the frame before the first.
    pub previous: u64,
    /// Sequence of the last frame that follows.
    pub last: u64,
    /// Its hash.
    pub last_hash: u64,
    /// Everything that the store decided up to here, in microseconds since 1970, is in this segment or an earlier one;
    /// 0 when that is not known.
    pub reach_us: u64,
    /// xxh3-128 of the frames.
    pub body_xxh3: u128,
}

/// Why a file is no archived segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// There is no trailer at its end.
    #[error(
        "it does not end with the trailer of an archived segment: it is cut off, or something else"
    )]
    NoTrailer,
    /// The trailer's checksum does not fit.
    #[error("the checksum of its trailer does not fit: it was damaged or changed")]
    Trailer,
    /// A version that this build does not read.
    #[error("it has version {found}, this build reads {VERSION}")]
    Version {
        /// The version.
        found: u16,
    },
    /// It is shorter or longer than its trailer says.
    #[error("it has {found} bytes, its trailer says {expected}")]
    Length {
        /// As the trailer says.
        expected: u64,
        /// Its bytes.
        found: u64,
    },
    /// The frames are not those that were archived.
    #[error("the checksum of its frames does not fit: it was damaged or changed")]
    Body,
}

impl Trailer {
    /// The last sector.
    pub(crate) fn encode(&self) -> [u8; SECTOR_BYTES] {
        let mut sector = [0; SECTOR_BYTES];
        let mut fields = Writer::new(&mut sector);
        let origin = &self.origin;
        fields.bytes(&MAGIC).u16(VERSION);
        fields
            .u16(origin.layout)
            .u16(origin.shard)
            .u16(origin.shards);
        fields.bytes(&origin.node.to_le_bytes()).u64(origin.lineage);
        fields.u64(self.segment.0).u64(self.body_bytes);
        fields.u64(self.key.map_or(0, |key| key.0));
        fields.u64(self.first).u64(self.previous);
        fields.u64(self.last).u64(self.last_hash);
        fields.u64(self.reach_us);
        fields.bytes(&self.body_xxh3.to_le_bytes());
        assert_eq!(fields.position(), CHECKED_BYTES, "layout of the trailer");
        let crc = crc_fast::crc32_iscsi(&sector[..CHECKED_BYTES]);
        sector[CHECKED_BYTES..USED_BYTES].copy_from_slice(&crc.to_le_bytes());
        sector
    }

    /// Reads the last sector of a file of `file_bytes` bytes. The frames are not looked at.
    ///
    /// # Errors
    /// See [`Damage`].
    pub fn decode(sector: &[u8], file_bytes: u64) -> Result<Trailer, Damage> {
        let (trailer, crc) = Self::fields(sector).ok_or(Damage::NoTrailer)?;
        if crc != crc_fast::crc32_iscsi(&sector[..CHECKED_BYTES])
            || sector[USED_BYTES..].iter().any(|byte| *byte != 0)
        {
            return Err(Damage::Trailer);
        }
        let trailer = trailer?;
        let expected = trailer
            .body_bytes
            .saturating_add(crate::le::len64(SECTOR_BYTES));
        if expected != file_bytes {
            return Err(Damage::Length {
                expected,
                found: file_bytes,
            });
        }
        Ok(trailer)
    }

    /// Reads a whole archived segment, its checksums verified, and returns its frames.
    ///
    /// # Errors
    /// See [`Damage`].
    pub fn open(file: &[u8]) -> Result<(Trailer, &[u8]), Damage> {
        let (body, sector) = file
            .split_last_chunk::<SECTOR_BYTES>()
            .ok_or(Damage::NoTrailer)?;
        let trailer = Self::decode(sector, crate::le::len64(file.len()))?;
        if xxh3_128(body) != trailer.body_xxh3 {
            return Err(Damage::Body);
        }
        Ok((trailer, body))
    }

    /// The fields and the checksum; `None` when it is no trailer.
    fn fields(sector: &[u8]) -> Option<(Result<Trailer, Damage>, u32)> {
        let sector = (sector.len() == SECTOR_BYTES).then_some(sector)?;
        let mut fields = Reader::new(sector);
        if fields.bytes(MAGIC.len())? != MAGIC {
            return None;
        }
        let version = fields.u16()?;
        let (layout, shard, shards) = (fields.u16()?, fields.u16()?, fields.u16()?);
        let node = fields.u128()?;
        let lineage = fields.u64()?;
        let segment = SegmentId(fields.u64()?);
        let body_bytes = fields.u64()?;
        let key = match fields.u64()? {
            0 => None,
            id => Some(KeyId(id)),
        };
        let trailer = Trailer {
            origin: Origin {
                node,
                lineage,
                layout,
                shards,
                shard,
            },
            segment,
            body_bytes,
            key,
            first: fields.u64()?,
            previous: fields.u64()?,
            last: fields.u64()?,
            last_hash: fields.u64()?,
            reach_us: fields.u64()?,
            body_xxh3: fields.u128()?,
        };
        let read = if version == VERSION {
            Ok(trailer)
        } else {
            Err(Damage::Version { found: version })
        };
        Some((read, fields.u32()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trailer() -> Trailer {
        Trailer {
            origin: Origin {
                node: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10,
                lineage: 17,
                layout: 2,
                shards: 4,
                shard: 3,
            },
            segment: SegmentId(0x0000_0009_1234_5678),
            body_bytes: 4096,
            key: Some(KeyId(5)),
            first: 100,
            previous: 0xaa,
            last: 107,
            last_hash: 0xbb,
            reach_us: 1_700_000_000_000_000,
            body_xxh3: xxh3_128(&[7; 4096]),
        }
    }

    fn file() -> Vec<u8> {
        [&[7; 4096][..], &trailer().encode()].concat()
    }

    #[test]
    fn a_trailer_comes_back() {
        let file = file();
        assert_eq!(Trailer::open(&file), Ok((trailer(), &[7; 4096][..])));
        let plain = Trailer {
            key: None,
            ..trailer()
        };
        assert_eq!(Trailer::decode(&plain.encode(), 8192), Ok(plain));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let mut file = file();
        for bit in 0..file.len() * 8 {
            file[bit / 8] ^= 1 << (bit % 8);
            assert!(Trailer::open(&file).is_err(), "bit {bit}");
            file[bit / 8] ^= 1 << (bit % 8);
        }
        for len in 0..file.len() {
            assert!(Trailer::open(&file[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn a_later_version_is_refused_by_name_and_a_cut_file_by_its_length() {
        let mut sector = trailer().encode();
        sector[8] = 2;
        let crc = crc_fast::crc32_iscsi(&sector[..CHECKED_BYTES]);
        sector[CHECKED_BYTES..USED_BYTES].copy_from_slice(&crc.to_le_bytes());
        let found = Trailer::decode(&sector, 8192);
        assert_eq!(found, Err(Damage::Version { found: 2 }));
        let short = Trailer::decode(&trailer().encode(), 4096);
        assert_eq!(
            short,
            Err(Damage::Length {
                expected: 8192,
                found: 4096
            })
        );
    }

    /// The example of `docs/formats/archive.md`.
    #[test]
    fn the_bytes_are_those_of_the_format_page() {
        let page = include_str!("../../../docs/formats/archive.md");
        crate::dump::assert_on_page(page, "archive.md", &trailer().encode());
    }

    #[test]
    fn no_bytes_make_it_panic() {
        torc_sim::fuzz::fuzz("trailer", &[file()], |input| {
            let _unread = Trailer::open(input);
        });
    }
}
