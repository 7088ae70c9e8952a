//! Divides a node's data among another number of shards, at a start and before anything is served.
//!
//! The new stores are made beside the old ones; the identity file then says, in one durable step, that
//! they are the stores. A crash before that step leaves the old ones in force, after it the new ones,
//! and the next start removes the others. What fails removes what it has made: it may be the space
//! that others on the volume need.

use torc_cluster::redistribute::{carry_over, is_divided};
use torc_engine::{Layout, Mark, Options, RedistributeError, Redistribution, redistribute};
use torc_env::disk::Space;
use torc_env::{Disk, Env, ShardId};
use torc_runtime::{Runtime, RuntimeConfig};

use crate::archive::{
    self,
    ending::{self, Ending},
};
use crate::boot::Boot;
use crate::boot::identity::Identity;
use crate::config::ServerConfig;
use crate::server::ServerError;

/// Memory of one store's memtables meanwhile; all stores of both layouts are open at once.
const MEMTABLE_BYTES: usize = 8 << 20;

/// Segments of its log that a store keeps at least, whether it writes or not: one in use, one ready.
const SEGMENTS_OF_A_STORE: u64 = 2;

/// Brings the data to `shards` shards, if it is not there yet. Durable on return.
///
/// # Errors
/// When a store cannot be read or written, or the new ones do not fit; the data is as it was then.
pub fn settle(config: &ServerConfig, boot: &mut Boot, shards: u16) -> Result<(), ServerError> {
    let from = boot.identity.layout();
    if from.shards == shards {
        return ending::take_back(config.archive.as_ref(), &boot.identity).map_err(|error| {
            ServerError::Redistribute {
                reason: format!("the archive still says that this layout has ended: {error}"),
            }
        });
    }
    let to = Layout {
        number: from.number + 1,
        shards,
    };
    tracing::info!(
        from = from.shards,
        to = shards,
        "redistributing the data over shards"
    );
    let (fsync, keys) = (config.fsync, config.keys.clone());
    let separate_from = config.storage.separate_from;
    let (archive, identity) = (config.archive.clone(), boot.identity.clone());
    let has_served = identity.has_served;
    let ended = archive.is_some().then(|| identity.clone());
    let runtime = RuntimeConfig {
        node: boot.identity.node,
        background: config.shards.background,
        ..RuntimeConfig::new(&config.node.data_dir)
    };
    let options = move |layout: Layout, shard: ShardId| Options {
        fsync,
        keys: keys.clone(),
        memtable_bytes: MEMTABLE_BYTES,
        cache_bytes: 0,
        separate_from,
        file_id_first: layout.file_id_first(shard),
        was_here: layout == from && has_served,
        // What is carried over into the new stores is in the old ones' logs.
        archive: archive::options(archive.as_ref(), &identity, layout, shard)
            .filter(|_| layout == from),
        ..Options::new(layout.dir(shard))
    };
    let done = Runtime::block_on(&runtime, move |handle| {
        let (env, options, ended) = (handle.env().clone(), options.clone(), ended.clone());
        async move {
            let space = env.disk().space().await;
            let space = space.map_err(|error| format!("cannot measure the disk: {error}"))?;
            let wal_segment_bytes = fitting_segment(space, from.shards, to.shards)?;
            let options = move |layout, shard| Options {
                wal_segment_bytes,
                ..options(layout, shard)
            };
            let done: Result<(), RedistributeError> = async {
                let stores = redistribute(&env, from, to, options, is_divided).await?;
                carry_over(&env, &stores).await?;
                if let Some(identity) = &ended {
                    let begins = stores.begins().await?;
                    end(&env, identity, &stores, begins).await;
                }
                stores.finish().await
            }
            .await;
            // The error belongs to the shard's thread; its words may leave.
            done.map_err(|error| error.to_string())
        }
    })?;
    if let Err(reason) = done {
        if let Err(error) = boot.remove_other_layouts(&config.node.data_dir) {
            tracing::warn!(
                "what the redistribution has left is removed at the next start: {error}"
            );
        }
        return Err(ServerError::Redistribute { reason });
    }
    boot.change_layout(&config.node.data_dir, to)?;
    tracing::info!(shards, "the data is redistributed");
    Ok(())
}

/// Bytes of a log segment while the stores of both layouts are open, each on its part of the volume.
///
/// # Errors
/// When their logs would take more than half of what is free.
fn fitting_segment(space: Space, from: u16, to: u16) -> Result<u64, String> {
    let stores = from.saturating_add(to);
    let segment = Options::new("").clamped(space.total_bytes, stores);
    let segment = segment.wal_segment_bytes;
    let needed = u64::from(stores) * SEGMENTS_OF_A_STORE * segment;
    if needed > space.free_bytes / 2 {
        return Err(format!(
            "the logs of {from} and {to} shards beside each other take {} MiB, more than half of the {} MiB that are \
             free: set shards.count lower, or make room",
            needed >> 20,
            space.free_bytes >> 20
        ));
    }
    Ok(segment)
}

/// Archives the rest of the old stores' logs, and that they end there. A node does not wait for an archive that does
/// not work: what it lacks then, a restore names.
async fn end<E: Env>(env: &E, identity: &Identity, stores: &Redistribution<E>, begins: Vec<Mark>) {
    let archived = async {
        for store in &stores.old {
            archive::in_time(env, store, archive::ORDER_PATIENCE).await?;
        }
        let ending = Ending {
            layout: identity.layout(),
            ends: stores.ends.clone(),
            begins,
        };
        let written = ending::write(env, identity, &ending).await;
        written.map_err(|error| error.to_string())
    };
    if let Err(reason) = archived.await {
        tracing::error!(
            "the end of the log over {} shards is not archived: {reason}; moments after the last archived one cannot be \
             restored from earlier backups: take a backup",
            stores.old.len()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn more_shards_than_the_disk_has_room_for_are_refused() {
        let space = |total_bytes, free_bytes| Space {
            total_bytes,
            free_bytes,
        };
        assert_eq!(
            fitting_segment(space(1000 * GIB, 900 * GIB), 1, 2),
            Ok(64 << 20)
        );
        // Each of a thousand stores takes no more than its part.
        let many = fitting_segment(space(100 * GIB, 57 * GIB), 1, 1000).unwrap();
        assert!(many * 2 * 1001 < 4 * GIB, "{many}");
        assert!(fitting_segment(space(256 << 20, 200 << 20), 1, 4).is_ok());
        let refused = fitting_segment(space(1000 * GIB, GIB), 1, 1000).unwrap_err();
        assert!(refused.contains("set shards.count lower"), "{refused}");
        assert!(fitting_segment(space(256 << 20, 200 << 20), 1, 1000).is_err());
    }
}
