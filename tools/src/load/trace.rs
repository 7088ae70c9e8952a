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

use std::collections::HashMap;
use std::io::BufRead;
use std::time::Duration;

use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::SeedableRng;
use torc_measure::keys::{unit, whole};
use torc_measure::mix::Operation;

use super::value::VALUE_BYTES_MIN;
use super::world::Nanos;

/// Rows of a trace that are kept; a row takes 32 bytes.
const ROWS_MAX: usize = 64 << 20;

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// When it is due, in nanoseconds from the first.
    pub at: Nanos,
    /// Number of its key.
    pub key: u64,
    /// Bytes of its value, for writes.
    pub value_bytes: u32,
    /// Seconds that the value lives; 0 = for ever.
    pub ttl_seconds: u32,
    /// What it does.
    pub operation: Operation,
}

/// A trace in memory.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// In order of time.
    pub rows: Vec<Row>,
    /// Different keys.
    pub keys: u64,
    /// Lines that were no request that can be made, e.g. counters.
    pub skipped: u64,
    /// `twitter` or `meta`.
    pub format: &'static str,
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

#[derive(Clone, Copy)]
struct Line {
    second: u64,
    key: u64,
    value_bytes: u32,
    ttl_seconds: u32,
    operation: Operation,
}

impl Trace {
    /// Reads a trace, `speed` times as fast as it was.
    pub fn read(input: impl BufRead, speed: f64, seed: u64) -> Result<Trace, String> {
        let mut trace = Trace::default();
        let mut columns = None;
        let mut numbers: HashMap<String, u64> = HashMap::new();
        let mut lines: Vec<Line> = Vec::new();
        for (number, line) in input.lines().enumerate() {
            let line = line.map_err(|error| format!("line {}: {error}", number + 1))?;
            if number == 0 {
                columns = Columns::of_header(&line);
                if columns.is_some() {
                    continue;
                }
            }
            let columns = columns.as_ref().unwrap_or(&TWITTER);
            match parse(columns, &line, &mut numbers) {
                Some((line, count)) => {
                    let count = usize::try_from(count).unwrap_or(usize::MAX);
                    if count > ROWS_MAX - lines.len() {
                        return Err(format!("more than {ROWS_MAX} requests; cut the trace"));
                    }
                    lines.extend(std::iter::repeat_n(line, count));
                }
                None => trace.skipped += 1,
            }
        }
        if lines.is_empty() {
            return Err("no request in the trace: expected Twitter's or CacheLib's columns".into());
        }
        trace.format = columns.as_ref().unwrap_or(&TWITTER).format;
        trace.keys = u64::try_from(numbers.len()).expect("a length fits 64 bits");
        trace.rows = timed(lines, speed, seed);
        Ok(trace)
    }

    /// From its beginning until just after its last request is due; never zero.
    pub fn length(&self) -> Duration {
        let last = self.rows.last().map_or(0, |row| row.at);
        Duration::from_nanos(last) + Duration::from_millis(1)
    }
}

fn parse(columns: &Columns, line: &str, numbers: &mut HashMap<String, u64>) -> Option<(Line, u32)> {
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
    let next = u64::try_from(numbers.len()).expect("a length fits 64 bits");
    let key = *numbers.entry(key.to_owned()).or_insert(next);
    let least = u32::try_from(VALUE_BYTES_MIN).expect("a small number");
    let number = |at: Option<usize>| field(at).and_then(|text| text.parse::<u32>().ok());
    Some((
        Line {
            second,
            key,
            value_bytes: number(columns.size)
                .unwrap_or(0)
                .clamp(least, torc_measure::sizes::SIZE_MAX),
            ttl_seconds: number(columns.ttl).unwrap_or(0),
            operation,
        },
        number(columns.count).unwrap_or(1),
    ))
}

/// Gives each line a moment within its second.
fn timed(mut lines: Vec<Line>, speed: f64, seed: u64) -> Vec<Row> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    lines.sort_by_key(|line| line.second);
    let first = lines.first().map_or(0, |line| line.second);
    let mut rows = Vec::with_capacity(lines.len());
    for group in lines.chunk_by(|one, other| one.second == other.second) {
        let mut moments: Vec<f64> = group.iter().map(|_| unit(&mut rng)).collect();
        moments.sort_by(f64::total_cmp);
        for (line, moment) in group.iter().zip(moments) {
            let seconds = ((line.second - first) as f64 + moment) / speed;
            rows.push(Row {
                at: whole(seconds * 1e9),
                key: line.key,
                value_bytes: line.value_bytes,
                ttl_seconds: line.ttl_seconds,
                operation: line.operation,
            });
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twitters_columns_are_read_and_spread_over_their_second() {
        let text = "0,k:a,4,100,1,get,0\n0,k:b,4,300,1,set,60\n2,k:a,4,100,2,incr,0\n\
                    2,k:a,4,100,2,delete,0\n";
        let trace = Trace::read(text.as_bytes(), 2.0, 7).unwrap();
        assert_eq!((trace.format, trace.keys, trace.skipped), ("twitter", 2, 1));
        let operations: Vec<Operation> = trace.rows.iter().map(|row| row.operation).collect();
        assert_eq!(
            operations,
            [Operation::Read, Operation::Write, Operation::Delete]
        );
        assert_eq!(
            (trace.rows[1].value_bytes, trace.rows[1].ttl_seconds),
            (300, 60)
        );
        assert!(trace.rows[0].at <= trace.rows[1].at && trace.rows[1].at < 500_000_000);
        assert!(
            (1_000_000_000..1_500_000_000).contains(&trace.rows[2].at),
            "twice as fast"
        );
        assert_eq!(trace.rows[2].key, trace.rows[0].key);
    }

    #[test]
    fn metas_columns_are_found_by_their_header_and_repeated() {
        let text = "op_time,key,key_size,op,op_count,size,cache_hits,ttl\n\
                    564726470,1669,7,GET,2,0,1,\n564726471,1670,20,SET,1,100,0,3600\n";
        let trace = Trace::read(text.as_bytes(), 1.0, 7).unwrap();
        assert_eq!((trace.format, trace.keys, trace.rows.len()), ("meta", 2, 3));
        assert_eq!(trace.rows[2].ttl_seconds, 3600);
    }

    #[test]
    fn what_is_no_trace_is_refused() {
        assert!(Trace::read("hello\n".as_bytes(), 1.0, 7).is_err());
        assert!(Trace::read("".as_bytes(), 1.0, 7).is_err());
        let endless = "op_time,key,op,op_count\n1,a,GET,4294967295\n";
        let words = Trace::read(endless.as_bytes(), 1.0, 7).unwrap_err();
        assert!(words.contains("more than"), "{words}");
        let far = "0,a,1,1,1,get,0\n18446744073709551615,a,1,1,1,get,0\n";
        let trace = Trace::read(far.as_bytes(), 1e-9, 7).unwrap();
        assert_eq!(trace.rows[1].at, u64::MAX);
    }
}
