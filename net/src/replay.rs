//! Brings restored stores forward: replays archived segments of the log onto them, up to a moment.
//!
//! Used by `torc restore` on a data directory that no node has; runs one shard, which opens all stores of the layout. Records go to
//! the store that owns them in that layout, whatever layout they were logged under. Records later than the moment, and what a node
//! only kept about itself, are left out ([`torc_cluster::restore`]).
//!
//! Not durable before [`run`] returns; what is repeated after a crash is the whole restore.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use torc_cluster::restore::{Moment, moment, owner};
use torc_cluster::topology::Topology;
use torc_engine::archive::read::Replay;
use torc_engine::archive::trailer::Trailer;
use torc_engine::{EntryRef, Fsync, Keys, Layout, Mark, Options, Record, Store, WriteError};
use torc_env::{Env, NodeId, TreeId};
use torc_runtime::{Runtime, RuntimeConfig, StartError};

/// Memory of one store's memtables meanwhile.
const MEMTABLE_BYTES: usize = 32 << 20;

/// What is to be replayed.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where the stores are.
    pub data_dir: PathBuf,
    /// Whose they are.
    pub node: NodeId,
    /// How they divide the ring.
    pub layout: Layout,
    /// Master keys: those of the segments, and the active one for what is written.
    pub keys: Keys,
    /// The keyspaces at the moment.
    pub topology: Option<Topology>,
    /// Logs of stores, those of an older layout first.
    pub logs: Vec<Log>,
    /// The moment, in microseconds since 1970.
    pub until_us: u64,
}

/// What of one store's log.
#[derive(Clone, Debug)]
pub struct Log {
    /// The last frame that the stores hold already.
    pub mark: Mark,
    /// Archived segments, in order.
    pub segments: Vec<PathBuf>,
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// Segments read.
    pub segments: u64,
    /// Records applied.
    pub records: u64,
    /// Records left out because they are later.
    pub later: u64,
    /// The newest stamp applied, in microseconds since 1970.
    pub newest_us: u64,
}

/// Why a restore stops.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The shard that does it cannot run.
    #[error(transparent)]
    Runtime(#[from] StartError),
    /// A segment cannot be read or used.
    #[error("{}: {reason}", path.display())]
    Segment {
        /// The segment.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A restored store cannot be opened or written.
    #[error("cannot write the restored stores: {reason}")]
    Store {
        /// Why.
        reason: String,
    },
}

/// Replays `plan`, and tells `progress` of the bytes of each segment that is done. Durable on return.
///
/// # Errors
/// When a segment is damaged or sealed under a key that is not given, or the device refuses. The stores are then neither what they
/// were nor what they should become.
pub fn run<P>(
    plan: Plan,
    background: torc_runtime::Background,
    progress: P,
) -> Result<Replayed, ReplayError>
where
    P: Fn(u64) + Clone + Send + 'static,
{
    let runtime = RuntimeConfig {
        node: plan.node,
        background,
        ..RuntimeConfig::new(&plan.data_dir)
    };
    let plan = Arc::new(plan);
    Runtime::block_on(&runtime, move |handle| {
        let (env, plan, progress) = (handle.env().clone(), Arc::clone(&plan), progress.clone());
        async move {
            let mut replaying = Replaying::open(&env, &plan).await?;
            for log in &plan.logs {
                replaying.log(log, &progress).await?;
            }
            replaying.close().await
        }
    })?
}

struct Replaying<'a, E: Env> {
    env: &'a E,
    plan: &'a Plan,
    stores: Vec<Store<E>>,
    done: Replayed,
}

impl<'a, E: Env> Replaying<'a, E> {
    async fn open(env: &'a E, plan: &'a Plan) -> Result<Self, ReplayError> {
        let mut stores = Vec::new();
        for shard in plan.layout.shards() {
            let options = Options {
                // All is done again after a crash; closing makes it durable.
                fsync: Fsync::Never,
                keys: plan.keys.clone(),
                memtable_bytes: MEMTABLE_BYTES,
                cache_bytes: 0,
                strategy: None,
                level0_runs_max: usize::MAX,
                file_id_first: plan.layout.file_id_first(shard),
                ..Options::new(plan.layout.dir(shard))
            };
            let opened = Store::open(env.clone(), options).await;
            stores.push(opened.map_err(|error| store_error(&error))?.0);
        }
        Ok(Self {
            env,
            plan,
            stores,
            done: Replayed::default(),
        })
    }

    async fn log(&mut self, log: &Log, progress: &impl Fn(u64)) -> Result<(), ReplayError> {
        let mut replay = Replay::new(log.mark);
        for path in &log.segments {
            let failed = |reason: String| ReplayError::Segment {
                path: path.clone(),
                reason,
            };
            let file = std::fs::read(path).map_err(|error: io::Error| failed(error.to_string()))?;
            let (trailer, body) =
                Trailer::open(&file).map_err(|found| failed(found.to_string()))?;
            let mut frames = replay.segment(&trailer, body, &self.plan.keys);
            loop {
                let frame = frames.next_frame();
                let Some(frame) = frame.map_err(|error| failed(error.to_string()))? else {
                    break;
                };
                for (tree, entry) in frame.records() {
                    self.record(path, tree, &entry).await?;
                }
                self.env.give_way().await;
            }
            self.done.segments += 1;
            progress(trailer.body_bytes);
        }
        Ok(())
    }

    async fn record(
        &mut self,
        path: &Path,
        tree: TreeId,
        entry: &EntryRef<'_>,
    ) -> Result<(), ReplayError> {
        let when = moment(self.plan.topology.as_ref(), tree, entry);
        let when = when.map_err(|error| ReplayError::Segment {
            path: path.to_owned(),
            reason: format!("a record that holds no state: {error}"),
        })?;
        match when {
            Moment::Never => return Ok(()),
            Moment::At(stamp) if stamp > self.plan.until_us => {
                self.done.later += 1;
                return Ok(());
            }
            Moment::At(stamp) => self.done.newest_us = self.done.newest_us.max(stamp),
            Moment::Always => {}
        }
        let record = Record {
            kind: entry.kind,
            stamp: entry.stamp,
            expires_at_ms: entry.expires_at_ms,
            value: Bytes::copy_from_slice(entry.value),
        };
        let shard = owner(tree, entry).shard(self.plan.layout.shards);
        let store = &self.stores[usize::from(shard.0)];
        self.done.records += 1;
        loop {
            match store.append(tree, entry.key, &record).await {
                // Whether it was written, closing says.
                Ok(_ticket) => return Ok(()),
                Err(WriteError::Overloaded { .. }) => {
                    store.flush().await.map_err(|error| store_error(&error))?;
                }
                Err(error) => return Err(store_error(&error)),
            }
        }
    }

    async fn close(self) -> Result<Replayed, ReplayError> {
        for store in &self.stores {
            store.flush().await.map_err(|error| store_error(&error))?;
            store.close().await.map_err(|error| store_error(&error))?;
        }
        Ok(self.done)
    }
}

fn store_error(error: &dyn std::fmt::Display) -> ReplayError {
    ReplayError::Store {
        reason: error.to_string(),
    }
}
