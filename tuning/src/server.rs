//! What `torc server` takes from here: the CPUs of the plan, the rates of its disk, quick wake-ups, and
//! serious findings to warn about.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::check::{Finding, Severity, check};
use crate::cpuset::CpuSet;
use crate::disk::{self, PROPERTIES_SCHEMA, Properties, Work};
use crate::host::Host;
use crate::plan::{Plan, Profile};
use crate::probe;

/// Where the plan that was applied last lies, beside its journal.
pub const PLAN_FILE: &str = "plan.json";

/// Directory of journal and plan unless another is given.
pub const STATE_DIRECTORY: &str = "/var/lib/torc-tune";

/// The plan that was applied last, if it fits this host.
pub fn applied_plan(state: &Path, host: &Host) -> Option<Plan> {
    let text = std::fs::read_to_string(state.join(PLAN_FILE)).ok()?;
    let plan: Plan = serde_json::from_str(&text).ok()?;
    (plan.host == host.fingerprint()).then_some(plan)
}

/// Keeps the calling thread, and every thread that it starts from now on, on the CPUs that the plan
/// gives to shards: then one shard for each allowed core is one for each of them. Without a plan that
/// fits, the latency profile's layout is taken. Returns the CPUs.
///
/// # Errors
/// When the kernel refuses.
pub fn settle(state: &Path, host: &Host) -> io::Result<CpuSet> {
    let plan = applied_plan(state, host).unwrap_or_else(|| Plan::of(host, Profile::Latency));
    let cpus = plan.layout.shard_cpus().and(&host.usable());
    probe::pin_to(&cpus)?;
    Ok(cpus)
}

/// Rates of a disk as its properties file gives them.
#[derive(Clone, Debug, PartialEq)]
pub struct DiskRates {
    /// Bytes a second, reading with large requests.
    pub read: u64,
    /// Bytes a second, writing with large requests.
    pub write: u64,
    /// Why they may be wrong here, for the log.
    pub doubts: Vec<String>,
}

/// Why a properties file gives no rates.
#[derive(Debug, Error)]
pub enum PropertiesError {
    /// It cannot be read.
    #[error("{path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// It is none, or of another version.
    #[error("{path} is no properties file of `torc tune disk`: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
}

/// Reads the rates that `torc tune disk --output` wrote, for the data in `data_dir`.
///
/// # Errors
/// When the file is not there or none. A file that is doubtful (not stable, of another disk) gives
/// rates with the doubts.
pub fn disk_rates(path: &Path, data_dir: &Path) -> Result<DiskRates, PropertiesError> {
    let text = std::fs::read_to_string(path).map_err(|source| PropertiesError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    let invalid = |reason: String| PropertiesError::Invalid {
        path: path.to_owned(),
        reason,
    };
    let properties = Properties::from_toml(&text).map_err(|error| invalid(error.to_string()))?;
    if properties.schema != PROPERTIES_SCHEMA {
        return Err(invalid(format!("version {} is unknown", properties.schema)));
    }
    let mut doubts = Vec::new();
    let mut rate = |work: Work| {
        let mut figures = properties.figures.iter();
        let figure = figures.find(|figure| figure.work == work);
        let figure = figure.ok_or_else(|| invalid(format!("no figure for {}", work.name())))?;
        if let Some(why) = &figure.unstable {
            doubts.push(format!("{} were not stable: {why}", work.name()));
        }
        if !(figure.bytes_per_second >= 1.0 && figure.bytes_per_second < 1e15) {
            return Err(invalid(format!("{} have no rate", work.name())));
        }
        Ok(whole(figure.bytes_per_second))
    };
    let (read, write) = (rate(Work::SequentialRead)?, rate(Work::SequentialWrite)?);
    // At the first start, the server has yet to make it.
    let here = data_dir.ancestors().find_map(disk::device_of);
    if let (Some(measured), Some(here)) = (&properties.device, &here)
        && measured != here
    {
        doubts.push(format!(
            "{measured} was measured, and the data lies on {here}"
        ));
    }
    Ok(DiskRates {
        read,
        write,
        doubts,
    })
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "between 1 and 1e15, as the caller checked"
)]
fn whole(rate: f64) -> u64 {
    rate as u64
}

