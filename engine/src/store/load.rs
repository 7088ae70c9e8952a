//! Opening the tables that the manifest lists, and doing without those that are damaged.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use futures_util::{StreamExt, TryStreamExt, stream};
use torc_env::{Disk, TokenRange, TreeId};

use super::damage::{Damage, without};
use super::tables::{Opened, Tables, changes_of};
use crate::blob::{Blob, BlobFile};
use crate::crypt::Keys;
use crate::error::{OpenError, ReadError};
use crate::levels::{Levels, TableRef};
use crate::manifest::{Change, Listed, Loss, State};
use crate::table::{Table, TableInfo, table_path};

/// Tables opened at the same time.
const OPENING_MAX: usize = 16;

/// What came of the listed tables.
pub(super) struct Loaded {
    /// The highest sequence number in one.
    pub(super) seqno: u64,
    /// Files that cannot be opened for damage.
    pub(super) damaged: Vec<u64>,
    /// What they held.
    pub(super) losses: Vec<Loss>,
    /// What the manifest must be told of them.
    pub(super) changes: Vec<Change>,
}

/// Opens every listed table. One that is damaged is cut out, with what older ones say of its
/// tokens: the rest of the store serves.
pub(super) async fn load_tables<D: Disk>(
    disk: &D,
    dir: &Path,
    state: &State,
    tables: &mut Tables<D>,
    keys: &Keys,
) -> Result<Loaded, OpenError> {
    let file_ids: BTreeSet<u64> = state.tables.values().map(|table| table.file_id).collect();
    let opened: Vec<Result<Table<D>, u64>> = stream::iter(file_ids)
        .map(|file_id| async move {
            match Table::open(disk, dir, file_id, keys).await {
                Ok(table) => Ok(Ok(table)),
                Err(error @ ReadError::Corrupt { .. }) => {
                    tracing::error!(%error, "a table cannot be opened and is set aside");
                    Ok(Err(file_id))
                }
                Err(error) => Err(OpenError::from(error)),
            }
        })
        .buffered(OPENING_MAX)
        .try_collect()
        .await?;
    let mut by_id = BTreeMap::new();
    let mut loaded = Loaded {
        seqno: 0,
        damaged: Vec::new(),
        losses: Vec::new(),
        changes: Vec::new(),
    };
    let (blobs, broken) = open_blobs(disk, dir, opened.iter().flatten(), keys).await?;
    for table in opened {
        match table {
            Ok(table) => {
                loaded.seqno = loaded.seqno.max(table.info().seqnos.max);
                let file_id = table.info().file_id;
                if blobs_of(&table).any(|blob| broken.contains(&blob.file_id)) {
                    loaded.damaged.push(file_id);
                } else {
                    by_id.insert(file_id, (Rc::new(table.info().clone()), table));
                }
            }
            Err(file_id) => loaded.damaged.push(file_id),
        }
    }
    let mut trees: BTreeMap<TreeId, Levels> = BTreeMap::new();
    for listed in state.tables.values() {
        let info = match by_id.get(&listed.file_id) {
            Some((info, _)) => Rc::clone(info),
            None => {
                loaded.losses.push(Loss {
                    tree: Some(listed.tree),
                    range: listed.extent,
                    is_accepted: false,
                });
                Rc::new(stand_in(listed))
            }
        };
        if info.tree != listed.tree {
            return Err(OpenError::Corrupt {
                path: table_path(dir, listed.file_id),
                offset: 0,
                detail: format!("expected tree {}, found {}", listed.tree.0, info.tree.0),
            });
        }
        trees.entry(listed.tree).or_default().insert(TableRef {
            info,
            level: listed.level,
            run: listed.run,
            extent: listed.extent,
        });
    }
    for (tree, levels) in trees {
        let damages: Vec<Damage> = loaded
            .damaged
            .iter()
            .map(|file_id| Damage {
                tree,
                file_id: *file_id,
                range: TokenRange::ALL,
            })
            .collect();
        let left = without(&levels, tree, &damages);
        loaded
            .changes
            .extend(changes_of(tree, &levels.edit_to(&left)));
        let edit = Levels::new().edit_to(&left);
        let in_use: BTreeSet<u64> = left.tables().map(|table| table.info.file_id).collect();
        let of_tree = in_use.iter().filter_map(|file_id| by_id.get(file_id));
        let of_tree: Vec<Table<D>> = of_tree.map(|(_, table)| table.clone()).collect();
        let used: BTreeSet<u64> = of_tree
            .iter()
            .flat_map(blobs_of)
            .map(|file| file.file_id)
            .collect();
        let opened = Opened {
            blobs: used.iter().map(|file_id| blobs[file_id].clone()).collect(),
            tables: of_tree,
        };
        tables.apply(tree, &edit, opened);
    }
    let losses = loaded.losses.iter().copied();
    loaded.changes.extend(losses.map(Change::Lost));
    Ok(loaded)
}

fn blobs_of<D: Disk>(table: &Table<D>) -> impl Iterator<Item = BlobFile> {
    table.info().blobs.iter().map(|used| used.file)
}

/// Opens every blob to which a table refers, and names those that are not as long as they were, which takes the tables
/// that refer to them with it. One that is missing fails the open, as a missing table does: somebody has removed it.
async fn open_blobs<D: Disk>(
    disk: &D,
    dir: &Path,
    tables: impl Iterator<Item = &Table<D>>,
    keys: &Keys,
) -> Result<(BTreeMap<u64, Blob<D>>, BTreeSet<u64>), OpenError> {
    let files: BTreeMap<u64, BlobFile> = tables
        .flat_map(blobs_of)
        .map(|file| (file.file_id, file))
        .collect();
    let opened: Vec<Result<Blob<D>, u64>> = stream::iter(files.into_values())
        .map(|file| async move {
            match Blob::open(disk, dir, &file, keys).await {
                Ok(blob) => {
                    blob.check_version().await?;
                    Ok(Ok(blob))
                }
                Err(error @ ReadError::Corrupt { .. }) => {
                    tracing::error!(%error, "a blob is damaged: tables that refer to it are set aside with it");
                    Ok(Err(file.file_id))
                }
                Err(ReadError::Io { path, source, .. })
                    if source.kind() == io::ErrorKind::NotFound =>
                {
                    Err(missing(path, "a table refers to this blob"))
                }
                Err(error) => Err(OpenError::from(error)),
            }
        })
        .buffered(OPENING_MAX)
        .try_collect()
        .await?;
    let (mut blobs, mut broken) = (BTreeMap::new(), BTreeSet::new());
    for blob in opened {
        match blob {
            Ok(blob) => drop(blobs.insert(blob.file().file_id, blob)),
            Err(file_id) => drop(broken.insert(file_id)),
        }
    }
    Ok((blobs, broken))
}

/// A file that must be there is not.
pub(super) fn missing(path: PathBuf, who: &str) -> OpenError {
    OpenError::Corrupt {
        path,
        offset: 0,
        detail: format!(
            "{who}, but it is missing: put it back, or, if it is lost for good and others have the data, an empty \
             file in its place, which is taken for a damaged one"
        ),
    }
}

/// What stands for a table that cannot be opened until it is cut out.
fn stand_in(listed: &Listed) -> TableInfo {
    TableInfo {
        file_id: listed.file_id,
        tree: listed.tree,
        bytes: listed.bytes,
        first_token: listed.extent.first,
        last_token: listed.extent.last,
        ..TableInfo::default()
    }
}
