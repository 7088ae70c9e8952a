//! `torc server`: one node in the foreground.

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use torc_net::config::{
    ArchiveConfig, ClusterConfig, ListenConfig, MemoryConfig, NodeConfig, ServerConfig,
    ShardsConfig, StorageConfig,
};
use torc_net::keys::KeySource;
use torc_net::server::Server as Node;
use torc_runtime::DiskRates;
use torc_tuning::host::Host;
use torc_tuning::kernel::Live;

use crate::config::{self, Background, Config, Fsync, ShardCpus};
use crate::failure::Failure;

/// How often the main thread looks whether the shards still run.
const WATCH: Duration = Duration::from_millis(100);
/// How long an idle, pinned shard looks for work before it sleeps.
const SPIN: Duration = Duration::from_micros(50);

/// `torc server`
#[derive(Args, Debug)]
pub struct Server {
    /// Configuration file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Override a key of the configuration; may be given several times
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Stop when the process that started this one ends
    #[arg(long, hide = true)]
    pub with_parent: bool,
}

/// Runs a node until SIGTERM or SIGINT, then drains it. Fails when it cannot start, when a shard
/// ends on its own, and when it does not drain in time.
pub fn server(args: &Server) -> Result<(), Failure> {
    if args.with_parent {
        let signal = Some(rustix::process::Signal::TERM);
        rustix::process::set_parent_process_death_signal(signal)
            .map_err(|error| Failure::new(format!("cannot follow the parent process: {error}")))?;
    }
    let loaded = config::load(args.config.as_deref(), std::env::vars(), &args.set)
        .map_err(|error| Failure::new(error.to_string()))?;
    start_log(&loaded.config)?;
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    let _awake = look_at_host(&loaded.config)?;
    let disk_rates = disk_rates(&loaded.config)?;
    // Before the node listens: a signal during the start must drain it, not kill it.
    let mut signals = signal_hook::iterator::Signals::new([
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGINT,
    ])?;
    let config = server_config(&loaded.config, disk_rates)?;
    let node = Node::start(config).map_err(|error| Failure::new(error.to_string()))?;
    loop {
        if let Some(signal) = signals.pending().next() {
            tracing::info!(signal, "draining");
            return if node.stop() {
                Ok(())
            } else {
                Err(Failure::new(
                    "the node did not drain in time; nothing acknowledged is lost",
                ))
            };
        }
        if !node.is_running() {
            return Err(Failure::new("a shard ended; the log above says why"));
        }
        std::thread::sleep(WATCH);
    }
}

/// Warns of what would hurt on this host, and keeps to the plan's cores where that is asked for: before
/// any other thread exists, since threads inherit their cores. What it returns keeps those cores from
/// deep sleep.
fn look_at_host(config: &Config) -> Result<Option<File>, Failure> {
    let host = Host::read(&Live::machine(), "this machine");
    for finding in host.iter().flat_map(torc_tuning::server::serious) {
        tracing::warn!(
            "{}: {}; {}. Fix: {}",
            finding.id,
            finding.found,
            finding.cost,
            finding.fix
        );
    }
    if config.shards.cpus != ShardCpus::Auto {
        return Ok(None);
    }
    let failed = |error: &dyn Error| Failure::new(format!("shards.cpus = \"auto\": {error}"));
    let host = host.map_err(|error| failed(&error))?;
    let cpus = torc_tuning::server::settle(&config.shards.plan_dir, &host)
        .map_err(|error| failed(&error))?;
    tracing::info!("shards run on CPUs {cpus}");
    match torc_tuning::server::stay_awake() {
        Ok(held) => Ok(Some(held)),
        Err(error) => {
            tracing::info!("idle cores may sleep deeply: /dev/cpu_dma_latency: {error}");
            Ok(None)
        }
    }
}

/// What `disk.properties` says, with doubts in the log.
fn disk_rates(config: &Config) -> Result<Option<DiskRates>, Failure> {
    let path = &config.disk.properties;
    if path.as_os_str().is_empty() {
        return Ok(None);
    }
    let rates = torc_tuning::server::disk_rates(path, &config.node.data_dir)
        .map_err(|error| Failure::new(format!("disk.properties: {error}")))?;
    for doubt in &rates.doubts {
        tracing::warn!(
            "{}: {doubt}; measure again with `torc tune disk`",
            path.display()
        );
    }
    tracing::info!(
        "background jobs leave time to requests on a disk that reads {} and writes {} MiB/s",
        rates.read >> 20,
        rates.write >> 20
    );
    Ok(Some(DiskRates {
        read: rates.read,
        write: rates.write,
    }))
}

