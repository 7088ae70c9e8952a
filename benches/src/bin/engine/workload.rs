//! What every engine is given: data, limits, and loads.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{RngCore as _, SeedableRng as _};
use torc_measure::keys::{Distribution, Keys as Draw, below, mixed};
use torc_measure::mix::{Mix, Operation, Ycsb};
use torc_measure::sizes::Sizes;

/// Bytes of a key.
pub const KEY_BYTES: usize = 20;

/// Data and limits, the same for all.
#[derive(Clone, Debug)]
pub struct Settings {
    pub keys: u32,
    pub value_bytes: usize,
    /// Bytes from which on a value goes into a blob, where an engine has such.
    pub separate_from: Option<usize>,
    /// Memory for cached records or blocks.
    pub cache_bytes: usize,
    /// Memory of a memtable; each engine may have two.
    pub memtable_bytes: usize,
    /// Size of a segment of our log.
    pub wal_segment_bytes: u64,
    pub durations: Durations,
}

/// How long loads run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Durations {
    /// That end after their time.
    pub load: Duration,
    /// At most, overwrites that end when so much has been overwritten.
    pub overwrite_max: Duration,
}

impl Settings {
    /// Key and value.
    pub fn record_bytes(&self) -> u64 {
        u64::try_from(KEY_BYTES + self.value_bytes).expect("64 bits")
    }

    /// Of one of so many equal instances.
    pub fn part(&self, instances: usize) -> Settings {
        let count = u32::try_from(instances).expect("not so many cores");
        Settings {
            keys: self.keys / count,
            cache_bytes: self.cache_bytes / instances,
            memtable_bytes: self.memtable_bytes / instances,
            wal_segment_bytes: self.wal_segment_bytes / u64::from(count),
            ..self.clone()
        }
    }

    /// Whether values of this size are separated.
    #[cfg(any(feature = "fjall", feature = "rocksdb"))]
    pub fn separates(&self) -> bool {
        self.separate_from
            .is_some_and(|from| from <= self.value_bytes)
    }
}

/// Keys that a load draws from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Keys {
    /// Keys that are there.
    Present(Distribution),
    /// Keys that were never written, from among those that were.
    Absent,
}

/// Each key that is there equally often.
pub const UNIFORM: Keys = Keys::Present(Distribution::Uniform);

/// What ends a load.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Until {
    /// All keys are there. Such a load is durable only when it has ended; in others each write is when it returns.
    Loaded,
    /// Its time is over.
    Time,
    /// So many times as many writes as there are keys have begun, or the longest time for that is over.
    Overwritten(u64),
}

/// A kind of load.
#[derive(Clone, Debug)]
pub struct Load {
    pub name: String,
    pub clients: usize,
    /// Clients beside them that only overwrite.
    pub writers: usize,
    pub mix: Mix,
    pub keys: Keys,
    pub scan_records: Sizes,
    pub until: Until,
}

impl Load {
    fn new(name: &str, clients: usize, operation: Operation) -> Load {
        Load {
            name: name.to_owned(),
            clients,
            writers: 0,
            mix: Mix::of(&[(operation, 1.0)]),
            keys: UNIFORM,
            scan_records: Sizes::Fixed(100),
            until: Until::Time,
        }
    }

    pub fn is_bulk(&self) -> bool {
        self.until == Until::Loaded
    }

    /// Of one of so many equal instances: its clients. A lone writer is one for each.
    fn part(&self, instances: usize) -> Load {
        Load {
            clients: self.clients / instances,
            ..self.clone()
        }
    }

    fn ycsb(name: &str, workload: Ycsb) -> Load {
        let (mix, distribution, scan_records) = workload.parts();
        Load {
            mix,
            keys: Keys::Present(distribution),
            scan_records,
            ..Load::new(&format!("YCSB {name}"), 64, Operation::Read)
        }
    }
}

/// What is done with one store, from empty on.
pub struct Script {
    pub loads: Vec<Load>,
    /// Loads before everything is merged.
    pub settled_after: usize,
}

impl Script {
    /// Of one of so many equal instances. Loads of fewer clients are left out: they would leave instances idle, and
    /// say what they say of one.
    pub fn part(mut self, instances: usize) -> Script {
        self.loads.retain(|load| load.clients >= instances);
        self.loads = self.loads.iter().map(|load| load.part(instances)).collect();
        self
    }

