//! What a run is told on the command line.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use torc_measure::keys::Distribution;
use torc_measure::mix::{Mix, Operation, Ycsb};
use torc_measure::sizes::Sizes;
use torc_tuning::cpuset::CpuSet;

use super::login::Login;
use super::place::{Place, parse_cpus};
use super::protocol::ProtocolName;
use super::schedule::Gaps;
use super::value::VALUE_BYTES_MIN;
use crate::failure::Failure;

/// Rate of an open loop that was not told one, in operations a second.
pub const RATE_DEFAULT: f64 = 5000.0;

/// Highest rate, in operations a second. What is due and never sent is counted one by one.
const RATE_MAX: f64 = 1e8;

/// When operations are due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Model {
    /// By a clock that does not wait for answers: latency
    Open,
    /// As soon as the one before is answered: service time, not latency
    Closed,
    /// Sessions arrive by a clock; each makes several operations one after the other
    Sessions,
}

/// How long to run before measuring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Warmup {
    /// Until rate and median stand still, as long as the measurement at most.
    Auto,
    /// So long.
    For(Duration),
}

/// Whom to measure, with what, how fast and for how long.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// HTTP endpoint of any node; the others are learned from it
    #[arg(
        long,
        env = "TORC_ENDPOINT",
        default_value = "http://127.0.0.1:7480",
        value_name = "URL",
        help_heading = "Target"
    )]
    pub endpoint: String,
    /// Address of the protocol's listener; given, nothing is learned. May be given several times
    #[arg(long, value_name = "HOST:PORT", value_parser = resolve, help_heading = "Target")]
    pub address: Vec<SocketAddr>,
    /// Protocol
    #[arg(long, value_enum, default_value_t = ProtocolName::Binary, help_heading = "Target")]
    pub protocol: ProtocolName,
    /// User for RESP's AUTH [default: the server's default user]
    #[arg(long, value_name = "NAME", help_heading = "Target")]
    pub user: Option<String>,
    /// File whose first line is the password for RESP's AUTH [default: TORC_LOAD_PASSWORD in the environment]
    #[arg(long, value_name = "FILE", help_heading = "Target")]
    pub password_file: Option<PathBuf>,
    /// Keyspace [default: default]
    #[arg(long, value_name = "NAME", help_heading = "Target")]
    pub keyspace: Option<String>,
    /// Replicas that must answer a read [default: quorum]
    #[arg(long, help_heading = "Target")]
    pub r: Option<String>,
    /// Replicas that must have a write [default: quorum]
    #[arg(long, help_heading = "Target")]
    pub w: Option<String>,
    /// Deadline of a request, in milliseconds
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..=60_000), help_heading = "Target")]
    pub timeout_ms: u32,

    /// A core workload of YCSB: sets mix, distribution and scan lengths unless they are given too
    #[arg(long, value_enum, ignore_case = true, help_heading = "Workload")]
    pub workload: Option<Ycsb>,
    /// Number of keys
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000), help_heading = "Workload")]
    pub keys: u64,
    /// Keys: uniform, sequential, `zipf[:EXPONENT]`, scrambled (YCSB's zipfian),
    /// `latest[:EXPONENT]`, `hotspot[:KEYS:OPERATIONS]`, `exponential[:PERCENT:FRACTION]`
    /// (default: uniform)
    #[arg(long, value_name = "SPEC", help_heading = "Workload")]
    pub distribution: Option<Distribution>,
    /// Share of the hot keys that are replaced by others each minute, 0 to 1 (zipf, hotspot)
    #[arg(
        long,
        default_value = "0",
        value_name = "SHARE",
        value_parser = parse_share,
        help_heading = "Workload"
    )]
    pub churn: f64,
    /// Operations with their shares, of read, write, insert, modify, delete, scan, batch; such as
    /// read=90,write=9,scan=1
    #[arg(
        long,
        value_name = "SPEC",
        conflicts_with = "reads",
        help_heading = "Workload"
    )]
    pub mix: Option<Mix>,
    /// Percent of reads, 0 to 100; the rest are writes [default: 50]
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=100), help_heading = "Workload")]
    pub reads: Option<u8>,
    /// Bytes of a value: N, uniform:LOW-HIGH, lognormal:MEDIAN:SIGMA, file:PATH (lines of SIZE COUNT)
    #[arg(
        long,
        default_value = "1024",
        value_name = "SPEC",
        help_heading = "Workload"
    )]
    pub value_bytes: Sizes,
    /// Keys of a scan, as for --value-bytes [default: 100]
    #[arg(long, value_name = "SPEC", help_heading = "Workload")]
    pub scan_keys: Option<Sizes>,
    /// Keys of a batch
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000), help_heading = "Workload")]
    pub batch_keys: u32,
    /// Seconds that values live
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Workload")]
    pub ttl: Option<u32>,

    /// When operations are due
    #[arg(long, value_enum, default_value_t = Model::Open, help_heading = "Pace")]
    pub model: Model,
    /// Operations a second, of the open loop and of sessions [default: 5000]
    #[arg(long, value_name = "N", value_parser = parse_rate, allow_negative_numbers = true, help_heading = "Pace")]
    pub rate: Option<f64>,
    /// Gaps between arrivals: poisson, uniform, burst:N
    #[arg(
        long,
        default_value = "poisson",
        value_name = "SPEC",
        help_heading = "Pace"
    )]
    pub arrivals: Gaps,
    /// Operations of a session
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Pace")]
    pub session_operations: u32,
    /// Pause within a session
    #[arg(long, default_value = "0s", value_parser = parse_duration, help_heading = "Pace")]
    pub think: Duration,
    /// Connections
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_000_000), help_heading = "Pace")]
    pub connections: u32,
    /// Requests that a connection has outstanding at most
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = "Pace")]
    pub pipeline: u32,
    /// Threads
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256), help_heading = "Pace")]
    pub threads: u32,
    /// CPUs that the threads keep to, one each, such as 1 or 2-5. A thread that has one for itself
    /// never sleeps there, unless it runs in real time
    #[arg(long, value_name = "LIST", value_parser = parse_cpus, help_heading = "Pace")]
    pub cpus: Option<CpuSet>,
    /// Run the threads before all other programs on their CPUs (SCHED_FIFO for most of each
    /// second): leave other CPUs for those
    #[arg(long, help_heading = "Pace")]
    pub realtime: bool,
    /// Sleep until operations are due instead of polling before: less CPU, more lag
    #[arg(long, help_heading = "Pace")]
    pub no_spin: bool,
    /// How long to measure, such as 3s, 500ms or 2m
    #[arg(long, default_value = "10s", value_parser = parse_length, help_heading = "Pace")]
    pub duration: Duration,
    /// Time before that which is not measured; `auto` waits until rate and median stand still
    #[arg(long, default_value = "auto", value_parser = parse_warmup, help_heading = "Pace")]
    pub warmup: Warmup,
    /// Seed of all random choices [default: from the clock; printed]
    #[arg(long, help_heading = "Pace")]
    pub seed: Option<u64>,

    /// Do not write every key before a run
    #[arg(long, help_heading = "Phases")]
    pub no_fill: bool,
    /// Do not wait after the fill until the servers have flushed and compacted
    #[arg(long, help_heading = "Phases")]
    pub no_settle: bool,
    /// After a run, read every key once and judge it by all that was acknowledged
    #[arg(long, help_heading = "Phases")]
    pub check_all: bool,
    /// Share of the values that are checked byte by byte, 0 to 1
    #[arg(
        long,
        default_value = "1",
        value_name = "SHARE",
        value_parser = parse_share,
        help_heading = "Phases"
    )]
    pub verify_share: f64,
    /// The server is a cache: a missing key is no loss
    #[arg(long, help_heading = "Phases")]
    pub may_evict: bool,
    /// Give up filling or verifying after this long
    #[arg(long, default_value = "10m", value_parser = parse_length, help_heading = "Phases")]
    pub give_up: Duration,

    /// Agents that make the load instead of this machine (see `torc load agent`)
    #[arg(long, value_name = "HOST:PORT", value_parser = resolve, help_heading = "Pace")]
    pub agents: Vec<SocketAddr>,

    /// What the run is called in reports [default: protocol and addresses]
    #[arg(long, help_heading = "Output")]
    pub name: Option<String>,
    /// Write the result as JSON to this file; `-` for standard output, where nothing else goes then
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub json: Option<PathBuf>,
    /// Write run.json, intervals.csv, latency.hlog and report.html to this directory
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    pub out: Option<PathBuf>,
    /// End with exit status 5 when a run is not VALID; without it that is only reported
    #[arg(long, help_heading = "Output")]
    pub require_valid: bool,
    /// Live view: on, off, or auto, which is on for a terminal and a line every ten seconds elsewhere
    #[arg(long, value_enum, default_value_t = Live::Auto, help_heading = "Output")]
    pub live: Live,
    /// The command line after `load`, for agents.
    #[arg(skip)]
    pub words: Vec<String>,
}

