//! What a shard's cluster half counts: plain numbers, read by whoever publishes them.
//!
//! Each [`Counter`] only grows; [`Gauges`] are what is now. No names of labels, no formats: those
//! belong to the publisher.

use std::cell::Cell;

/// Something that is counted since the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Reads coordinated here and answered.
    Reads,
    /// Reads coordinated here that failed.
    ReadFailures,
    /// Writes coordinated here and answered.
    Writes,
    /// Writes coordinated here and refused: nothing was applied.
    WriteRefusals,
    /// Writes coordinated here that are in doubt.
    WriteDoubts,
    /// Client requests handed to the owning shard of this node.
    MeshHops,
    /// Client writes handed to a replica because this node is none.
    Forwards,
    /// Requests refused at an admission bound.
    Overloads,
    /// Reads that asked one more replica because an answer was late.
    Hedges,
    /// Reads whose replicas differed and were repaired before the answer.
    ReadRepairs,
    /// Merges done for other coordinators.
    ReplicaMerges,
    /// Reads done for other coordinators.
    ReplicaReads,
    /// Requests refused because of another range epoch.
    OtherOwners,
    /// Requests refused because their time was up.
    LateRequests,
    /// Messages that were not valid.
    BadMessages,
    /// Hints stored.
    HintsStored,
    /// Hints delivered and deleted.
    HintsReplayed,
    /// Hints dropped for age or bytes; their ranges wait for repair.
    HintsDropped,
    /// Ranges repaired with all their owners.
    RangesRepaired,
    /// Ranges that could not be repaired with all their owners.
    RangeRepairFailures,
    /// Records taken over from another replica by repair.
    RecordsReceived,
    /// Records given to another replica by repair.
    RecordsSent,
    /// Records that cannot be read: unknown, not absent.
    UnreadableRecords,
    /// States from others whose stamps are too far ahead of this node's clock.
    SkewedStamps,
}

impl Counter {
    /// Every counter, in order of declaration.
    pub const ALL: [Counter; 24] = [
        Counter::Reads,
        Counter::ReadFailures,
        Counter::Writes,
        Counter::WriteRefusals,
        Counter::WriteDoubts,
        Counter::MeshHops,
        Counter::Forwards,
        Counter::Overloads,
        Counter::Hedges,
        Counter::ReadRepairs,
        Counter::ReplicaMerges,
        Counter::ReplicaReads,
        Counter::OtherOwners,
        Counter::LateRequests,
        Counter::BadMessages,
        Counter::HintsStored,
        Counter::HintsReplayed,
        Counter::HintsDropped,
        Counter::RangesRepaired,
        Counter::RangeRepairFailures,
        Counter::RecordsReceived,
        Counter::RecordsSent,
        Counter::UnreadableRecords,
        Counter::SkewedStamps,
    ];

    /// The counter's name, as metrics are named: what is counted, plural, lower case.
    pub fn name(self) -> &'static str {
        match self {
            Counter::Reads => "reads",
            Counter::ReadFailures => "read_failures",
            Counter::Writes => "writes",
            Counter::WriteRefusals => "write_refusals",
            Counter::WriteDoubts => "write_doubts",
            Counter::MeshHops => "mesh_hops",
            Counter::Forwards => "forwards",
            Counter::Overloads => "overloads",
            Counter::Hedges => "hedges",
            Counter::ReadRepairs => "read_repairs",
            Counter::ReplicaMerges => "replica_merges",
            Counter::ReplicaReads => "replica_reads",
            Counter::OtherOwners => "other_owners",
            Counter::LateRequests => "late_requests",
            Counter::BadMessages => "bad_messages",
            Counter::HintsStored => "hints_stored",
            Counter::HintsReplayed => "hints_replayed",
            Counter::HintsDropped => "hints_dropped",
            Counter::RangesRepaired => "ranges_repaired",
            Counter::RangeRepairFailures => "range_repair_failures",
            Counter::RecordsReceived => "records_received",
            Counter::RecordsSent => "records_sent",
            Counter::UnreadableRecords => "unreadable_records",
            Counter::SkewedStamps => "skewed_stamps",
        }
    }
}

/// The counters of one shard.
#[derive(Debug, Default)]
pub struct Metrics {
    counts: [Cell<u64>; Counter::ALL.len()],
}

impl Metrics {
    /// Adds to a counter.
    pub fn add(&self, counter: Counter, amount: u64) {
        let cell = &self.counts[counter as usize];
        cell.set(cell.get().wrapping_add(amount));
    }

    /// The count since the start.
    pub fn get(&self, counter: Counter) -> u64 {
        self.counts[counter as usize].get()
    }

    /// All counters with their names, in order of declaration.
    pub fn counts(&self) -> Vec<(&'static str, u64)> {
        Counter::ALL
            .iter()
            .map(|counter| (counter.name(), self.get(*counter)))
            .collect()
    }
}

/// What is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Gauges {
    /// Client requests in flight.
    pub requests_in_flight: u32,
    /// Requests for other coordinators in flight.
    pub replica_requests_in_flight: u32,
    /// Hints waiting for their targets.
    pub hints: u64,
    /// Their bytes.
    pub hint_bytes: u64,
    /// Age of the oldest one, in milliseconds.
    pub hint_age_ms: u64,
    /// Replica ranges of this shard.
    pub ranges: u64,
    /// Time since the range that was repaired the longest ago was repaired, in milliseconds; of a
    /// range never repaired, since this shard started.
    pub oldest_unrepaired_ms: u64,
    /// The delay before a read is hedged, in microseconds.
    pub hedge_delay_us: u64,
    /// How far the hybrid clock is ahead of civil time, in microseconds.
    pub clock_ahead_us: u64,
    /// Damaged parts that wait for somebody to accept that they are lost.
    pub damage_waiting: u64,
    /// Bytes of requests and answers that are held for clients.
    pub client_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_has_its_own_place_and_name() {
        let metrics = Metrics::default();
        for (index, counter) in Counter::ALL.into_iter().enumerate() {
            assert_eq!(counter as usize, index);
            metrics.add(counter, u64::try_from(index).unwrap());
        }
        let counts = metrics.counts();
        for (index, (name, count)) in counts.iter().enumerate() {
            assert_eq!(*count, u64::try_from(index).unwrap());
            assert!(counts[..index].iter().all(|(other, _)| other != name));
        }
    }
}
