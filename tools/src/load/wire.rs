//! A recorder on its way between machines: JSON, with histograms in V2 with deflate and base64.

use std::collections::BTreeMap;

use base64::Engine as _;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Deserializer, V2DeflateSerializer};
use serde::{Deserialize, Serialize};
use torc_measure::mix::Operation;

use super::health::Thread;
use super::output::encode;
use super::recorder::{Dual, Recorder, Status, Turns, Verdicts, add};
use super::world::Nanos;

/// Distance between the thread numbers of two machines.
const THREADS_APART: usize = 1000;

/// A recorder as JSON.
#[derive(Serialize, Deserialize)]
pub struct Packed {
    /// Kind, outcome, from intended, from sent.
    series: Vec<(String, String, String, String)>,
    /// Target, kind, outcome, from intended, from sent.
    targets: Vec<(usize, String, String, String, String)>,
    lag: String,
    gaps: String,
    polled_ns: Nanos,
    broken: u64,
    turns: Turns,
    threads: BTreeMap<usize, Thread>,
    value_bytes: u64,
    verdicts: Verdicts,
    errors: Vec<String>,
    error_kinds: BTreeMap<String, u64>,
}

impl Packed {
    /// Packs a recorder.
    pub fn of(recorder: &Recorder) -> Self {
        let mut serializer = V2DeflateSerializer::new();
        let mut pack = |one: &Histogram<u64>| encode(&mut serializer, one).unwrap_or_default();
        let mut series = Vec::new();
        for operation in Operation::ALL {
            let one = recorder.series(operation);
            let name = operation.name().to_owned();
            for status in Status::ALL {
                if let Some(dual) = one.of(status).filter(|dual| !dual.intended.is_empty()) {
                    series.push((
                        name.clone(),
                        status.name().to_owned(),
                        pack(&dual.intended),
                        pack(&dual.sent),
                    ));
                }
            }
        }
        let mut targets = Vec::new();
        for (at, target) in recorder.targets().iter().enumerate() {
            for (operation, status, cell) in target.cells() {
                targets.push((
                    at,
                    operation.name().to_owned(),
                    status.name().to_owned(),
                    pack(&cell.intended.dense()),
                    pack(&cell.sent.dense()),
                ));
            }
        }
        Self {
            series,
            targets,
            lag: pack(&recorder.health.lag),
            gaps: pack(&recorder.health.pauses.gaps),
            polled_ns: recorder.health.pauses.polled_ns,
            broken: recorder.health.broken,
            turns: recorder.turns,
            threads: recorder.health.threads.clone(),
            value_bytes: recorder.value_bytes,
            verdicts: recorder.verdicts.clone(),
            errors: recorder.errors.clone(),
            error_kinds: recorder.error_kinds.clone(),
        }
    }

    /// The recorder, its threads numbered as those of machine `machine`. `None` when something in
    /// it is not what [`Packed::of`] makes.
    pub fn unpack(&self, machine: usize) -> Option<Recorder> {
        let mut recorder = Recorder::default();
        for (operation, status, intended, sent) in &self.series {
            let (operation, status) = (Operation::named(operation)?, Status::named(status)?);
            let mut dual = Dual::default();
            add(&mut dual.intended, &unpacked(intended)?);
            add(&mut dual.sent, &unpacked(sent)?);
            recorder.series_mut(operation).add_dual(status, &dual);
        }
        for (at, operation, status, intended, sent) in &self.targets {
            let (operation, status) = (Operation::named(operation)?, Status::named(status)?);
            let cell = recorder.target_mut(*at).cell_mut(operation, status);
            cell.intended.add_dense(&unpacked(intended)?);
            cell.sent.add_dense(&unpacked(sent)?);
        }
        add(&mut recorder.health.lag, &unpacked(&self.lag)?);
        add(&mut recorder.health.pauses.gaps, &unpacked(&self.gaps)?);
        recorder.health.pauses.polled_ns = self.polled_ns;
        for (number, thread) in &self.threads {
            recorder.thread(machine * THREADS_APART + number, *thread);
        }
        recorder.verdicts = self.verdicts.clone();
        recorder.health.broken = self.broken;
        recorder.turns = self.turns;
        recorder.value_bytes = self.value_bytes;
        recorder.errors.clone_from(&self.errors);
        recorder.error_kinds.clone_from(&self.error_kinds);
        Some(recorder)
    }
}

fn unpacked(text: &str) -> Option<Histogram<u64>> {
    let bytes = base64::engine::general_purpose::STANDARD
        .decode(text)
        .ok()?;
    Deserializer::new().deserialize(&mut &bytes[..]).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recorder_comes_through_whole() {
        let mut recorder = Recorder::default();
        recorder.record(Operation::Read, Status::Ok, 2_000_000, Some(1_000_000));
        recorder.record(Operation::Insert, Status::Unsent, 7_000_000, None);
        recorder.record_target(3, Operation::Read, Status::Ok, 2_000_000, 1_000_000);
        recorder.health.lag.record(500).unwrap();
        recorder.health.pauses.polled(7_000);
        recorder.thread(
            1,
            Thread {
                busy_ns: 5,
                wall_ns: 10,
                delayed_ns: 1,
                stolen_ns: 2,
            },
        );
        recorder.verdicts.lost = 4;
        recorder.health.broken = 2;
        recorder.turns.waited = 3;
        recorder.error(|| "no".into());
        let text = serde_json::to_string(&Packed::of(&recorder)).unwrap();
        let packed: Packed = serde_json::from_str(&text).unwrap();
        let again = packed.unpack(2).unwrap();
        assert_eq!(again.series(Operation::Read).done(), 1);
        assert_eq!(again.series(Operation::Insert).count(Status::Unsent), 1);
        assert_eq!(again.series(Operation::Insert).total().sent.len(), 0);
        let cells: Vec<_> = again.targets()[3].cells().collect();
        let [(Operation::Read, Status::Ok, cell)] = cells[..] else {
            panic!("{} cells", cells.len());
        };
        let latencies = [&cell.intended, &cell.sent].map(|one| one.dense().max() / 100_000);
        assert_eq!(latencies, [20, 10]);
        assert_eq!((again.verdicts.lost, again.health.lag.len()), (4, 1));
        let pauses = &again.health.pauses;
        assert_eq!((pauses.polled_ns, pauses.gaps.len()), (7_000, 1));
        assert!((again.health.threads[&2001].busy() - 0.5).abs() < 1e-9);
        assert_eq!((again.health.broken, again.turns.waited), (2, 3));
        assert_eq!(again.error_kinds, recorder.error_kinds);
    }

    #[test]
    fn what_is_no_record_is_refused() {
        let mut packed = Packed::of(&Recorder::default());
        packed.lag = "AAAA".into();
        assert!(packed.unpack(0).is_none());
    }
}
