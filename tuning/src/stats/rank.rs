//! Rank tests by permutation, and Holm's correction.

use super::Random;

/// Arrangements enumerated exactly; beyond, as many are drawn.
const ARRANGEMENTS_MAX: f64 = 200_000.0;

/// Number of ways to choose `k` of `n`.
fn choose(n: usize, k: usize) -> f64 {
    (0..k).fold(1.0, |ways, i| ways * (n - i) as f64 / (i + 1) as f64)
}

/// Least two-sided probability that runs of these numbers can reach: 3 + 3 give 0.1.
pub fn rank_sum_least(before: usize, after: usize) -> f64 {
    (2.0 / choose(before + after, before)).min(1.0)
}

/// Doubled midranks of all values: integers, so that sums compare exactly in spite of ties.
fn doubled_ranks(values: &[f64]) -> Vec<u64> {
    values
        .iter()
        .map(|value| {
            let below = values.iter().filter(|other| *other < value).count();
            let equal = values.iter().filter(|other| *other == value).count();
            (2 * below + equal + 1) as u64
        })
        .collect()
}

/// Two-sided probability that a difference in ranks at least as large arises when both sides are
/// drawn alike (Wilcoxon's rank sum): exact up to 10 + 10 runs, ties included, else from seeded
/// draws.
pub fn rank_sum(before: &[f64], after: &[f64], seed: u64) -> f64 {
    if before.is_empty() || after.is_empty() {
        return 1.0;
    }
    let all: Vec<f64> = before.iter().chain(after).copied().collect();
    let ranks = doubled_ranks(&all);
    let total: u64 = ranks.iter().sum();
    let n = before.len() as u64;
    let size = all.len() as u64;
    // Distance from the mean n × total ÷ size, kept in integers by multiplying with size.
    let distance = |sum: u64| (sum * size).abs_diff(n * total);
    let seen = distance(ranks[..before.len()].iter().sum());
    if choose(all.len(), before.len()) <= ARRANGEMENTS_MAX {
        exact(&ranks, before.len(), &|sum| distance(sum) >= seen)
    } else {
        drawn(ranks, before.len(), seed, &|sum| distance(sum) >= seen)
    }
}

fn exact(ranks: &[u64], chosen: usize, extreme: &dyn Fn(u64) -> bool) -> f64 {
    // ways[k][sum]: arrangements that choose k of the ranks so far with that sum.
    let total = usize::try_from(ranks.iter().sum::<u64>()).unwrap_or(usize::MAX);
    let mut ways = vec![vec![0.0_f64; total + 1]; chosen + 1];
    ways[0][0] = 1.0;
    for &rank in ranks {
        let rank = usize::try_from(rank).unwrap_or(total);
        for k in (1..=chosen).rev() {
            for sum in (rank..=total).rev() {
                ways[k][sum] += ways[k - 1][sum - rank];
            }
        }
    }
    let hits: f64 = ways[chosen]
        .iter()
        .enumerate()
        .filter(|(sum, _)| extreme(*sum as u64))
        .map(|(_, ways)| ways)
        .sum();
    (hits / choose(ranks.len(), chosen)).min(1.0)
}

fn drawn(mut ranks: Vec<u64>, chosen: usize, seed: u64, extreme: &dyn Fn(u64) -> bool) -> f64 {
    const DRAWS: u32 = 20_000;
    let mut random = Random::new(seed);
    let mut hits = 0_u32;
    for _ in 0..DRAWS {
        for at in 0..chosen {
            let other = at + random.below(ranks.len() - at);
            ranks.swap(at, other);
        }
        hits += u32::from(extreme(ranks[..chosen].iter().sum()));
    }
    // The arrangement that was seen counts as one of the draws, so 0 is never claimed.
    f64::from(hits + 1) / f64::from(DRAWS + 1)
}

/// Holm's step-down correction, in the order of the input.
pub fn holm(ps: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..ps.len()).collect();
    order.sort_by(|a, b| ps[*a].total_cmp(&ps[*b]));
    let mut corrected = vec![1.0; ps.len()];
    let mut floor = 0.0_f64;
    for (at, &index) in order.iter().enumerate() {
        floor = floor.max(ps[index] * (ps.len() - at) as f64).min(1.0);
        corrected[index] = floor;
    }
    corrected
}

#[cfg(test)]
mod tests {
    use super::{holm, rank_sum, rank_sum_least};

    #[test]
    fn known_probabilities_come_out() {
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} is not {b}");
        close(rank_sum_least(3, 3), 0.1);
        close(rank_sum_least(4, 4), 2.0 / 70.0);
        close(rank_sum_least(5, 5), 2.0 / 252.0);
        let low = [1.0, 2.0, 3.0, 4.0, 5.0];
        let high = [6.0, 7.0, 8.0, 9.0, 10.0];
        close(rank_sum(&low, &high, 1), 2.0 / 252.0);
        close(rank_sum(&high, &low, 1), 2.0 / 252.0);
        close(rank_sum(&[1.0; 5], &[1.0; 5], 1), 1.0);
        // By hand: {1,3} of {1,2,3,4} has sums 3,4,5,5,6,7 around 5; |4-5| or more: 4 of 6.
        close(rank_sum(&[1.0, 3.0], &[2.0, 4.0], 1), 4.0 / 6.0);
    }

    #[test]
    fn drawn_arrangements_agree_with_exact_ones() {
        let low: Vec<f64> = (0..12).map(f64::from).collect();
        let high: Vec<f64> = (0..12).map(|i| f64::from(i) + 4.5).collect();
        let p = rank_sum(&low, &high, 3);
        assert!((0.005..0.05).contains(&p), "{p}");
        let far: Vec<f64> = (0..12).map(|i| f64::from(i) + 100.0).collect();
        let p = rank_sum(&low, &far, 3);
        assert!(p > 0.0 && p < 0.001, "{p}");
    }

    #[test]
    fn holm_keeps_the_order_and_never_exceeds_one() {
        assert_eq!(holm(&[0.01, 0.04, 0.03]), [0.03, 0.06, 0.06]);
        assert_eq!(holm(&[0.6, 0.7]), [1.0, 1.0]);
        assert!(holm(&[]).is_empty());
    }
}
