//! Fuzzing of parsers as ordinary tests: inputs follow from their number, so what fails once fails
//! again.
//!
//! Each input is one of a target's valid ones, changed in up to eight places, or noise. `TORC_FUZZ_INPUTS`
//! says how many inputs a target gets; the default fits into every run of the tests.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Inputs of each target, unless the environment says otherwise.
const INPUTS: u64 = 20_000;

/// Longest input that is noise from beginning to end.
const NOISE_BYTES_MAX: u64 = 300;

/// What a parser may hold for each byte of its input, and besides: see [`Target::within`].
const HELD_PER_BYTE: u64 = 64;
const HELD_BESIDES: u64 = 128 << 10;

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

/// Runs a function and says how many bytes of memory it held at most.
pub type Measure = fn(&mut dyn FnMut()) -> u64;

/// A parser to be fuzzed.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// For people.
    pub name: &'a str,
    /// Inputs that it takes.
    pub valid: &'a [Vec<u8>],
    /// It gets one in so many of the inputs: 1, or more when each takes long.
    pub one_in: u64,
    /// How its memory is measured: a parser may hold 128 KiB, and 64 bytes for each byte of its
    /// input. `None` where that cannot be told from what others hold.
    pub within: Option<Measure>,
}

/// Gives `parse` many inputs made out of `valid` ones; none may make it panic.
///
/// # Panics
/// When one does; its number and its bytes are printed.
pub fn fuzz(name: &str, valid: &[Vec<u8>], parse: impl Fn(&[u8])) {
    let target = Target {
        name,
        valid,
        one_in: 1,
        within: None,
    };
    target.fuzz(parse);
}

impl Target<'_> {
    /// Gives `parse` many inputs.
    ///
    /// # Panics
    /// When one makes it panic or hold too much; its number and its bytes are printed.
    pub fn fuzz(&self, parse: impl Fn(&[u8])) {
        for input in self.valid {
            self.give(&parse, input);
        }
        for number in 0..inputs().div_ceil(self.one_in) {
            let input = input(number, self.valid);
            let parsed = catch_unwind(AssertUnwindSafe(|| self.give(&parse, &input)));
            if let Err(panic) = parsed {
                println!("{}: input {number} is {input:02x?}", self.name);
                println!("{}: as text: {}", self.name, input.escape_ascii());
                resume_unwind(panic);
            }
        }
    }

    fn give(&self, parse: &impl Fn(&[u8]), input: &[u8]) {
        let Some(measure) = self.within else {
            return parse(input);
        };
        let held = measure(&mut || parse(input));
        let len = u64::try_from(input.len()).expect("a length in memory fits 64 bits");
        let held_max = HELD_BESIDES + HELD_PER_BYTE * len;
        assert!(
            held <= held_max,
            "{held} bytes held for {len} bytes of input"
        );
    }
}

/// How many inputs a target gets.
///
/// # Panics
/// When the environment says something else than a number.
pub fn inputs() -> u64 {
    let inputs = std::env::var("TORC_FUZZ_INPUTS").ok();
    inputs.map_or(INPUTS, |inputs| inputs.parse().expect("a number"))
}

/// Input `number` made out of `valid` ones.
pub fn input(number: u64, valid: &[Vec<u8>]) -> Vec<u8> {
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
    match random.below(9) {
        0 | 1 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
        2 if at < bytes.len() => bytes[at] = random.byte(),
        // A number of any width that is an edge, or next to one.
        3 | 4 => {
            let width = [1, 2, 4, 8][random.index(4)].min(bytes.len() - at);
            bytes[at..at + width].copy_from_slice(&edge(random).to_le_bytes()[..width]);
        }
        // The same in digits, for those who read text.
        5 => {
            let digits = bytes[at..].iter().take_while(|byte| byte.is_ascii_digit());
            let end = at + digits.count();
            bytes.splice(at..end, edge(random).to_string().into_bytes());
        }
        6 => bytes.truncate(at),
        7 => {
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

fn edge(random: &mut Random) -> u64 {
    EDGES[random.index(EDGES.len())]
        .wrapping_add(random.below(3))
        .wrapping_sub(1)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_panics_or_holds_too_much_is_found() {
        let valid = [b"valid 10".to_vec()];
        let target = Target {
            name: "test",
            valid: &valid,
            one_in: 4,
            within: None,
        };
        let finds = |target: &Target<'_>, parse: &dyn Fn(&[u8])| {
            catch_unwind(AssertUnwindSafe(|| target.fuzz(parse))).is_err()
        };
        assert!(!finds(&target, &|_| {}));
        assert!(finds(&target, &|input| assert!(
            !input.starts_with(b"Valid")
        )));
        assert!(finds(&target, &|input| assert!(
            !input.ends_with(b"2147483648")
        )));
        let within = |held| Target {
            within: Some(held),
            ..target
        };
        let just: Measure = |parse| {
            parse();
            HELD_BESIDES
        };
        let much: Measure = |_| HELD_BESIDES + HELD_PER_BYTE * 1_000;
        assert!(!finds(&within(just), &|_| {}));
        assert!(finds(&within(much), &|_| {}));
    }
}
