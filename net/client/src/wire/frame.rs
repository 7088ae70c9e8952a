//! One frame: length, checksum, version, kind, request id, payload.
//!
//! ```text
//! byte 0        4        8        9     10     12            20
//!      | length | crc32c | version | kind | flags | request id | payload …
//! ```
//!
//! All little-endian. `length` counts everything after itself; `crc32c` covers everything after
//! itself. Client connections and the links between nodes use the same frame with other kinds.
//!
//! Invariant: a payload is handed out only after length, version and checksum were found good.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Bytes before the payload.
pub const HEADER_BYTES: usize = 20;
/// Bytes that `length` itself takes.
const LENGTH_BYTES: usize = 4;
/// The least that `length` can say: what follows it in a frame without a payload.
const LENGTH_LEAST: u32 = 16;
const _: () = assert!(LENGTH_LEAST as usize == HEADER_BYTES - LENGTH_BYTES);
/// Bytes that the checksum does not cover: `length` and the checksum.
const UNCOVERED_BYTES: usize = 8;
/// The largest frame, header included (8 MiB): a batch of several of the largest values.
pub const FRAME_BYTES_MAX: usize = 8 << 20;
/// The least room that is made for a frame that has not come yet.
const RESERVE_BYTES_MIN: usize = 16 << 10;
/// The protocol version that this build speaks.
pub const VERSION: u8 = 1;

/// What stands before a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the payload is; the number space belongs to whoever uses the frame.
    pub kind: u8,
    /// Bits that refine the kind. Unknown ones are ignored.
    pub flags: u16,
    /// Matches an answer with its request.
    pub request: u64,
}

/// A frame that was found good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its header.
    pub header: Header,
    /// Its payload; shares the receive buffer.
    pub payload: Bytes,
}

/// Why bytes are not a frame. The connection cannot go on after any of these: where the next frame
/// starts is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length is below that of an empty frame.
    #[error("frame length {found} is below the least, {least}")]
    TooShort {
        /// What was found.
        found: u32,
        /// The least.
        least: u32,
    },
    /// The length is above the limit.
    #[error("frame of {found} bytes is above the limit of {limit}")]
    TooLong {
        /// What was announced, header included.
        found: u64,
        /// The limit, header included.
        limit: usize,
    },
    /// The bytes were changed on the way.
    #[error("frame checksum is {found:#010x}, computed {expected:#010x}")]
    Checksum {
        /// The checksum of the bytes as they came.
        expected: u32,
        /// The checksum that came with them.
        found: u32,
    },
    /// The peer speaks another version.
    #[error("frame of protocol version {found}, expected {expected}")]
    Version {
        /// Ours.
        expected: u8,
        /// Theirs.
        found: u8,
    },
}

/// Takes one frame off the front of `input`, or says that more bytes are needed (`None`; room for
/// some of the missing bytes is then made, so that a large payload is received in place).
///
/// # Errors
/// See [`FrameError`].
pub fn decode(input: &mut BytesMut, limit: usize) -> Result<Option<Frame>, FrameError> {
    let Some(length) = input.first_chunk().map(|bytes| u32::from_le_bytes(*bytes)) else {
        return Ok(None);
    };
    let total = u64::from(length) + LENGTH_BYTES as u64;
    if total < HEADER_BYTES as u64 {
        return Err(FrameError::TooShort {
            found: length,
            least: LENGTH_LEAST,
        });
    }
    let total = match usize::try_from(total) {
        Ok(total) if total <= limit => total,
        _ => {
            return Err(FrameError::TooLong {
                found: total,
                limit,
            });
        }
    };
    if input.len() < total {
        // At most as much again as was received: an announced length alone takes no memory.
        let missing = total - input.len();
        input.reserve(missing.min(input.len() + RESERVE_BYTES_MIN));
        return Ok(None);
    }
    let mut bytes = input.split_to(total).freeze();
    bytes.advance(LENGTH_BYTES);
    let found = bytes.get_u32_le();
    let expected = crc_fast::crc32_iscsi(&bytes);
    if found != expected {
        return Err(FrameError::Checksum { expected, found });
    }
    let version = bytes.get_u8();
    if version != VERSION {
        return Err(FrameError::Version {
            expected: VERSION,
            found: version,
        });
    }
    let header = Header {
        kind: bytes.get_u8(),
        flags: bytes.get_u16_le(),
        request: bytes.get_u64_le(),
    };
    Ok(Some(Frame {
        header,
        payload: bytes,
    }))
}

/// Starts a frame at the end of `out`; the payload is appended by the caller, then [`finish`] seals
/// it. Returns where the frame starts.
pub fn begin(out: &mut BytesMut, header: Header) -> usize {
    let start = out.len();
    out.put_u64_le(0);
    out.put_u8(VERSION);
    out.put_u8(header.kind);
    out.put_u16_le(header.flags);
    out.put_u64_le(header.request);
    start
}

