//! What a disk can do, measured as Torc uses it: O_DIRECT through io_uring on a file of its own.
//!
//! Every figure comes from two independent passes. When these differ by more than
//! [`SPREAD_MAX`], or the processor was the limit, the figure says that it is not stable instead of
//! looking like one that is. The outcome is a properties file for the server's I/O scheduler.

mod job;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::stats::Random;

pub use job::Work;

/// Largest difference of two passes, relative to the smaller.
pub const SPREAD_MAX: f64 = 0.05;
/// Processor time beyond which the disk was not the limit.
const BUSY_MAX: f64 = 0.90;
/// Bytes of a small request.
pub const PAGE: u64 = 4096;
/// Bytes of a large request.
pub const LARGE: u64 = 1 << 20;
/// Name of the file that is measured and removed.
const PROBE_FILE: &str = "torc-disk-probe";
/// Layout of the properties file.
pub const PROPERTIES_SCHEMA: u32 = 1;

/// What to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// Directory on the disk; a file is made there and removed.
    pub directory: PathBuf,
    /// Bytes of that file: larger than any cache of the device that should not be measured.
    pub file_bytes: u64,
    /// Length of each pass.
    pub pass: Duration,
    /// Depths of random reads.
    pub depths: Vec<u32>,
}

/// Why a disk could not be measured.
#[derive(Debug, Error)]
pub enum DiskError {
    /// A file operation failed.
    #[error("{path}: {source}")]
    Io {
        /// File or directory.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No direct I/O here (tmpfs, some network and stacked file systems).
    #[error("{path}: this file system has no direct I/O, so a measurement would show memory")]
    NoDirect {
        /// Directory.
        path: PathBuf,
    },
    /// No ring.
    #[error("io_uring is not available here: {0}")]
    Ring(io::Error),
    /// A request failed.
    #[error("a request failed: {0}")]
    Request(io::Error),
    /// The file is too small for the requests.
    #[error("the file has to hold at least {least} bytes")]
    TooSmall {
        /// Least size.
        least: u64,
    },
}

/// One figure: the mean of two passes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskFigure {
    /// What was done.
    pub work: Work,
    /// Requests in flight.
    pub depth: u32,
    /// Requests a second.
    pub per_second: f64,
    /// Bytes a second.
    pub bytes_per_second: f64,
    /// Median latency in microseconds.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile; absent with fewer than 10 000 requests.
    pub p999_us: Option<f64>,
    /// Why this figure is not to be relied upon.
    pub unstable: Option<String>,
}

/// The properties file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Properties {
    /// [`PROPERTIES_SCHEMA`].
    pub schema: u32,
    /// Figures.
    pub figures: Vec<DiskFigure>,
}

impl Properties {
    /// As TOML.
    ///
    /// # Errors
    /// Never for figures that were measured.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }

    /// From TOML.
    ///
    /// # Errors
    /// With the line that does not fit.
    pub fn from_toml(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }

    /// Whether every figure is stable.
    pub fn is_stable(&self) -> bool {
        self.figures.iter().all(|figure| figure.unstable.is_none())
    }
}

/// Removes the probe's file however the measurement ends.
struct Probe {
    path: PathBuf,
}

impl Drop for Probe {
    fn drop(&mut self) {
        // Nothing durable hangs on it; a file left behind is found by its name.
        drop(fs::remove_file(&self.path));
    }
}

/// Measures everything: random reads over depth, sequential reads and writes, durable writes, a
/// mixture. `progress` hears what begins.
pub fn measure(
    options: &DiskOptions,
    mut progress: impl FnMut(&str),
) -> Result<Properties, DiskError> {
    if options.file_bytes < 64 * LARGE {
        return Err(DiskError::TooSmall { least: 64 * LARGE });
    }
    let path = options.directory.join(PROBE_FILE);
    progress("writing the file that is measured");
    let probe = Probe { path: path.clone() };
    fill(&path, options.file_bytes)?;
    let reader = open(&path, &options.directory, false)?;
    let writer = open(&path, &options.directory, true)?;
    let mut works: Vec<(Work, u32)> = options
        .depths
        .iter()
        .map(|depth| (Work::RandomRead, *depth))
        .collect();
    works.extend([
        (Work::SequentialRead, 8),
        (Work::Mixed, 16),
        (Work::DurableWrite, 1),
        (Work::SequentialWrite, 8),
    ]);
    let mut figures = Vec::new();
    for (work, depth) in works {
        progress(&format!("{} at depth {depth}", work.name()));
        let file = if work == Work::DurableWrite {
            &writer
        } else {
            &reader
        };
        let pass = |seed| job::run(file, options.file_bytes, work, depth, options.pass, seed);
        // The first requests meet a device that was asleep or still busy with what came before.
        job::run(file, options.file_bytes, work, depth, options.pass / 4, 7)?;
        let passes = [pass(1)?, pass(2)?];
        figures.push(figure(work, depth, &passes));
    }
    drop(probe);
    Ok(Properties {
        schema: PROPERTIES_SCHEMA,
        figures,
    })
}

/// Measures one kind of work in one pass on a file that exists, for `prove`.
///
/// # Errors
/// As [`measure`].
pub fn quick(directory: &Path, pass: Duration, seed: u64) -> Result<DiskFigure, DiskError> {
    let path = directory.join(PROBE_FILE);
    let bytes = 256 * LARGE;
    let probe = Probe { path: path.clone() };
    fill(&path, bytes)?;
    let file = open(&path, directory, false)?;
    let outcome = job::run(&file, bytes, Work::RandomRead, 4, pass, seed)?;
    drop(probe);
    Ok(figure(Work::RandomRead, 4, &[outcome]))
}

