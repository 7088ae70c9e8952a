//! `torc tune`: what a host is, what is wrong with it, what to change, and whether that helped.
//!
//! Only `apply`, `rollback`, `confirm`, `prove` and `persist` write, and only with root's rights. The
//! rest reads, also a captured host (`--root`).

mod change;
mod host;
mod measure;
mod prove;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use torc_tuning::{disk, plan};

use crate::failure::Failure;
use crate::load::parse_duration;

/// `torc tune`
#[derive(Args, Debug)]
pub struct Tune {
    #[command(subcommand)]
    command: Command,
    /// Work on a captured host (directory or archive) instead of this machine
    #[arg(long, global = true, value_name = "PATH")]
    root: Option<PathBuf>,
    /// Directory of the journal
    #[arg(long, global = true, value_name = "DIR", default_value = torc_tuning::server::STATE_DIRECTORY)]
    state: PathBuf,
}

/// What the host is for
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Profile {
    /// Shortest answers: one shard a core
    Latency,
    /// Most answers: one shard a hardware thread
    Throughput,
    /// Others work here too: half of the cores, nothing that they would feel
    Shared,
}

impl From<Profile> for plan::Profile {
    fn from(profile: Profile) -> Self {
        match profile {
            Profile::Latency => Self::Latency,
            Profile::Throughput => Self::Throughput,
            Profile::Shared => Self::Shared,
        }
    }
}

/// Kinds of work for a disk
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Work {
    /// 4 KiB reads anywhere
    RandomRead,
    /// 1 MiB reads in order
    SequentialRead,
    /// 7 reads for 3 writes of 4 KiB anywhere
    Mixed,
    /// 4 KiB writes in order, each durable before the next
    DurableWrite,
    /// 1 MiB writes in order
    SequentialWrite,
}

impl Work {
    const ALL: [Self; 5] = [
        Self::RandomRead,
        Self::SequentialRead,
        Self::Mixed,
        Self::DurableWrite,
        Self::SequentialWrite,
    ];
}

impl From<Work> for disk::Work {
    fn from(work: Work) -> Self {
        match work {
            Work::RandomRead => Self::RandomRead,
            Work::SequentialRead => Self::SequentialRead,
            Work::Mixed => Self::Mixed,
            Work::DurableWrite => Self::DurableWrite,
            Work::SequentialWrite => Self::SequentialWrite,
        }
    }
}

/// What `prove` measures
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Measure {
    /// Time that spinning threads lose
    Jitter,
    /// Random reads
    Disk,
    /// `torc load` against the endpoint
    Load,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Show everything that is known of the host
    Inspect(Format),
    /// Show the layout map: CPUs, shards, queues, interrupts
    Map(MapArgs),
    /// Show what costs latency or safety, with reason, cost, fix and sureness
    Check(Format),
    /// Plan shards, interrupts and settings; writes nothing
    Plan(PlanArgs),
    /// Make a plan's changes, all or none
    Apply(ApplyArgs),
    /// Keep the changes that were applied
    Confirm,
    /// Compare the host with the changes in force
    Verify(VerifyArgs),
    /// Undo the newest changes, byte for byte
    Rollback,
    /// Show on which cores the shards' interrupts land
    Irqproof(IrqproofArgs),
    /// Measure a disk into a properties file
    Disk(DiskArgs),
    /// Measure how long spinning threads are taken off their cores
    Jitter(JitterArgs),
    /// Measure before and after, interleaved, with a verdict for each knob
    Prove(ProveArgs),
    /// Take the host into an archive, without personal data
    Capture(CaptureArgs),
    /// Write the systemd unit that plans and applies at every boot
    Persist(PersistArgs),
    /// Undo unconfirmed changes when their time is over (started by `apply`)
    #[command(hide = true)]
    Guard(GuardArgs),
}

