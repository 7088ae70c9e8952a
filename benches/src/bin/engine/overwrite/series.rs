//! What happened in each second, and what that amounts to.

use std::fmt::Write as _;
use std::time::Duration;

use hdrhistogram::Histogram;
use torc_engine::Stats;

/// Without an acknowledgement for so long, the store stands still.
const STALL: Duration = Duration::from_millis(100);
/// A second below this part of the mean is a slow one.
const SLOW: f64 = 0.8;

/// One second.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Second {
    pub written: u64,
    pub refused: u64,
    pub read_p99_us: f64,
    pub level0_runs: u64,
    pub runs: u64,
    pub backlog_mib: u64,
    pub memtable_mib: u64,
}

/// Bytes that the store wrote.
#[derive(Clone, Copy, Debug, Default)]
pub struct Written {
    pub log: u64,
    pub flushed: u64,
    pub compacted: u64,
}

/// A phase.
pub struct Series {
    pub seconds: Vec<Second>,
    puts: Histogram<u64>,
    /// While nothing was merged, and while something was.
    gets: [Histogram<u64>; 2],
    gets_now: Histogram<u64>,
    last_written: Duration,
    stalls: u32,
    stall_max: Duration,
    bytes: Written,
}

impl Series {
    pub fn new(seconds: u64) -> Series {
        let count = usize::try_from(seconds).expect("64 bits");
        let histogram = || Histogram::new(3).expect("three digits");
        Series {
            seconds: vec![Second::default(); count],
            puts: histogram(),
            gets: [histogram(), histogram()],
            gets_now: histogram(),
            last_written: Duration::ZERO,
            stalls: 0,
            stall_max: Duration::ZERO,
            bytes: Written::default(),
        }
    }

    fn second(&mut self, at: Duration) -> Option<&mut Second> {
        let second = usize::try_from(at.as_secs()).expect("64 bits");
        self.seconds.get_mut(second)
    }

    /// An update was acknowledged `at` after the begin.
    pub fn written(&mut self, at: Duration, took: Duration) {
        let gap = at.saturating_sub(self.last_written);
        self.last_written = at;
        self.stall_max = self.stall_max.max(gap);
        self.stalls += u32::from(gap >= STALL);
        record(&mut self.puts, took);
        if let Some(second) = self.second(at) {
            second.written += 1;
        }
    }

    /// An update was refused.
    pub fn refused(&mut self, at: Duration) {
        if let Some(second) = self.second(at) {
            second.refused += 1;
        }
    }

    /// A read has returned.
    pub fn read(&mut self, at: Duration, took: Duration, is_compacting: bool) {
        record(&mut self.gets[usize::from(is_compacting)], took);
        record(&mut self.gets_now, took);
        let p99 = micros(&self.gets_now, 0.99);
        if let Some(second) = self.second(at) {
            second.read_p99_us = p99;
        }
    }

    /// What the store holds at the end of a second.
    pub fn look(&mut self, second: u64, stats: &Stats) {
        self.gets_now.reset();
        let second = usize::try_from(second).expect("64 bits");
        let second = &mut self.seconds[second];
        let number = |count: usize| u64::try_from(count).expect("64 bits");
        second.level0_runs = number(stats.level0_runs);
        second.runs = number(stats.runs_max);
        second.backlog_mib = stats.compaction_debt_bytes >> 20;
        second.memtable_mib = number(stats.memtable_bytes >> 20);
    }

    /// The phase is over.
    pub fn end(&mut self, bytes: Written) {
        self.bytes = bytes;
    }

    /// Updates a second.
    pub fn mean(&self) -> f64 {
        let all: u64 = self.seconds.iter().map(|second| second.written).sum();
        all as f64 / self.seconds.len().max(1) as f64
    }

    /// A line a second.
    pub fn csv(&self) -> String {
        let mut csv = format!("{HEAD}\n");
        for (index, second) in self.seconds.iter().enumerate() {
            let Second {
                written,
                refused,
                read_p99_us,
                level0_runs,
                runs,
                backlog_mib,
                memtable_mib,
            } = second;
            writeln!(
                csv,
                "{index},{written},{refused},{read_p99_us:.0},{level0_runs},{runs},{backlog_mib},{memtable_mib}"
            )
            .expect("memory");
        }
        csv
    }

