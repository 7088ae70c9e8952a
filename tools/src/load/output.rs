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

use super::first_of;
use super::html;
use super::outcome::{Interval, Outcome, PERCENTILES, SCHEMA};
use super::recorder::Recorder;
use super::run::Run;
use crate::failure::Failure;

/// Links that are followed one after the other, as by Linux.
const LINKS_MAX: usize = 40;

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

/// Files of a command that has ended.
pub struct Results {
    json: String,
    /// What a directory gets, by name.
    files: Vec<(&'static str, String)>,
}

impl Results {
    /// Those of one run.
    pub fn of_run(run: &Run) -> Self {
        let outcome = &run.outcome;
        let json = json(outcome);
        let page = html::page(std::slice::from_ref(outcome), "");
        Self {
            files: vec![
                ("run.json", json.clone()),
                ("intervals.csv", csv(&outcome.intervals)),
                ("latency.hlog", run.hlog.text()),
                ("report.html", page),
            ],
            json,
        }
    }

    /// Those of several.
    pub fn of_runs(outcomes: &[Outcome]) -> Self {
        let json = json(outcomes);
        Self {
            files: vec![
                ("runs.json", json.clone()),
                ("report.html", html::page(outcomes, "")),
            ],
            json,
        }
    }

    /// Writes them to where `--json` and `--out` say: all files or, where one cannot be written, none.
    pub fn write(self, to_file: Option<&Path>, to_directory: Option<&Path>) -> Result<(), Failure> {
        let mut all = Vec::new();
        if let Some(directory) = to_directory {
            make_directory(directory)?;
            let files = self.files.into_iter();
            all.extend(files.map(|(name, text)| (directory.join(name), text)));
        }
        let said = match to_file {
            Some(_) if is_stdout(to_file) => say(&self.json),
            Some(path) => {
                all.push((path.to_owned(), self.json));
                Ok(())
            }
            None => Ok(()),
        };
        first_of(files(&all), said)
    }
}

/// Makes a directory for results, unless it is there.
pub fn make_directory(path: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(path).map_err(|error| failed(path, &error))
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
fn files(files: &[(PathBuf, String)]) -> Result<(), Failure> {
    let mut beside = Vec::new();
    // A pipe or a device has no place beside it, and nothing that could be lost.
    let is_special = |path: &Path| path.exists() && !path.is_file();
    let (special, plain): (Vec<_>, Vec<_>) = files.iter().partition(|(path, _)| is_special(path));
    for (path, text) in plain {
        let written = place_of(path)
            .and_then(|place| Ok((write_beside(&place, text)?, place)))
            .map_err(|error| unwritten(path, &error))?;
        beside.push((path, written));
    }
    for (path, text) in special {
        std::fs::write(path, text).map_err(|error| failed(path, &error))?;
    }
    for (path, (written, place)) in beside {
        let renamed = written.persist(&place);
        renamed.map_err(|failure| unwritten(path, &failure.error))?;
    }
    Ok(())
}

/// Where a file's links lead, whether something is there or not: that is replaced, not the link.
fn place_of(path: &Path) -> std::io::Result<PathBuf> {
    let mut place = path.to_owned();
    for _ in 0..LINKS_MAX {
        match std::fs::read_link(&place) {
            // From the link's directory, unless it is absolute.
            Ok(target) => place = directory_of(&place).join(target),
            // It is no link, or nothing.
            Err(_) => return Ok(place),
        }
    }
    Err(rustix::io::Errno::LOOP.into())
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
        make_directory(path)?;
        tempfile::tempfile_in(path).map_err(|error| failed(path, &error))?;
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
        let place = opened.and_then(|()| place_of(path));
        place.and_then(|place| tempfile::tempfile_in(directory_of(&place)))
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
    let document = serde_json::from_str(&text).map_err(|error| {
        Failure::new(format!(
            "{}: not JSON ({error}); expected run.json or runs.json, or their directory",
            file.display()
        ))
    })?;
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
    fn what_is_no_result_is_refused_with_what_is_expected() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("latency.hlog");
        std::fs::write(&file, "#[Histogram log format version 1.3]\n").unwrap();
        let words = read(&file).err().unwrap().to_string();
        assert!(
            words.contains("latency.hlog") && words.contains("run.json"),
            "{words}"
        );
    }

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
    fn a_link_that_leads_nowhere_yet_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let link = |name: &str, to: &str| std::os::unix::fs::symlink(to, at(name)).unwrap();
        std::fs::create_dir(at("results")).unwrap();
        link("first", "second");
        link("second", "results/new");
        ready(Some(&at("first")), None).unwrap();
        file(&at("first"), "1").unwrap();
        assert!(at("first").is_symlink() && at("second").is_symlink());
        assert_eq!(std::fs::read_to_string(at("results/new")).unwrap(), "1");
        link("lost", "missing/new");
        link("round", "round");
        for (name, why) in [("lost", "No such file"), ("round", "symbolic links")] {
            for refused in [ready(Some(&at(name)), None), file(&at(name), "1")] {
                let words = refused.unwrap_err().to_string();
                assert!(words.contains(name) && words.contains(why), "{words}");
            }
            assert!(at(name).is_symlink());
        }
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
