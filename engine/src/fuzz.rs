//! Fuzzing of the parsers as ordinary tests: inputs follow from their number, so what fails once
//! fails again.
//!
//! Each input is one of a target's valid ones, changed in up to eight places, or noise. `TORC_FUZZ_INPUTS`
//! says how many inputs a target gets; the default fits into every run of the tests.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Inputs of each target, unless the environment says otherwise.
const INPUTS: u64 = 20_000;

/// Longest input that is noise from beginning to end.
const NOISE_BYTES_MAX: u64 = 300;

/// Numbers that lie where parsers go wrong.
const EDGES: [u64; 12] = [
    0,
    1,
    2,
    63,
    64,
    127,
    128,
    255,
    0x7fff_ffff,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    u64::MAX,
];

/// Gives `parse` many inputs made out of `valid` ones; none may make it panic.
pub(crate) fn fuzz(target: &str, valid: &[Vec<u8>], parse: impl Fn(&[u8])) {
    for input in valid {
        parse(input);
    }
    let inputs = std::env::var("TORC_FUZZ_INPUTS").ok();
    let inputs = inputs.map_or(INPUTS, |inputs| inputs.parse().expect("a number"));
    for number in 0..inputs {
        let input = input(number, valid);
        let parsed = catch_unwind(AssertUnwindSafe(|| parse(&input)));
        if let Err(panic) = parsed {
            println!("{target}: input {number} is {input:02x?}");
            resume_unwind(panic);
        }
    }
}

/// Input `number`.
fn input(number: u64, valid: &[Vec<u8>]) -> Vec<u8> {
    let mut random = Random(number);
    if valid.is_empty() || random.below(64) == 0 {
        let len = random.below(NOISE_BYTES_MAX);
        return (0..len).map(|_| random.byte()).collect();
    }
    let mut bytes = valid[random.index(valid.len())].clone();
    for _ in 0..=random.below(8) {
        change(&mut bytes, &mut random, valid);
    }
    bytes
}

fn change(bytes: &mut Vec<u8>, random: &mut Random, valid: &[Vec<u8>]) {
    let at = random.index(bytes.len() + 1);
    let len = random.index(17).min(bytes.len() - at);
    match random.below(8) {
        0 | 1 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
        2 if at < bytes.len() => bytes[at] = random.byte(),
        // A number of any width that is an edge, or next to one.
        3 | 4 => {
            let edge = EDGES[random.index(EDGES.len())]
                .wrapping_add(random.below(3))
                .wrapping_sub(1);
            let width = [1, 2, 4, 8][random.index(4)].min(bytes.len() - at);
            bytes[at..at + width].copy_from_slice(&edge.to_le_bytes()[..width]);
        }
        5 => bytes.truncate(at),
        6 => {
            let part = bytes[at..at + len].to_vec();
            let to = random.index(bytes.len() + 1);
            bytes.splice(to..to, part);
        }
        _ => {
            let other = &valid[random.index(valid.len())];
            let from = random.index(other.len() + 1);
            let part = other[from..(from + len).min(other.len())].to_vec();
            bytes.splice(at..at + len, part);
        }
    }
}

/// Numbers that follow from the first one (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn index(&mut self, len: usize) -> usize {
        let len = u64::try_from(len).expect("a length in memory fits 64 bits");
        usize::try_from(self.below(len)).expect("below a usize")
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }
}
