//! What happens before anything is served: take the data directory, find out who this node is, count
//! the start.
//!
//! Invariants:
//! - one process at a time has the directory: `node/lock` is held until [`Boot`] is dropped;
//! - the boot counter is raised and synced, with its directory entry, before [`boot`] returns. All
//!   causality rests on it: writes of this run are minted under a name that no earlier run had;
//! - a directory of another node, another cluster or another format is refused, never taken over.
//!
//! Runs once, before the shards exist, so it uses the standard library's blocking files.

pub mod identity;

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use torc_cluster::topology::store::no_vote;
use torc_engine::Layout;
use torc_engine::layout::{STORE_ROOT, is_store};
use torc_env::NodeId;

use crate::boot::identity::{FORMAT, Identity, IdentityError, NAME_BYTES_MAX};

/// A node that may start.
#[derive(Debug)]
pub struct Boot {
    /// Who it is, and which of its starts this is.
    pub identity: Identity,
    /// Whether the directory was empty: the node has never been in a cluster.
    pub is_fresh: bool,
    /// Whether the node's vote about the topology is gone: it must give none.
    pub has_lost_vote: bool,
    /// Keeps other processes out.
    _lock: File,
}

/// Why a node may not start.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The directory or a file in it cannot be used.
    #[error("cannot use the data directory: {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process has it.
    #[error("the data directory {path} is in use by another process; stop that one first")]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// Another version of the program wrote the directory.
    #[error("{path}: {source}; start {}: nothing was changed", if *found > FORMAT { "a newer program" } else { "the program that wrote it" })]
    Format {
        /// The identity file.
        path: PathBuf,
        /// The format in it.
        found: u32,
        /// What is said of it.
        source: IdentityError,
    },
    /// The identity file is damaged.
    #[error(
        "cannot read {path}: {source}; restore that file from a backup, or replace this node: it \
         must not start under a guessed identity"
    )]
    Identity {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: IdentityError,
    },
    /// Data without an identity.
    #[error("{path} holds data but no node/identity: restore that file, or use an empty directory")]
    NoIdentity {
        /// The directory.
        path: PathBuf,
    },
    /// The directory holds part of a backup.
    #[error("{path} holds a restore that was broken off: run `torc restore` again")]
    Restoring {
        /// The directory.
        path: PathBuf,
    },
    /// The directory belongs to something else.
    #[error(
        "{path} belongs to the {what} {found:?}, but the configuration says {configured:?}: correct \
         the configuration or use another directory"
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// `node` or `cluster`.
        what: &'static str,
        /// The name in the directory.
        found: String,
        /// The name in the configuration.
        configured: String,
    },
    /// A name is empty or too long.
    #[error("a {what} name has 1 to {NAME_BYTES_MAX} bytes, {name:?} has {}", name.len())]
    Name {
        /// `node` or `cluster`.
        what: &'static str,
        /// The name.
        name: String,
    },
}

/// The file of the node's vote, in `node/`.
const VOTE: &str = "topology.vote";

/// What lies in a data directory while a backup is restored into it.
pub const RESTORING: &str = "restoring";

