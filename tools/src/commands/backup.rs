//! `torc backup` and `torc restore`: copies of a node's data, and the way back.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;

use crate::backup::archive::{Archive, Item, Manifest, hash_file};
use crate::backup::{copy, restore as restoring};
use crate::commands::admin::{Common, order};
use crate::config;
use crate::endpoint::Endpoint;
use crate::failure::Failure;

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
    #[arg(long, value_name = "MIB")]
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
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List the backups in a directory
    List {
        /// Directory of a node's backups
        dir: PathBuf,
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
    /// Which backup [default: the newest]
    #[arg(long, value_name = "ID")]
    backup: Option<String>,
    /// All nodes of the cluster are restored, none of them still has its data
    #[arg(long)]
    all_nodes: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Makes, lists or verifies backups.
pub fn backup(args: &Backup) -> Result<(), Failure> {
    match (&args.command, &args.to) {
        (None, Some(to)) => make(args, to),
        (None, None) => Err(Failure::new("--to DIR is missing")),
        (Some(Command::Verify { dir, backup, json }), _) => verify(dir, backup.as_deref(), *json),
        (Some(Command::List { dir, json }), _) => list(dir, *json),
        (Some(Command::Snapshots { common }), _) => {
            let list = Endpoint::new(&common.endpoint)?.get_json("/admin/snapshots")?;
            println!("{list}");
            Ok(())
        }
        (Some(Command::Drop { id, common }), _) => {
            order(common, "DELETE", &format!("/admin/snapshots/{id}"), None)
        }
    }
}

fn make(args: &Backup, to: &std::path::Path) -> Result<(), Failure> {
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

fn verify(dir: &std::path::Path, backup: Option<&str>, as_json: bool) -> Result<(), Failure> {
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
    }
    if as_json {
        println!(
            "{}",
            json!({ "backups": ids, "files": known.len(), "damaged": damaged })
        );
    } else {
        for line in &damaged {
            println!("{line}");
        }
        println!("{} backups, {} files", ids.len(), known.len());
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

fn list(dir: &std::path::Path, as_json: bool) -> Result<(), Failure> {
    let archive = Archive::at(dir);
    let mut all = Vec::new();
    for id in archive.ids()? {
        let manifest = archive.read(&id)?;
        let bytes: u64 = files(&archive, &manifest).map(|(_, item)| item.bytes).sum();
        if !as_json {
            println!(
                "{id}  node {}  cluster {}  taken at {} ms  {bytes} bytes",
                manifest.name, manifest.cluster, manifest.created_ms
            );
        }
        all.push(json!({
            "id": id,
            "node": manifest.name,
            "cluster": manifest.cluster,
            "created_ms": manifest.created_ms,
            "bytes": bytes,
        }));
    }
    if as_json {
        println!("{}", json!({ "backups": all }));
    }
    Ok(())
}

/// Restores a backup into the empty data directory that a configuration names.
pub fn restore(args: &Restore) -> Result<(), Failure> {
    let loaded = config::load(Some(&args.config), std::env::vars(), &args.set)
        .map_err(|error| Failure::new(error.to_string()))?;
    let archive = Archive::at(&args.from);
    let id = match &args.backup {
        Some(id) => id.clone(),
        None => archive
            .ids()?
            .pop()
            .ok_or_else(|| Failure::new(format!("{}: no backups", args.from.display())))?,
    };
    let manifest = archive.read(&id)?;
    let node = &loaded.config.node;
    for (what, found, configured) in [
        ("node", &manifest.name, &node.name),
        ("cluster", &manifest.cluster, &loaded.config.cluster.name),
    ] {
        if found != configured {
            return Err(Failure::new(format!(
                "backup {id} is of {what} {found:?}, but the configuration says {configured:?}"
            )));
        }
    }
    let abstains = manifest.members > 1 && !args.all_nodes;
    let bytes = restoring::run(&archive, &manifest, &node.data_dir, abstains)?;
    if args.json {
        println!(
            "{}",
            json!({ "id": id, "bytes": bytes, "votes": !abstains })
        );
    } else {
        println!(
            "backup {id} is restored into {}: {bytes} bytes; the node can be started",
            node.data_dir.display()
        );
    }
    Ok(())
}