/// Whether the terminal shows a run while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Live {
    /// On for a terminal, elsewhere a line every ten seconds
    Auto,
    /// On
    On,
    /// Off
    Off,
}

/// What comes of mix, distribution and scan lengths after presets and defaults.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Operations with their shares.
    pub mix: Mix,
    /// Keys.
    pub distribution: Distribution,
    /// Keys of a scan.
    pub scan_keys: Sizes,
}

impl Options {
    /// Presets and defaults, overridden by what was given.
    pub fn workload(&self) -> Workload {
        let (mix, distribution, scan_keys) = match self.workload {
            Some(ycsb) => ycsb.parts(),
            None => (Mix::reads(50.0), Distribution::Uniform, Sizes::Fixed(100)),
        };
        let reads = self.reads.map(|reads| Mix::reads(f64::from(reads)));
        Workload {
            mix: self.mix.clone().or(reads).unwrap_or(mix),
            distribution: self.distribution.unwrap_or(distribution),
            scan_keys: self.scan_keys.clone().unwrap_or(scan_keys),
        }
    }

    /// Operations a second; `None` for a closed loop.
    pub fn offered(&self) -> Option<f64> {
        (self.model != Model::Closed).then(|| self.rate.unwrap_or(RATE_DEFAULT))
    }

    /// Whether a read must see every write acknowledged before it: quorums overlap for the levels
    /// that are known to; anything else is judged only by its bytes.
    pub fn strict(&self) -> bool {
        let level = |level: &Option<String>| level.as_deref().unwrap_or("quorum").to_owned();
        let (r, w) = (level(&self.r), level(&self.w));
        let quorum = |level: &str| matches!(level, "quorum" | "2" | "3" | "all");
        (quorum(&r) && quorum(&w)) || r == "all" || w == "all"
    }