/// Takes the data directory `dir` (made if it is missing) for the node `name` of `cluster`, which runs
/// `shards` shards. On return the start is counted, durably.
///
/// # Errors
/// See [`BootError`].
pub fn boot(dir: &Path, name: &str, cluster: &str, shards: u16) -> Result<Boot, BootError> {
    for (what, name) in [("node", name), ("cluster", cluster)] {
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(BootError::Name {
                what,
                name: name.to_owned(),
            });
        }
    }
    if dir.join(RESTORING).exists() {
        return Err(BootError::Restoring {
            path: dir.to_owned(),
        });
    }
    let node_dir = dir.join("node");
    fs::create_dir_all(&node_dir).map_err(during("create", &node_dir))?;
    let lock = take_lock(dir, &node_dir.join("lock"))?;
    let path = node_dir.join("identity");
    let before = read_identity(&path)?;
    let is_fresh = before.is_none();
    let random = random_bytes().map_err(during("read", Path::new(RANDOM)))?;
    let (node_random, boot_random) = random;
    let identity = match before {
        Some(before) => {
            for (what, found, configured) in [
                ("cluster", &before.cluster, cluster),
                ("node", &before.name, name),
            ] {
                if found != configured {
                    return Err(BootError::Foreign {
                        path: dir.to_owned(),
                        what,
                        found: found.clone(),
                        configured: configured.to_owned(),
                    });
                }
            }
            Identity {
                boot: before.boot.saturating_add(1),
                random: boot_random,
                ..before
            }
        }
        None => {
            if !stores(dir)?.is_empty() {
                return Err(BootError::NoIdentity {
                    path: dir.to_owned(),
                });
            }
            Identity {
                node: NodeId(node_random),
                boot: 1,
                random: boot_random,
                shards,
                layout: 0,
                lineage: 0,
                abstains: false,
                has_served: false,
                name: name.to_owned(),
                cluster: cluster.to_owned(),
            }
        }
    };
    let identity = if identity.has_served && has_lost_store(dir, identity.layout())? {
        // A store that begins anew gives ids of tables and segments that were given before: not in the same lineage.
        Identity {
            lineage: identity.boot,
            ..identity
        }
    } else {
        identity
    };
    let vote = node_dir.join(VOTE);
    let has_vote = vote.try_exists().map_err(during("look for", &vote))?;
    if !has_vote && !identity.has_served {
        // Before anybody is answered, so that one which is missing later is a lost one.
        write_durably(&node_dir, VOTE, &no_vote())?;
    }
    write_identity(dir, &identity)?;
    remove_other_layouts(dir, identity.layout())?;
    Ok(Boot {
        has_lost_vote: !has_vote && identity.has_served,
        identity,
        is_fresh,
        _lock: lock,
    })
}

impl Boot {
    /// Says durably that the node takes connections from now on: its stores are there.
    ///
    /// # Errors
    /// When the identity cannot be written.
    pub fn serves(&mut self, dir: &Path) -> Result<(), BootError> {
        if self.identity.has_served {
            return Ok(());
        }
        self.identity.has_served = true;
        write_identity(dir, &self.identity)
    }

    /// Says that the data in `dir` is divided as `layout` says from now on, durably, and removes the
    /// stores of before.
    ///
    /// # Errors
    /// When the identity cannot be written, or an old store cannot be removed.
    pub fn change_layout(&mut self, dir: &Path, layout: Layout) -> Result<(), BootError> {
        self.identity.shards = layout.shards;
        self.identity.layout = layout.number;
        write_identity(dir, &self.identity)?;
        remove_other_layouts(dir, layout)
    }

    /// Removes the stores in `dir` that are of other layouts than the one in force.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub fn remove_other_layouts(&self, dir: &Path) -> Result<(), BootError> {
        remove_other_layouts(dir, self.identity.layout())
    }
}

/// Removes what a redistribution that broke off, before or after it took force, has left.
fn remove_other_layouts(dir: &Path, layout: Layout) -> Result<(), BootError> {
    for name in stores(dir)?.iter().filter(|name| !layout.holds(name)) {
        let path = dir.join(name);
        fs::remove_dir_all(&path).map_err(during("remove", &path))?;
    }
    Ok(())
}

/// Names of the stores in a data directory, of whatever layout.
fn stores(dir: &Path) -> Result<Vec<String>, BootError> {
    let entries = fs::read_dir(dir).map_err(during("list", dir))?.flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names.filter(|name| is_store(name)).collect())
}

