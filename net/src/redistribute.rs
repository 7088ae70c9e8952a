//! Divides a node's data among another number of shards, at a start and before anything is served.
//!
//! The new stores are made beside the old ones; the identity file then says, in one durable step, that
//! they are the stores. A crash before that step leaves the old ones in force, after it the new ones,
//! and the next start removes the others.

use torc_cluster::redistribute::{carry_over, is_divided};
use torc_engine::{Layout, Mark, Options, RedistributeError, Redistribution, redistribute};
use torc_env::{Env, ShardId};
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

/// Brings the data to `shards` shards, if it is not there yet. Durable on return.
///
/// # Errors
/// When a store cannot be read or written; the data is as it was then.
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
    done.map_err(|reason| ServerError::Redistribute { reason })?;
    boot.change_layout(&config.node.data_dir, to)?;
    tracing::info!(shards, "the data is redistributed");
    Ok(())
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
