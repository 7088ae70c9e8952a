//! The log archive of a node: where its shards' segments go, the topologies beside them, and the orders to archive what
//! is being written.
//!
//! The disk of a shard is its data directory, so the archive hangs there under a name of its own, a symbolic link to the
//! directory that the operator gave. Below it each node, each lineage of its data and each store of a layout has a
//! directory: a log begins anew in each of them. Format: `docs/formats/archive.md`.
//!
//! Invariant: the directory is never made here. Where it should be mounted and is not, a node does not start and
//! does not fill another disk.

pub mod ending;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use serde_json::{Value, json};
use torc_engine::archive::trailer::Origin;
use torc_engine::{ArchiveOptions, Layout, Stats, Store};
use torc_env::{Class, Disk, Env, ShardId};

use crate::boot::identity::Identity;
use crate::config::ArchiveConfig;
use crate::gather::on_every_shard;
use crate::http::response::Problem;
use crate::service::Service;
use crate::snapshot::{place_whole, read_whole};

/// The link in the data directory.
pub(crate) const LINK: &str = "wal-archive";
/// Where the topologies of a lineage lie beside the stores.
pub const TOPOLOGIES: &str = "topology";
/// How often the topology is looked at.
const TOPOLOGY_INTERVAL: Duration = Duration::from_millis(250);
/// How long an order to archive waits for a shard.
pub(crate) const ORDER_PATIENCE: Duration = Duration::from_secs(60);
/// How long a stopping shard waits for its last segment.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// Why a node does not start with its archive.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// There is no such directory.
    #[error(
        "archive.dir = {}: {source}; mount it, or make it: a node does not, so that it never fills another disk",
        path.display()
    )]
    Missing {
        /// As configured.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The link cannot be made.
    #[error("cannot link archive.dir into the data directory: {}: {source}", path.display())]
    Link {
        /// The link.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Hangs the archive into the data directory, or takes away what an earlier configuration has hung there. Runs before the
/// shards exist.
///
/// # Errors
/// When the archive's directory does not exist, or the data directory cannot be written.
pub fn attach(data_dir: &Path, archive: Option<&ArchiveConfig>) -> Result<(), AttachError> {
    let link = data_dir.join(LINK);
    let failed = |source| AttachError::Link {
        path: link.clone(),
        source,
    };
    let target = match archive {
        None => None,
        Some(config) => {
            let missing = |source| AttachError::Missing {
                path: config.dir.clone(),
                source,
            };
            let target = config.dir.canonicalize().map_err(missing)?;
            fs::read_dir(&target).map_err(missing)?;
            Some(target)
        }
    };
    match fs::read_link(&link) {
        Ok(found) if Some(&found) == target.as_ref() => return Ok(()),
        Ok(_) => fs::remove_file(&link).map_err(failed)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    match target {
        None => Ok(()),
        Some(target) => std::os::unix::fs::symlink(target, &link).map_err(failed),
    }
}

/// The directory of a lineage below the archive.
pub fn lineage_dir(node: u128, lineage: u64) -> PathBuf {
    PathBuf::from(format!("{node:032x}")).join(format!("{lineage:016x}"))
}

/// Where and how a shard archives its log in a layout of the node's data.
pub fn options(
    archive: Option<&ArchiveConfig>,
    identity: &Identity,
    layout: Layout,
    shard: ShardId,
) -> Option<ArchiveOptions> {
    let config = archive?;
    let origin = Origin {
        node: identity.node.0,
        lineage: identity.lineage,
        layout: layout.number,
        shards: layout.shards,
        shard: shard.0,
    };
    let dir = Path::new(LINK).join(lineage_dir(origin.node, origin.lineage));
    Some(ArchiveOptions {
        held_bytes_max: config.held_bytes_max,
        interval: config.interval,
        ..ArchiveOptions::new(dir.join(layout.dir(shard)), origin)
    })
}

/// Archives all that this node has written up to now, and says how far that reaches.
///
/// # Errors
/// 409 without an archive, 503 when a shard could not archive its log in time.
pub async fn now(service: &Service) -> Result<Value, Problem> {
    if service.config.archive.is_none() {
        return Err(off());
    }
    let outcomes = on_every_shard(&service.handle, |service: Rc<Service>| async move {
        in_time(&service.env, &service.store, ORDER_PATIENCE).await
    });
    let mut reach_us = u64::MAX;
    for (shard, outcome) in outcomes.await.into_iter().enumerate() {
        let outcome = outcome.unwrap_or_else(|| Err("the shard is stopping".into()));
        match outcome {
            Ok(reached) => reach_us = reach_us.min(reached),
            Err(reason) => {
                return Err(Problem::not_ready(format!(
                    "the log of shard {shard} is not archived: {reason}"
                )));
            }
        }
    }
    Ok(json!({ "reach_us": reach_us }))
}

/// Archives what a store has written up to now, unless that takes longer than `patience`, and says how far that
/// reaches.
pub(crate) async fn in_time<E: Env>(
    env: &E,
    store: &Store<E>,
    patience: Duration,
) -> Result<u64, String> {
    let archived = std::pin::pin!(store.archive_log());
    let late = std::pin::pin!(env.sleep(patience));
    match futures_util::future::select(archived, late).await {
        futures_util::future::Either::Left((reach, _)) => reach.map_err(|error| error.to_string()),
        futures_util::future::Either::Right(_) => {
            Err(format!("not archived within {} s", patience.as_secs()))
        }
    }
}

/// What the archive of this node lacks, and how far it reaches.
///
/// # Errors
/// 409 without an archive.
pub async fn describe(service: &Service) -> Result<Value, Problem> {
    let Some(config) = &service.config.archive else {
        return Err(off());
    };
    let all = on_every_shard(&service.handle, |service: Rc<Service>| async move {
        service.store.stats()
    });
    let all: Vec<Stats> = all.await.into_iter().flatten().collect();
    let sum = |of: fn(&Stats) -> u64| all.iter().map(of).sum::<u64>();
    let dir = lineage_dir(service.identity.node.0, service.identity.lineage);
    Ok(json!({
        "dir": config.dir.join(dir).display().to_string(),
        "reach_us": all.iter().map(|stats| stats.archive_reach_us).min(),
        "segments": sum(|stats| stats.counts.archived_segments),
        "waiting": sum(|stats| stats.archive_waiting as u64),
        "held_bytes": sum(|stats| stats.archive_held_bytes),
        "failures": sum(|stats| stats.counts.archive_failures),
        "gaps": sum(|stats| stats.counts.archive_gaps),
        "failing": all.iter().any(|stats| stats.archive_failing),
    }))
}

fn off() -> Problem {
    Problem::new(
        409,
        "no_archive",
        "this node has no log archive: archive.dir says where it is",
    )
}

/// Archives a stopping shard's last segment, if that does not take long.
pub(crate) async fn finish(service: &Service) {
    if service.config.archive.is_none() {
        return;
    }
    if let Err(reason) = in_time(&service.env, &service.store, STOP_PATIENCE).await {
        tracing::warn!("the end of the log is archived after the next start: {reason}");
    }
}

/// Starts the task that puts each topology into the archive, on the first shard of a node that has one. A restore to a
/// moment takes the topology of that moment.
pub(crate) fn keep_topology(service: &Rc<Service>) {
    if service.config.archive.is_none() || service.env.shard() != ShardId(0) {
        return;
    }
    let service = Rc::clone(service);
    service.env.clone().spawn(Class::Control, async move {
        let mut kept = 0;
        while !service.stop.is_raised() {
            let epoch = service.view().map_or(0, |view| view.topology.epoch.0);
            if epoch > kept {
                match keep_one(&service, epoch).await {
                    Ok(()) => kept = epoch,
                    Err(error) => {
                        tracing::warn!(%error, "a topology is not archived; trying again");
                    }
                }
            }
            service.env.sleep(TOPOLOGY_INTERVAL).await;
        }
    });
}

async fn keep_one(service: &Service, epoch: u64) -> io::Result<()> {
    let disk = service.env.disk();
    let identity = &service.identity;
    let dir = Path::new(LINK)
        .join(lineage_dir(identity.node.0, identity.lineage))
        .join(TOPOLOGIES);
    disk.create_dir(&dir).await?;
    let entries = disk.list(&dir).await?;
    let names = entries
        .iter()
        .filter_map(|entry| topology_name(&entry.name));
    if names.map(|(_, kept)| kept).max() >= Some(epoch) {
        return Ok(());
    }
    let bytes = read_whole(disk, Path::new("node/topology")).await?;
    let name = format!("{:016x}-{epoch:016x}", service.env.wall().0);
    place_whole(disk, &dir, &name, &bytes).await
}

/// Since when a topology was known, in microseconds since 1970, and its epoch: what its file's name says.
pub fn topology_name(name: &str) -> Option<(u64, u64)> {
    let (since, epoch) = name.split_once('-')?;
    let number = |digits: &str| {
        let is_whole = digits.len() == 16;
        u64::from_str_radix(digits, 16).ok().filter(|_| is_whole)
    };
    Some((number(since)?, number(epoch)?))
}
