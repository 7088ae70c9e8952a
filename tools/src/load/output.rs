//! Results as files: `run.json`, `intervals.csv`, `latency.hlog`, `report.html`.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use base64::Engine as _;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Serializer as _, V2DeflateSerializer};
use torc_measure::mix::Operation;

use super::html;
use super::outcome::{Interval, Outcome, PERCENTILES};
use super::recorder::Recorder;
use super::run::Run;
use crate::failure::Failure;

/// An interval log that the HdrHistogram tools read: version 1.3 lines, histograms in V2 with
/// deflate. Tags are `read.intended`, `read.sent` and so on; values are nanoseconds, the largest
/// value of a line is in milliseconds.
pub struct Hlog {
    text: String,
    serializer: V2DeflateSerializer,
}

impl Hlog {
    /// A log that begins at a civil time in milliseconds.
    pub fn new(began_ms: u64) -> Self {
        let seconds = began_ms as f64 / 1e3;
        let mut text = String::new();
        writeln!(text, "#[Histogram log format version 1.3]").expect("writing to a string");
        writeln!(text, "#[StartTime: {seconds:.3} (seconds since epoch)]")
            .expect("writing to a string");
        writeln!(text, "#[BaseTime: {seconds:.3} (seconds since epoch)]")
            .expect("writing to a string");
        text.push_str(
            "\"StartTimestamp\",\"Interval_Length\",\"Interval_Max\",\
                       \"Interval_Compressed_Histogram\"\n",
        );
        Self {
            text,
            serializer: V2DeflateSerializer::new(),
        }
    }

    /// Adds one interval.
    pub fn add(&mut self, at_s: f64, length_s: f64, recorder: &Recorder) {
        for operation in Operation::ALL {
            let series = recorder.series(operation);
            if series.total_count() == 0 {
                continue;
            }
            let total = series.total();
            let name = operation.name();
            for (kind, histogram) in [("intended", &total.intended), ("sent", &total.sent)] {
                let Some(encoded) = encode(&mut self.serializer, histogram) else {
                    continue;
                };
                let max = histogram.max() as f64 / 1e6;
                writeln!(
                    self.text,
                    "Tag={name}.{kind},{at_s:.3},{length_s:.3},{max:.3},{encoded}"
                )
                .expect("writing to a string");
            }
        }
    }

    /// The log.
    pub fn text(&self) -> &str {
        &self.text
    }
}

/// A histogram as base64 of V2 with deflate.
pub fn encode(serializer: &mut V2DeflateSerializer, histogram: &Histogram<u64>) -> Option<String> {
    let mut bytes = Vec::new();
    serializer.serialize(histogram, &mut bytes).ok()?;
    Some(base64::engine::general_purpose::STANDARD.encode(bytes))
}

/// A line an interval and kind of operation.
pub fn csv(intervals: &[Interval]) -> String {
    let mut out = String::from("at_s,operation,done,failed,client_busy,lag_us_p99.9");
    for (_, name) in PERCENTILES {
        write!(out, ",{name}_us").expect("writing to a string");
    }
    out.push('\n');
    for interval in intervals {
        for (name, percentiles) in &interval.latency_us {
            let done = interval.done.get(name).copied().unwrap_or(0);
            write!(
                out,
                "{},{name},{done},{},{:.4},{:.1}",
                interval.at_s, interval.failed, interval.client_busy, interval.lag_us_p999
            )
            .expect("writing to a string");
            for (_, percentile) in PERCENTILES {
                let value = percentiles.get(percentile).copied().unwrap_or(0.0);
                write!(out, ",{value:.1}").expect("writing to a string");
            }
            out.push('\n');
        }
    }
    out
}

/// Writes the four files of a run to a directory, which is made if need be.
pub fn directory(path: &Path, run: &Run) -> Result<(), Failure> {
    std::fs::create_dir_all(path).map_err(|error| failed(path, &error))?;
    let outcome = &run.outcome;
    file(&path.join("run.json"), &json(outcome))?;
    file(&path.join("intervals.csv"), &csv(&outcome.intervals))?;
    file(&path.join("latency.hlog"), run.hlog.text())?;
    file(
        &path.join("report.html"),
        &html::page(std::slice::from_ref(outcome), ""),
    )
}

