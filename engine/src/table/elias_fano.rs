//! A sorted list of integers in Elias–Fano form: `2 + log2(universe / count)` bits each, random
//! access and predecessor search in a few nanoseconds, no decoding.
//!
//! Each value is split: the low bits stand packed one after the other, the high parts are unary-coded
//! deltas in a bit vector (a one for each value, a zero for each step of the high part). Select
//! samples, which make both directions a short scan, live in memory only.
//!
//! Source: P. Elias 1974, R. Fano 1971; predecessor search as in S. Vigna, "Quasi-succinct indices"
//! (2013), section 4.

use crate::le;

/// One sample for so many ones, and one for so many zeros: an eighth of a bit a value each, and eight
/// words to walk through at most, mostly.
const SAMPLE_EVERY: usize = 256;

/// Bytes before the words of an encoded list.
const HEADER_BYTES: usize = 16;

/// A non-decreasing list of integers below 2^127.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EliasFano {
    count: usize,
    low_bits: u32,
    low: Vec<u64>,
    high: Vec<u64>,
    one_samples: Vec<u32>,
    zero_samples: Vec<u32>,
}

impl EliasFano {
    /// Packs `values`, which must not decrease.
    pub(crate) fn build(values: &[u128]) -> EliasFano {
        let count = values.len();
        let max = values.last().copied().unwrap_or(0);
        let low_bits = low_bits_for(max, count);
        let high_len = count + to_usize(max >> low_bits) + 1;
        let mut low = vec![0; (count * to_usize(low_bits.into())).div_ceil(64)];
        let mut high = vec![0; high_len.div_ceil(64)];
        let mut previous = 0;
        for (index, value) in values.iter().copied().enumerate() {
            assert!(value >= previous, "an Elias-Fano list must not decrease");
            previous = value;
            set_bits(&mut low, index * to_usize(low_bits.into()), low_bits, value);
            let position = to_usize(value >> low_bits) + index;
            high[position / 64] |= 1 << (position % 64);
        }
        let mut list = EliasFano {
            count,
            low_bits,
            low,
            high,
            one_samples: Vec::new(),
            zero_samples: Vec::new(),
        };
        list.sample();
        list
    }

    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// Bytes in memory.
    pub(crate) fn memory_bytes(&self) -> usize {
        8 * (self.low.len() + self.high.len())
            + 4 * (self.one_samples.len() + self.zero_samples.len())
    }

    /// The value at `index`, which must be below [`EliasFano::len`].
    pub(crate) fn get(&self, index: usize) -> u128 {
        assert!(index < self.count, "index {index} of {}", self.count);
        let high = self.select_one(index) - index;
        (wide(high) << self.low_bits) | self.low_at(index)
    }

    /// The last index whose value is at most `value`.
    pub(crate) fn predecessor(&self, value: u128) -> Option<usize> {
        let last = self.count.checked_sub(1)?;
        let high = value >> self.low_bits;
        if high > wide(self.select_one(last) - last) {
            return Some(last);
        }
        let high = to_usize(high);
        // Values whose high part is at most `high`; those of them below `first` have a smaller one.
        let end = self.select_zero(high) - high;
        let first = match high.checked_sub(1) {
            Some(before) => self.select_zero(before) - before,
            None => 0,
        };
        let low = value & low_mask(self.low_bits);
        let found = (first..end).rev().find(|index| self.low_at(*index) <= low);
        found.or_else(|| first.checked_sub(1))
    }

    /// Appends the list as it stands on disk: count (8), low bits (4), zero (4), low words, high
    /// words.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&le::len64(self.count).to_le_bytes());
        out.extend_from_slice(&self.low_bits.to_le_bytes());
        let high_words = u32::try_from(self.high.len()).expect("a table has below 2^32 blocks");
        out.extend_from_slice(&high_words.to_le_bytes());
        for word in self.low.iter().chain(&self.high) {
            out.extend_from_slice(&word.to_le_bytes());
        }
    }

    /// Reads a list from the start of `bytes` and returns it with the number of bytes that it
    /// takes, or what is wrong with it.
    pub(crate) fn decode(bytes: &[u8]) -> Result<(EliasFano, usize), &'static str> {
        if bytes.len() < HEADER_BYTES {
            return Err("a list of at least 16 bytes");
        }
        let count = usize::try_from(le::u64_at(bytes, 0)).map_err(|_| "a count in memory")?;
        let low_bits = le::u32_at(bytes, 8);
        let high_words = usize::try_from(le::u32_at(bytes, 12)).expect("32 bits fit usize");
        if low_bits > 127 || count > bytes.len() * 8 {
            return Err("a list that fits its bytes");
        }
        let low_words = (count * to_usize(low_bits.into())).div_ceil(64);
        let len = HEADER_BYTES + 8 * (low_words + high_words);
        if bytes.len() < len {
            return Err("a list that fits its bytes");
        }
        let words = |from: usize, count: usize| -> Vec<u64> {
            (0..count)
                .map(|word| le::u64_at(bytes, from + 8 * word))
                .collect()
        };
        let mut list = EliasFano {
            count,
            low_bits,
            low: words(HEADER_BYTES, low_words),
            high: words(HEADER_BYTES + 8 * low_words, high_words),
            one_samples: Vec::new(),
            zero_samples: Vec::new(),
        };
        let ones: usize = list
            .high
            .iter()
            .map(|word| to_usize(word.count_ones().into()))
            .sum();
        // A zero after the last one ends the last bucket; without it a search would run out.
        let ended = list.high.last().is_some_and(|word| word >> 63 == 0);
        if ones != count || !ended {
            return Err("as many ones as values, and a zero behind them");
        }
        list.sample();
        Ok((list, len))
    }

    fn sample(&mut self) {
        let (mut ones, mut zeros) = (0, 0);
        for (index, word) in self.high.iter().enumerate() {
            let base = u32::try_from(index * 64).expect("a table has below 2^32 fence bits");
            for bit in 0..64 {
                let (count, samples) = if word >> bit & 1 == 1 {
                    (&mut ones, &mut self.one_samples)
                } else {
                    (&mut zeros, &mut self.zero_samples)
                };
                if *count % SAMPLE_EVERY == 0 {
                    samples.push(base + bit);
                }
                *count += 1;
            }
        }
    }

    /// Position of the one number `rank` in the high bits.
    fn select_one(&self, rank: usize) -> usize {
        select(&self.high, &self.one_samples, rank, 0)
    }

    /// Position of the zero number `rank` in the high bits.
    fn select_zero(&self, rank: usize) -> usize {
        select(&self.high, &self.zero_samples, rank, u64::MAX)
    }

    fn low_at(&self, index: usize) -> u128 {
        get_bits(
            &self.low,
            index * to_usize(self.low_bits.into()),
            self.low_bits,
        )
    }
}

