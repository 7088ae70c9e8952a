//! Opening a store: manifest, tables, log, in this order.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use torc_env::{Class, DirEntry, Disk, Env, TokenRange};

use super::archive::Archiving;
use super::compact::ExpiryClock;
use super::damage::Damages;
use super::keys::Writing;
use super::load::{Loaded, load_tables, missing};
use super::memory::Memory;
use super::pacing::Pacing;
use super::snapshot::Hold;
use super::supply::{Live, Retired, Supply};
use super::tables::{DataFile, Tables};
use super::{Health, Inner, Store};
use crate::ahead::AheadBudget;
use crate::blob::blob_id;
use crate::cache::{BlockCache, RecordCache};
use crate::error::{OpenError, PUT_BACK};
use crate::frame::Mark;
use crate::le::len64;
use crate::manifest::{Change, Loss, Manifest, State};
use crate::options::{Options, WAL_SEGMENT_BYTES_MIN};
use crate::signal::{Signal, Turn};
use crate::table::{table_id, table_path};
use crate::wal::{self, FLAG_CLOSED, FLAG_UNSYNCED, Log, Replayed, SegmentId};

/// What an open found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Tables listed.
    pub tables: usize,
    /// Their size in bytes.
    pub table_bytes: u64,
    /// Log frames that were not yet in tables.
    pub frames: u64,
    /// Records in them.
    pub records: u64,
    /// The store had been closed; nothing was in flight.
    pub clean: bool,
    /// Acknowledged updates may be missing, and nobody knows which: a policy that acknowledges before it syncs met a
    /// crash, or the store was restored from a snapshot. Reported at every open until [`Store::forget_amnesia`].
    pub amnesia: bool,
    /// What damage in log or tables has cost, now or before. Reported at every open until
    /// [`Store::set_losses`].
    pub losses: Vec<Loss>,
    /// The first log frame that was durable once and cannot be read any more.
    pub damaged_from: Option<u64>,
    /// Tables that cannot be opened any more, and were set aside: what they held is missing.
    pub damaged_tables: usize,
}

