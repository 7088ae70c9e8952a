//! What a disk can do, measured as Torc uses it: O_DIRECT through io_uring on a file of its own.
//!
//! Every figure comes from two independent passes. When these differ by more than
//! [`SPREAD_MAX`], or the processor was the limit, the figure says that it is not stable instead of
//! looking like one that is. The outcome is a properties file for the server's I/O scheduler.

mod job;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::stats::Random;

pub use job::{Pass, Work};

/// Largest difference of two passes, relative to the smaller.
pub const SPREAD_MAX: f64 = 0.05;
/// Processor time beyond which the disk was not the limit.
const BUSY_MAX: f64 = 0.90;
/// Bytes of a small request.
pub const PAGE: u64 = 4096;
/// Bytes of a large request.
pub const LARGE: u64 = 1 << 20;
/// Least file: the large requests of a whole queue, several times over.
const FILE_BYTES_LEAST: u64 = 64 * LARGE;
/// How `statfs` names a file system that has no disk.
const RAMFS_MAGIC: libc::c_long = 0x8584_58f6;
/// Name of the file that is measured and removed.
const PROBE_FILE: &str = "torc-disk-probe";
/// Layout of the properties file.
pub const PROPERTIES_SCHEMA: u32 = 1;

/// Where to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A file is made in this directory, filled, and removed.
    Directory {
        /// On the disk.
        path: PathBuf,
        /// Bytes of the file: larger than any cache of the device that should not be measured.
        file_bytes: u64,
    },
    /// This file, which is overwritten and stays: to compare with another tool on the very same blocks.
    File(PathBuf),
}

/// What to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// Where.
    pub subject: Subject,
    /// Length of each pass.
    pub pass: Duration,
    /// Kinds of work.
    pub works: Vec<Work>,
    /// Depths of random reads; the other kinds have one of their own.
    pub depths: Vec<u32>,
}