fn open(path: &Path, directory: &Path, durable: bool) -> Result<File, DiskError> {
    let flags = libc::O_DIRECT | if durable { libc::O_DSYNC } else { 0 };
    let mut options = OpenOptions::new();
    let opened = options
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path);
    opened.map_err(|source| match source.raw_os_error() {
        Some(libc::EINVAL | libc::EOPNOTSUPP) => DiskError::NoDirect {
            path: directory.to_owned(),
        },
        _ => DiskError::Io {
            path: path.to_owned(),
            source,
        },
    })
}

/// Writes bytes that do not compress, so that no layer below can cheat, and syncs them.
fn fill(path: &Path, bytes: u64) -> Result<(), DiskError> {
    let io = |source| DiskError::Io {
        path: path.to_owned(),
        source,
    };
    let mut file = File::create(path).map_err(io)?;
    let mut random = Random::new(bytes);
    let mut block = vec![0_u8; usize::try_from(LARGE).unwrap_or(0)];
    for _ in 0..bytes / LARGE {
        for word in block.chunks_exact_mut(8) {
            word.copy_from_slice(&random.bits().to_le_bytes());
        }
        file.write_all(&block).map_err(io)?;
    }
    file.sync_all().map_err(io)
}

fn figure(work: Work, depth: u32, passes: &[job::Pass]) -> DiskFigure {
    let rates: Vec<f64> = passes.iter().map(job::Pass::per_second).collect();
    let mean = rates.iter().sum::<f64>() / rates.len() as f64;
    let (low, high) = rates
        .iter()
        .fold((f64::INFINITY, 0.0_f64), |(low, high), rate| {
            (low.min(*rate), high.max(*rate))
        });
    let busy = passes.iter().map(|pass| pass.busy).fold(0.0, f64::max);
    let mut latencies: Vec<f64> = passes
        .iter()
        .flat_map(|pass| pass.latencies_ns.iter().map(|ns| *ns as f64 / 1000.0))
        .collect();
    latencies.sort_by(f64::total_cmp);
    let at = |q| {
        if latencies.is_empty() {
            0.0
        } else {
            crate::stats::percentile(&latencies, q)
        }
    };
    let spread = (high - low) / low.max(f64::MIN_POSITIVE);
    let unstable = if latencies.is_empty() {
        Some("no request was answered in time".into())
    } else if spread > SPREAD_MAX {
        Some(format!("two passes differ by {:.0} %", spread * 100.0))
    } else if busy > BUSY_MAX {
        Some(format!(
            "the processor was the limit ({:.0} % busy)",
            busy * 100.0
        ))
    } else {
        None
    };
    DiskFigure {
        work,
        depth,
        per_second: mean,
        bytes_per_second: mean * work.bytes() as f64,
        p50_us: at(0.5),
        p99_us: at(0.99),
        p999_us: (latencies.len() >= 10_000).then(|| at(0.999)),
        unstable,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::job::Pass;
    use super::{DiskError, DiskOptions, LARGE, Properties, Work, figure, measure};

    fn pass(requests: u64, busy: f64) -> Pass {
        Pass {
            requests,
            seconds: 1.0,
            busy,
            latencies_ns: vec![100_000; 100],
        }
    }

    #[test]
    fn figures_that_do_not_repeat_say_so() {
        assert_eq!(
            figure(Work::RandomRead, 1, &[pass(1000, 0.5), pass(1040, 0.5)]).unstable,
            None
        );
        let unstable = figure(Work::RandomRead, 1, &[pass(1000, 0.5), pass(1200, 0.5)]).unstable;
        assert!(unstable.unwrap().contains("differ by 20 %"));
        let unstable = figure(Work::RandomRead, 1, &[pass(1000, 0.97), pass(1000, 0.5)]).unstable;
        assert!(unstable.unwrap().contains("processor"));
    }

    #[test]
    fn properties_round_trip() {
        let properties = Properties {
            schema: super::PROPERTIES_SCHEMA,
            figures: vec![
                figure(Work::RandomRead, 32, &[pass(1000, 0.5), pass(1200, 0.5)]),
                figure(Work::DurableWrite, 1, &[pass(1000, 0.1), pass(1000, 0.1)]),
            ],
        };
        let text = properties.to_toml().unwrap();
        assert_eq!(Properties::from_toml(&text).unwrap(), properties);
        assert!(Properties::from_toml("schema = 1\n").is_err());
    }

    #[test]
    fn a_small_file_is_measured_and_removed() {
        // The target directory lies on a real disk; the temporary one may be memory.
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let options = DiskOptions {
            directory: directory.path().to_owned(),
            file_bytes: 64 * LARGE,
            pass: Duration::from_millis(40),
            depths: vec![1, 8],
        };
        match measure(&options, |_| ()) {
            Ok(properties) => {
                assert_eq!(properties.figures.len(), 6);
                assert!(
                    properties
                        .figures
                        .iter()
                        .all(|figure| figure.per_second > 0.0)
                );
            }
            // A runner without io_uring or direct I/O.
            Err(error) => assert!(
                matches!(error, DiskError::Ring(_) | DiskError::NoDirect { .. }),
                "{error}"
            ),
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn memory_is_refused_and_not_measured_as_a_disk() {
        let options = DiskOptions {
            directory: "/dev/shm/does-not-exist".into(),
            file_bytes: 1,
            pass: Duration::ZERO,
            depths: vec![1],
        };
        assert!(matches!(
            measure(&options, |_| ()),
            Err(DiskError::TooSmall { .. })
        ));
    }
}