    /// What [`Series::csv`] wrote; `None` for anything else.
    pub fn parse(csv: &str) -> Option<Series> {
        let mut lines = csv.lines();
        if lines.next()? != HEAD {
            return None;
        }
        let mut series = Series::new(0);
        for line in lines {
            let mut fields = line.split(',').skip(1);
            let mut number = || fields.next()?.parse::<u64>().ok();
            series.seconds.push(Second {
                written: number()?,
                refused: number()?,
                read_p99_us: number()? as f64,
                level0_runs: number()?,
                runs: number()?,
                backlog_mib: number()?,
                memtable_mib: number()?,
            });
        }
        Some(series)
    }

    /// Prints what reads took.
    pub fn print_reads(&self, when: &str) {
        for (histogram, what) in self.gets.iter().zip(["without", "during"]) {
            if histogram.is_empty() {
                continue;
            }
            println!(
                "reads {what} compaction, {when}: p50 {:.0} us, p99 {:.0} us, p99.9 {:.0} us ({} reads)",
                micros(histogram, 0.5),
                micros(histogram, 0.99),
                micros(histogram, 0.999),
                histogram.len(),
            );
        }
        let [without, during] = &self.gets;
        if !without.is_empty() && !during.is_empty() {
            let ratio = micros(during, 0.99) / micros(without, 0.99);
            println!("p99 of reads during compaction over that without, {when}: {ratio:.2}");
        }
    }
}

/// Prints how the rate held.
pub fn print_rates(series: &Series) {
    let mean = series.mean();
    let rates = || series.seconds.iter().map(|second| second.written as f64);
    let lowest = rates().fold(f64::INFINITY, f64::min);
    let slow = rates().filter(|rate| *rate < mean * SLOW).count();
    let refused: u64 = series.seconds.iter().map(|second| second.refused).sum();
    let at = |quantile| micros(&series.puts, quantile);
    println!(
        "updates: mean {mean:.0}/s over {} s, lowest second {lowest:.0}/s, {:.2} of the mean; {slow} s below {SLOW}",
        series.seconds.len(),
        lowest / mean,
    );
    println!(
        "updates: p50 {:.0} us, p99 {:.0} us, p99.9 {:.0} us, max {:.0} us; {refused} refused",
        at(0.5),
        at(0.99),
        at(0.999),
        at(1.0)
    );
    println!(
        "stalls of {} ms or more: {}; longest time without an acknowledgement {:.0} ms",
        STALL.as_millis(),
        series.stalls,
        series.stall_max.as_secs_f64() * 1e3
    );
    let Written {
        log,
        flushed,
        compacted,
    } = series.bytes;
    println!(
        "written: log {} MiB, flushes {} MiB, compactions {} MiB; tables written for each byte flushed {:.2}",
        log >> 20,
        flushed >> 20,
        compacted >> 20,
        (flushed + compacted) as f64 / flushed.max(1) as f64
    );
}

const HEAD: &str = "second,written,refused,read_p99_us,level0_runs,runs,backlog_mib,memtable_mib";

fn record(histogram: &mut Histogram<u64>, took: Duration) {
    let nanos = u64::try_from(took.as_nanos()).expect("a short time");
    histogram.record(nanos).expect("a growing histogram");
}

fn micros(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    Duration::from_nanos(histogram.value_at_quantile(quantile)).as_secs_f64() * 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_they_were_written() {
        let mut series = Series::new(2);
        series.written(Duration::from_millis(10), Duration::from_micros(200));
        series.written(Duration::from_millis(1010), Duration::from_micros(200));
        series.refused(Duration::from_millis(1020));
        series.read(Duration::from_millis(1500), Duration::from_micros(80), true);
        let again = Series::parse(&series.csv()).unwrap();
        assert_eq!(again.seconds[0], series.seconds[0]);
        assert_eq!(again.seconds[1].refused, 1);
        assert_eq!(again.seconds[1].read_p99_us, 80.0);
        assert_eq!((series.stalls, series.mean()), (1, 1.0));
        assert!(Series::parse("something else").is_none());
    }
}
