//! What is counted on a shard, and how it is published.
//!
//! On the path: each connection counts and measures on its own shard, without atomics. A scrape asks
//! every shard for a [`Snapshot`], adds them up and writes Prometheus' text.

use std::cell::{Cell, RefCell};
use std::fmt::Write;
use std::time::Duration;

use hdrhistogram::Histogram;

/// Which client protocol a request came by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// HTTP.
    Http,
    /// RESP.
    Resp,
    /// The binary protocol.
    Binary,
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Reads a key.
    Get,
    /// Writes a key.
    Put,
    /// Deletes a key.
    Delete,
    /// Lists keys.
    Scan,
    /// Several.
    Batch,
}

const WIRES: [&str; 3] = ["http", "resp", "binary"];
const ACTIONS: [&str; 5] = ["get", "put", "delete", "scan", "batch"];

/// Upper bounds of the published latency buckets, in microseconds.
const BUCKETS_US: [u64; 14] = [
    50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000,
    5_000_000,
];
/// The longest latency that is told apart, in microseconds.
const LATENCY_US_MAX: u64 = 60_000_000;

/// The counts of one shard.
#[derive(Debug)]
pub struct ShardMetrics {
    latencies: RefCell<Vec<Histogram<u64>>>,
    failures: [Cell<u64>; WIRES.len()],
    accepted: [Cell<u64>; WIRES.len()],
    refused: Cell<u64>,
}

impl Default for ShardMetrics {
    fn default() -> Self {
        let histogram =
            || Histogram::new_with_bounds(1, LATENCY_US_MAX, 2).expect("the bounds are in order");
        let count = WIRES.len() * ACTIONS.len();
        Self {
            latencies: RefCell::new((0..count).map(|_| histogram()).collect()),
            failures: Default::default(),
            accepted: Default::default(),
            refused: Cell::new(0),
        }
    }
}

impl ShardMetrics {
    /// Notes an answered request.
    pub fn answered(&self, wire: Wire, action: Action, took: Duration, failed: bool) {
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let mut latencies = self.latencies.borrow_mut();
        let index = wire as usize * ACTIONS.len() + action as usize;
        latencies[index].saturating_record(took_us.clamp(1, LATENCY_US_MAX));
        if failed {
            add(&self.failures[wire as usize]);
        }
    }

    /// Notes a new connection.
    pub fn accepted(&self, wire: Wire) {
        add(&self.accepted[wire as usize]);
    }

    /// Notes a connection refused at the limit.
    pub fn refused(&self) {
        add(&self.refused);
    }
}

fn add(cell: &Cell<u64>) {
    cell.set(cell.get().wrapping_add(1));
}

/// The numbers of one shard at one moment. Travels between threads.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    latencies: Vec<Histogram<u64>>,
    failures: [u64; WIRES.len()],
    accepted: [u64; WIRES.len()],
    refused: u64,
    /// Names without `torc_`; counters only grow.
    pub counters: Vec<(String, u64)>,
    /// Names without `torc_`.
    pub gauges: Vec<(String, u64)>,
    /// Receives by shard and by the CPU on which the kernel handled their packets, as sampled.
    pub arrivals: Vec<((u16, usize), u64)>,
    /// Gauges of each shard that mean nothing together.
    pub by_shard: Vec<(u16, &'static str, f64)>,
    /// Files of the stores by the master key that they need, `none` for those in the clear.
    pub files_by_key: Vec<(String, u64)>,
    /// Gauges of which the node's is the greatest of its shards', not their sum.
    pub greatest: Vec<(String, u64)>,
}

impl Snapshot {
    /// The numbers that this crate counts.
    pub fn of(metrics: &ShardMetrics, connections: usize) -> Self {
        let read =
            |cells: &[Cell<u64>; WIRES.len()]| [0, 1, 2].map(|index: usize| cells[index].get());
        Self {
            latencies: metrics.latencies.borrow().clone(),
            failures: read(&metrics.failures),
            accepted: read(&metrics.accepted),
            refused: metrics.refused.get(),
            counters: Vec::new(),
            gauges: vec![("connections".into(), connections as u64)],
            arrivals: Vec::new(),
            by_shard: Vec::new(),
            files_by_key: Vec::new(),
            greatest: Vec::new(),
        }
    }

    /// Adds another shard's numbers.
    pub fn add(&mut self, other: Snapshot) {
        if self.latencies.is_empty() {
            *self = other;
            return;
        }
        for (ours, theirs) in self.latencies.iter_mut().zip(&other.latencies) {
            ours.add(theirs).expect("all shards use the same bounds");
        }
        for wire in 0..WIRES.len() {
            self.failures[wire] += other.failures[wire];
            self.accepted[wire] += other.accepted[wire];
        }
        self.refused += other.refused;
        let sum = |ours: &mut u64, theirs: u64| *ours = ours.wrapping_add(theirs);
        combine(&mut self.counters, other.counters, sum);
        combine(&mut self.gauges, other.gauges, sum);
        combine(&mut self.files_by_key, other.files_by_key, sum);
        self.arrivals.extend(other.arrivals);
        self.by_shard.extend(other.by_shard);
        combine(&mut self.greatest, other.greatest, |ours, theirs| {
            *ours = (*ours).max(theirs);
        });
    }

