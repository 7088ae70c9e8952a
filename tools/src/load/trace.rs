//! Public traces of cache requests, to be replayed with their timing.
//!
//! Two formats are read, as text:
//!
//! - Twitter's cache traces: `time in seconds,key,key size,value size,client,operation,TTL`, no
//!   header.
//! - Meta's CacheLib key-value traces: a header names the columns; `op_time` (seconds), `key`,
//!   `key_size`, `op`, `op_count`, `size`, `ttl` are used, as far as they are there.
//!
//! Both tell time in whole seconds. Requests of one second are spread over it as a Poisson process
//! would: at sorted uniform moments of a seeded generator. Keys are numbered in order of first
//! appearance; the store gets the load generator's own keys, so that values can be verified.
//!
//! A trace may be larger than memory. It is read once, from a file or a pipe, and its requests wait in
//! a temporary file ([`rows`]); what stays in memory is a number for each different key while it is read.

mod rows;

use std::collections::{BTreeMap, HashMap};
use std::io::BufRead;
use std::time::Duration;

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::SeedableRng;
use torc_measure::keys::{unit, whole};
use torc_measure::mix::Operation;
use xxhash_rust::xxh3::xxh3_64;

use super::interrupt;
use super::value::VALUE_BYTES_MIN;
use super::world::Nanos;
use rows::Writer;
pub use rows::{Ahead, Row};

/// Bytes of a line at most, without its end.
const LINE_BYTES_MAX: usize = 64 << 10;
/// Requests of one second at most: they are in memory while their moments are found.
const SECOND_MAX: usize = 1 << 20;
/// Requests of later seconds that are gathered before a second is taken to be complete: so many lines may
/// one come late by.
const GATHERED_MAX: usize = 1 << 17;

/// A trace that has been read.
pub struct Trace {
    rows: rows::Spool,
    /// Requests.
    pub requests: u64,
    /// Different keys.
    pub keys: u64,
    /// Lines that were no request that can be made, e.g. counters.
    pub skipped: u64,
    /// `twitter` or `meta`.
    pub format: &'static str,
    /// When the last request is due.
    last: Nanos,
}

/// Where the columns are.
struct Columns {
    format: &'static str,
    time: usize,
    key: usize,
    size: Option<usize>,
    operation: usize,
    count: Option<usize>,
    ttl: Option<usize>,
}

const TWITTER: Columns = Columns {
    format: "twitter",
    time: 0,
    key: 1,
    size: Some(3),
    operation: 5,
    count: None,
    ttl: Some(6),
};

impl Columns {
    fn of_header(line: &str) -> Option<Columns> {
        let names: Vec<&str> = line.split(',').map(str::trim).collect();
        let at = |name: &str| names.iter().position(|one| *one == name);
        Some(Columns {
            format: "meta",
            time: at("op_time")?,
            key: at("key")?,
            size: at("size"),
            operation: at("op")?,
            count: at("op_count"),
            ttl: at("ttl"),
        })
    }
}

/// A line without its time.
#[derive(Clone, Copy)]
struct Line {
    key: u64,
    value_bytes: u32,
    ttl_seconds: u32,
    operation: Operation,
}

impl Trace {
    /// Reads a trace, `speed` times as fast as it was.
    pub fn read(input: impl BufRead, speed: f64, seed: u64) -> Result<Trace, String> {
        Self::read_gathering(input, speed, seed, GATHERED_MAX)
    }

