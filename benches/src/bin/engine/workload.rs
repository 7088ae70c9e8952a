//! What every engine is given: records, loads, and the line that a load prints.

use std::time::Duration;

use hdrhistogram::Histogram;

/// Data and limits, the same for all.
#[derive(Clone, Debug)]
pub struct Settings {
    pub keys: u32,
    pub value_bytes: usize,
    pub cache_bytes: usize,
    pub memtable_bytes: usize,
    /// How long each load runs.
    pub duration: Duration,
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
    /// Puts, each durable when it returns.
    Put { writers: usize },
    /// Gets.
    Get { readers: usize, keys: Keys },
}

/// The loads, in order. The first ones run on top of the filled store; the reads after a compaction.
pub const PUTS: [Load; 2] = [Load::Put { writers: 1 }, Load::Put { writers: 64 }];
pub const GETS: [Load; 5] = [
    get(1, Keys::Hot),
    get(1, Keys::Uniform),
    get(64, Keys::Uniform),
    get(1, Keys::Absent),
    get(64, Keys::Absent),
];

const fn get(readers: usize, keys: Keys) -> Load {
    Load::Get { readers, keys }
}

impl Load {
    pub fn name(self) -> String {
        match self {
            Load::Put { writers } => format!("put, synced, {writers} writers"),
            Load::Get { readers, keys } => {
                let keys = match keys {
                    Keys::Uniform => "any",
                    Keys::Hot => "hot",
                    Keys::Absent => "absent",
                };
                format!("get, {keys} keys, {readers} readers")
            }
        }
    }
}

/// Latencies of one load, in nanoseconds.
pub fn histogram() -> Histogram<u64> {
    Histogram::new(3).expect("three digits")
}

pub fn record(latencies: &mut Histogram<u64>, took: Duration) {
    let nanos = u64::try_from(took.as_nanos()).expect("a short time");
    latencies.record(nanos).expect("a growing histogram");
}

pub fn print(engine: &str, load: &str, latencies: &Histogram<u64>, took: Duration) {
    let micros = |nanos: u64| Duration::from_nanos(nanos).as_secs_f64() * 1e6;
    let at = |quantile| micros(latencies.value_at_quantile(quantile));
    println!(
        "{engine:<10} {load:<28} {:>10.0} {:>10.1} {:>10.1} {:>10.1} {:>10.0}",
        latencies.len() as f64 / took.as_secs_f64(),
        at(0.5),
        at(0.99),
        at(0.999),
        micros(latencies.max()),
    );
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
            Keys::Uniform => key(self.below(settings.keys)),
            Keys::Hot => key(self.below(1000)),
            Keys::Absent => key(settings.keys + self.below(settings.keys)),
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
pub fn key(number: u32) -> Vec<u8> {
    format!("user{number:016}").into_bytes()
}
