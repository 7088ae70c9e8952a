//! Rank and frequency of every distribution beside its law.

use super::*;
use rand_xoshiro::rand_core::SeedableRng;

const DRAWS: u32 = 400_000;

fn rng() -> Xoshiro256PlusPlus {
    Xoshiro256PlusPlus::seed_from_u64(1)
}

/// How often each of `count` keys comes.
fn counts(distribution: &str, count: u64) -> Vec<f64> {
    let mut rng = rng();
    let mut keys = Keys::new(distribution.parse().unwrap(), count, 0.0);
    let mut counts = vec![0.0; usize::try_from(count).unwrap()];
    for _ in 0..DRAWS {
        counts[usize::try_from(keys.next(&mut rng, count, 0)).unwrap()] += 1.0;
    }
    counts
}

/// Fails unless `found` is what chance makes of `probabilities`: chi-square over classes of at
/// least 10 expected draws, within 5 standard deviations of its mean.
fn fits(name: &str, found: &[f64], probabilities: &[f64]) {
    assert_eq!(found.len(), probabilities.len());
    let total: f64 = probabilities.iter().sum();
    assert!(
        (total - 1.0).abs() < 1e-6,
        "{name}: probabilities sum to {total}"
    );
    let (mut chi, mut classes) = (0.0, 0.0);
    let (mut seen, mut expected) = (0.0, 0.0);
    for (count, probability) in found.iter().zip(probabilities) {
        seen += count;
        expected += probability * f64::from(DRAWS);
        if expected >= 10.0 {
            chi += (seen - expected).powi(2) / expected;
            classes += 1.0;
            (seen, expected) = (0.0, 0.0);
        }
    }
    let freedom: f64 = classes - 1.0;
    let limit = freedom + 5.0 * (2.0 * freedom).sqrt();
    assert!(
        freedom >= 1.0 && chi < limit,
        "{name}: chi-square {chi} of {freedom}, limit {limit}"
    );
}

fn zipf_law(count: u32, exponent: f64) -> Vec<f64> {
    let weights: Vec<f64> = (1..=count)
        .map(|rank| f64::from(rank).powf(-exponent))
        .collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / total).collect()
}

#[test]
fn scattering_is_a_bijection() {
    for count in [1u64, 2, 3, 17, 1000, 4097] {
        let mut seen: Vec<u64> = (0..count).map(|rank| scatter(rank, count)).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..count).collect::<Vec<_>>());
    }
}

#[test]
fn zipf_keys_follow_the_law_rank_by_rank() {
    for exponent in [0.5, 0.99, 1.0, 1.4] {
        let found = counts(&format!("zipf:{exponent}"), 1000);
        let by_rank: Vec<f64> = (0..1000)
            .map(|rank| found[usize::try_from(scatter(rank, 1000)).unwrap()])
            .collect();
        fits(
            &format!("zipf {exponent}"),
            &by_rank,
            &zipf_law(1000, exponent),
        );
    }
}

#[test]
fn latest_is_zipf_counted_from_the_newest_key() {
    let mut found = counts("latest", 1000);
    found.reverse();
    fits("latest", &found, &zipf_law(1000, 0.99));
    // The newest key moves as keys are added.
    let mut rng = rng();
    let mut keys = Keys::new("latest".parse().unwrap(), 10, 0.0);
    let newest = (0..10_000)
        .filter(|_| keys.next(&mut rng, 500, 0) == 499)
        .count();
    assert!(newest > 1000, "{newest} of 10000 to the newest of 500 keys");
}

#[test]
fn hotspot_gives_its_share_to_the_hot_keys_and_is_flat_within() {
    let found = counts("hotspot:0.2:0.8", 100);
    let by_rank: Vec<f64> = (0..100)
        .map(|rank| found[usize::try_from(scatter(rank, 100)).unwrap()])
        .collect();
    let law: Vec<f64> = (0..100)
        .map(|rank| if rank < 20 { 0.8 / 20.0 } else { 0.2 / 80.0 })
        .collect();
    fits("hotspot", &by_rank, &law);
}

#[test]
fn exponential_keeps_its_percentile_from_the_newest_key() {
    let mut found = counts("exponential:95:0.5", 1000);
    found.reverse();
    let gamma = 20.0_f64.ln() / 500.0;
    let weights: Vec<f64> = (0..1000)
        .map(|back| (-gamma * f64::from(back)).exp() - (-gamma * f64::from(back + 1)).exp())
        .collect();
    let total: f64 = weights.iter().sum();
    let law: Vec<f64> = weights.iter().map(|weight| weight / total).collect();
    fits("exponential", &found, &law);
    let within: f64 = found[..500].iter().sum();
    let share = within / f64::from(DRAWS);
    assert!(
        (0.945..0.96).contains(&share),
        "{share} within half the keys"
    );
}

#[test]
fn scrambled_is_ycsbs_zipfian_over_ten_thousand_million_items() {
    // YCSB publishes the sum of its law: zeta(10^10, 0.99) = 26.46902820178302, so the hottest
    // item gets 3.78 % of all operations however many keys there are, the second 1.90 %.
    let count = 100_000;
    let found = counts("scrambled", count);
    for (item, share) in [(0_u64, 1.0 / 26.469), (1, 2.0_f64.powf(-0.99) / 26.469)] {
        let key = usize::try_from(fnv64(item) % count).unwrap();
        let seen = found[key] / f64::from(DRAWS);
        assert!(
            (seen / share - 1.0).abs() < 0.04,
            "item {item}: {seen} instead of {share}"
        );
    }
    let reached = found.iter().filter(|count| **count > 0.0).count();
    assert!(
        reached > 50_000,
        "the tail is spread over the keys: {reached}"
    );
}

#[test]
fn uniform_and_sequential_keys_come_equally_often() {
    fits("uniform", &counts("uniform", 1000), &[0.001; 1000]);
    let found = counts("sequential", 1000);
    assert!(found.iter().all(|count| *count == f64::from(DRAWS / 1000)));
}

#[test]
fn churn_gives_every_rank_another_key_in_its_time() {
    let keys = Keys::new("zipf".parse().unwrap(), 1_000_000, 0.1);
    let minute = 60_000_000_000;
    let moved = |from: u64, to: u64| {
        let same = (0..10_000).filter(|rank| keys.place(*rank, from) == keys.place(*rank, to));
        10_000 - same.count()
    };
    assert_eq!(moved(0, 1_000_000), 0);
    for start in [0, 7 * minute] {
        let share = moved(start, start + minute);
        assert!(
            (850..1150).contains(&share),
            "{share} of 10000 in a minute at 10 %"
        );
    }
    assert!(moved(0, 10 * minute) > 9_900);
}

#[test]
fn distributions_are_named_and_checked() {
    for good in [
        "uniform",
        "zipf:1.2",
        "latest",
        "hotspot:0.1:0.9",
        "exponential",
        "scrambled",
    ] {
        assert!(good.parse::<Distribution>().is_ok(), "{good}");
    }
    for bad in [
        "",
        "zipf:0",
        "zipf:x",
        "hotspot:2:1",
        "exponential:100:1",
        "exponential:0:0.5",
        "exponential:95:1e300",
        "gauss",
    ] {
        assert!(bad.parse::<Distribution>().is_err(), "{bad}");
    }
}