    /// Prometheus' text.
    pub fn to_text(&self) -> String {
        let mut text = String::with_capacity(16 << 10);
        for (name, value) in &self.counters {
            family(&mut text, name, "counter");
            line(&mut text, name, "", value);
        }
        for (name, value) in self.gauges.iter().chain(&self.greatest) {
            family(&mut text, name, "gauge");
            line(&mut text, name, "", value);
        }
        for (name, values) in [
            ("requests_failed_total", &self.failures),
            ("connections_accepted_total", &self.accepted),
        ] {
            family(&mut text, name, "counter");
            for (wire, value) in WIRES.iter().zip(values) {
                line(&mut text, name, &format!("{{protocol=\"{wire}\"}}"), value);
            }
        }
        family(&mut text, "socket_arrivals_total", "counter");
        for ((shard, cpu), count) in &self.arrivals {
            let labels = format!("{{shard=\"{shard}\",cpu=\"{cpu}\"}}");
            line(&mut text, "socket_arrivals_total", &labels, count);
        }
        family(&mut text, "store_files", "gauge");
        for (key, count) in &self.files_by_key {
            line(
                &mut text,
                "store_files",
                &format!("{{key=\"{key}\"}}"),
                count,
            );
        }
        let mut by_shard = self.by_shard.clone();
        by_shard.sort_by_key(|(shard, name, _)| (*name, *shard));
        let mut last = "";
        for (shard, name, value) in by_shard {
            if name != last {
                family(&mut text, name, "gauge");
                last = name;
            }
            line(&mut text, name, &format!("{{shard=\"{shard}\"}}"), &value);
        }
        family(&mut text, "connections_refused_total", "counter");
        line(&mut text, "connections_refused_total", "", &self.refused);
        self.write_latencies(&mut text);
        text
    }

    fn write_latencies(&self, text: &mut String) {
        let name = "request_duration_seconds";
        family(text, name, "histogram");
        for (index, histogram) in self.latencies.iter().enumerate() {
            let labels = format!(
                "protocol=\"{}\",operation=\"{}\"",
                WIRES[index / ACTIONS.len()],
                ACTIONS[index % ACTIONS.len()]
            );
            // One walk for all bounds.
            let mut below = [0u64; BUCKETS_US.len()];
            let (mut total_us, mut count) = (0u64, 0u64);
            for value in histogram.iter_recorded() {
                let recorded = value.count_at_value();
                count += recorded;
                total_us = total_us.saturating_add(value.value_iterated_to() * recorded);
                for (bound, below) in BUCKETS_US.iter().zip(&mut below) {
                    if value.value_iterated_to() <= *bound {
                        *below += recorded;
                    }
                }
            }
            let bucket = format!("{name}_bucket");
            for (bound, below) in BUCKETS_US.iter().zip(&below) {
                let bound = Duration::from_micros(*bound).as_secs_f64();
                line(
                    text,
                    &bucket,
                    &format!("{{{labels},le=\"{bound}\"}}"),
                    below,
                );
            }
            line(text, &bucket, &format!("{{{labels},le=\"+Inf\"}}"), &count);
            let seconds = Duration::from_micros(total_us).as_secs_f64();
            line(
                text,
                &format!("{name}_sum"),
                &format!("{{{labels}}}"),
                &seconds,
            );
            line(
                text,
                &format!("{name}_count"),
                &format!("{{{labels}}}"),
                &count,
            );
        }
    }
}

fn combine(
    ours: &mut Vec<(String, u64)>,
    theirs: Vec<(String, u64)>,
    with: impl Fn(&mut u64, u64),
) {
    for (name, value) in theirs {
        match ours.iter_mut().find(|(other, _)| *other == name) {
            Some((_, our_value)) => with(our_value, value),
            None => ours.push((name, value)),
        }
    }
}

fn family(text: &mut String, name: &str, kind: &str) {
    writeln!(text, "# TYPE torc_{name} {kind}").expect("writing to a string does not fail");
}

fn line(text: &mut String, name: &str, labels: &str, value: &dyn std::fmt::Display) {
    writeln!(text, "torc_{name}{labels} {value}").expect("writing to a string does not fail");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_add_up_and_the_text_is_what_prometheus_reads() {
        let metrics = ShardMetrics::default();
        metrics.accepted(Wire::Http);
        metrics.answered(Wire::Http, Action::Get, Duration::from_micros(80), false);
        metrics.answered(Wire::Http, Action::Get, Duration::from_millis(3), true);
        let mut one = Snapshot::of(&metrics, 2);
        one.counters.push(("corrupt_blocks_total".into(), 1));
        one.greatest.push(("hint_age_ms".into(), 5));
        let mut all = Snapshot::default();
        all.add(one.clone());
        one.greatest[0].1 = 9;
        all.add(one);
        let text = all.to_text();
        for expected in [
            "# TYPE torc_corrupt_blocks_total counter\ntorc_corrupt_blocks_total 2\n",
            "torc_connections 4\n",
            "torc_hint_age_ms 9\n",
            "torc_requests_failed_total{protocol=\"http\"} 2\n",
            "torc_connections_accepted_total{protocol=\"http\"} 2\n",
            "torc_request_duration_seconds_bucket{protocol=\"http\",operation=\"get\",le=\"0.0001\"} 2\n",
            "torc_request_duration_seconds_bucket{protocol=\"http\",operation=\"get\",le=\"+Inf\"} 4\n",
            "torc_request_duration_seconds_count{protocol=\"http\",operation=\"get\"} 4\n",
        ] {
            assert!(text.contains(expected), "{expected} is missing in\n{text}");
        }
        let mut lines = text.lines().filter(|line| !line.starts_with('#'));
        assert!(lines.all(|line| line.starts_with("torc_") && line.split(' ').count() == 2));
    }
}
