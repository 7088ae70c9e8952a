//! `torc restore`: a stopped node's data from a backup, and from its archived log up to a moment.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use torc_cluster::topology::Topology;
use torc_cluster::topology::store::read_copy;
use torc_engine::Layout;
use torc_env::NodeId;
use torc_net::replay::Plan;

use crate::backup::archive::{Archive, Manifest};
use crate::backup::log::{LogArchive, Reach};
use crate::backup::moment::{Moment, Until};
use crate::backup::restore::{Forward, Restored, run, topology_of};
use crate::commands::server;
use crate::config::{self, Config};
use crate::failure::Failure;

/// `torc restore`
#[derive(Args, Debug)]
pub struct Restore {
    /// Directory of the node's backups
    #[arg(long, value_name = "DIR")]
    from: PathBuf,
    /// Configuration of the stopped node
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Override a key of the configuration; may be given several times
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// Which backup [default: the newest, with --at the newest that was cut before]
    #[arg(long, value_name = "ID")]
    backup: Option<String>,
    /// Bring the backup forward with the archived log to this moment: civil time with its zone
    /// (2026-03-29T14:05:00Z), a stamp of the hybrid clock (microseconds since 1970), or `latest`
    #[arg(long, value_name = "MOMENT")]
    at: Option<Until>,
    /// Directory of the archived log [default: archive.dir of the configuration]
    #[arg(long, value_name = "DIR", requires = "at")]
    archive: Option<PathBuf>,
    /// Only say what would be restored, and which moments can be reached
    #[arg(long, requires = "at")]
    dry_run: bool,
    /// All nodes of the cluster are restored, none of them still has its data
    #[arg(long)]
    all_nodes: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Restores a backup into the empty data directory that a configuration names.
pub fn restore(args: &Restore) -> Result<(), Failure> {
    let loaded = config::load(Some(&args.config), std::env::vars(), &args.set)
        .map_err(|error| Failure::new(error.to_string()))?;
    let config = loaded.config;
    let archive = Archive::at(&args.from);
    let manifest = chosen(args, &archive)?;
    check_names(&manifest, &config)?;
    let log = log_archive(args, &config)?;
    let reach = match (&log, args.at) {
        (Some(log), Some(until)) => {
            check_life(args, log, &manifest, until)?;
            Some(log.reach(&manifest, until)?)
        }
        _ => None,
    };
    if let (true, Some(log), Some(reach)) = (args.dry_run, &log, &reach) {
        return foretell(args, &manifest, reach, &log.furthest(&manifest)?);
    }
    let forward = match (&log, &reach) {
        (Some(log), Some(reach)) => Some(forward(log, &manifest, reach, &config)?),
        _ => None,
    };
    let abstains = manifest.members > 1 && !args.all_nodes;
    let restored = run(
        &archive,
        &manifest,
        &config.node.data_dir,
        abstains,
        forward,
    )?;
    tell(
        args,
        &manifest,
        &config,
        reach.as_ref(),
        &restored,
        abstains,
    );
    Ok(())
}

/// The backup to be restored.
fn chosen(args: &Restore, archive: &Archive) -> Result<Manifest, Failure> {
    if let Some(id) = &args.backup {
        return archive.read(id);
    }
    let ids = archive.ids()?;
    let newest = ids
        .last()
        .ok_or_else(|| Failure::new(format!("{}: no backups", args.from.display())))?;
    let Some(Until::Moment(moment)) = args.at else {
        return archive.read(newest);
    };
    let mut oldest = None;
    for id in ids.iter().rev() {
        let manifest = archive.read(id)?;
        if manifest.cut_stamp <= moment.0 {
            return Ok(manifest);
        }
        oldest = Some(Moment(manifest.cut_stamp));
    }
    let oldest = oldest.map_or_else(String::new, |cut| format!(" (the oldest: {cut})"));
    Err(Failure::new(format!(
        "{}: every backup was cut after {moment}{oldest}: a backup is brought forward, never back",
        args.from.display()
    )))
}

fn check_names(manifest: &Manifest, config: &Config) -> Result<(), Failure> {
    for (what, found, configured) in [
        ("node", &manifest.name, &config.node.name),
        ("cluster", &manifest.cluster, &config.cluster.name),
    ] {
        if found != configured {
            return Err(Failure::new(format!(
                "backup {} is of {what} {found:?}, but the configuration says {configured:?}",
                manifest.id
            )));
        }
    }
    Ok(())
}

/// A restore begins another life of a node's data, whose log goes onto backups of that life only. Refuses a moment of a
/// later life than the backup's, and says when it is of an earlier one than the node's last.
fn check_life(
    args: &Restore,
    log: &LogArchive,
    manifest: &Manifest,
    until: Until,
) -> Result<(), Failure> {
    let Some(since) = log.restored_since(manifest)? else {
        return Ok(());
    };
    let id = &manifest.id;
    match until {
        // The clock of the earlier life may have been ahead of civil time: what its log reaches is of that life.
        Until::Moment(moment) if moment >= since && log.reach(manifest, until).is_err() => {
            Err(Failure::new(format!(
                "{moment} is after the restore of {since}, and backup {id} is from before it: a restore begins another life of \
             the data, and what is archived then goes onto backups of that life only. {} has none from between that \
             restore and {moment}: take one after each restore. Moments before {since} can be restored",
                args.from.display()
            )))
        }
        Until::Latest if args.backup.is_none() => Err(Failure::new(format!(
            "the newest backup, {id}, is from before the restore of {since}: `latest` would leave out all that was \
             written since then. Back up the data as it is now if it is still there. For the end of its life before \
             that restore, give --backup {id}"
        ))),
        Until::Moment(_) | Until::Latest => {
            eprintln!(
                "this is of the data's life before the restore of {since}: what was written since then is not in it"
            );
            Ok(())
        }
    }
}

fn log_archive(args: &Restore, config: &Config) -> Result<Option<LogArchive>, Failure> {
    if args.at.is_none() {
        return Ok(None);
    }
    let dir = args.archive.as_ref().unwrap_or(&config.archive.dir);
    if dir.as_os_str().is_empty() {
        return Err(Failure::new(
            "--at needs the archived log: give --archive DIR, or archive.dir in the configuration",
        ));
    }
    Ok(Some(LogArchive::at(dir)))
}

/// What is replayed onto the backup.
fn forward(
    log: &LogArchive,
    manifest: &Manifest,
    reach: &Reach,
    config: &Config,
) -> Result<Forward, Failure> {
    let keys = server::key_source(config).read();
    let (topology, copy) = topology(log, manifest, reach.until)?;
    let node = u128::from_str_radix(&manifest.node, 16)
        .map_err(|_| Failure::new("the backup's node is malformed"))?;
    Ok(Forward {
        plan: Plan {
            data_dir: config.node.data_dir.clone(),
            node: NodeId(node),
            layout: Layout {
                number: manifest.layout,
                shards: manifest.shards,
            },
            keys: keys.map_err(|error| Failure::new(error.to_string()))?,
            topology,
            logs: reach.logs.clone(),
            until_us: reach.until.0,
        },
        bytes: reach.bytes,
        background: server::background(config),
        topology: copy,
    })
}

/// The topology of the moment, and the copy of its file: the archive's or the backup's, whichever is newer.
fn topology(
    log: &LogArchive,
    manifest: &Manifest,
    until: Moment,
) -> Result<(Option<Topology>, Option<Vec<u8>>), Failure> {
    let copies = [topology_of(manifest)?, log.topology(manifest, until)?];
    let mut newest: Option<(Topology, Vec<u8>)> = None;
    for copy in copies.into_iter().flatten() {
        let read = read_copy(&copy);
        let topology = read.map_err(|error| Failure::new(format!("a kept topology: {error}")))?;
        if newest
            .as_ref()
            .is_none_or(|(known, _)| topology.epoch > known.epoch)
        {
            newest = Some((topology, copy));
        }
    }
    Ok(newest.unzip())
}

/// Says what a restore would do.
fn foretell(
    args: &Restore,
    manifest: &Manifest,
    reach: &Reach,
    furthest: &Reach,
) -> Result<(), Failure> {
    let cut = Moment(manifest.cut_stamp);
    let segments: usize = reach.logs.iter().map(|log| log.segments.len()).sum();
    if args.json {
        println!(
            "{}",
            json!({
                "id": manifest.id,
                "at_us": reach.until.0,
                "segments": segments,
                "log_bytes": reach.bytes,
                "from_us": cut.0,
                "reach_us": furthest.until.0,
                "limit": furthest.limit,
            })
        );
        return Ok(());
    }
    println!(
        "backup {} and {segments} archived segments, {} bytes, would give {}",
        manifest.id, reach.bytes, reach.until
    );
    println!(
        "this backup can be brought to every moment from {cut} to {} ({})",
        furthest.until, furthest.limit
    );
    Ok(())
}

fn tell(
    args: &Restore,
    manifest: &Manifest,
    config: &Config,
    reach: Option<&Reach>,
    restored: &Restored,
    abstains: bool,
) {
    let (bytes, replayed) = (restored.bytes, &restored.replayed);
    if args.json {
        println!(
            "{}",
            json!({
                "id": manifest.id,
                "bytes": bytes,
                "votes": !abstains,
                "at_us": reach.map(|reach| reach.until.0),
                "segments": replayed.segments,
                "records": replayed.records,
                "later_records": replayed.later,
            })
        );
        return;
    }
    println!(
        "backup {} is restored into {}: {bytes} bytes; the node can be started",
        manifest.id,
        config.node.data_dir.display()
    );
    if let Some(reach) = reach {
        println!(
            "it is as of {}: {} records of {} archived segments were replayed, {} later ones left out",
            reach.until, replayed.records, replayed.segments, replayed.later
        );
    }
}
