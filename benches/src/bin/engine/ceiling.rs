//! What the disk does by itself, as fio finds it: the ceiling of every engine.

use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::workload::KEY_BYTES;

/// One of fio's jobs.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Ceiling {
    pub work: Work,
    pub block_bytes: usize,
    pub depth: usize,
    pub per_s: f64,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    RandomRead,
    /// One after the other, each durable before the next.
    DurableWrite,
}

const FILE_BYTES: u64 = 1 << 30;
/// What one group of writes may come to.
const GROUP_BYTES: usize = 1 << 20;
const PAGE: usize = 4096;

/// Work, bytes of a block, depth.
const JOBS: [(Work, usize, usize); 8] = [
    (Work::RandomRead, PAGE, 1),
    (Work::RandomRead, PAGE, 64),
    (Work::RandomRead, 2 * PAGE, 1),
    (Work::RandomRead, 2 * PAGE, 64),
    (Work::RandomRead, 32 * PAGE, 1),
    (Work::RandomRead, 32 * PAGE, 64),
    (Work::DurableWrite, PAGE, 1),
    (Work::DurableWrite, GROUP_BYTES, 1),
];

/// Runs all jobs on a file in `directory`; `None` if fio is not installed.
pub fn measure(directory: &Path, seconds: f64) -> Option<Vec<Ceiling>> {
    let file = tempfile::Builder::new()
        .prefix("ceiling-")
        .tempfile_in(directory)
        .expect("a file on the disk");
    let run = |(work, block_bytes, depth)| {
        let output = Command::new("fio")
            .args(["--name=ceiling", "--ioengine=io_uring", "--direct=1"])
            .args(["--time_based", "--ramp_time=0.5", "--norandommap"])
            .args(["--randrepeat=0", "--output-format=json"])
            .arg(format!("--filename={}", file.path().display()))
            .arg(format!("--size={FILE_BYTES}"))
            .arg(format!("--runtime={}ms", seconds * 1e3))
            .arg(format!("--bs={block_bytes}"))
            .arg(format!("--iodepth={depth}"))
            .args(match work {
                Work::RandomRead => ["--rw=randread"].as_slice(),
                Work::DurableWrite => ["--rw=write", "--sync=dsync"].as_slice(),
            })
            .output()
            .ok()?;
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "fio failed: {words}");
        let json: serde_json::Value =
            serde_json::from_slice(&output.stdout).expect("fio's words are JSON");
        let side = match work {
            Work::RandomRead => "read",
            Work::DurableWrite => "write",
        };
        let per_s = &json["jobs"][0][side]["iops"];
        Some(Ceiling {
            work,
            block_bytes,
            depth,
            per_s: per_s.as_f64().expect("a rate"),
        })
    };
    JOBS.into_iter().map(run).collect()
}

/// Operations a second that the disk allows a load, where one operation is at least one read or one part of a
/// durable write: half of a value is read, which is what compression leaves of it, in whole pages; all of it goes
/// to the log, in groups of at most a mebibyte. `None` for other loads: memory answers part of them.
pub fn of(ceilings: &[Ceiling], load: &str, value_bytes: usize) -> Option<f64> {
    let at = |work, block_bytes, depth| {
        let is_it =
            |one: &&Ceiling| (one.work, one.block_bytes, one.depth) == (work, block_bytes, depth);
        ceilings.iter().find(is_it).map(|one| one.per_s)
    };
    let block = (value_bytes / 2).next_multiple_of(PAGE);
    let group = GROUP_BYTES as f64 / (KEY_BYTES + value_bytes) as f64;
    let grouped = at(Work::DurableWrite, GROUP_BYTES, 1).map(|per_s| per_s * group);
    match load {
        "read hit, 1 client" => at(Work::RandomRead, block, 1),
        "read hit, 64 clients" => at(Work::RandomRead, block, 64),
        "random fill, durable, 1 client" => {
            let alone = at(Work::DurableWrite, PAGE, 1)?;
            Some(alone.min(grouped?))
        }
        "random fill, durable, 64 clients" | "overwrite, 64 clients" => grouped,
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_meets_the_job_that_it_is_made_of() {
        let rates = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 1000.0, 100.0];
        let ceilings: Vec<Ceiling> = JOBS
            .into_iter()
            .zip(rates)
            .map(|((work, block_bytes, depth), per_s)| Ceiling {
                work,
                block_bytes,
                depth,
                per_s,
            })
            .collect();
        assert_eq!(of(&ceilings, "read hit, 1 client", 1000), Some(10.0));
        assert_eq!(of(&ceilings, "read hit, 64 clients", 16 << 10), Some(40.0));
        assert_eq!(of(&ceilings, "read hit, 1 client", 256 << 10), Some(50.0));
        let alone = of(&ceilings, "random fill, durable, 1 client", 1000);
        assert_eq!(alone, Some(1000.0));
        let large = of(&ceilings, "random fill, durable, 1 client", 256 << 10).unwrap();
        assert!((399.0..400.0).contains(&large), "{large}");
        assert_eq!(of(&ceilings, "YCSB C", 1000), None);
    }
}