/// Whether a store that is in force is not there.
fn has_lost_store(dir: &Path, layout: Layout) -> Result<bool, BootError> {
    for shard in layout.shards() {
        let root = dir.join(layout.dir(shard)).join(STORE_ROOT);
        if !root.try_exists().map_err(during("look for", &root))? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn take_lock(dir: &Path, path: &Path) -> Result<File, BootError> {
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(during("open", path))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(BootError::InUse {
            path: dir.to_owned(),
        }),
        Err(TryLockError::Error(source)) => Err(during("lock", path)(source)),
    }
}

fn read_identity(path: &Path) -> Result<Option<Identity>, BootError> {
    match fs::read(path) {
        Ok(bytes) => match Identity::decode(&bytes) {
            Ok(identity) => Ok(Some(identity)),
            Err(source @ IdentityError::Format { found }) => Err(BootError::Format {
                path: path.to_owned(),
                found,
                source,
            }),
            Err(source) => Err(BootError::Identity {
                path: path.to_owned(),
                source,
            }),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(during("read", path)(source)),
    }
}

/// Writes the identity of the data directory `dir`, whose `node` directory exists, durably: beside the old
/// file, synced, renamed, the directories synced. After a crash at any point either the old identity or
/// the new one is there.
///
/// # Errors
/// When the operating system refuses.
pub fn write_identity(dir: &Path, identity: &Identity) -> Result<(), BootError> {
    let node_dir = &dir.join("node");
    write_durably(node_dir, "identity", &identity.encode())?;
    sync_dir(dir)
}

fn write_durably(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), BootError> {
    let beside = dir.join(format!("{name}.new"));
    let mut file = File::create(&beside).map_err(during("create", &beside))?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(during("write", &beside))?;
    fs::rename(&beside, dir.join(name)).map_err(during("rename", &beside))?;
    sync_dir(dir)
}

fn sync_dir(dir: &Path) -> Result<(), BootError> {
    let synced = File::open(dir).and_then(|directory| directory.sync_all());
    synced.map_err(during("sync", dir))
}

const RANDOM: &str = "/dev/urandom";

/// A node id and a boot random from the operating system.
fn random_bytes() -> io::Result<(u128, u64)> {
    let mut bytes = [0; 24];
    File::open(RANDOM)?.read_exact(&mut bytes)?;
    let (node, boot) = bytes.split_at(16);
    let node = node
        .iter()
        .fold(0, |all, byte| all << 8 | u128::from(*byte));
    let boot = boot.iter().fold(0, |all, byte| all << 8 | u64::from(*byte));
    // Zero means "whichever node answers" in an address.
    Ok((node.max(1), boot))
}

fn during(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BootError {
    let path = path.to_owned();
    move |source| BootError::Io {
        action,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_start_is_counted_under_the_same_node() {
        let dir = tempfile::tempdir().unwrap();
        let first = boot(dir.path(), "n1", "demo", 2).unwrap();
        assert!(first.is_fresh);
        let node = first.identity.node;
        assert_eq!(first.identity.boot, 1);
        drop(first);
        for count in 2..5 {
            let next = boot(dir.path(), "n1", "demo", 2).unwrap();
            assert!(!next.is_fresh);
            assert_eq!((next.identity.node, next.identity.boot), (node, count));
        }
        let other = tempfile::tempdir().unwrap();
        let other = boot(other.path(), "n1", "demo", 2).unwrap();
        assert_ne!(other.identity.node, node);
    }

    #[test]
    fn a_restore_that_was_broken_off_starts_no_node() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(RESTORING), "").unwrap();
        assert!(matches!(
            boot(dir.path(), "n1", "demo", 2),
            Err(BootError::Restoring { .. })
        ));
        assert!(!dir.path().join("node").exists(), "nothing was touched");
        fs::remove_file(dir.path().join(RESTORING)).unwrap();
        assert!(boot(dir.path(), "n1", "demo", 2).unwrap().is_fresh);
    }

    #[test]
    fn one_process_at_a_time_has_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let _running = boot(dir.path(), "n1", "demo", 2).unwrap();
        assert!(matches!(
            boot(dir.path(), "n1", "demo", 2),
            Err(BootError::InUse { .. })
        ));
    }

    #[test]
    fn a_directory_of_another_node_or_cluster_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(boot(dir.path(), "n1", "demo", 2).unwrap());
        for (name, cluster, expected) in [("n2", "demo", "node"), ("n1", "other", "cluster")] {
            match boot(dir.path(), name, cluster, 2) {
                Err(BootError::Foreign { what, .. }) => assert_eq!(what, expected),
                other => panic!("{other:?}"),
            }
        }
        let again = boot(dir.path(), "n1", "demo", 2).unwrap();
        assert_eq!(again.identity.boot, 2, "a refused start is not counted");
    }

    #[test]
    fn stores_of_a_layout_that_is_not_in_force_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        drop(boot(dir.path(), "n1", "demo", 2).unwrap());
        for store in ["shard-00", "shard-01", "shard-00.1"] {
            fs::create_dir(dir.path().join(store)).unwrap();
        }
        let stores = || {
            let mut names = stores(dir.path()).unwrap();
            names.sort();
            names
        };
        let mut again = boot(dir.path(), "n1", "demo", 1).unwrap();
        assert_eq!(again.identity.shards, 2, "the data says how it is divided");
        assert_eq!(stores(), ["shard-00", "shard-01"]);
        fs::create_dir(dir.path().join("shard-00.1")).unwrap();
        let layout = Layout {
            number: 1,
            shards: 1,
        };
        again.change_layout(dir.path(), layout).unwrap();
        assert_eq!(stores(), ["shard-00.1"]);
        drop(again);
        let after = boot(dir.path(), "n1", "demo", 1).unwrap();
        assert_eq!(after.identity.layout(), layout);
    }

    #[test]
    fn a_store_that_is_gone_after_the_node_has_served_begins_another_lineage() {
        let dir = tempfile::tempdir().unwrap();
        let roots = ["shard-00", "shard-01"].map(|store| dir.path().join(store).join(STORE_ROOT));
        let mut first = boot(dir.path(), "n1", "demo", 2).unwrap();
        for root in &roots {
            fs::create_dir(root.parent().unwrap()).unwrap();
            fs::write(root, []).unwrap();
        }
        first.serves(dir.path()).unwrap();
        drop(first);
        let second = boot(dir.path(), "n1", "demo", 2).unwrap();
        assert_eq!(second.identity.lineage, 0);
        drop(second);
        fs::remove_file(&roots[1]).unwrap();
        let third = boot(dir.path(), "n1", "demo", 2).unwrap();
        assert_eq!(third.identity.lineage, 3);
        drop(third);
        fs::write(&roots[1], []).unwrap();
        let fourth = boot(dir.path(), "n1", "demo", 2).unwrap();
        assert_eq!((fourth.identity.lineage, fourth.identity.boot), (3, 4));
    }

    #[test]
    fn a_vote_that_is_missing_after_the_node_has_served_is_lost_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let vote = dir.path().join("node/topology.vote");
        drop(boot(dir.path(), "n1", "demo", 1).unwrap());
        // As an older program, or a crash, may leave it.
        fs::remove_file(&vote).unwrap();
        let mut served = boot(dir.path(), "n1", "demo", 1).unwrap();
        assert!(!served.has_lost_vote && vote.exists());
        served.serves(dir.path()).unwrap();
        drop(served);
        let again = boot(dir.path(), "n1", "demo", 1).unwrap();
        assert!(again.identity.has_served && !again.has_lost_vote);
        drop(again);
        fs::remove_file(&vote).unwrap();
        for _ in 0..2 {
            let lost = boot(dir.path(), "n1", "demo", 1).unwrap();
            assert!(lost.has_lost_vote && !vote.exists());
        }
    }

    #[test]
    fn a_damaged_or_missing_identity_is_never_guessed() {
        let dir = tempfile::tempdir().unwrap();
        drop(boot(dir.path(), "n1", "demo", 2).unwrap());
        let path = dir.path().join("node/identity");
        let mut bytes = fs::read(&path).unwrap();
        bytes[20] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert!(matches!(
            boot(dir.path(), "n1", "demo", 2),
            Err(BootError::Identity { .. })
        ));
        fs::remove_file(&path).unwrap();
        fs::create_dir(dir.path().join("shard-00")).unwrap();
        assert!(matches!(
            boot(dir.path(), "n1", "demo", 2),
            Err(BootError::NoIdentity { .. })
        ));
    }

    #[test]
    fn a_directory_of_a_newer_program_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        drop(boot(dir.path(), "n1", "demo", 2).unwrap());
        let path = dir.path().join("node/identity");
        let mut bytes = fs::read(&path).unwrap();
        bytes[8] += 1;
        fs::write(&path, &bytes).unwrap();
        // A store that another format may name so.
        fs::create_dir(dir.path().join("shard-07.3")).unwrap();
        let refused = boot(dir.path(), "n1", "demo", 2).unwrap_err();
        let what = refused.to_string();
        assert!(what.contains("node/identity") && what.contains("start a newer program"));
        assert!(what.contains("format 3, this program reads 2"), "{what}");
        assert_eq!(fs::read(&path).unwrap(), bytes);
        assert!(dir.path().join("shard-07.3").exists());
    }

    #[test]
    fn a_start_that_broke_off_before_its_rename_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        drop(boot(dir.path(), "n1", "demo", 2).unwrap());
        fs::write(dir.path().join("node/identity.new"), b"torn").unwrap();
        let next = boot(dir.path(), "n1", "demo", 2).unwrap();
        assert_eq!(next.identity.boot, 2);
    }
}