    fn read_gathering(
        mut input: impl BufRead,
        speed: f64,
        seed: u64,
        gathered_max: usize,
    ) -> Result<Trace, String> {
        let mut columns = None;
        let mut numbers = Numbers::default();
        let mut skipped = 0;
        let mut timing = Timing::new(speed, seed, gathered_max).map_err(in_spool)?;
        let mut line = String::new();
        for number in 1.. {
            let fail = |error: &dyn std::fmt::Display| format!("line {number}: {error}");
            line.clear();
            let most = u64::try_from(LINE_BYTES_MAX + 1).expect("a small number");
            let taken = std::io::Read::take(&mut input, most).read_line(&mut line);
            if taken.map_err(|error| fail(&error))? == 0 {
                break;
            }
            if line.len() > LINE_BYTES_MAX && !line.ends_with('\n') {
                return Err(fail(&format!("longer than {LINE_BYTES_MAX} bytes")));
            }
            if interrupt::came() {
                return Err(fail(&"interrupted"));
            }
            if number == 1 {
                columns = Columns::of_header(&line);
                if columns.is_some() {
                    continue;
                }
            }
            let columns = columns.as_ref().unwrap_or(&TWITTER);
            match parse(columns, &line, &mut numbers) {
                Some((second, line, count)) => {
                    timing.add(second, line, count).map_err(|why| fail(&why))?;
                }
                None => skipped += 1,
            }
        }
        let (rows, requests, last) = timing.end().map_err(in_spool)?;
        if requests == 0 {
            return Err("no request in the trace: expected Twitter's or CacheLib's columns".into());
        }
        Ok(Trace {
            rows,
            requests,
            keys: numbers.count(),
            skipped,
            format: columns.as_ref().unwrap_or(&TWITTER).format,
            last,
        })
    }

    /// A trace of these requests.
    #[cfg(test)]
    pub fn of(rows: &[Row]) -> Trace {
        let mut writer = Writer::new().unwrap();
        rows.iter().for_each(|row| writer.add(row).unwrap());
        let (spool, requests) = writer.end().unwrap();
        Trace {
            rows: spool,
            requests,
            keys: rows.iter().map(|row| row.key + 1).max().unwrap(),
            skipped: 0,
            format: "test",
            last: rows.last().unwrap().at,
        }
    }

    /// Every `step`th request from `first` on, read ahead a little.
    pub fn ahead(&self, first: usize, step: usize) -> Ahead {
        self.rows.ahead(first, step)
    }

    /// From its beginning until just after its last request is due; never zero.
    pub fn length(&self) -> Duration {
        Duration::from_nanos(self.last) + Duration::from_millis(1)
    }
}

/// The file that requests wait in could not be written.
fn in_spool(error: std::io::Error) -> String {
    format!(
        "its requests take {} bytes each in a temporary file in {}: {error}; give another \
         directory by TMPDIR",
        rows::ROW_BYTES,
        std::env::temp_dir().display()
    )
}

/// Numbers of keys, in order of first appearance. A key is known by its hash: of a hundred million keys
/// two share one in a run out of four thousand, and then are one key here.
#[derive(Default)]
struct Numbers(HashMap<u64, u64>);

impl Numbers {
    fn of(&mut self, key: &str) -> u64 {
        let next = self.count();
        *self.0.entry(xxh3_64(key.as_bytes())).or_insert(next)
    }

    fn count(&self) -> u64 {
        u64::try_from(self.0.len()).expect("a length fits 64 bits")
    }
}

/// The second, the rest, and how often it is there.
fn parse(columns: &Columns, line: &str, numbers: &mut Numbers) -> Option<(u64, Line, u32)> {
    let fields: Vec<&str> = line.split(',').map(str::trim).collect();
    let field = |at: Option<usize>| at.and_then(|at| fields.get(at)).copied();
    let name = field(Some(columns.operation))?.to_ascii_lowercase();
    let operation = match name.as_str() {
        "get" | "gets" | "get_lease" => Operation::Read,
        "set" | "add" | "replace" | "cas" | "set_lease" => Operation::Write,
        "delete" => Operation::Delete,
        _ => return None,
    };
    let second = field(Some(columns.time))?.parse().ok()?;
    let key = field(Some(columns.key)).filter(|key| !key.is_empty())?;
    let key = numbers.of(key);
    let least = u32::try_from(VALUE_BYTES_MIN).expect("a small number");
    let number = |at: Option<usize>| field(at).and_then(|text| text.parse::<u32>().ok());
    let line = Line {
        key,
        value_bytes: number(columns.size)
            .unwrap_or(0)
            .clamp(least, torc_measure::sizes::SIZE_MAX),
        ttl_seconds: number(columns.ttl).unwrap_or(0),
        operation,
    };
    Some((second, line, number(columns.count).unwrap_or(1)))
}

/// Gives each line a moment within its second, a second after the other.
struct Timing {
    speed: f64,
    rng: Xoshiro256PlusPlus,
    writer: Writer,
    /// Lines by second, those of the last ones that have come.
    gathered: BTreeMap<u64, Vec<Line>>,
    gathered_count: usize,
    gathered_max: usize,
    /// The first second, once it is known.
    first: Option<u64>,
    /// The last second that has its moments.
    timed: Option<u64>,
    last: Nanos,
}

