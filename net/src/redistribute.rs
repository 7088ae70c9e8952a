//! Divides a node's data among another number of shards, at a start and before anything is served.
//!
//! The new stores are made beside the old ones; the identity file then says, in one durable step, that
//! they are the stores. A crash before that step leaves the old ones in force, after it the new ones,
//! and the next start removes the others.

use torc_cluster::redistribute::{carry_over, is_divided};
use torc_engine::{Layout, Options, RedistributeError, redistribute};
use torc_env::ShardId;
use torc_runtime::{Runtime, RuntimeConfig};

use crate::boot::Boot;
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
        return Ok(());
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
        ..Options::new(layout.dir(shard))
    };
    let done = Runtime::block_on(&runtime, move |handle| {
        let (env, options) = (handle.env().clone(), options.clone());
        async move {
            let done: Result<(), RedistributeError> = async {
                let stores = redistribute(&env, from, to, options, is_divided).await?;
                carry_over(&env, &stores).await?;
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