    /// Refuses what clap cannot.
    pub fn check(&self) -> Result<(), Failure> {
        refuse(
            "--model closed, which goes as fast as answers come",
            &[("--rate", self.rate.is_some() && self.model == Model::Closed)],
        )?;
        refuse(
            "a model without sessions",
            &[(
                "--think",
                !self.think.is_zero() && self.model != Model::Sessions,
            )],
        )?;
        let moves = matches!(
            self.workload().distribution,
            Distribution::Zipf { .. } | Distribution::Hotspot { .. }
        );
        refuse(
            "a distribution that has no hot keys to replace (zipf and hotspot have)",
            &[("--churn", self.churn > 0.0 && !moves)],
        )?;
        let (keyspaces, ttls) = match self.protocol {
            ProtocolName::Http | ProtocolName::Binary => (true, true),
            ProtocolName::Resp | ProtocolName::Memcached => (false, true),
            ProtocolName::Etcd => (false, false),
        };
        let logins = self.protocol == ProtocolName::Resp;
        refuse(
            &format!("--protocol {}, which has none", self.protocol.name()),
            &[
                ("--keyspace", self.keyspace.is_some() && !keyspaces),
                ("--ttl", self.ttl.is_some() && !ttls),
                ("--user", self.user.is_some() && !logins),
                ("--password-file", self.password_file.is_some() && !logins),
            ],
        )?;
        let least = u32::try_from(VALUE_BYTES_MIN).expect("a small number");
        if matches!(self.value_bytes, Sizes::Fixed(bytes) if bytes < least) {
            return Err(Failure::usage(
                "--value-bytes: at least 16, so that values can be verified",
            ));
        }
        Ok(self.place().check()?)
    }

    /// Who the load is, where the protocol asks.
    pub fn login(&self) -> Result<Option<Login>, Failure> {
        match self.protocol {
            ProtocolName::Resp => Login::find(self.user.as_deref(), self.password_file.as_deref()),
            _ => Ok(None),
        }
    }

