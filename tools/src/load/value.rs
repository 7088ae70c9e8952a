//! Values that describe themselves, so that whatever comes back can be checked byte by byte.
//!
//! A value is its key's index, its sequence number and a filler that follows from both. Nothing
//! about it has to be remembered: the reader derives every byte again. The sequence number is the
//! writer's civil time in microseconds at the first try, so it grows over runs as well, and the
//! age of what is read can be told.

/// Bytes of index and sequence number at the front: the smallest value that can be verified.
pub const VALUE_BYTES_MIN: usize = 16;

/// Why a value is not what was written under its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// Shorter than index and sequence number.
    Short,
    /// It belongs to another key.
    OtherKey {
        /// The key that it was written under.
        found: u64,
    },
    /// A byte of the filler differs.
    Damaged {
        /// Offset of the first wrong word.
        offset: usize,
    },
}

/// Writes the value of key `index` with sequence number `sequence` over the whole of `out`.
///
/// # Panics
/// When `out` is shorter than [`VALUE_BYTES_MIN`].
pub fn write(index: u64, sequence: u64, out: &mut [u8]) {
    assert!(
        out.len() >= VALUE_BYTES_MIN,
        "values have at least {VALUE_BYTES_MIN} bytes"
    );
    let (head, filler) = out.split_at_mut(VALUE_BYTES_MIN);
    head[..8].copy_from_slice(&index.to_le_bytes());
    head[8..].copy_from_slice(&sequence.to_le_bytes());
    let mut words = Words::new(index, sequence);
    for chunk in filler.chunks_mut(8) {
        chunk.copy_from_slice(&words.next().to_le_bytes()[..chunk.len()]);
    }
}

/// Checks every byte of `value`, read under key `index`, and returns its sequence number.
pub fn verify(index: u64, value: &[u8]) -> Result<u64, Wrong> {
    let Some((head, filler)) = value.split_at_checked(VALUE_BYTES_MIN) else {
        return Err(Wrong::Short);
    };
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    let found = word(&head[..8]);
    let sequence = word(&head[8..]);
    let mut words = Words::new(found, sequence);
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
    fn new(index: u64, sequence: u64) -> Self {
        Self {
            state: index.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ sequence.rotate_left(32),
        }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_verifies_and_tells_its_sequence() {
        for len in [16, 17, 100, 1024] {
            let mut value = vec![0; len];
            write(7, 99, &mut value);
            assert_eq!(verify(7, &value), Ok(99));
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let mut value = vec![0; 61];
        write(7, 99, &mut value);
        for bit in 0..value.len() * 8 {
            value[bit / 8] ^= 1 << (bit % 8);
            assert!(verify(7, &value).is_err(), "bit {bit}");
            value[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn a_value_of_another_key_is_told_from_damage() {
        let mut value = vec![0; 100];
        write(8, 99, &mut value);
        assert_eq!(verify(7, &value), Err(Wrong::OtherKey { found: 8 }));
        assert_eq!(verify(7, &value[..10]), Err(Wrong::Short));
    }
}