/// The result as one JSON document.
pub fn json(outcome: &Outcome) -> String {
    let mut text = serde_json::to_string_pretty(outcome).unwrap_or_default();
    text.push('\n');
    text
}

/// Writes a file; `-` is standard output.
pub fn file(path: &Path, text: &str) -> Result<(), Failure> {
    if path.as_os_str() == "-" {
        return say(text);
    }
    std::fs::write(path, text).map_err(|error| failed(path, &error))
}

/// Writes results to standard output. A reader that has seen enough, such as `head`, is no failure;
/// a full disk is.
pub fn say(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::new(format!("standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// Tells on standard error how far it is. A measurement does not end because nobody hears it.
pub fn note(words: &str) {
    writeln!(std::io::stderr(), "{words}").ok();
}

/// Fails when a run's files could not be written: better before the run than after it.
pub fn ready(json: Option<&Path>, directory: Option<&Path>) -> Result<(), Failure> {
    if let Some(path) = directory {
        std::fs::create_dir_all(path)
            .and_then(|()| tempfile::tempfile_in(path))
            .map_err(|error| failed(path, &error))?;
    }
    let Some(path) = json.filter(|path| path.as_os_str() != "-") else {
        return Ok(());
    };
    let tried = if path.is_dir() {
        Err(std::io::ErrorKind::IsADirectory.into())
    } else if path.is_file() {
        File::options().append(true).open(path)
    } else if path.exists() {
        // A pipe or a device.
        return Ok(());
    } else {
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        tempfile::tempfile_in(parent.unwrap_or(Path::new(".")))
    };
    tried.map(drop).map_err(|error| failed(path, &error))
}

/// Reads a result: `run.json`, or the directory that holds it.
pub fn read(path: &Path) -> Result<Outcome, Failure> {
    let file = if path.is_dir() {
        path.join("run.json")
    } else {
        path.to_owned()
    };
    let text = std::fs::read_to_string(&file).map_err(|error| failed(&file, &error))?;
    serde_json::from_str(&text).map_err(|error| failed(&file, &error))
}

fn failed(path: &Path, error: &dyn std::error::Error) -> Failure {
    Failure::new(format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::recorder::Status;
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};

    #[test]
    fn the_interval_log_is_read_back_by_the_hdr_reader() {
        let mut recorder = Recorder::default();
        recorder.record(Operation::Read, Status::Ok, 2_000_000, Some(1_000_000));
        let mut hlog = Hlog::new(1_700_000_000_500);
        hlog.add(0.0, 1.0, &recorder);
        hlog.add(1.0, 1.0, &recorder);
        let entries: Vec<_> = IntervalLogIterator::new(hlog.text().as_bytes())
            .collect::<Result<_, _>>()
            .unwrap();
        let mut tags = Vec::new();
        for entry in entries {
            if let LogEntry::Interval(line) = entry {
                let bytes = base64::engine::general_purpose::STANDARD
                    .decode(line.encoded_histogram())
                    .unwrap();
                let histogram: Histogram<u64> =
                    Deserializer::new().deserialize(&mut &bytes[..]).unwrap();
                assert_eq!(histogram.len(), 1);
                tags.push(line.tag().unwrap().as_str().to_owned());
            }
        }
        assert_eq!(
            tags,
            ["read.intended", "read.sent", "read.intended", "read.sent"]
        );
    }

    #[test]
    fn the_table_has_a_line_an_interval_and_kind() {
        let mut recorder = Recorder::default();
        recorder.record(Operation::Read, Status::Ok, 2_000_000, Some(1_000_000));
        recorder.record(
            Operation::Write,
            Status::Refused,
            2_000_000,
            Some(1_000_000),
        );
        let text = csv(&[crate::load::outcome::interval(3.0, &recorder)]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[1].starts_with("3,read,1,1,"), "{text}");
        let columns = |line: &str| line.split(',').count();
        assert!(
            lines.iter().all(|line| columns(line) == columns(lines[0])),
            "{text}"
        );
    }
}
