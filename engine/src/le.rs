//! Little-endian integers at byte positions: the one way in which the engine's formats read and
//! write numbers.
//!
//! Every function panics when the slice is too short: callers check lengths first and answer with a
//! typed error, so a panic here is a programmer's fault.

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

pub(crate) fn u128_at(bytes: &[u8], at: usize) -> u128 {
    u128::from_le_bytes(array_at(bytes, at))
}

/// An unsigned integer of `width` bytes, 0 to 8.
pub(crate) fn uint_at(bytes: &[u8], at: usize, width: usize) -> u64 {
    let mut wide = [0; 8];
    wide[..width].copy_from_slice(&bytes[at..at + width]);
    u64::from_le_bytes(wide)
}

/// Appends the low `width` bytes of `value`, 0 to 8; the rest must be zero.
pub(crate) fn push_uint(out: &mut Vec<u8>, value: u64, width: usize) {
    debug_assert!(uint_width(value) <= width, "{value} in {width} bytes");
    out.extend_from_slice(&value.to_le_bytes()[..width]);
}

/// Bytes that hold `value`: 0 for zero, up to 8.
pub(crate) fn uint_width(value: u64) -> usize {
    let bits = u64::BITS - value.leading_zeros();
    usize::try_from(bits.div_ceil(8)).expect("at most eight")
}

/// A length as it is stored; lengths in the engine's formats are bounded far below `u64::MAX`.
pub(crate) fn len64(len: usize) -> u64 {
    u64::try_from(len).expect("a length in memory fits 64 bits")
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    *bytes[at..]
        .first_chunk()
        .expect("the caller has checked the length")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_of_every_width_come_back() {
        for value in [
            0,
            1,
            255,
            256,
            0xFF_FFFF,
            0x0100_0000,
            u64::MAX >> 8,
            u64::MAX,
        ] {
            let width = uint_width(value);
            let mut out = vec![7];
            push_uint(&mut out, value, width);
            assert_eq!(out.len(), 1 + width);
            assert_eq!(uint_at(&out, 1, width), value);
        }
    }
}
