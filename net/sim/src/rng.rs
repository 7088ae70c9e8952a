//! Seeded randomness, one independent stream for each purpose.
//!
//! Streams are derived from the run's seed by name, so that drawing more from one (another fault,
//! another client) does not move the others and a shrunk plan keeps its schedule.

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{RngCore, SeedableRng};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// A stream of random numbers that depends on nothing but its seed and name.
#[derive(Clone, Debug)]
pub struct Rng(Xoshiro256PlusPlus);

impl Rng {
    /// The stream called `name` of the run `seed`.
    pub fn stream(seed: u64, name: &str) -> Self {
        Self(Xoshiro256PlusPlus::seed_from_u64(xxh3_64_with_seed(
            name.as_bytes(),
            seed,
        )))
    }

    /// A uniformly random number.
    pub fn number(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A uniformly random number below `bound`.
    ///
    /// # Panics
    /// When `bound` is zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "nothing is below zero");
        // Multiply-shift: the bias is below bound / 2^64.
        let wide = u128::from(self.number()) * u128::from(bound);
        u64::try_from(wide >> 64).expect("a high half fits")
    }

    /// A uniformly random index below `len`.
    pub fn index(&mut self, len: usize) -> usize {
        let bound = u64::try_from(len).expect("a length fits into 64 bits");
        usize::try_from(self.below(bound)).expect("an index is below its length")
    }

    /// A uniformly random number within `range`, both ends included.
    pub fn within(&mut self, range: std::ops::RangeInclusive<u64>) -> u64 {
        let (first, last) = (*range.start(), *range.end());
        assert!(first <= last, "an empty range");
        match (last - first).checked_add(1) {
            Some(width) => first + self.below(width),
            None => self.number(),
        }
    }

    /// True with probability `p` (at or below 0 never, at or above 1 always).
    pub fn chance(&mut self, p: f64) -> bool {
        if p <= 0.0 {
            return false;
        }
        self.fraction() < p
    }

    /// Uniform in `0.0..1.0`.
    pub fn fraction(&mut self) -> f64 {
        const MANTISSA_BITS: u32 = 53;
        let bits = self.number() >> (64 - MANTISSA_BITS);
        bits as f64 / (1u64 << MANTISSA_BITS) as f64
    }

    /// A number within `range` whose logarithm is uniform: small ones are as likely as large ones.
    pub fn log_within(&mut self, range: std::ops::RangeInclusive<u64>) -> u64 {
        let (first, last) = (*range.start(), *range.end());
        assert!(first <= last, "an empty range");
        let bits_first = 64 - first.leading_zeros();
        let bits_last = 64 - last.leading_zeros();
        let bits = u32::try_from(self.within(u64::from(bits_first)..=u64::from(bits_last)))
            .expect("at most 64 bits");
        let low = if bits == 0 { 0 } else { 1u64 << (bits - 1) };
        let high = if bits == 64 {
            u64::MAX
        } else {
            (1u64 << bits) - 1
        };
        self.within(low.max(first)..=high.min(last))
    }

    /// One of `items`.
    ///
    /// # Panics
    /// When there is none.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        let index = self.index(items.len());
        &items[index]
    }

    /// Brings `items` into a random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for end in (1..items.len()).rev() {
            items.swap(end, self.index(end + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_of_one_seed_differ_and_repeat() {
        let draw = |name| {
            let mut rng = Rng::stream(7, name);
            [rng.number(), rng.number()]
        };
        assert_eq!(draw("disk"), draw("disk"));
        assert_ne!(draw("disk"), draw("net"));
    }

    #[test]
    fn draws_stay_within_their_bounds() {
        let mut rng = Rng::stream(1, "test");
        for _ in 0..10_000 {
            assert!(rng.below(3) < 3);
            assert!((5..=9).contains(&rng.within(5..=9)));
            assert!((0..=1000).contains(&rng.log_within(0..=1000)));
            assert!((0.0..1.0).contains(&rng.fraction()));
        }
        assert!(!rng.chance(0.0) && rng.chance(1.0));
    }

    #[test]
    fn a_shuffle_keeps_every_item() {
        let mut items: Vec<u32> = (0..50).collect();
        Rng::stream(3, "test").shuffle(&mut items);
        assert_ne!(items, (0..50).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..50).collect::<Vec<_>>());
    }
}