    /// What says how fast operations come, and whether it was given.
    pub fn paces(&self) -> [(&'static str, bool); 2] {
        [
            ("--rate", self.rate.is_some()),
            ("--model", self.model != Model::Open),
        ]
    }

    /// What says which operations come, and whether it was given.
    pub fn mixes(&self) -> [(&'static str, bool); 6] {
        [
            ("--workload", self.workload.is_some()),
            ("--mix", self.mix.is_some()),
            ("--reads", self.reads.is_some()),
            ("--distribution", self.distribution.is_some()),
            ("--scan-keys", self.scan_keys.is_some()),
            ("--ttl", self.ttl.is_some()),
        ]
    }

    /// Where the threads run.
    pub fn place(&self) -> Place {
        Place {
            cpus: self.cpus.clone(),
            realtime: self.realtime,
        }
    }

    /// Refuses operations that the protocol does not have.
    pub fn check_mix(&self, protocol: &super::protocol::Protocol) -> Result<(), Failure> {
        let unsupported: Vec<&str> = self
            .workload()
            .mix
            .operations()
            .filter(|operation| !protocol.supports(*operation))
            .map(Operation::name)
            .collect();
        if unsupported.is_empty() {
            return Ok(());
        }
        Err(Failure::usage(format!(
            "--protocol {} has no {}: leave it out of the --mix",
            self.protocol.name(),
            unsupported.join(", ")
        )))
    }
}

/// The first address of `HOST:PORT`, where the host may be a name.
fn resolve(text: &str) -> Result<SocketAddr, String> {
    let found = text.to_socket_addrs().map_err(|error| error.to_string())?;
    found
        .into_iter()
        .next()
        .ok_or_else(|| "no address has this name".into())
}

/// Refuses the first of these options that was given.
pub fn refuse(what: &str, given: &[(&str, bool)]) -> Result<(), Failure> {
    match given.iter().find(|(_, given)| *given) {
        Some((name, _)) => Err(Failure::usage(format!("{name} does not go with {what}"))),
        None => Ok(()),
    }
}

/// Operations a second that can be offered.
pub fn parse_rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok();
    rate.filter(|rate| *rate > 0.0 && *rate <= RATE_MAX)
        .ok_or_else(|| format!("operations a second, above zero and at most {RATE_MAX:.0}"))
}

/// A finite number above zero.
pub fn parse_positive(text: &str) -> Result<f64, String> {
    let number = text.parse().ok();
    number
        .filter(|number: &f64| number.is_finite() && *number > 0.0)
        .ok_or_else(|| "a number above zero".into())
}

fn parse_share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok();
    share
        .filter(|share| (0.0..=1.0).contains(share))
        .ok_or_else(|| "a share, 0 to 1".into())
}

/// A duration above zero.
fn parse_length(text: &str) -> Result<Duration, String> {
    let length = parse_duration(text)?;
    if length.is_zero() {
        return Err("above zero".into());
    }
    Ok(length)
}

/// `3s`, `500ms`, `100us`, `2m`, `1h`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let scale = match unit {
        "us" => 0.000_001,
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err("expected a number with us, ms, s, m or h, such as 3s".into()),
    };
    let number: f64 = number
        .parse()
        .map_err(|_| "expected a number before the unit")?;
    Duration::try_from_secs_f64(number * scale).map_err(|error| error.to_string())
}

fn parse_warmup(text: &str) -> Result<Warmup, String> {
    if text == "auto" {
        Ok(Warmup::Auto)
    } else {
        parse_duration(text).map(Warmup::For)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_may_be_names() {
        assert_eq!(resolve("localhost:7400").unwrap().port(), 7400);
        assert!(resolve("127.0.0.1").is_err() && resolve("a b:1").is_err());
    }

    #[test]
    fn durations_are_read_with_their_unit() {
        assert_eq!(parse_duration("3s"), Ok(Duration::from_secs(3)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("100us"), Ok(Duration::from_micros(100)));
        assert_eq!(parse_duration("1.5m"), Ok(Duration::from_secs(90)));
        for bad in ["3", "s", "", "3 s", "-1s", "3d"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
