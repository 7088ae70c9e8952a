//! Randomness of a shard: xoshiro256** seeded by the operating system. Fast, and good enough for
//! identifiers, jitter and hash keys; not a cipher.

use std::cell::Cell;
use std::io;

use crate::sys;

/// A generator of uniform 64-bit numbers. Not shared between shards.
pub(crate) struct Random {
    state: Cell<[u64; 4]>,
}

impl Random {
    /// Seeds a generator with 32 bytes of the kernel's randomness.
    pub(crate) fn from_system() -> io::Result<Random> {
        let mut state = [0; 4];
        for word in &mut state {
            let mut bytes = [0; 8];
            sys::random_bytes(&mut bytes)?;
            *word = u64::from_le_bytes(bytes);
        }
        // The all-zero state is the generator's only fixed point.
        state[0] |= u64::from(state == [0; 4]);
        Ok(Random {
            state: Cell::new(state),
        })
    }

    /// The next number.
    pub(crate) fn next(&self) -> u64 {
        let mut s = self.state.get();
        let result = s[1].wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let shifted = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= shifted;
        s[3] = s[3].rotate_left(45);
        self.state.set(s);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sequence_is_that_of_the_published_algorithm() {
        // First outputs of xoshiro256** from state 1, 2, 3, 4.
        let random = Random {
            state: Cell::new([1, 2, 3, 4]),
        };
        assert_eq!(
            [random.next(), random.next(), random.next()],
            [11520, 0, 1_509_978_240]
        );
    }

    #[test]
    fn two_generators_differ() {
        let a = Random::from_system().unwrap();
        let b = Random::from_system().unwrap();
        assert_ne!([a.next(), a.next()], [b.next(), b.next()]);
    }
}