impl Timing {
    fn new(speed: f64, seed: u64, gathered_max: usize) -> std::io::Result<Self> {
        Ok(Self {
            speed,
            rng: Xoshiro256PlusPlus::seed_from_u64(seed),
            writer: Writer::new()?,
            gathered: BTreeMap::new(),
            gathered_count: 0,
            gathered_max,
            first: None,
            timed: None,
            last: 0,
        })
    }

    fn add(&mut self, second: u64, line: Line, count: u32) -> Result<(), String> {
        if count == 0 {
            return Ok(());
        }
        if let Some(timed) = self.timed.filter(|timed| second <= *timed) {
            return Err(format!(
                "of second {second}, long after lines of second {timed}: sort the trace by time"
            ));
        }
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        while let Some((oldest, lines)) = self.gathered.first_key_value() {
            let newer = (self.gathered_count - lines.len()).saturating_add(count);
            if *oldest >= second || newer <= self.gathered_max {
                break;
            }
            self.time_oldest().map_err(in_spool)?;
        }
        let of_second = self.gathered.get(&second).map_or(0, Vec::len);
        if of_second.saturating_add(count) > SECOND_MAX {
            return Err(format!(
                "more than {SECOND_MAX} requests in a second; cut the trace"
            ));
        }
        self.gathered_count += count;
        let lines = self.gathered.entry(second).or_default();
        lines.extend(std::iter::repeat_n(line, count));
        Ok(())
    }

    /// Writes the oldest second.
    fn time_oldest(&mut self) -> std::io::Result<()> {
        let Some((second, lines)) = self.gathered.pop_first() else {
            return Ok(());
        };
        self.gathered_count -= lines.len();
        self.timed = Some(second);
        let first = *self.first.get_or_insert(second);
        let mut moments: Vec<f64> = lines.iter().map(|_| unit(&mut self.rng)).collect();
        moments.sort_by(f64::total_cmp);
        for (line, moment) in lines.iter().zip(moments) {
            let seconds = ((second - first) as f64 + moment) / self.speed;
            self.last = whole(seconds * 1e9);
            self.writer.add(&Row {
                at: self.last,
                key: line.key,
                value_bytes: line.value_bytes,
                ttl_seconds: line.ttl_seconds,
                operation: line.operation,
            })?;
        }
        Ok(())
    }