fn start_log(config: &Config) -> Result<(), Failure> {
    let filter = tracing_subscriber::EnvFilter::try_new(&config.log.level)
        .map_err(|error| Failure::new(format!("log.level = {:?}: {error}", config.log.level)))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .try_init()
        .map_err(|error| Failure::new(format!("cannot start the log: {error}")))
}

/// Where the configuration says that the master keys are.
pub fn key_source(config: &Config) -> KeySource {
    let encryption = &config.encryption;
    if !encryption.key_file.as_os_str().is_empty() {
        KeySource::File(encryption.key_file.clone())
    } else if !encryption.key_command.is_empty() {
        KeySource::Command(encryption.key_command.clone())
    } else {
        KeySource::None
    }
}

/// Where background work runs.
pub fn background(config: &Config) -> torc_runtime::Background {
    match config.shards.background {
        Background::Glommio => torc_runtime::Background::Glommio,
        Background::Shard => torc_runtime::Background::Shard,
    }
}

fn archive(config: &Config) -> Option<ArchiveConfig> {
    let archive = &config.archive;
    (!archive.dir.as_os_str().is_empty()).then(|| ArchiveConfig {
        dir: archive.dir.clone(),
        held_bytes_max: archive.held_mb << 20,
        interval: (archive.interval_s > 0).then(|| Duration::from_secs(archive.interval_s)),
    })
}

/// Reads the master keys on the way.
fn server_config(config: &Config, disk_rates: Option<DiskRates>) -> Result<ServerConfig, Failure> {
    let mebibytes = |count: u64| usize::try_from(count << 20).unwrap_or(usize::MAX);
    let key_source = key_source(config);
    let keys = key_source.read();
    let keys = keys.map_err(|error| Failure::new(error.to_string()))?;
    warn_of_readers(&key_source);
    Ok(ServerConfig {
        node: NodeConfig {
            name: config.node.name.clone(),
            data_dir: config.node.data_dir.clone(),
            rack: config.node.rack.clone(),
            zone: config.node.zone.clone(),
            datacenter: config.node.datacenter.clone(),
        },
        listen: ListenConfig {
            client: config.listen.client,
            http: config.listen.http,
            resp: config.listen.resp,
            internode: config.listen.internode,
        },
        cluster: ClusterConfig {
            name: config.cluster.name.clone(),
            seeds: config.cluster.seeds.clone(),
            vnodes: config.cluster.vnodes,
            gossip_interval: Duration::from_millis(config.cluster.gossip_interval_ms),
            hints: config.cluster.hints,
            repair_interval: Duration::from_secs(config.cluster.repair_interval_s),
        },
        shards: ShardsConfig {
            count: config.shards.count,
            pin: config.shards.pin,
            background: background(config),
            spin: if config.shards.pin {
                SPIN
            } else {
                Duration::ZERO
            },
        },
        fsync: match config.durability.fsync {
            Fsync::Always => torc_engine::Fsync::Always,
            Fsync::Group => torc_engine::Fsync::Group,
            Fsync::Interval => {
                torc_engine::Fsync::Interval(Duration::from_millis(config.durability.interval_ms))
            }
            Fsync::Never => torc_engine::Fsync::Never,
        },
        archive: archive(config),
        memory: MemoryConfig {
            memtable_bytes: mebibytes(config.memory.memtable_mb),
            cache_bytes: mebibytes(config.memory.cache_mb),
            client_bytes: mebibytes(config.memory.clients_mb),
        },
        storage: StorageConfig {
            separate_from: match config.storage.blob_from_kb {
                0 => None,
                kib => Some(usize::try_from(kib << 10).unwrap_or(usize::MAX)),
            },
        },
        disk_rates,
        connections_max: torc_net::limits::CONNECTIONS_MAX_DEFAULT,
        keys,
        key_source,
    })
}

/// A key file is for the server's user alone.
fn warn_of_readers(source: &KeySource) {
    let KeySource::File(path) = source else {
        return;
    };
    let mode = std::fs::metadata(path).map(|found| found.permissions().mode());
    if mode.is_ok_and(|mode| mode & 0o077 != 0) {
        tracing::warn!(
            "encryption.key_file = {}: others than its owner may read or write it (`chmod 600`)",
            path.display()
        );
    }
}