pub(super) async fn open<E: Env>(
    env: E,
    options: Options,
) -> Result<(Store<E>, Recovery), OpenError> {
    let dir = options.dir.clone();
    let (wal_dir, tables_dir) = (dir.join("wal"), dir.join("tables"));
    let disk = env.disk();
    for path in [&dir, &wal_dir, &tables_dir] {
        disk.create_dir(path)
            .await
            .map_err(io_error(path, "create"))?;
        // What a lost process had named, but not yet synced, is made durable before it is believed.
        disk.sync_dir(path).await.map_err(io_error(path, "sync"))?;
    }
    let space = disk.space().await.map_err(io_error(&dir, "measure"))?;
    let options = options.clamped(space.total_bytes, env.shard_count());

    let files = Files::list(disk, &wal_dir, &tables_dir).await?;
    let keys = options.keys.clone();
    let fresh = files.are_none().then(|| State {
        losses: options.was_here.then_some(ANYTHING).into_iter().collect(),
        ..State::default()
    });
    let manifest = Manifest::open(&env, &dir, fresh, &keys).await?;
    let state = manifest.state().clone();
    files.check_listed(&state, &wal_dir, &tables_dir)?;

    let file_ids = files.tables.keys().chain(files.blobs.keys());
    let next_file_id = file_ids.map(|id| id + 1).max().unwrap_or(1);
    let mut tables = Tables::new(
        next_file_id
            .max(state.file_id_floor)
            .max(options.file_id_first),
    );
    let loaded = load_tables(disk, &tables_dir, &state, &mut tables, &keys).await?;
    let seqno = loaded.seqno;
    let mut memory = Memory::new(
        TokenRange::of_shard(env.shard(), env.shard_count()),
        torc_env::map::hasher(&env),
        state.flushed,
        seqno.max(state.seqno_floor),
        state.dropped.clone(),
        options.memtable_bytes,
    );
    let mut records = 0;
    let mut oldest_seqno = u64::MAX;
    let replayed = wal::replay(
        disk,
        &wal_dir,
        &state.segments,
        state.flushed,
        &keys,
        |seqno, logged| {
            records += 1;
            oldest_seqno = oldest_seqno.min(seqno);
            memory.replay(logged.tree, &logged.entry(seqno));
        },
    )
    .await?;
    let last = replayed.end.last;
    memory.passed(last);

    manifest.take_over().await?;
    let recovery = judge(&state, &replayed, records, &loaded);
    let supply = settle(
        &manifest,
        &state,
        &files,
        &Past {
            replayed: &replayed,
            recovery: &recovery,
            oldest_seqno,
            // Nothing that was decided before is still to come.
            archive_reach_us: options
                .archive
                .is_some()
                .then(|| env.wall().0.saturating_sub(1)),
        },
        loaded.changes,
    )
    .await
    .map_err(|cause| OpenError::Io {
        path: dir.clone(),
        doing: "write the manifest",
        source: std::io::Error::other(cause.to_string()),
    })?;

    let cache = RecordCache::new(options.cache_bytes, torc_env::map::hasher(&env));
    let blocks = BlockCache::beside(&cache, options.cache_blocks_percent);
    let scans = AheadBudget::new(options.scan_bytes_max);
    let pacing = Pacing::new(options.memtable_bytes);
    let store = Rc::new(Inner {
        cache,
        blocks,
        scans,
        clock: ExpiryClock::new(&env),
        env,
        options,
        keys: RefCell::new(keys),
        writing: Writing::default(),
        wal_dir,
        tables_dir,
        manifest,
        memory: RefCell::new(memory),
        tables: RefCell::new(tables),
        supply: RefCell::new(supply),
        health: Health::default(),
        counts: RefCell::default(),
        work: Signal::default(),
        segments: Signal::default(),
        sync: Signal::default(),
        flush: Signal::default(),
        compaction: Signal::default(),
        compacting: Turn::default(),
        compacted_last: Cell::new(None),
        pacing,
        damages: Damages::default(),
        hold: Hold::default(),
        archiving: Archiving::default(),
        writing_tasks: Cell::new(0),
        stopped: Signal::default(),
    });
    store.health.written.set(last.sequence);
    store.health.synced.set(last.sequence);
    store.count(|counts| {
        counts.corrupt_blocks = len64(loaded.damaged.len());
    });
    let damaged: Vec<DataFile> = loaded
        .damaged
        .iter()
        .copied()
        .map(DataFile::Table)
        .collect();
    store.set_aside(&damaged).await;
    remove_orphans(&store, &files, &state, !damaged.is_empty()).await;
    store.look_at_space().await;
    start(&store, last, recovery.damaged_from.is_some());
    Ok((Store(store), recovery))
}

/// Starts the store's tasks.
fn start<E: Env>(store: &Rc<Inner<E>>, last: Mark, is_damaged: bool) {
    let env = &store.env;
    let is_full = {
        let memory = store.memory.borrow();
        memory.is_active_full(store.options.memtable_bytes)
    };
    // A damaged log is not needed any more once what it gave is in tables.
    if is_full || is_damaged {
        store.memory.borrow_mut().seal();
    }
    store.spawn(
        Class::Foreground,
        Rc::clone(store).run_commits(Log::new(last)),
    );
    store.spawn(Class::Foreground, Rc::clone(store).run_supply());
    if !store.options.fsync.is_synced() {
        store.spawn(Class::Foreground, Rc::clone(store).run_syncs());
    }
    store.spawn(Class::Flush, Rc::clone(store).run_flushes());
    if store.options.archive.is_some() {
        store.spawn(Class::Flush, Rc::clone(store).run_archive());
        env.spawn(Class::Control, Rc::clone(store).run_archive_clock());
    }
    store.spawn(Class::Flush, Rc::clone(store).run_compactions());
    env.spawn(Class::Control, Rc::clone(store).run_space_watch());
}

