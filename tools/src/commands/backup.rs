//! `torc backup`: copies of a node's data, and the archive of its log.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::json;

use crate::backup::archive::{Archive, Item, Manifest, hash_file};
use crate::backup::copy;
use crate::backup::log::{LogArchive, prune};
use crate::backup::moment::Moment;
use crate::commands::admin::{Common, order};
use crate::commands::whole;
use crate::endpoint::{Endpoint, Request};
use crate::failure::Failure;

/// The highest rate that can be asked for: as good as none.
const RATE_MIB_MAX: u64 = 1 << 20;

/// `torc backup`
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Backup {
    #[command(subcommand)]
    command: Option<Command>,
    /// Directory of this node's backups; tables that are there already are not copied again
    #[arg(long, value_name = "DIR", required = true)]
    to: Option<PathBuf>,
    /// Copy at most so many MiB a second
    #[arg(long, value_name = "MIB", allow_hyphen_values = true, value_parser = |text: &str| whole(text, 1..=RATE_MIB_MAX))]
    rate: Option<u64>,
    /// Believe the tables that are there already without reading them again
    #[arg(long)]
    trust_existing: bool,
    #[command(flatten)]
    common: Common,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Hold every file of the backups in a directory against its checksum
    Verify {
        /// Directory of a node's backups
        dir: PathBuf,
        /// Only this backup
        #[arg(long, value_name = "ID")]
        backup: Option<String>,
        /// Also the archived log that brings these backups forward (`archive.dir` of the node)
        #[arg(long, value_name = "DIR")]
        archive: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List the backups in a directory
    List {
        /// Directory of a node's backups
        dir: PathBuf,
        /// Say up to when the archived log brings each of them (`archive.dir` of the node)
        #[arg(long, value_name = "DIR")]
        archive: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Archive the endpoint's node's log up to now, and say how far it reaches
    Log {
        /// Only say what is archived, and what is not
        #[arg(long)]
        status: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Remove archived log that is older than the oldest backup in a directory
    Prune {
        /// Directory of a node's backups
        dir: PathBuf,
        /// Directory of the archived log (`archive.dir` of the node)
        #[arg(long, value_name = "DIR")]
        archive: PathBuf,
        /// Only say what would be removed
        #[arg(long)]
        dry_run: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List the snapshots that the endpoint's node keeps for backups that were not finished
    Snapshots {
        #[command(flatten)]
        common: Common,
    },
    /// Give up a snapshot of the endpoint's node
    Drop {
        /// Its id
        id: String,
        #[command(flatten)]
        common: Common,
    },
}

/// Makes, lists or verifies backups.
pub fn backup(args: &Backup) -> Result<(), Failure> {
    match (&args.command, &args.to) {
        (None, Some(to)) => make(args, to),
        (None, None) => Err(Failure::new("--to DIR is missing")),
        (
            Some(Command::Verify {
                dir,
                backup,
                archive,
                json,
            }),
            _,
        ) => verify(dir, backup.as_deref(), archive.as_deref(), *json),
        (Some(Command::List { dir, archive, json }), _) => list(dir, archive.as_deref(), *json),
        (Some(Command::Log { status, common }), _) => log(common, *status),
        (
            Some(Command::Prune {
                dir,
                archive,
                dry_run,
                json,
            }),
            _,
        ) => prune_log(dir, archive, *dry_run, *json),
        (Some(Command::Snapshots { common }), _) => {
            let list = Endpoint::new(&common.endpoint)?.get_json("/admin/snapshots")?;
            println!("{list}");
            Ok(())
        }
        (Some(Command::Drop { id, common }), _) => {
            order(common, "DELETE", &format!("/admin/snapshots/{id}"), None).map(drop)
        }
    }
}

fn make(args: &Backup, to: &Path) -> Result<(), Failure> {
    let endpoint = Endpoint::new(&args.common.endpoint)?;
    let rate = args.rate.map(|mib| mib << 20);
    let done = copy::run(&endpoint, &Archive::at(to), rate, !args.trust_existing)?;
    if args.common.json {
        println!(
            "{}",
            json!({
                "id": done.id,
                "resumed": done.resumed,
                "tables": done.tables.all,
                "copied_tables": done.tables.copied,
                "replaced_tables": done.tables.replaced,
                "blobs": done.blobs.all,
                "copied_blobs": done.blobs.copied,
                "replaced_blobs": done.blobs.replaced,
                "bytes": done.bytes,
                "copied_bytes": done.copied_bytes,
            })
        );
        return Ok(());
    }
    println!(
        "backup {}: {} tables, {} copied; {} blobs, {} copied; {} bytes, {} copied",
        done.id,
        done.tables.all,
        done.tables.copied,
        done.blobs.all,
        done.blobs.copied,
        done.bytes,
        done.copied_bytes
    );
    let replaced = done.tables.replaced + done.blobs.replaced;
    if replaced > 0 {
        println!("{replaced} files of earlier backups were damaged and are replaced");
    }
    Ok(())
}

/// Orders the node to archive its log, or asks how that goes.
fn log(common: &Common, status: bool) -> Result<(), Failure> {
    let request = Request {
        method: if status { "GET" } else { "POST" },
        path: "/admin/archive".into(),
        ..Request::default()
    };
    let answer = Endpoint::new(&common.endpoint)?
        .expect_long(request)?
        .json()?;
    if common.json {
        println!("{answer}");
        return Ok(());
    }
    let number = |name: &str| {
        answer
            .get(name)
            .and_then(serde_json::Value::as_u64)
            .unwrap_or(0)
    };
    match number("reach_us") {
        0 => println!("nothing is archived since this node was started"),
        reach => println!("the log is archived up to {}", Moment(reach)),
    }
    if status {
        println!(
            "{} segments archived, {} waiting ({} bytes held back), {} failures, {} gaps",
            number("segments"),
            number("waiting"),
            number("held_bytes"),
            number("failures"),
            number("gaps"),
        );
        if answer.get("failing").and_then(serde_json::Value::as_bool) == Some(true) {
            println!("the last attempt FAILED: the node's log says why, and it is tried again");
        }
    }
    Ok(())
}

/// A directory that is not there holds no backups, and is more likely a slip or a volume that is not mounted.
fn exists(dir: &Path) -> Result<(), Failure> {
    match dir.is_dir() {
        true => Ok(()),
        false => Err(Failure::new(format!(
            "{}: there is no such directory",
            dir.display()
        ))),
    }
}

fn prune_log(dir: &Path, archive: &Path, dry_run: bool, as_json: bool) -> Result<(), Failure> {
    for dir in [dir, archive] {
        exists(dir)?;
    }
    let backups = Archive::at(dir);
    let manifests = backups.ids()?.into_iter().map(|id| backups.read(&id));
    let manifests = manifests.collect::<Result<Vec<_>, _>>()?;
    let unneeded = LogArchive::at(archive).unneeded(&manifests)?;
    if !dry_run {
        prune(&unneeded)?;
    }
    if as_json {
        println!(
            "{}",
            json!({
                "removed": !dry_run,
                "files": unneeded.files.len(),
                "bytes": unneeded.bytes,
                "without_backup": unneeded.without_backup,
            })
        );
        return Ok(());
    }
    let verb = if dry_run { "would be" } else { "are" };
    println!(
        "{} files {verb} removed, {} bytes",
        unneeded.files.len(),
        unneeded.bytes
    );
    for lineage in &unneeded.without_backup {
        println!(
            "kept: {lineage}, a life of the node's data without a backup in {}",
            dir.display()
        );
    }
    Ok(())
}

fn verify(
    dir: &Path,
    backup: Option<&str>,
    log: Option<&Path>,
    as_json: bool,
) -> Result<(), Failure> {
    let archive = Archive::at(dir);
    let ids = match backup {
        Some(id) => vec![id.to_owned()],
        None => archive.ids()?,
    };
    if ids.is_empty() {
        return Err(Failure::new(format!("{}: no backups", dir.display())));
    }
    let mut damaged = Vec::new();
    let mut known = std::collections::BTreeMap::new();
    let mut manifests = Vec::new();
    for id in &ids {
        let manifest = match archive.read(id) {
            Ok(manifest) => manifest,
            Err(failure) => {
                damaged.push(failure.to_string());
                continue;
            }
        };
        for (path, item) in files(&archive, &manifest) {
            // Backups share most tables and blobs.
            let found = known
                .entry(path.clone())
                .or_insert_with(|| hash_file(&path));
            match found {
                Ok((bytes, xxh3)) if *bytes == item.bytes && *xxh3 == item.xxh3 => {}
                Ok(_) => damaged.push(format!(
                    "{}: damaged, its checksum does not fit (backup {id})",
                    path.display()
                )),
                Err(error) => damaged.push(format!("{}: {error} (backup {id})", path.display())),
            }
        }
        manifests.push(manifest);
    }
    let segments = match log {
        Some(log) => LogArchive::at(log).verify(&manifests, &mut damaged)?,
        None => 0,
    };
    if as_json {
        println!(
            "{}",
            json!({
                "backups": ids,
                "files": known.len(),
                "segments": segments,
                "damaged": damaged,
            })
        );
    } else {
        for line in &damaged {
            println!("{line}");
        }
        println!("{} backups, {} files", ids.len(), known.len());
        if log.is_some() {
            println!("{segments} archived segments of the log");
        }
    }
    match damaged.len() {
        0 => Ok(()),
        count => Err(Failure::new(format!(
            "{count} files are damaged or missing"
        ))),
    }
}

fn files<'a>(
    archive: &'a Archive,
    manifest: &'a Manifest,
) -> impl Iterator<Item = (PathBuf, &'a Item)> {
    manifest.stores.iter().flat_map(move |store| {
        let dir = archive.backup(&manifest.id).join(&store.dir);
        let files = store.files.iter();
        let files = files.map(move |file| (dir.join(&file.name), file));
        let shared = store.shared();
        let lineage = &manifest.lineage;
        files.chain(shared.map(move |(kind, item)| (archive.shared(lineage, kind, item), item)))
    })
}

fn list(dir: &Path, log: Option<&Path>, as_json: bool) -> Result<(), Failure> {
    for dir in [Some(dir), log].into_iter().flatten() {
        exists(dir)?;
    }
    let archive = Archive::at(dir);
    let log = log.map(LogArchive::at);
    let mut all = Vec::new();
    for id in archive.ids()? {
        let manifest = archive.read(&id)?;
        let bytes: u64 = files(&archive, &manifest).map(|(_, item)| item.bytes).sum();
        let reach = log
            .as_ref()
            .map(|log| log.furthest(&manifest))
            .transpose()?;
        if !as_json {
            println!(
                "{id}  node {}  cluster {}  taken at {} ms  {bytes} bytes",
                manifest.name, manifest.cluster, manifest.created_ms
            );
            if let Some(reach) = &reach {
                println!(
                    "  from {} to {} ({})",
                    Moment(manifest.cut_stamp),
                    reach.until,
                    reach.limit
                );
            }
        }
        all.push(json!({
            "id": id,
            "node": manifest.name,
            "cluster": manifest.cluster,
            "created_ms": manifest.created_ms,
            "bytes": bytes,
            "cut_us": manifest.cut_stamp,
            "reach_us": reach.as_ref().map(|reach| reach.until.0),
            "limit": reach.map(|reach| reach.limit),
        }));
    }
    if as_json {
        println!("{}", json!({ "backups": all }));
    }
    Ok(())
}