    /// Only loads in whose names `part` occurs, and what they build on.
    pub fn only(mut self, part: &str) -> Script {
        self.loads
            .retain(|load| load.is_bulk() || load.name.contains(part));
        self
    }
}

/// All that is measured of an engine.
pub fn scripts() -> [Script; 2] {
    use Operation::{Insert, Modify, Read, Scan, Write};
    let writes = vec![
        Load::new("random fill, durable, 64 clients", 64, Insert),
        Load::new("random fill, durable, 1 client", 1, Insert),
    ];
    let rest = vec![
        Load {
            until: Until::Loaded,
            ..Load::new("bulk load", 64, Insert)
        },
        Load::new("read hit, 1 client", 1, Read),
        Load::new("read hit, 64 clients", 64, Read),
        Load {
            keys: Keys::Absent,
            ..Load::new("read miss, 64 clients", 64, Read)
        },
        Load::new("scan of 100, 1 client", 1, Scan),
        Load {
            until: Until::Overwritten(3),
            ..Load::new("overwrite ×3, 64 clients", 64, Write)
        },
        Load::new("read, then write, 64 clients", 64, Modify),
        Load {
            writers: 1,
            ..Load::new("read while writing, 64 clients", 64, Read)
        },
        Load::ycsb("A", Ycsb::A),
        Load::ycsb("B", Ycsb::B),
        Load::ycsb("C", Ycsb::C),
        Load::ycsb("D", Ycsb::D),
        Load::ycsb("E", Ycsb::E),
        Load::ycsb("F", Ycsb::F),
    ];
    [
        Script {
            loads: writes,
            settled_after: usize::MAX,
        },
        Script {
            loads: rest,
            settled_after: 1,
        },
    ]
}

/// Which keys a store holds: those of the numbers from 0 on. Keys of neighbouring numbers have nothing to do with each other, as
/// YCSB has it (`insertorder=hashed`), and as keys come to the store of a node in a ring.
#[derive(Default)]
pub struct Population {
    next: AtomicU64,
    /// All below are there.
    count: AtomicU64,
    /// What is there above.
    ahead: Mutex<BTreeSet<u64>>,
}

impl Population {
    /// Keys that are there, at least.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    fn inserted(&self, number: u64) {
        let mut ahead = self.ahead.lock().expect("no client has panicked");
        ahead.insert(number);
        let mut count = self.count.load(Ordering::Relaxed);
        while ahead.remove(&count) {
            count += 1;
        }
        self.count.store(count, Ordering::Release);
    }
}

/// What a client does next.
#[derive(Clone, Debug)]
pub struct Step {
    pub operation: Operation,
    pub key: Vec<u8>,
    /// What is written, if anything is.
    pub value: Bytes,
    /// Of a read: whether the key must be there.
    pub is_there: bool,
    /// Records of a scan.
    pub records: usize,
    /// Of an insert.
    number: u64,
}

/// What all clients of a load share.
pub struct Run<'a> {
    pub settings: &'a Settings,
    pub load: &'a Load,
    pub population: &'a Population,
    /// When no client begins a step any more.
    end: Option<Instant>,
    /// So many steps are begun at most; how many have been.
    steps_max: u64,
    steps: AtomicU64,
}

impl<'a> Run<'a> {
    /// That begins at a time.
    pub fn new(
        settings: &'a Settings,
        load: &'a Load,
        population: &'a Population,
        begun: Instant,
    ) -> Run<'a> {
        let Durations {
            load: duration,
            overwrite_max,
        } = settings.durations;
        let (end, steps_max) = match load.until {
            Until::Loaded => (None, u64::MAX),
            Until::Time => (Some(begun + duration), u64::MAX),
            Until::Overwritten(times) => (Some(begun + overwrite_max), times * population.count()),
        };
        Run {
            settings,
            load,
            population,
            end,
            steps_max,
            steps: AtomicU64::new(0),
        }
    }

    /// Whether another step may begin; counts it if so.
    fn goes_on(&self) -> bool {
        if self.end.is_some_and(|end| Instant::now() >= end) {
            return false;
        }
        self.steps_max == u64::MAX || self.steps.fetch_add(1, Ordering::Relaxed) < self.steps_max
    }

    /// Clients of both kinds.
    pub fn clients(&self) -> std::ops::Range<usize> {
        0..self.load.clients + self.load.writers
    }
}

