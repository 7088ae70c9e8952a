//! Results as files: `run.json`, `intervals.csv`, `latency.hlog`, `report.html`.

use std::fmt::Write as _;
use std::fs::{File, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Serializer as _, V2DeflateSerializer};
use serde_json::Value;
use tempfile::NamedTempFile;
use torc_measure::mix::Operation;

use super::html;
use super::outcome::{Interval, Outcome, PERCENTILES, SCHEMA};
use super::recorder::Recorder;
use super::run::Run;
use crate::failure::Failure;

/// An interval log that the HdrHistogram tools read: version 1.3 lines, histograms in V2 with
/// deflate. Tags are `read.intended`, `read.sent` and so on; values are nanoseconds, the largest
/// value of a line is in milliseconds.
pub struct Hlog {
    began_ms: u64,
    lines: Vec<HlogLine>,
    serializer: V2DeflateSerializer,
}

struct HlogLine {
    tag: String,
    at_s: f64,
    seconds: f64,
    max_ms: f64,
    encoded: String,
}

impl Hlog {
    /// A log that begins at a civil time in milliseconds.
    pub fn new(began_ms: u64) -> Self {
        Self {
            began_ms,
            lines: Vec::new(),
            serializer: V2DeflateSerializer::new(),
        }
    }

    /// Adds one interval.
    pub fn add(&mut self, at_s: f64, seconds: f64, recorder: &Recorder) {
        for operation in Operation::ALL {
            let series = recorder.series(operation);
            if series.total_count() == 0 {
                continue;
            }
            let total = series.total();
            for (kind, histogram) in [("intended", &total.intended), ("sent", &total.sent)] {
                if let Some(encoded) = encode(&mut self.serializer, histogram) {
                    self.lines.push(HlogLine {
                        tag: format!("{}.{kind}", operation.name()),
                        at_s,
                        seconds,
                        max_ms: histogram.max() as f64 / 1e6,
                        encoded,
                    });
                }
            }
        }
    }

    /// The run ended after so many seconds: nothing was measured beyond.
    pub fn end(&mut self, seconds: f64) {
        for line in &mut self.lines {
            line.seconds = line.seconds.min((seconds - line.at_s).max(0.0));
        }
    }

    /// The log.
    pub fn text(&self) -> String {
        let mut text = String::from("#[Histogram log format version 1.3]\n");
        for name in ["StartTime", "BaseTime"] {
            let seconds = self.began_ms as f64 / 1e3;
            writeln!(text, "#[{name}: {seconds:.3} (seconds since epoch)]")
                .expect("writing to a string");
        }
        text.push_str(
            "\"StartTimestamp\",\"Interval_Length\",\"Interval_Max\",\
                       \"Interval_Compressed_Histogram\"\n",
        );
        for line in &self.lines {
            writeln!(
                text,
                "Tag={},{:.3},{:.3},{:.3},{}",
                line.tag, line.at_s, line.seconds, line.max_ms, line.encoded
            )
            .expect("writing to a string");
        }
        text
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
    out.push_str(",seconds\n");
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
            writeln!(out, ",{:.3}", interval.seconds).expect("writing to a string");
        }
    }
    out
}

/// Writes the four files of a run to a directory, which is made if need be.
pub fn directory(path: &Path, run: &Run) -> Result<(), Failure> {
    std::fs::create_dir_all(path).map_err(|error| failed(path, &error))?;
    let outcome = &run.outcome;
    files(&[
        (path.join("run.json"), json(outcome)),
        (path.join("intervals.csv"), csv(&outcome.intervals)),
        (path.join("latency.hlog"), run.hlog.text()),
        (
            path.join("report.html"),
            html::page(std::slice::from_ref(outcome), ""),
        ),
    ])
}

/// A result, or several, as one JSON document.
pub fn json(results: &(impl serde::Serialize + ?Sized)) -> String {
    let mut text = serde_json::to_string_pretty(results).unwrap_or_default();
    text.push('\n');
    text
}

/// Writes a file; `-` is standard output.
pub fn file(path: &Path, text: &str) -> Result<(), Failure> {
    if is_stdout(Some(path)) {
        return say(text);
    }
    files(&[(path.to_owned(), text.to_owned())])
}

/// Writes files, each beside its place first: where one cannot be written, all that were there before stay
/// as they are. A power cut may still take the new ones: nothing is synced.
pub fn files(files: &[(PathBuf, String)]) -> Result<(), Failure> {
    let mut beside = Vec::new();
    for (path, text) in files {
        if path.exists() && !path.is_file() {
            // A pipe or a device has no place beside it, and nothing that could be lost.
            std::fs::write(path, text).map_err(|error| failed(path, &error))?;
            continue;
        }
        // What a link leads to is replaced, not the link.
        let place = path.canonicalize().unwrap_or_else(|_| path.clone());
        let written = write_beside(&place, text).map_err(|error| unwritten(path, &error))?;
        beside.push((path, place, written));
    }
    for (path, place, written) in beside {
        let renamed = written.persist(&place);
        renamed.map_err(|failure| unwritten(path, &failure.error))?;
    }
    Ok(())
}

fn write_beside(place: &Path, text: &str) -> std::io::Result<NamedTempFile> {
    let old = std::fs::metadata(place).ok().map(|old| old.permissions());
    // As for any new file, which the caller's mask narrows.
    let permissions = old.clone().unwrap_or(Permissions::from_mode(0o666));
    let mut written = tempfile::Builder::new()
        .prefix(".torc-load-")
        .permissions(permissions)
        .tempfile_in(directory_of(place))?;
    if let Some(old) = old {
        written.as_file().set_permissions(old)?;
    }
    written.write_all(text.as_bytes())?;
    Ok(written)
}