/// The files that are there.
struct Files {
    segments: BTreeMap<SegmentId, u64>,
    tables: BTreeMap<u64, u64>,
    blobs: BTreeMap<u64, u64>,
}

impl Files {
    async fn list<D: Disk>(disk: &D, wal_dir: &Path, tables_dir: &Path) -> Result<Self, OpenError> {
        let list = |entries: Vec<DirEntry>| entries.into_iter().filter(|entry| !entry.is_dir);
        let wal = disk
            .list(wal_dir)
            .await
            .map_err(io_error(wal_dir, "list"))?;
        let tables = disk
            .list(tables_dir)
            .await
            .map_err(io_error(tables_dir, "list"))?;
        Ok(Self {
            segments: list(wal)
                .filter_map(|entry| Some((SegmentId::from_name(&entry.name)?, entry.len)))
                .collect(),
            tables: list(tables.clone())
                .filter_map(|entry| Some((table_id(&entry.name)?, entry.len)))
                .collect(),
            blobs: list(tables)
                .filter_map(|entry| Some((blob_id(&entry.name)?, entry.len)))
                .collect(),
        })
    }

    fn are_none(&self) -> bool {
        self.segments.is_empty() && self.tables.is_empty() && self.blobs.is_empty()
    }

    /// Everything that the manifest lists must be there. Checked before anything is removed.
    fn check_listed(
        &self,
        state: &State,
        wal_dir: &Path,
        tables_dir: &Path,
    ) -> Result<(), OpenError> {
        let corrupt = |path: PathBuf, detail: String| OpenError::Corrupt {
            path,
            offset: 0,
            detail,
        };
        for id in &state.segments {
            if !self.segments.contains_key(id) {
                let detail =
                    format!("the manifest lists this log segment, but it is missing: {PUT_BACK}");
                return Err(corrupt(id.path(wal_dir), detail));
            }
        }
        for table in state.tables.values() {
            if !self.tables.contains_key(&table.file_id) {
                let path = table_path(tables_dir, table.file_id);
                return Err(missing(path, "the manifest lists this table"));
            }
        }
        Ok(())
    }
}

/// What damage in the log costs, and a store that is gone: whatever was in it.
const ANYTHING: Loss = Loss {
    tree: None,
    range: TokenRange::ALL,
    is_accepted: false,
};

/// What the replay says about the past.
fn judge(state: &State, replayed: &Replayed, records: u64, loaded: &Loaded) -> Recovery {
    let end = &replayed.end;
    let clean = end.gap.is_none() && end.last_flags & FLAG_CLOSED != 0;
    let was_unsynced = end.last_flags & FLAG_UNSYNCED != 0 && !clean;
    if was_unsynced {
        tracing::warn!("the last run acknowledged before it synced, and was not closed");
    }
    let mut losses = state.losses.clone();
    losses.extend(&loaded.losses);
    losses.extend(end.gap.as_ref().map(|_| ANYTHING));
    Recovery {
        tables: state.tables.len(),
        table_bytes: state.tables.values().map(|table| table.bytes).sum(),
        frames: replayed.frames,
        records,
        clean,
        amnesia: state.suspect || was_unsynced,
        losses,
        damaged_from: end.gap.as_ref().map(|gap| gap.missing_from),
        damaged_tables: loaded.damaged.len(),
    }
}

/// What the replay found.
struct Past<'a> {
    replayed: &'a Replayed,
    recovery: &'a Recovery,
    /// Of the records replayed.
    oldest_seqno: u64,
    /// Up to when everything is in the log, for the archive; `None` without one.
    archive_reach_us: Option<u64>,
}

