//! An HdrHistogram of nanoseconds to two digits that takes memory only for the magnitudes that occur.
//!
//! There is one for each operation, status and target, which may be thousands, and the latencies of each
//! lie within a few factors of two. Values are told apart exactly as a dense histogram of two digits does.

use hdrhistogram::Histogram;

use super::recorder::{LATENCY_NS_MAX, histogram};
use super::world::Nanos;

/// Values that are told apart within a factor of two: two digits.
const STEPS: usize = 128;
const STEP_BITS: u32 = STEPS.ilog2();
/// Factors of two up to the highest latency; the first one is everything below [`STEPS`].
const OCTAVES: usize = (LATENCY_NS_MAX.ilog2() + 2 - STEP_BITS) as usize;

/// Counts by latency. A factor of two takes a kibibyte from its first latency on, all of them 36.
#[derive(Clone)]
pub struct Sparse {
    octaves: [Option<Box<[u64; STEPS]>>; OCTAVES],
}

impl Default for Sparse {
    fn default() -> Self {
        Self {
            octaves: [const { None }; OCTAVES],
        }
    }
}

impl Sparse {
    /// Counts a latency; one above the highest that is told apart counts as that.
    pub fn record(&mut self, nanos: Nanos) {
        self.record_times(nanos, 1);
    }

    fn record_times(&mut self, nanos: Nanos, times: u64) {
        let nanos = nanos.clamp(1, LATENCY_NS_MAX);
        // Bits of the value above those that number its step.
        let octave = (nanos.ilog2() + 1).saturating_sub(STEP_BITS);
        let step = (nanos >> octave.saturating_sub(1)) % (1 << STEP_BITS);
        let (octave, step) = (
            octave as usize,
            usize::try_from(step).expect("a small number"),
        );
        let counts = self.octaves[octave].get_or_insert_with(|| Box::new([0; STEPS]));
        counts[step] += times;
    }

    /// Adds another one.
    pub fn add(&mut self, other: &Sparse) {
        for (mine, theirs) in self.octaves.iter_mut().zip(&other.octaves) {
            match (mine, theirs) {
                (_, None) => {}
                (Some(mine), Some(theirs)) => {
                    for (mine, theirs) in mine.iter_mut().zip(theirs.iter()) {
                        *mine += theirs;
                    }
                }
                (mine, theirs) => mine.clone_from(theirs),
            }
        }
    }

    /// Adds a dense one of two digits, as it comes from another machine.
    pub fn add_dense(&mut self, other: &Histogram<u64>) {
        for value in other.iter_recorded() {
            self.record_times(value.value_iterated_to(), value.count_at_value());
        }
    }

    /// The same as a dense one, to be asked for percentiles.
    pub fn dense(&self) -> Histogram<u64> {
        let mut dense = histogram(2);
        for (octave, counts) in self.octaves.iter().enumerate() {
            for (step, count) in counts.iter().flat_map(|counts| counts.iter().enumerate()) {
                let value = match octave.checked_sub(1) {
                    None => step,
                    Some(shift) => (step + STEPS) << shift,
                };
                let value = u64::try_from(value).expect("a latency fits 64 bits");
                if *count > 0 {
                    dense.saturating_record_n(value, *count);
                }
            }
        }
        dense
    }

    /// Latencies that were counted.
    pub fn len(&self) -> u64 {
        self.octaves
            .iter()
            .flatten()
            .map(|counts| counts.iter().sum::<u64>())
            .sum()
    }

    /// Empties it and keeps its memory.
    pub fn clear(&mut self) {
        for counts in self.octaves.iter_mut().flatten() {
            counts.fill(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_told_apart_as_by_a_dense_histogram() {
        let (mut sparse, mut dense) = (Sparse::default(), histogram(2));
        let powers = (0..42).flat_map(|bits| [-1, 0, 1].map(|off: i64| (1_i64 << bits) + off));
        let others = (1..2000).map(|number| number * number * 77);
        for value in powers.chain(others).chain([3_600_000_000_000]) {
            let value = u64::try_from(value.max(1)).unwrap();
            sparse.record(value);
            dense.record(value).unwrap();
        }
        let mut twice = sparse.clone();
        twice.add(&sparse);
        let mut from_dense = Sparse::default();
        from_dense.add_dense(&dense);
        assert_eq!((sparse.len(), twice.len()), (dense.len(), 2 * dense.len()));
        for percentile in 0..=1000 {
            let at = |histogram: &Histogram<u64>| {
                histogram.value_at_percentile(f64::from(percentile) / 10.0)
            };
            for same in [&sparse, &twice, &from_dense] {
                assert_eq!(at(&same.dense()), at(&dense), "{percentile}");
            }
        }
        twice.clear();
        assert_eq!((twice.len(), twice.dense().len()), (0, 0));
    }

    #[test]
    fn what_is_beyond_all_bounds_counts_as_the_bound() {
        let mut sparse = Sparse::default();
        sparse.record(0);
        sparse.record(u64::MAX);
        let mut dense = histogram(2);
        dense.saturating_record(u64::MAX);
        assert_eq!((sparse.len(), sparse.dense().max()), (2, dense.max()));
    }

    #[test]
    fn latencies_of_one_magnitude_take_the_memory_of_one() {
        let mut sparse = Sparse::default();
        (1000..1024).for_each(|nanos| sparse.record(nanos));
        assert_eq!(sparse.octaves.iter().flatten().count(), 1);
    }
}