/// Position of the set bit number `rank` of `words` with each word xored by `flip`. `rank` must be
/// below the number of such bits.
fn select(words: &[u64], samples: &[u32], rank: usize, flip: u64) -> usize {
    let start = usize::try_from(samples[rank / SAMPLE_EVERY]).expect("32 bits fit usize");
    let mut left = rank % SAMPLE_EVERY;
    let mut index = start / 64;
    let mut word = (words[index] ^ flip) & (u64::MAX << (start % 64));
    loop {
        let ones = to_usize(word.count_ones().into());
        if left < ones {
            break;
        }
        left -= ones;
        index += 1;
        word = words[index] ^ flip;
    }
    for _ in 0..left {
        word &= word - 1;
    }
    index * 64 + to_usize(word.trailing_zeros().into())
}

/// The width that minimises the size: about log2 of the mean distance.
fn low_bits_for(max: u128, count: usize) -> u32 {
    let mean = max / wide(count).max(1);
    if mean == 0 { 0 } else { mean.ilog2() }
}

fn low_mask(bits: u32) -> u128 {
    (1 << bits) - 1
}

fn set_bits(words: &mut [u64], at: usize, width: u32, value: u128) {
    let mut rest = value & low_mask(width);
    let mut at = at;
    let mut left = to_usize(width.into());
    while left > 0 {
        let shift = at % 64;
        let take = left.min(64 - shift);
        let part = u64::try_from(rest & low_mask(u32::try_from(take).expect("at most 64")))
            .expect("masked to 64 bits");
        words[at / 64] |= part << shift;
        rest >>= take;
        at += take;
        left -= take;
    }
}

fn get_bits(words: &[u64], at: usize, width: u32) -> u128 {
    let mut value = 0;
    let mut done = 0;
    let width = to_usize(width.into());
    while done < width {
        let shift = (at + done) % 64;
        let take = (width - done).min(64 - shift);
        let word = u128::from(words[(at + done) / 64] >> shift);
        value |= (word & low_mask(u32::try_from(take).expect("at most 64"))) << done;
        done += take;
    }
    value
}

fn to_usize(value: u128) -> usize {
    usize::try_from(value).expect("the high part is at most twice the count")
}

fn wide(value: usize) -> u128 {
    u128::from(le::len64(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(values: &[u128], probes: &[u128]) {
        let built = EliasFano::build(values);
        let mut bytes = vec![];
        built.encode(&mut bytes);
        bytes.extend_from_slice(b"what follows");
        let (list, len) = EliasFano::decode(&bytes).expect("own encoding");
        assert_eq!(len + 12, bytes.len());
        assert_eq!(list, built);
        for (index, value) in values.iter().enumerate() {
            assert_eq!(list.get(index), *value);
        }
        for probe in probes.iter().chain(values) {
            let expected = values.iter().rposition(|value| value <= probe);
            assert_eq!(list.predecessor(*probe), expected, "probe {probe}");
        }
    }

    #[test]
    fn edges_of_the_universe_are_found() {
        check(&[], &[0, 5]);
        check(&[0], &[0, 1, u128::MAX]);
        check(&[0, 0, 0, 7], &[0, 6, 7, 8]);
        check(&[u128::MAX >> 1], &[0, u128::MAX]);
        check(&[0, u128::MAX >> 1], &[1, u128::MAX >> 2]);
    }

    #[test]
    fn uniform_values_cost_two_bits_more_than_their_gap() {
        let values: Vec<u128> = (0..10_000).map(|i| i * 256 + (i * 37) % 256).collect();
        let list = EliasFano::build(&values);
        let bits = list.memory_bytes() * 8 / values.len();
        assert!(bits <= 12, "{bits} bits a value");
    }

    #[test]
    fn damaged_lists_are_refused_or_answer_without_panic() {
        let values: Vec<u128> = (0..300).map(|i| i * 1000).collect();
        let mut bytes = vec![];
        EliasFano::build(&values).encode(&mut bytes);
        for len in 0..bytes.len() {
            assert!(EliasFano::decode(&bytes[..len]).is_err(), "length {len}");
        }
    }

    proptest! {
        #[test]
        fn every_value_and_every_predecessor_is_found(
            mut values in prop::collection::vec(any::<u128>(), 0..400),
            shift in 1u32..128,
            probes in prop::collection::vec(any::<u128>(), 0..50),
        ) {
            for value in &mut values {
                *value >>= shift;
            }
            values.sort_unstable();
            let probes: Vec<u128> = probes.iter().map(|probe| probe >> (shift - 1)).collect();
            check(&values, &probes);
        }
    }
}