/// The key of a number, each its own.
fn hashed(number: u64) -> Vec<u8> {
    format!("user{:016x}", mixed(number)).into_bytes()
}

/// One that does one thing after the other.
pub struct Client<'a> {
    run: &'a Run<'a>,
    numbers: Numbers,
    draw: Draw,
    only_writes: bool,
    pub tally: Tally,
}

impl<'a> Client<'a> {
    pub fn new(run: &'a Run<'a>, number: usize) -> Client<'a> {
        let distribution = match run.load.keys {
            Keys::Present(distribution) => distribution,
            Keys::Absent => Distribution::Uniform,
        };
        Client {
            run,
            numbers: Numbers::new(number + 1),
            draw: Draw::new(distribution, run.population.count().max(1), 0.0),
            only_writes: number >= run.load.clients,
            tally: Tally::new(),
        }
    }

    /// The next step, unless the load has ended.
    pub fn next(&mut self) -> Option<Step> {
        let Run {
            settings,
            load,
            population,
            ..
        } = self.run;
        if !self.run.goes_on() {
            return None;
        }
        let operation = if self.only_writes {
            Operation::Write
        } else {
            load.mix.draw(&mut self.numbers.0)
        };
        let mut step = Step {
            operation,
            key: Vec::new(),
            value: Bytes::new(),
            is_there: load.keys != Keys::Absent,
            records: 0,
            number: 0,
        };
        if operation == Operation::Insert {
            step.number = population.next.fetch_add(1, Ordering::Relaxed);
            if load.is_bulk() && step.number >= u64::from(settings.keys) {
                return None;
            }
            step.key = hashed(step.number);
        } else {
            let count = population.count();
            let number = self.draw.next(&mut self.numbers.0, count, 0);
            step.key = hashed(number);
            if !step.is_there {
                // Behind all keys that begin like it, and before the next.
                step.key[KEY_BYTES - 1] = b'x';
            }
        }
        if operation.writes() {
            step.value = self.numbers.value(settings.value_bytes);
        }
        if operation == Operation::Scan {
            let records = load.scan_records.sample(&mut self.numbers.0, 1);
            step.records = usize::try_from(records).expect("64 bits");
        }
        Some(step)
    }

    /// A step was done; `scanned` is the bytes that a scan returned.
    pub fn done(&mut self, step: &Step, took: Duration, scanned: u64) {
        use Operation::{Insert, Modify, Read, Scan, Write};
        let record = self.run.settings.record_bytes();
        let tally = &mut self.tally;
        let histogram = match step.operation {
            Read => &mut tally.reads,
            Scan => &mut tally.scans,
            _ => &mut tally.writes,
        };
        let nanos = u64::try_from(took.as_nanos()).expect("a short time");
        histogram.record(nanos).expect("a growing histogram");
        tally.asked_bytes += match step.operation {
            Read | Modify => record,
            _ => scanned,
        };
        if matches!(step.operation, Insert | Modify | Write) {
            tally.put_bytes += record;
        }
        if step.operation == Insert {
            self.run.population.inserted(step.number);
        }
    }
}

/// What clients did: latencies in nanoseconds, and bytes of records. Histograms of two digits, as three take half a
/// mebibyte a client of the memory that the engine is given.
#[derive(Clone)]
pub struct Tally {
    pub reads: hdrhistogram::Histogram<u64>,
    pub writes: hdrhistogram::Histogram<u64>,
    pub scans: hdrhistogram::Histogram<u64>,
    pub put_bytes: u64,
    pub asked_bytes: u64,
}

impl Tally {
    pub fn new() -> Tally {
        let histogram = || hdrhistogram::Histogram::new(2).expect("two digits");
        Tally {
            reads: histogram(),
            writes: histogram(),
            scans: histogram(),
            put_bytes: 0,
            asked_bytes: 0,
        }
    }

    pub fn add(&mut self, other: &Tally) {
        self.reads.add(&other.reads).expect("one shape");
        self.writes.add(&other.writes).expect("one shape");
        self.scans.add(&other.scans).expect("one shape");
        self.put_bytes += other.put_bytes;
        self.asked_bytes += other.asked_bytes;
    }
}