/// The directory that a file is in.
fn directory_of(path: &Path) -> &Path {
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    parent.unwrap_or(Path::new("."))
}

/// A file could not be written beside its place.
fn unwritten(path: &Path, error: &std::io::Error) -> Failure {
    let left = match path.exists() {
        true => "the old file is untouched",
        false => "no file is left behind",
    };
    Failure::new(format!("{}: {error}; {left}", path.display()))
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

/// Writes results for people: to standard output, unless programs read `json` there.
pub fn show(json: Option<&Path>, text: &str) -> Result<(), Failure> {
    if is_stdout(json) {
        note(text.trim_end());
        return Ok(());
    }
    say(text)
}

fn is_stdout(path: Option<&Path>) -> bool {
    path.is_some_and(|path| path.as_os_str() == "-")
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
    let Some(path) = json.filter(|path| !is_stdout(Some(path))) else {
        return Ok(());
    };
    let tried = if path.is_dir() {
        Err(std::io::ErrorKind::IsADirectory.into())
    } else if path.exists() && !path.is_file() {
        // A pipe or a device.
        return Ok(());
    } else {
        // What is there is replaced by a file beside it, unless it is protected.
        let protected = path
            .is_file()
            .then(|| File::options().append(true).open(path));
        let opened = protected.transpose().map(drop);
        opened.and_then(|()| tempfile::tempfile_in(directory_of(path)))
    };
    tried.map(drop).map_err(|error| failed(path, &error))
}

/// Reads results: the file of one or of several, or the directory that `--out` was.
fn read(path: &Path) -> Result<Vec<Outcome>, Failure> {
    let file = match path.is_dir() {
        false => path.to_owned(),
        true => ["run.json", "runs.json"]
            .map(|name| path.join(name))
            .into_iter()
            .find(|file| file.exists())
            .ok_or_else(|| {
                Failure::new(format!(
                    "{}: neither run.json nor runs.json is there",
                    path.display()
                ))
            })?,
    };
    let text = std::fs::read_to_string(&file).map_err(|error| failed(&file, &error))?;
    let document = serde_json::from_str(&text).map_err(|error| failed(&file, &error))?;
    let results = match document {
        Value::Array(results) => results,
        result => vec![result],
    };
    let one = |result: Value| {
        let schema = result.get("schema").and_then(Value::as_u64);
        if schema != Some(u64::from(SCHEMA)) {
            let words = schema.map_or("no result of torc load".into(), |schema| {
                format!("a result of schema {schema}; this version reads {SCHEMA}")
            });
            return Err(Failure::new(format!("{}: {words}", file.display())));
        }
        serde_json::from_value(result).map_err(|error| failed(&file, &error))
    };
    results.into_iter().map(one).collect()
}

/// Reads all of these, one after the other.
pub fn read_all(paths: &[PathBuf]) -> Result<Vec<Outcome>, Failure> {
    let read: Result<Vec<_>, Failure> = paths.iter().map(|path| read(path)).collect();
    Ok(read?.into_iter().flatten().collect())
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
        hlog.end(1.5);
        let text = hlog.text();
        let entries: Vec<_> = IntervalLogIterator::new(text.as_bytes())
            .collect::<Result<_, _>>()
            .unwrap();
        let (mut tags, mut lengths) = (Vec::new(), Vec::new());
        for entry in entries {
            if let LogEntry::Interval(line) = entry {
                let bytes = base64::engine::general_purpose::STANDARD
                    .decode(line.encoded_histogram())
                    .unwrap();
                let histogram: Histogram<u64> =
                    Deserializer::new().deserialize(&mut &bytes[..]).unwrap();
                assert_eq!(histogram.len(), 1);
                tags.push(line.tag().unwrap().as_str().to_owned());
                lengths.push(line.duration().as_millis());
            }
        }
        assert_eq!(lengths, [1000, 1000, 500, 500], "the last one was shorter");
        assert_eq!(
            tags,
            ["read.intended", "read.sent", "read.intended", "read.sent"]
        );
    }

    #[test]
    fn a_file_is_replaced_with_its_permissions_and_through_its_link() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let mode = |name: &str| std::fs::metadata(at(name)).unwrap().permissions().mode() & 0o777;
        std::fs::write(at("as-usual"), "").unwrap();
        file(&at("new"), "1").unwrap();
        assert_eq!(mode("new"), mode("as-usual"));
        std::fs::set_permissions(at("new"), Permissions::from_mode(0o604)).unwrap();
        std::os::unix::fs::symlink("new", at("link")).unwrap();
        file(&at("link"), "2").unwrap();
        assert!(at("link").is_symlink());
        assert_eq!(
            (std::fs::read_to_string(at("new")).unwrap(), mode("new")),
            ("2".into(), 0o604)
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
    }

    #[test]
    fn where_one_file_cannot_be_written_all_old_ones_stay() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("old"), "old").unwrap();
        let refused = files(&[
            (at("old"), "new".into()),
            (at("missing").join("file"), "new".into()),
        ]);
        let words = refused.unwrap_err().to_string();
        assert!(words.contains("missing/file: No such file"), "{words}");
        assert!(words.ends_with("no file is left behind"), "{words}");
        assert_eq!(std::fs::read_to_string(at("old")).unwrap(), "old");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
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
        let text = csv(&[crate::load::outcome::interval(3.0, 1.0, &recorder)]);
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
