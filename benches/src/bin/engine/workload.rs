//! What every engine is given: records, and loads.

use std::time::Duration;

use hdrhistogram::Histogram;

/// Data and limits, the same for all.
#[derive(Clone, Debug)]
pub struct Settings {
    pub keys: u32,
    pub value_bytes: usize,
    /// Bytes from which on Torc puts a value into a blob.
    pub separate_from: Option<usize>,
    /// Memory for cached records or blocks.
    pub cache_bytes: usize,
    /// Memory of a memtable; each engine may have two.
    pub memtable_bytes: usize,
    /// How long each load runs.
    pub duration: Duration,
}

/// The next option of the command line, with its value.
pub fn option(words: &mut impl Iterator<Item = String>) -> Option<(String, String)> {
    let word = words.next()?;
    let value = words
        .next()
        .unwrap_or_else(|| panic!("{word} needs a value"));
    Some((word, value))
}

/// Keys that a load draws from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys {
    /// All of them, evenly.
    Uniform,
    /// The first thousand, evenly: they fit every cache.
    Hot,
    /// Keys that were never written.
    Absent,
}

/// A kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Every key once, each put durable when it returns.
    Fill { clients: usize },
    /// Keys that are not there yet, each durable when it returns.
    Insert { clients: usize },
    /// Keys that are there: read, then written, as a store does that merges versions; each durable when
    /// it returns.
    Update { clients: usize },
    /// Updates as above and gets, one half each, of any key.
    Mixed { clients: usize },
    /// Gets.
    Get { clients: usize, keys: Keys },
}

/// What a client does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    Insert { key: Vec<u8>, value: Vec<u8> },
    Update { key: Vec<u8>, value: Vec<u8> },
    Get { key: Vec<u8>, is_there: bool },
}

/// What every engine goes through first, on one store.
pub const WRITES: [Load; 5] = [
    Load::Fill { clients: 64 },
    Load::Insert { clients: 1 },
    Load::Update { clients: 1 },
    Load::Update { clients: 64 },
    Load::Mixed { clients: 64 },
];

/// What comes after a full compaction.
pub const READS: [Load; 5] = [
    get(1, Keys::Hot),
    get(1, Keys::Uniform),
    get(64, Keys::Uniform),
    get(1, Keys::Absent),
    get(64, Keys::Absent),
];

const fn get(clients: usize, keys: Keys) -> Load {
    Load::Get { clients, keys }
}

impl Load {
    pub fn name(self) -> String {
        match self {
            Load::Fill { clients } => format!("fill, {}", of(clients)),
            Load::Insert { clients } => format!("insert, {}", of(clients)),
            Load::Update { clients } => format!("read and write, {}", of(clients)),
            Load::Mixed { clients } => format!("50% reads, {}", of(clients)),
            Load::Get { clients, keys } => {
                let keys = match keys {
                    Keys::Uniform => "any key",
                    Keys::Hot => "hot keys",
                    Keys::Absent => "absent keys",
                };
                format!("get {keys}, {}", of(clients))
            }
        }
    }

    pub fn clients(self) -> usize {
        match self {
            Load::Fill { clients }
            | Load::Insert { clients }
            | Load::Update { clients }
            | Load::Mixed { clients }
            | Load::Get { clients, .. } => clients,
        }
    }

    /// A client's next step. `filled` counts the keys that a fill has handed out.
    pub fn next(
        self,
        settings: &Settings,
        numbers: &mut Numbers,
        filled: impl FnOnce() -> u32,
    ) -> Option<Step> {
        let is_put = match self {
            Load::Fill { .. } => {
                let number = filled();
                return (number < settings.keys).then(|| Step::Insert {
                    key: key("user", number),
                    value: numbers.value(settings),
                });
            }
            Load::Insert { .. } => {
                return Some(Step::Insert {
                    key: key("more", filled()),
                    value: numbers.value(settings),
                });
            }
            Load::Update { .. } => true,
            Load::Mixed { .. } => numbers.next() >> 63 == 0,
            Load::Get { .. } => false,
        };
        let keys = match self {
            Load::Get { keys, .. } => keys,
            _ => Keys::Uniform,
        };
        let key = numbers.key(settings, keys);
        Some(if is_put {
            let value = numbers.value(settings);
            Step::Update { key, value }
        } else {
            let is_there = keys != Keys::Absent;
            Step::Get { key, is_there }
        })
    }
}

fn of(clients: usize) -> String {
    match clients {
        1 => "1 client".to_owned(),
        _ => format!("{clients} clients"),
    }
}

/// Latencies of one load, in nanoseconds.
#[derive(Clone)]
pub struct Latencies {
    pub puts: Histogram<u64>,
    pub gets: Histogram<u64>,
}

impl Latencies {
    pub fn new() -> Latencies {
        let histogram = || Histogram::new(3).expect("three digits");
        Latencies {
            puts: histogram(),
            gets: histogram(),
        }
    }

    pub fn record(&mut self, is_put: bool, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).expect("a short time");
        let histogram = if is_put {
            &mut self.puts
        } else {
            &mut self.gets
        };
        histogram.record(nanos).expect("a growing histogram");
    }

    #[cfg(any(feature = "fjall", feature = "rocksdb"))]
    pub fn add(&mut self, other: &Latencies) {
        self.puts.add(&other.puts).expect("one shape");
        self.gets.add(&other.gets).expect("one shape");
    }
}

/// A stream of numbers that look random: xorshift64*.
pub struct Numbers(u64);

impl Numbers {
    pub fn new(seed: usize) -> Numbers {
        let seed = u64::try_from(seed).expect("a small number");
        Numbers(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, bound: u32) -> u32 {
        let high = (u128::from(self.next()) * u128::from(bound)) >> 64;
        u32::try_from(high).expect("below a 32-bit bound")
    }

    /// A key of the load.
    pub fn key(&mut self, settings: &Settings, keys: Keys) -> Vec<u8> {
        match keys {
            Keys::Uniform => key("user", self.below(settings.keys)),
            Keys::Hot => key("user", self.below(1000)),
            Keys::Absent => key("none", self.below(settings.keys)),
        }
    }

    /// A value of which half compresses.
    pub fn value(&mut self, settings: &Settings) -> Vec<u8> {
        let mut value = Vec::with_capacity(settings.value_bytes + 8);
        while value.len() < settings.value_bytes / 2 {
            value.extend_from_slice(&self.next().to_le_bytes());
        }
        value.resize(settings.value_bytes, b'.');
        value
    }
}

/// The key of a number: 20 bytes.
pub fn key(kind: &str, number: u32) -> Vec<u8> {
    format!("{kind}{number:016}").into_bytes()
}
