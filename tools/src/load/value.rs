//! Values that describe themselves, so that whatever comes back can be checked byte by byte.
//!
//! A value is its key's index, its sequence and a filler that follows from both and from the
//! length. Nothing about it has to be remembered: the reader derives every byte again. The sequence
//! holds the writer's civil time and a count of the key's versions, so it grows over runs as well,
//! and what is read can be told its age and the number of versions that it is behind.

use torc_measure::keys::{GOLDEN, mixed};

/// Bytes of index and sequence at the front: the smallest value that can be verified.
pub const VALUE_BYTES_MIN: usize = 16;
/// Bits of a sequence that count versions.
const VERSION_BITS: u32 = 11;
const VERSION_MASK: u64 = (1 << VERSION_BITS) - 1;

/// Orders the versions of one key: civil time in microseconds, then a count of versions modulo
/// 2048. 0 is before all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sequence(pub u64);

impl Sequence {
    /// The one after this, at `now_us` or at the next microsecond if the clock has not moved.
    pub fn next(self, now_us: u64) -> Sequence {
        let version = (self.0 + 1) & VERSION_MASK;
        let at = now_us.max(self.micros() + 1);
        Sequence((at << VERSION_BITS) | version)
    }

    /// When it was made, in microseconds since 1970.
    pub fn micros(self) -> u64 {
        self.0 >> VERSION_BITS
    }

    /// Versions from this to `newer`, modulo 2048.
    pub fn versions_to(self, newer: Sequence) -> u64 {
        newer.0.wrapping_sub(self.0) & VERSION_MASK
    }
}

/// Why a value is not what was written under its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// Shorter than index and sequence.
    Short,
    /// It belongs to another key.
    OtherKey {
        /// The key that it was written under.
        found: u64,
    },
    /// A byte of the filler differs, or the length does.
    Damaged {
        /// Offset of the first wrong word.
        offset: usize,
    },
}

/// Writes the value of key `index` with `sequence` over the whole of `out`.
///
/// # Panics
/// When `out` is shorter than [`VALUE_BYTES_MIN`].
pub fn write(index: u64, sequence: Sequence, out: &mut [u8]) {
    assert!(
        out.len() >= VALUE_BYTES_MIN,
        "values have at least {VALUE_BYTES_MIN} bytes"
    );
    let mut words = Words::new(index, sequence, out.len());
    let (head, filler) = out.split_at_mut(VALUE_BYTES_MIN);
    head[..8].copy_from_slice(&index.to_le_bytes());
    head[8..].copy_from_slice(&sequence.0.to_le_bytes());
    let (chunks, rest) = filler.as_chunks_mut::<8>();
    for chunk in chunks {
        *chunk = words.next().to_le_bytes();
    }
    rest.copy_from_slice(&words.next().to_le_bytes()[..rest.len()]);
}

/// Checks every byte of `value`, read under key `index`, and returns its sequence.
pub fn verify(index: u64, value: &[u8]) -> Result<Sequence, Wrong> {
    let Some((head, filler)) = value.split_at_checked(VALUE_BYTES_MIN) else {
        return Err(Wrong::Short);
    };
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    let found = word(&head[..8]);
    let sequence = Sequence(word(&head[8..]));
    let mut words = Words::new(found, sequence, value.len());
    for (number, chunk) in filler.chunks(8).enumerate() {
        if *chunk != words.next().to_le_bytes()[..chunk.len()] {
            return Err(Wrong::Damaged {
                offset: VALUE_BYTES_MIN + number * 8,
            });
        }
    }
    if found == index {
        Ok(sequence)
    } else {
        Err(Wrong::OtherKey { found })
    }
}

/// A stream of pseudo-random words (splitmix64), incompressible.
struct Words {
    state: u64,
}

impl Words {
    fn new(index: u64, sequence: Sequence, len: usize) -> Self {
        let len = u64::try_from(len).expect("a length fits 64 bits");
        Self {
            state: index.wrapping_mul(GOLDEN)
                ^ sequence.0.rotate_left(32)
                ^ len.wrapping_mul(0xd6e8_feb8_6659_fd93),
        }
    }

    fn next(&mut self) -> u64 {
        let word = mixed(self.state);
        self.state = self.state.wrapping_add(GOLDEN);
        word
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEQUENCE: Sequence = Sequence(99 << VERSION_BITS);

    #[test]
    fn what_was_written_verifies_and_tells_its_sequence() {
        for len in [16, 17, 100, 1024] {
            let mut value = vec![0; len];
            write(7, SEQUENCE, &mut value);
            assert_eq!(verify(7, &value), Ok(SEQUENCE));
        }
    }

    #[test]
    fn every_flipped_bit_and_every_truncation_is_noticed() {
        let mut value = vec![0; 61];
        write(7, SEQUENCE, &mut value);
        for bit in 0..value.len() * 8 {
            value[bit / 8] ^= 1 << (bit % 8);
            assert!(verify(7, &value).is_err(), "bit {bit}");
            value[bit / 8] ^= 1 << (bit % 8);
        }
        for len in VALUE_BYTES_MIN + 1..value.len() {
            assert!(verify(7, &value[..len]).is_err(), "cut at {len}");
        }
    }

    #[test]
    fn a_value_of_another_key_is_told_from_damage() {
        let mut value = vec![0; 100];
        write(8, SEQUENCE, &mut value);
        assert_eq!(verify(7, &value), Err(Wrong::OtherKey { found: 8 }));
        assert_eq!(verify(7, &value[..10]), Err(Wrong::Short));
    }

    #[test]
    fn sequences_tell_how_far_behind_a_version_is() {
        let mut newer = SEQUENCE;
        for _ in 0..2047 {
            newer = newer.next(50);
        }
        assert!(newer > SEQUENCE);
        assert_eq!(SEQUENCE.versions_to(newer), 2047);
        assert_eq!(
            newer.micros() - SEQUENCE.micros(),
            2047,
            "the clock stood still"
        );
    }
}