/// Writes length and checksum of the frame that starts at `start` and ends at the end of `out`.
///
/// # Panics
/// When the frame is above [`FRAME_BYTES_MAX`]: senders bound what they send.
pub fn finish(out: &mut BytesMut, start: usize) {
    finish_with(out, start, &[]);
}

/// As [`finish`], for a payload whose last part `tail` is not in `out`: the caller sends it right
/// after, uncopied.
///
/// # Panics
/// When the frame is above [`FRAME_BYTES_MAX`].
pub fn finish_with(out: &mut BytesMut, start: usize, tail: &[u8]) {
    let total = out.len() - start + tail.len();
    assert!(total <= FRAME_BYTES_MAX, "frame of {total} bytes");
    let length = u32::try_from(total - LENGTH_BYTES).expect("a frame is far below 4 GiB");
    let covered = &out[start + UNCOVERED_BYTES..];
    let checksum = if tail.is_empty() {
        crc_fast::crc32_iscsi(covered)
    } else {
        let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
        digest.update(covered);
        digest.update(tail);
        u32::try_from(digest.finalize()).expect("CRC-32C has 32 bits")
    };
    out[start..start + LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
    out[start + LENGTH_BYTES..start + UNCOVERED_BYTES].copy_from_slice(&checksum.to_le_bytes());
}

/// Appends a whole frame. One copy of `payload`.
///
/// # Panics
/// When the frame is above [`FRAME_BYTES_MAX`].
pub fn encode(out: &mut BytesMut, header: Header, payload: &[u8]) {
    out.reserve(HEADER_BYTES + payload.len());
    let start = begin(out, header);
    out.extend_from_slice(payload);
    finish(out, start);
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header = Header {
        kind: 3,
        flags: 0x0102,
        request: 0x1122_3344_5566_7788,
    };

    fn frame(payload: &[u8]) -> BytesMut {
        let mut out = BytesMut::new();
        encode(&mut out, HEADER, payload);
        out
    }

    /// The bytes on the format page. A change here breaks every client in the field.
    #[test]
    fn the_layout_is_pinned() {
        let golden = [
            0x12, 0, 0, 0, // length: 16 + 2
            0x2a, 0x0a, 0x8c, 0x65, // crc32c
            1, 3, 2, 1, // version, kind, flags
            0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, // request id
            b'h', b'i',
        ];
        assert_eq!(frame(b"hi")[..], golden);
    }

    #[test]
    fn frames_come_out_as_they_went_in_however_they_are_cut() {
        let mut stream = frame(b"first");
        stream.extend_from_slice(&frame(b""));
        stream.extend_from_slice(&frame(&[7; 5000]));
        let whole = stream.freeze();
        for step in [1, 3, 20, 21, 5000, whole.len()] {
            let mut input = BytesMut::new();
            let mut payloads = Vec::new();
            for part in whole.chunks(step) {
                input.extend_from_slice(part);
                while let Some(frame) = decode(&mut input, FRAME_BYTES_MAX).expect("good frames") {
                    assert_eq!(frame.header, HEADER);
                    payloads.push(frame.payload);
                }
            }
            assert!(input.is_empty());
            assert_eq!(payloads, [&b"first"[..], b"", &[7; 5000]]);
        }
    }

    #[test]
    fn every_truncation_asks_for_more() {
        let whole = frame(b"payload");
        for len in 0..whole.len() {
            let mut input = BytesMut::from(&whole[..len]);
            assert_eq!(decode(&mut input, FRAME_BYTES_MAX), Ok(None), "{len} bytes");
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let whole = frame(b"payload");
        for bit in 0..whole.len() * 8 {
            let mut input = whole.clone();
            input[bit / 8] ^= 1 << (bit % 8);
            // A longer length may also leave the frame waiting for bytes that never come.
            assert!(
                !matches!(decode(&mut input, FRAME_BYTES_MAX), Ok(Some(_))),
                "bit {bit}"
            );
        }
    }

    #[test]
    fn hostile_lengths_are_refused_before_any_memory_is_taken() {
        for length in [0u32, 1, 15] {
            let mut input = BytesMut::from(&length.to_le_bytes()[..]);
            assert!(matches!(
                decode(&mut input, FRAME_BYTES_MAX),
                Err(FrameError::TooShort { .. })
            ));
        }
        let largest = u32::try_from(FRAME_BYTES_MAX).unwrap();
        for length in [largest - 3, u32::MAX - 4, u32::MAX] {
            let mut input = BytesMut::from(&length.to_le_bytes()[..]);
            assert!(matches!(
                decode(&mut input, FRAME_BYTES_MAX),
                Err(FrameError::TooLong { .. })
            ));
        }
    }

    #[test]
    fn a_tail_that_is_sent_apart_gives_the_same_bytes() {
        let mut out = BytesMut::new();
        let start = begin(&mut out, HEADER);
        out.extend_from_slice(b"pay");
        finish_with(&mut out, start, b"load");
        out.extend_from_slice(b"load");
        assert_eq!(out, frame(b"payload"));
    }
}
