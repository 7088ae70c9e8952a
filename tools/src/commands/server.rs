//! `torc server`: one node in the foreground.
//!
//! Reads the configuration, starts a `torc_net::Server`, and waits for a signal. What a node does is
//! that crate's affair.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use signal_hook::consts::{SIGINT, SIGTERM};
use torc_net::ServerConfig;
use torc_net::config::{ClusterConfig, ListenConfig, MemoryConfig, NodeConfig, ShardsConfig};
use torc_net::limits::CONNECTIONS_MAX_DEFAULT;
use tracing_subscriber::EnvFilter;

use crate::config::{self, Background, Config, Fsync};
use crate::failure::Failure;

/// How often the foreground looks for a signal or a dead shard.
const WATCH_INTERVAL: Duration = Duration::from_millis(20);
/// How long an idle, pinned shard looks for work before it sleeps: about what a wake-up costs.
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

/// Runs a node until SIGTERM or SIGINT, then drains it.
pub fn server(args: &Server) -> Result<(), Failure> {
    let failed = |error: &dyn std::error::Error| Failure::new(error.to_string());
    let loaded = config::load(args.config.as_deref(), std::env::vars(), &args.set)
        .map_err(|error| failed(&error))?;
    start_log(&loaded.config.log.level)?;
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
    let stop = stop_signal(args.with_parent)
        .map_err(|error| Failure::new(format!("cannot wait for signals: {error}")))?;
    let server =
        torc_net::Server::start(server_config(&loaded.config)).map_err(|error| failed(&error))?;
    while !stop.load(Ordering::Relaxed) {
        if !server.is_running() {
            server.stop();
            return Err(Failure::new("a shard has ended; the log says why"));
        }
        std::thread::sleep(WATCH_INTERVAL);
    }
    tracing::info!("stopping");
    if !server.stop() {
        return Err(Failure::new("the node did not drain in time"));
    }
    Ok(())
}

/// Logs to standard error, so that standard output stays free.
fn start_log(level: &str) -> Result<(), Failure> {
    let filter = EnvFilter::try_new(level)
        .map_err(|error| Failure::new(format!("log.level = {level:?}: {error}")))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(false)
        .init();
    Ok(())
}

/// A flag that a signal raises.
fn stop_signal(with_parent: bool) -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGINT] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    if with_parent {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
    }
    Ok(stop)
}

fn server_config(config: &Config) -> ServerConfig {
    let megabytes = |count: u64| usize::try_from(count << 20).unwrap_or(usize::MAX);
    ServerConfig {
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
            background: match config.shards.background {
                Background::Glommio => torc_runtime::Background::Glommio,
                Background::Shard => torc_runtime::Background::Shard,
            },
            spin: SPIN,
        },
        fsync: match config.durability.fsync {
            Fsync::Always => torc_engine::Fsync::Always,
            Fsync::Group => torc_engine::Fsync::Group,
            Fsync::Interval => {
                torc_engine::Fsync::Interval(Duration::from_millis(config.durability.interval_ms))
            }
            Fsync::Never => torc_engine::Fsync::Never,
        },
        memory: MemoryConfig {
            memtable_bytes: megabytes(config.memory.memtable_mb),
            cache_bytes: megabytes(config.memory.cache_mb),
        },
        connections_max: CONNECTIONS_MAX_DEFAULT,
    }
}