/// Sorts the segments into those with frames and those to be recycled, and puts what the manifest
/// must know, `changes` to tables included, into one edit.
async fn settle<E: Env>(
    manifest: &Manifest<E>,
    state: &State,
    files: &Files,
    past: &Past<'_>,
    mut changes: Vec<Change>,
) -> Result<Supply<super::FileOf<E>>, Rc<str>> {
    let Past {
        replayed,
        recovery,
        oldest_seqno,
        archive_reach_us,
    } = *past;
    let active = manifest.active_key();
    let mut live = VecDeque::new();
    let mut retired = Vec::new();
    let is_damaged = recovery.damaged_from.is_some();
    let segments = state.segments.iter().enumerate();
    let archives = archive_reach_us.is_some();
    let last_used = replayed.segment_last.iter().rposition(Option::is_some);
    for (index, id) in segments {
        let bytes = replayed.segment_bytes[index];
        let last = replayed.segment_last[index];
        let key = replayed.segment_keys[index];
        let reach_us = archive_reach_us.filter(|_| last_used == Some(index));
        let kept = Live {
            id: *id,
            bytes,
            end: replayed.segment_ends[index],
            last: last.unwrap_or(0),
            is_exact: false,
            reach_us: reach_us.unwrap_or(0),
            is_archived: !archives || last.is_none(),
            key,
        };
        match last {
            Some(last) if last > state.flushed.sequence || is_damaged || archives => {
                live.push_back(kept);
            }
            // A segment without a frame may be the damaged one: it stays as evidence.
            None if is_damaged => live.push_back(kept),
            _ => {
                changes.push(Change::RemoveSegment(*id));
                // Without a frame nothing says what an earlier life of the file has left in it.
                if active.is_none() || last.is_some() && key == active {
                    retired.push(Retired {
                        id: *id,
                        bytes,
                        key,
                    });
                }
            }
        }
    }
    if recovery.amnesia && !state.suspect {
        changes.push(Change::Suspect(true));
    }
    if is_damaged {
        changes.push(Change::Lost(ANYTHING));
    }
    for (tree, seqno) in &state.dropped {
        if *seqno < oldest_seqno {
            changes.push(Change::ForgetDrop { tree: *tree });
        }
    }
    manifest.commit(&changes).await?;
    let unlisted = files.segments.iter();
    let unlisted = unlisted.filter(|_| active.is_none());
    // A shorter one is what an interrupted creation left.
    let unlisted = unlisted
        .filter(|(id, bytes)| !state.segments.contains(id) && **bytes >= WAL_SEGMENT_BYTES_MIN);
    retired.extend(unlisted.map(|(id, bytes)| Retired {
        id: *id,
        bytes: *bytes,
        key: None,
    }));
    Ok(Supply::new(live, retired, archives))
}

/// Removes what neither the manifest lists nor recycling needs. Everything listed was found before. Blobs are set
/// aside when a table is damaged (`keep_blobs`): it may be the one that refers to them.
async fn remove_orphans<E: Env>(store: &Inner<E>, files: &Files, state: &State, keep_blobs: bool) {
    let listed: BTreeSet<u64> = state.tables.values().map(|table| table.file_id).collect();
    let unlisted = files.tables.keys().filter(|id| !listed.contains(id));
    let orphans: Vec<DataFile> = unlisted.copied().map(DataFile::Table).collect();
    store.remove_files(&orphans).await;
    let used = store.tables.borrow().blob_ids();
    let unused = files.blobs.keys().filter(|id| !used.contains(id));
    let orphans: Vec<DataFile> = unused.copied().map(DataFile::Blob).collect();
    if keep_blobs {
        store.set_aside(&orphans).await;
    } else {
        store.remove_files(&orphans).await;
    }
    store.supply.borrow_mut().retire(&[], store.active_key());
    let unneeded: Vec<SegmentId> = {
        let supply = store.supply.borrow();
        let unlisted = files.segments.keys().filter(|id| !supply.knows(**id));
        unlisted.copied().collect()
    };
    store.remove_segments(&unneeded).await;
}

fn io_error(path: &Path, doing: &'static str) -> impl FnOnce(std::io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| OpenError::Io {
        path,
        doing,
        source,
    }
}