/// Asks the kernel to let no CPU sleep deeper than it wakes at once, for as long as the file is held. The
/// request ends with the process, which is why the server makes it and no script.
///
/// # Errors
/// Where the device is missing or may not be opened.
pub fn stay_awake() -> io::Result<File> {
    let mut file = File::options().write(true).open("/dev/cpu_dma_latency")?;
    // Zero microseconds, as an `int`.
    file.write_all(&[0; 4])?;
    Ok(file)
}

/// What [`check`] finds serious.
pub fn serious(host: &Host) -> Vec<Finding> {
    let mut findings = check(host);
    findings.retain(|finding| finding.severity == Severity::Serious);
    findings
}

#[cfg(test)]
mod tests {
    use super::{PROPERTIES_SCHEMA, Properties, Work, applied_plan, disk_rates, settle};
    use crate::disk::DiskFigure;
    use crate::host::Host;
    use crate::kernel::Live;
    use crate::plan::{Plan, Profile};

    #[test]
    fn a_server_settles_on_the_cpus_of_the_plan() {
        let state = tempfile::tempdir().unwrap();
        let thread = std::thread::spawn(move || {
            let host = Host::read(&Live::machine(), "this machine").unwrap();
            let cpus = settle(state.path(), &host).unwrap();
            let allowed = rustix::thread::sched_getaffinity(None).unwrap();
            let count = usize::try_from(allowed.count()).unwrap();
            assert_eq!(count, cpus.len());
        });
        thread.join().unwrap();
    }

    #[test]
    fn rates_are_read_from_the_properties_file_and_doubts_are_said() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.toml");
        let figure = |work, bytes_per_second, unstable| DiskFigure {
            work,
            depth: 8,
            per_second: 1.0,
            bytes_per_second,
            p50_us: 1.0,
            p99_us: 1.0,
            p999_us: None,
            unstable,
        };
        let mut properties = Properties {
            schema: PROPERTIES_SCHEMA,
            device: None,
            figures: vec![
                figure(Work::SequentialRead, 900e6, None),
                figure(
                    Work::SequentialWrite,
                    300e6,
                    Some("two passes differ by 9 %".into()),
                ),
            ],
        };
        let read = |properties: &Properties| {
            std::fs::write(&path, properties.to_toml().unwrap()).unwrap();
            disk_rates(&path, directory.path())
        };
        let rates = read(&properties).unwrap();
        assert_eq!((rates.read, rates.write), (900_000_000, 300_000_000));
        assert_eq!(rates.doubts.len(), 1);
        if crate::disk::device_of(directory.path()).is_some() {
            properties.device = Some("another".into());
            assert_eq!(read(&properties).unwrap().doubts.len(), 2);
            let missing = directory.path().join("not/yet");
            assert_eq!(disk_rates(&path, &missing).unwrap().doubts.len(), 2);
        }
        properties.figures[1].bytes_per_second = 0.0;
        assert!(
            read(&properties)
                .unwrap_err()
                .to_string()
                .contains("no rate")
        );
        properties.figures.truncate(1);
        assert!(
            read(&properties)
                .unwrap_err()
                .to_string()
                .contains("no figure")
        );
        properties.schema += 1;
        assert!(
            read(&properties)
                .unwrap_err()
                .to_string()
                .contains("version")
        );
        std::fs::write(&path, "hello").unwrap();
        let error = disk_rates(&path, directory.path()).unwrap_err();
        assert!(error.to_string().contains("no properties file"), "{error}");
    }

    #[test]
    fn the_kernel_is_asked_for_quick_wake_ups_where_it_lets_us() {
        match super::stay_awake() {
            Ok(held) => assert!(held.metadata().is_ok()),
            Err(error) => println!("not available here: /dev/cpu_dma_latency: {error}"),
        }
    }

    #[test]
    fn a_plan_of_another_host_is_not_followed() {
        let state = tempfile::tempdir().unwrap();
        let host = Host::read(&Live::machine(), "this machine").unwrap();
        let mut plan = Plan::of(&host, Profile::Throughput);
        let write = |plan: &Plan| {
            std::fs::write(
                state.path().join(super::PLAN_FILE),
                serde_json::to_string(plan).unwrap(),
            )
            .unwrap();
        };
        write(&plan);
        assert_eq!(applied_plan(state.path(), &host).as_ref(), Some(&plan));
        plan.host = "another".into();
        write(&plan);
        assert_eq!(applied_plan(state.path(), &host), None);
    }
}
