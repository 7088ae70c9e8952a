//! The directory of a node's backups: names, manifests, checksums.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use torc_net::sealed::{self, seal};
use xxhash_rust::xxh3::Xxh3;

use crate::failure::Failure;

/// Newest version of the format that this build reads and writes.
pub const VERSION: u64 = 2;
/// What is written when there are no blobs, so that older builds read it.
const VERSION_WITHOUT_BLOBS: u64 = 1;
const MANIFEST: &str = "backup.json";
const SEALED: sealed::Kind = sealed::Kind {
    format: "torc-backup",
    foreign: "it is no manifest of a backup",
    versions: VERSION_WITHOUT_BLOBS..=VERSION,
};
/// Bytes hashed or copied at once.
pub const PIECE_BYTES: usize = 1 << 20;

/// What a backup consists of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Always `torc-backup`.
    pub format: String,
    /// See [`VERSION`].
    pub version: u64,
    /// The snapshot that was copied; sorts by time.
    pub id: String,
    /// When it was taken, in milliseconds since 1970.
    pub created_ms: u64,
    /// The newest stamp of the node's hybrid clock at the cut.
    pub cut_stamp: u64,
    /// The node's uuid.
    pub node: String,
    /// Its name.
    pub name: String,
    /// Its cluster's name.
    pub cluster: String,
    /// Starts of the node so far.
    pub boot: u64,
    /// Members of the cluster.
    pub members: u64,
    /// Shards of the node.
    pub shards: u16,
    /// Layout of its data.
    pub layout: u16,
    /// Lineage of its data; ids of tables and blobs are unique in it.
    pub lineage: String,
    /// The file `node/topology`, base64; none before the node was in a cluster.
    pub topology: Option<String>,
    /// A store for each shard.
    pub stores: Vec<StoreFiles>,
}

/// The files of one store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreFiles {
    /// Its directory in the data directory.
    pub dir: String,
    /// Files of this backup alone.
    pub files: Vec<Item>,
    /// Tables, shared with other backups.
    pub tables: Vec<Item>,
    /// Blobs, shared likewise. Since version 2.
    #[serde(default)]
    pub blobs: Vec<Item>,
    /// Where its log was cut; none in backups of versions without a log archive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<LogMark>,
}

/// A kind of file that backups share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A table.
    Table,
    /// A blob.
    Blob,
}

impl Kind {
    /// What the names of such files end in.
    pub fn extension(self) -> &'static str {
        match self {
            Kind::Table => "table",
            Kind::Blob => "blob",
        }
    }
}

impl StoreFiles {
    /// All files that are shared with other backups.
    pub fn shared(&self) -> impl Iterator<Item = (Kind, &Item)> {
        let tables = self.tables.iter().map(|item| (Kind::Table, item));
        let blobs = self.blobs.iter().map(|item| (Kind::Blob, item));
        tables.chain(blobs)
    }
}

/// The last frame of a store's log that its tables hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogMark {
    /// Its sequence.
    pub sequence: u64,
    /// Its hash, sixteen hexadecimal digits.
    pub hash: String,
}

/// One file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// File name, or the id of a table or blob.
    pub name: String,
    /// Length.
    pub bytes: u64,
    /// xxh3-128 of its content, in hexadecimal; empty while unknown.
    #[serde(default)]
    pub xxh3: String,
}

/// A directory of backups.
pub struct Archive {
    dir: PathBuf,
}

impl Archive {
    /// The archive in `dir`, which need not exist yet.
    pub fn at(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }

    /// Its path.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the tables and blobs of a lineage lie.
    pub fn tables(&self, lineage: &str) -> PathBuf {
        self.dir.join("tables").join(lineage)
    }

    /// Where tables and blobs lie that are being copied.
    pub fn incoming(&self) -> PathBuf {
        self.dir.join("incoming")
    }

    /// Where the other files of a backup lie.
    pub fn backup(&self, id: &str) -> PathBuf {
        self.dir.join("backups").join(id)
    }

    /// Which snapshot was being copied when the last run broke off.
    pub fn unfinished(&self) -> PathBuf {
        self.dir.join("unfinished")
    }

    /// A table or blob of a backup.
    pub fn shared(&self, lineage: &str, kind: Kind, item: &Item) -> PathBuf {
        let name = format!("{}-{}.{}", item.name, item.xxh3, kind.extension());
        self.tables(lineage).join(name)
    }

    /// The tables and blobs of a lineage that were copied before: by id (tables and blobs have none in common), the
    /// checksum that the name promises.
    pub fn copied(&self, lineage: &str) -> BTreeMap<String, String> {
        let entries = fs::read_dir(self.tables(lineage)).into_iter().flatten();
        let named = entries.flatten().filter_map(|entry| {
            let name = entry.file_name();
            let (stem, extension) = name.to_str()?.split_once('.')?;
            let (id, xxh3) = stem.split_once('-')?;
            let kinds = [Kind::Table, Kind::Blob];
            kinds.iter().find(|kind| kind.extension() == extension)?;
            Some((id.to_owned(), xxh3.to_owned()))
        });
        named.collect()
    }