/// A stream of numbers that look random, and what is made of them.
pub struct Numbers(Xoshiro256PlusPlus);

impl Numbers {
    pub fn new(seed: usize) -> Numbers {
        let seed = u64::try_from(seed).expect("64 bits");
        Numbers(Xoshiro256PlusPlus::seed_from_u64(seed))
    }

    /// One of `keys` keys, evenly; `kind` is how they begin.
    pub fn key(&mut self, kind: &str, keys: u32) -> Vec<u8> {
        let number = below(&mut self.0, u64::from(keys));
        key(kind, u32::try_from(number).expect("below a 32-bit bound"))
    }

    /// A value of which half compresses: a piece of a common supply, so that making it costs next to nothing.
    pub fn value(&mut self, bytes: usize) -> Bytes {
        let supply = supply();
        let room = u64::try_from(supply.len() - bytes).expect("values below its size");
        let begin = usize::try_from(below(&mut self.0, room)).expect("64 bits");
        supply.slice(begin..begin + bytes)
    }
}

/// Four mebibytes of 64 random bytes and 64 equal ones by turns.
fn supply() -> Bytes {
    static SUPPLY: std::sync::OnceLock<Bytes> = std::sync::OnceLock::new();
    let make = || {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(0);
        let mut bytes = vec![b'.'; 4 << 20];
        for piece in bytes.chunks_exact_mut(128) {
            rng.fill_bytes(&mut piece[..64]);
        }
        Bytes::from(bytes)
    };
    SUPPLY.get_or_init(make).clone()
}

/// The key of a number.
pub fn key(kind: &str, number: u32) -> Vec<u8> {
    format!("{kind}{number:016}").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            keys: 10,
            value_bytes: 100,
            separate_from: None,
            cache_bytes: 32 << 20,
            memtable_bytes: 16 << 20,
            wal_segment_bytes: 16 << 20,
            durations: Durations {
                load: Duration::ZERO,
                overwrite_max: Duration::from_secs(3600),
            },
        }
    }

    fn of_name(script: &Script, part: &str) -> Load {
        let mut loads = script.loads.iter();
        let load = loads.find(|load| load.name.contains(part));
        load.expect("a load of that name").clone()
    }

    #[test]
    fn parts_divide_keys_memory_and_clients_and_leave_out_lone_clients() {
        let part = settings().part(2);
        assert_eq!((part.keys, part.cache_bytes), (5, 16 << 20));
        assert_eq!(part.memtable_bytes, 8 << 20);
        let [_, script] = scripts();
        let all = script.loads.len();
        let script = script.part(2);
        assert_eq!(script.loads.len(), all - 2, "two loads have one client");
        let load = of_name(&script, "while writing");
        assert_eq!((load.clients, load.writers), (32, 1));
        assert!(script.loads[script.settled_after - 1].is_bulk());
    }

    #[test]
    fn a_choice_of_loads_keeps_what_they_build_on() {
        let [fills, script] = scripts();
        let names = |script: Script| -> Vec<String> {
            script.loads.into_iter().map(|load| load.name).collect()
        };
        assert_eq!(names(script.only("YCSB C")), ["bulk load", "YCSB C"]);
        assert!(names(fills.only("YCSB C")).is_empty());
    }

    #[test]
    fn overwrites_end_when_everything_has_been_three_times() {
        let (settings, population) = (settings(), Population::default());
        let run_all = |load: &Load| {
            let run = Run::new(&settings, load, &population, Instant::now());
            let mut clients = [Client::new(&run, 0), Client::new(&run, 1)];
            let mut done = 0;
            while let Some((client, step)) = clients
                .iter_mut()
                .find_map(|client| client.next().map(|step| (client, step)))
            {
                client.done(&step, Duration::from_micros(1), 0);
                done += 1;
            }
            done
        };
        let [_, script] = scripts();
        assert_eq!(run_all(&of_name(&script, "bulk")), 10);
        assert_eq!(run_all(&of_name(&script, "overwrite")), 30);
        assert_eq!(
            run_all(&of_name(&script, "read hit")),
            0,
            "its time is zero"
        );
    }
}