impl DiskOptions {
    /// The rows of the outcome: each kind of work with the requests that it keeps in flight.
    pub fn rows(&self) -> Vec<(Work, u32)> {
        let depths = |work: Work| match work {
            Work::RandomRead => self.depths.clone(),
            Work::SequentialRead | Work::SequentialWrite => vec![8],
            Work::Mixed => vec![16],
            Work::DurableWrite => vec![1],
        };
        let rows = self.works.iter();
        rows.flat_map(|work| depths(*work).into_iter().map(|depth| (*work, depth)))
            .collect()
    }
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
    /// No direct I/O here (some network and stacked file systems).
    #[error("{path}: this file system has no direct I/O, so a measurement would show memory")]
    NoDirect {
        /// The file.
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
    /// The file has no blocks for some of its bytes.
    #[error("{path} has holes, and reading a hole does not reach the disk: fill the file first")]
    Holes {
        /// The file.
        path: PathBuf,
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
    /// The block device that was measured, e.g. `nvme0n1`, where the file system lies on one.
    pub device: Option<String>,
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

/// A file that can be measured. One that was made here is removed however the measurement ends.
#[derive(Debug)]
pub struct Probe {
    path: PathBuf,
    bytes: u64,
    made: bool,
    plain: File,
    durable: File,
}

impl Drop for Probe {
    fn drop(&mut self) {
        if self.made {
            // Nothing durable hangs on it; a file left behind is found by its name.
            drop(fs::remove_file(&self.path));
        }
    }
}

impl Probe {
    /// Makes the file, or opens the one that is given.
    ///
    /// # Errors
    /// When there is no direct I/O, no room, or the given file is too small or has holes.
    pub fn new(subject: &Subject) -> Result<Self, DiskError> {
        let (path, bytes, made) = match subject {
            Subject::Directory { path, file_bytes } => (path.join(PROBE_FILE), *file_bytes, true),
            Subject::File(path) => (path.clone(), allocated(path)?, false),
        };
        if bytes < FILE_BYTES_LEAST {
            return Err(DiskError::TooSmall {
                least: FILE_BYTES_LEAST,
            });
        }
        if made && let Err(error) = fill(&path, bytes) {
            drop(fs::remove_file(&path));
            return Err(error);
        }
        let opened = open(&path, false).and_then(|plain| Ok((plain, open(&path, true)?)));
        if opened.is_err() && made {
            drop(fs::remove_file(&path));
        }
        let (plain, durable) = opened?;
        Ok(Self {
            path,
            bytes,
            made,
            plain,
            durable,
        })
    }

    /// One pass.
    ///
    /// # Errors
    /// Without io_uring, and when a request fails.
    pub fn pass(
        &self,
        (work, depth): (Work, u32),
        duration: Duration,
        seed: u64,
    ) -> Result<Pass, DiskError> {
        let file = if work == Work::DurableWrite {
            &self.durable
        } else {
            &self.plain
        };
        job::run(file, self.bytes, (work, depth), duration, seed)
    }
}

/// Length of a file of which every byte has a block.
fn allocated(path: &Path) -> Result<u64, DiskError> {
    let metadata = fs::metadata(path).map_err(|source| DiskError::Io {
        path: path.to_owned(),
        source,
    })?;
    if metadata.blocks().saturating_mul(512) < metadata.len() {
        return Err(DiskError::Holes {
            path: path.to_owned(),
        });
    }
    Ok(metadata.len())
}

/// Measures each row of the options twice. `progress` hears what begins.
///
/// # Errors
/// See [`DiskError`]; nothing is left behind.
pub fn measure(
    options: &DiskOptions,
    mut progress: impl FnMut(&str),
) -> Result<Properties, DiskError> {
    progress("preparing the file that is measured");
    let probe = Probe::new(&options.subject)?;
    let mut figures = Vec::new();
    for (work, depth) in options.rows() {
        progress(&format!("{} at depth {depth}", work.name()));
        let pass = |duration, seed| probe.pass((work, depth), duration, seed);
        // The first requests meet a device that was asleep or still busy with what came before.
        pass(options.pass / 4, 7)?;
        let passes = [pass(options.pass, 1)?, pass(options.pass, 2)?];
        figures.push(figure(work, depth, &passes));
    }
    Ok(Properties {
        schema: PROPERTIES_SCHEMA,
        device: device_of(&probe.path),
        figures,
    })
}

/// Name of the block device below a file or directory, the whole one if that is a partition. `None`
/// where there is none, or several (btrfs, overlay, network file systems).
pub fn device_of(path: &Path) -> Option<String> {
    let device = fs::metadata(path).ok()?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let mut block = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    if block.join("partition").exists() {
        block.pop();
    }
    block.file_name()?.to_str().map(str::to_owned)
}

fn open(path: &Path, durable: bool) -> Result<File, DiskError> {
    let flags = libc::O_DIRECT | if durable { libc::O_DSYNC } else { 0 };
    let mut options = OpenOptions::new();
    let opened = options
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path);
    let no_direct = || DiskError::NoDirect {
        path: path.to_owned(),
    };
    let file = opened.map_err(|source| match source.raw_os_error() {
        Some(libc::EINVAL | libc::EOPNOTSUPP) => no_direct(),
        _ => DiskError::Io {
            path: path.to_owned(),
            source,
        },
    })?;
    // Since Linux 6.6 memory takes the flag, too.
    let kind = rustix::fs::fstatfs(&file).map(|system| system.f_type);
    if kind.is_ok_and(|kind| kind == libc::TMPFS_MAGIC || kind == RAMFS_MAGIC) {
        return Err(no_direct());
    }
    Ok(file)
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

/// What passes of one row come to: their mean, and whether they agree.
pub fn figure(work: Work, depth: u32, passes: &[Pass]) -> DiskFigure {
    let rates: Vec<f64> = passes.iter().map(Pass::per_second).collect();
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
    use super::{DiskError, DiskOptions, LARGE, Properties, Subject, Work, figure, measure};

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
            device: Some("nvme0n1".into()),
            figures: vec![
                figure(Work::RandomRead, 32, &[pass(1000, 0.5), pass(1200, 0.5)]),
                figure(Work::DurableWrite, 1, &[pass(1000, 0.1), pass(1000, 0.1)]),
            ],
        };
        let text = properties.to_toml().unwrap();
        assert_eq!(Properties::from_toml(&text).unwrap(), properties);
        assert!(Properties::from_toml("schema = 1\n").is_err());
    }

    fn options(subject: Subject) -> DiskOptions {
        DiskOptions {
            subject,
            pass: Duration::from_millis(40),
            works: Work::ALL.to_vec(),
            depths: vec![1, 8],
        }
    }

    /// A runner without io_uring or direct I/O.
    fn is_not_available(error: &DiskError) -> bool {
        matches!(error, DiskError::Ring(_) | DiskError::NoDirect { .. })
    }

    /// The target directory lies on a real disk; the temporary one may be memory.
    fn directory() -> tempfile::TempDir {
        tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap()
    }

    #[test]
    fn a_small_file_is_measured_and_removed() {
        let directory = directory();
        let options = options(Subject::Directory {
            path: directory.path().to_owned(),
            file_bytes: 64 * LARGE,
        });
        match measure(&options, |_| ()) {
            Ok(properties) => {
                assert_eq!(properties.figures.len(), 6);
                let mut figures = properties.figures.iter();
                assert!(figures.all(|figure| figure.per_second > 0.0));
            }
            Err(error) => assert!(is_not_available(&error), "{error}"),
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_given_file_is_measured_and_stays() {
        let directory = directory();
        let path = directory.path().join("given");
        super::fill(&path, 64 * LARGE).unwrap();
        let mut options = options(Subject::File(path.clone()));
        options.works = vec![Work::RandomRead];
        match measure(&options, |_| ()) {
            Ok(properties) => assert_eq!(properties.figures.len(), 2),
            Err(error) => assert!(is_not_available(&error), "{error}"),
        }
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 64 * LARGE);
    }

    #[test]
    fn what_would_not_reach_the_disk_is_refused() {
        let directory = directory();
        let path = directory.path().join("holes");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(64 * LARGE).unwrap();
        let refused = measure(&options(Subject::File(path)), |_| ()).unwrap_err();
        assert!(matches!(refused, DiskError::Holes { .. }), "{refused}");
        let refused = measure(
            &options(Subject::Directory {
                path: directory.path().to_owned(),
                file_bytes: 1,
            }),
            |_| (),
        );
        assert!(matches!(refused, Err(DiskError::TooSmall { .. })));
        let Ok(memory) = tempfile::tempdir_in("/dev/shm") else {
            return;
        };
        let refused = measure(
            &options(Subject::Directory {
                path: memory.path().to_owned(),
                file_bytes: 64 * LARGE,
            }),
            |_| (),
        );
        assert!(matches!(refused, Err(DiskError::NoDirect { .. })));
        assert_eq!(std::fs::read_dir(memory.path()).unwrap().count(), 0);
    }
}