    /// Ids of the finished backups, oldest first.
    pub fn ids(&self) -> Result<Vec<String>, Failure> {
        let dir = self.dir.join("backups");
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(&dir, &error)),
        };
        let mut ids: Vec<String> = entries
            .flatten()
            .filter(|entry| entry.path().join(MANIFEST).exists())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        ids.sort();
        Ok(ids)
    }

    /// The manifest of a backup, its own checksum verified.
    pub fn read(&self, id: &str) -> Result<Manifest, Failure> {
        let path = self.backup(id).join(MANIFEST);
        let text = fs::read_to_string(&path).map_err(|error| failed(&path, &error))?;
        parse(&text).map_err(|reason| Failure::new(format!("{}: {reason}", path.display())))
    }

    /// Makes a backup count. Everything that it lists is durable already.
    pub fn write(&self, manifest: &Manifest) -> Result<(), Failure> {
        let path = self.backup(&manifest.id).join(MANIFEST);
        let manifest = Manifest {
            format: SEALED.format.to_owned(),
            version: version_of(manifest),
            ..manifest.clone()
        };
        let text = format(&manifest).map_err(|error| Failure::new(error.to_string()))?;
        replace(&path, text.as_bytes()).map_err(|error| failed(&path, &error))
    }
}

/// The oldest version that says all of it.
fn version_of(manifest: &Manifest) -> u64 {
    if manifest.stores.iter().all(|store| store.blobs.is_empty()) {
        VERSION_WITHOUT_BLOBS
    } else {
        VERSION
    }
}

fn format(manifest: &Manifest) -> Result<String, serde_json::Error> {
    Ok(seal(&serde_json::to_string_pretty(manifest)?))
}

fn parse(text: &str) -> Result<Manifest, String> {
    serde_json::from_value(SEALED.open(text)?).map_err(|error| error.to_string())
}

/// Hexadecimal form of a checksum.
pub fn hex(xxh3: u128) -> String {
    format!("{xxh3:032x}")
}

/// Length and checksum of a file's content.
pub fn hash_file(path: &Path) -> io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let mut hasher = Xxh3::new();
    let bytes = feed(&mut file, &mut hasher, &mut io::sink())?;
    Ok((bytes, hex(hasher.digest128())))
}

/// Reads `from` to its end, hashing, and writes it to `to`.
pub fn feed(from: &mut impl Read, hasher: &mut Xxh3, to: &mut impl Write) -> io::Result<u64> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut bytes = 0;
    loop {
        let read = from.read(&mut piece)?;
        if read == 0 {
            return Ok(bytes);
        }
        hasher.update(&piece[..read]);
        to.write_all(&piece[..read])?;
        bytes += u64::try_from(read).unwrap_or(u64::MAX);
    }
}

/// Replaces a file: written beside, synced, renamed over, directory synced.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let fresh = path.with_extension("new");
    let mut file = File::create(&fresh)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&fresh, path)?;
    sync_dir(path.parent().unwrap_or(Path::new(".")))
}

/// Makes the names in a directory durable.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// A failure at a path.
pub fn failed(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::new(format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            format: SEALED.format.into(),
            version: VERSION,
            id: "0000018bcfe5680001ab".into(),
            stores: vec![StoreFiles {
                dir: "shard-00".into(),
                files: Vec::new(),
                tables: vec![Item {
                    name: "0000000000000001".into(),
                    bytes: 4096,
                    xxh3: "00".into(),
                }],
                blobs: Vec::new(),
                log: None,
            }],
            ..Manifest::default()
        }
    }

    #[test]
    fn a_manifest_comes_back_and_every_change_of_it_is_noticed() {
        let text = format(&manifest()).unwrap();
        assert_eq!(parse(&text).unwrap(), manifest());
        for len in 0..text.len() {
            assert!(parse(&text[..len]).is_err(), "{len} bytes");
        }
        for at in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] ^= 1;
            let changed = String::from_utf8(bytes).unwrap();
            assert!(parse(&changed).is_err(), "byte {at}");
        }
    }

    #[test]
    fn another_version_is_refused_by_name() {
        let later = Manifest {
            version: VERSION + 1,
            ..manifest()
        };
        let reason = parse(&format(&later).unwrap()).unwrap_err();
        assert!(reason.contains("version Some(3)"), "{reason}");
    }

    #[test]
    fn a_backup_with_blobs_has_a_version_that_older_builds_refuse() {
        let mut manifest = manifest();
        assert_eq!(version_of(&manifest), 1);
        manifest.stores[0].blobs = vec![Item::default()];
        assert_eq!(version_of(&manifest), 2);
    }
}