#[derive(Args, Debug)]
struct Format {
    /// As JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct MapArgs {
    /// What the host is for
    #[arg(long, value_enum, default_value_t = Profile::Latency)]
    profile: Profile,
    /// Write a picture to this file instead
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct PlanArgs {
    /// What the host is for
    #[arg(long, value_enum, default_value_t = Profile::Latency)]
    profile: Profile,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Show every change on a line of its own, also of hundreds of queues
    #[arg(long)]
    all: bool,
    /// Write the plan to this file, for `apply`
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct ApplyArgs {
    /// Plan that `torc tune plan --output` wrote; without it, one is made now
    plan: Option<PathBuf>,
    /// What the host is for, when a plan is made now
    #[arg(long, value_enum, default_value_t = Profile::Latency)]
    profile: Profile,
    /// Undo by itself unless `torc tune confirm` comes within this time; 0s keeps at once
    #[arg(long, default_value = "120s", value_parser = parse_duration)]
    confirm_within: Duration,
}

#[derive(Args, Debug)]
struct VerifyArgs {
    /// Look again and again, until interrupted
    #[arg(long)]
    watch: bool,
    /// Time between two looks
    #[arg(long, default_value = "15s", value_parser = parse_duration)]
    interval: Duration,
}

#[derive(Args, Debug)]
struct IrqproofArgs {
    /// How long to count
    #[arg(long = "for", default_value = "10s", value_parser = parse_duration)]
    duration: Duration,
    /// Prove the layout of this profile [default: the plan that was applied, else latency]
    #[arg(long, value_enum)]
    profile: Option<Profile>,
    /// Endpoint of a server that tells where the packets of its sockets arrive
    #[arg(long, value_name = "URL", env = "TORC_ENDPOINT")]
    endpoint: Option<String>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct DiskArgs {
    /// Directory on the disk; a file is written there and removed
    #[arg(long, value_name = "DIR", required_unless_present = "file")]
    dir: Option<PathBuf>,
    /// Overwrite and measure this file instead, and leave it there
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dir", "file_mib"])]
    file: Option<PathBuf>,
    /// Size of the file that is written, in MiB
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(64..=1_048_576))]
    file_mib: u64,
    /// Length of each pass
    #[arg(long, default_value = "3s", value_parser = parse_duration)]
    pass: Duration,
    /// Kinds of work
    #[arg(long, value_enum, value_delimiter = ',', value_name = "LIST", default_values_t = Work::ALL)]
    work: Vec<Work>,
    /// Depths of the random reads
    #[arg(long, value_delimiter = ',', value_name = "LIST", default_values_t = [1, 4, 16, 64], value_parser = clap::value_parser!(u32).range(1..=1024))]
    depths: Vec<u32>,
    /// Write the properties file here, for `[disk] properties` of the server
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Write it although a figure is not stable
    #[arg(long)]
    keep_unstable: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct JitterArgs {
    /// CPUs, such as 1-3,8 [default: all that are allowed]
    #[arg(long, value_name = "LIST")]
    cpus: Option<String>,
    /// How long
    #[arg(long = "for", default_value = "5s", value_parser = parse_duration)]
    duration: Duration,
    /// Take real-time priority, so that only kernel and hypervisor are left
    #[arg(long)]
    realtime: bool,
    /// Do not record the kernel's events, which name the culprits and cost a little themselves
    #[arg(long)]
    no_trace: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct ProveArgs {
    /// What the host is for
    #[arg(long, value_enum, default_value_t = Profile::Latency)]
    profile: Profile,
    /// What to measure
    #[arg(long, value_enum, default_value_t = Measure::Jitter)]
    measure: Measure,
    /// Runs of each arm
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(2..=100))]
    repeats: u8,
    /// Length of each run
    #[arg(long, default_value = "3s", value_parser = parse_duration)]
    run: Duration,
    /// Judge each group of knobs by itself, not all together
    #[arg(long)]
    each: bool,
    /// Change nothing between the arms: whatever is found is chance
    #[arg(long)]
    aa: bool,
    /// Instead of changing the host, run this command beside the runs of the second arm
    #[arg(long, value_name = "COMMAND", conflicts_with_all = ["aa", "each"])]
    beside: Option<String>,
    /// Directory on the disk, for `--measure disk`
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Endpoint, for `--measure load`
    #[arg(long, env = "TORC_ENDPOINT", default_value = "http://127.0.0.1:7480")]
    endpoint: String,
    /// More options of `torc load run`, for `--measure load`, such as "--rate 20000 --reads 90"
    #[arg(
        long,
        value_name = "OPTIONS",
        default_value = "",
        allow_hyphen_values = true
    )]
    load: String,
    /// As JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct CaptureArgs {
    /// Archive to write
    #[arg(long, short, value_name = "FILE", default_value = "host.tar")]
    output: PathBuf,
}

#[derive(Args, Debug)]
struct PersistArgs {
    /// What the host is for
    #[arg(long, value_enum, default_value_t = Profile::Latency)]
    profile: Profile,
    /// Directory of the unit; without it, the unit is printed
    #[arg(long, value_name = "DIR")]
    unit_dir: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct GuardArgs {
    /// Seconds to wait
    #[arg(long)]
    after: u64,
}

/// Runs one of them.
pub fn tune(args: &Tune) -> Result<(), Failure> {
    let state = &args.state;
    match &args.command {
        Command::Inspect(format) => host::inspect(args.root.as_deref(), format.json),
        Command::Map(map) => host::map(args.root.as_deref(), map),
        Command::Check(format) => host::check(args.root.as_deref(), format.json),
        Command::Plan(plan) => host::plan(args.root.as_deref(), plan),
        _ if args.root.is_some() => Err(Failure::new(
            "--root is for inspect, map, check and plan: the others work on the machine itself",
        )),
        Command::Apply(apply) => change::apply(state, apply),
        Command::Confirm => change::confirm(state),
        Command::Verify(verify) => change::verify(state, verify),
        Command::Rollback => change::rollback(state),
        Command::Persist(persist) => change::persist(state, persist),
        Command::Guard(guard) => change::guard(state, guard),
        Command::Irqproof(proof) => measure::irqproof(state, proof),
        Command::Disk(disk) => measure::disk(disk),
        Command::Jitter(jitter) => measure::jitter(jitter),
        Command::Prove(prove) => prove::prove(state, prove),
        Command::Capture(capture) => host::capture(capture),
    }
}