    /// The requests, their number, and when the last one is due.
    fn end(mut self) -> std::io::Result<(rows::Spool, u64, Nanos)> {
        while !self.gathered.is_empty() {
            self.time_oldest()?;
        }
        let (rows, requests) = self.writer.end()?;
        Ok((rows, requests, self.last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(trace: &Trace) -> Vec<Row> {
        trace.ahead(0, 1).collect()
    }

    #[test]
    fn twitters_columns_are_read_and_spread_over_their_second() {
        let text = "0,k:a,4,100,1,get,0\n0,k:b,4,300,1,set,60\n2,k:a,4,100,2,incr,0\n\
                    2,k:a,4,100,2,delete,0\n";
        let trace = Trace::read(text.as_bytes(), 2.0, 7).unwrap();
        assert_eq!((trace.format, trace.keys, trace.skipped), ("twitter", 2, 1));
        let rows = rows(&trace);
        assert_eq!(trace.requests, 3);
        let operations: Vec<Operation> = rows.iter().map(|row| row.operation).collect();
        assert_eq!(
            operations,
            [Operation::Read, Operation::Write, Operation::Delete]
        );
        assert_eq!((rows[1].value_bytes, rows[1].ttl_seconds), (300, 60));
        assert!(rows[0].at <= rows[1].at && rows[1].at < 500_000_000);
        assert!(
            (1_000_000_000..1_500_000_000).contains(&rows[2].at),
            "twice as fast"
        );
        assert_eq!(rows[2].key, rows[0].key);
        assert_eq!(trace.length(), Duration::from_nanos(rows[2].at + 1_000_000));
    }

    #[test]
    fn metas_columns_are_found_by_their_header_and_repeated() {
        let text = "op_time,key,key_size,op,op_count,size,cache_hits,ttl\n\
                    564726470,1669,7,GET,2,0,1,\n564726471,1670,20,SET,1,100,0,3600\n";
        let trace = Trace::read(text.as_bytes(), 1.0, 7).unwrap();
        assert_eq!((trace.format, trace.keys, trace.requests), ("meta", 2, 3));
        assert_eq!(rows(&trace)[2].ttl_seconds, 3600);
    }

    #[test]
    fn what_is_no_trace_is_refused() {
        let refused = |text: &str| Trace::read(text.as_bytes(), 1.0, 7).err().unwrap();
        let long = |bytes: usize| format!("0,{},1,1,1,get,0\n", "k".repeat(bytes - 14));
        let longest = long(LINE_BYTES_MAX);
        assert_eq!(longest.len(), LINE_BYTES_MAX + 1, "with its end");
        for text in [longest.as_str(), longest.trim_end()] {
            assert!(Trace::read(text.as_bytes(), 1.0, 7).is_ok());
        }
        let words = refused(&long(LINE_BYTES_MAX + 1));
        assert!(words.contains("line 1: longer than 65536 bytes"), "{words}");
        assert!(refused("hello\n").contains("no request"));
        assert!(refused("").contains("no request"));
        let words = refused("op_time,key,op,op_count\n1,a,GET,4294967295\n");
        assert!(words.contains("line 2: more than"), "{words}");
        let words = refused(&"x".repeat(1 << 20));
        assert!(words.contains("line 1: longer than"), "{words}");
        let far = "0,a,1,1,1,get,0\n18446744073709551615,a,1,1,1,get,0\n";
        let trace = Trace::read(far.as_bytes(), 1e-9, 7).unwrap();
        assert_eq!(rows(&trace)[1].at, u64::MAX);
    }

    /// Lines of 50 seconds, `late` of which may come behind those of the next ones.
    fn lines(late: usize) -> Vec<(u64, String)> {
        let mut lines: Vec<(u64, String)> = (0_u64..5_000)
            .map(|number| {
                let second = 7 + number * number / 500_000;
                (
                    second,
                    format!("{second},k{},1,{number},1,get,0\n", number % 97),
                )
            })
            .collect();
        if late > 0 {
            lines.chunks_mut(late).for_each(<[_]>::reverse);
        }
        lines
    }

    #[test]
    fn moments_are_those_of_the_whole_trace_in_order_however_little_is_gathered() {
        let (speed, seed) = (3.0, 11);
        for (late, gathered_max) in [(0, 1 << 17), (0, 30), (40, 100), (200, 500)] {
            let lines = lines(late);
            let text: String = lines.iter().map(|(_, line)| line.as_str()).collect();
            let trace = Trace::read_gathering(text.as_bytes(), speed, seed, gathered_max).unwrap();
            // The same, with all of it in memory.
            let mut sorted: Vec<(u64, u64)> =
                (0_u64..).zip(&lines).map(|(at, one)| (one.0, at)).collect();
            sorted.sort_by_key(|(second, _)| *second);
            let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
            let mut expected = Vec::new();
            for second in sorted.chunk_by(|one, other| one.0 == other.0) {
                let mut moments: Vec<f64> = second.iter().map(|_| unit(&mut rng)).collect();
                moments.sort_by(f64::total_cmp);
                let from = (second[0].0 - 7) as f64;
                expected.extend(
                    moments
                        .iter()
                        .map(|moment| whole((from + moment) / speed * 1e9)),
                );
            }
            let found: Vec<Nanos> = rows(&trace).iter().map(|row| row.at).collect();
            assert_eq!(found, expected, "{late} late, {gathered_max} gathered");
        }
    }

    #[test]
    fn a_line_that_comes_too_late_is_named() {
        let mut text: String = lines(0).into_iter().map(|(_, line)| line).collect();
        text.push_str("7,k,1,1,1,get,0\n");
        assert!(Trace::read(text.as_bytes(), 1.0, 7).is_ok());
        let refused = Trace::read_gathering(text.as_bytes(), 1.0, 7, 500);
        let words = refused.err().unwrap();
        assert!(
            words.contains("line 5001: of second 7") && words.contains("sort"),
            "{words}"
        );
    }
}
