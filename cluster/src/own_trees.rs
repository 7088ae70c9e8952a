//! The trees of a store that are no keyspace's, when they are damaged.
//!
//! No other node has what they held, so nobody is waited for, as for damage in the data: it is cut out where it is met, at
//! the start, at a change of the number of shards, or while the shard runs. In the same durable step the store says
//! that it lacks something. What that costs:
//!
//! - **The mark that a shard lacks data.** A start that has lost it takes the shard for one that does; so what it has
//!   lost is fetched, or nothing is.
//! - **The clock's mark.** A running shard writes it anew. A start without it begins at civil time: such a shard asks
//!   all owners of its ranges before it mints, and stamps a write above all that it knows of the key.
//! - **Hints.** Their books are made anew, so that nobody waits for them, and all ranges are due for repair.
//!
//! The actor stays: no dot was minted with what these trees hold.

use torc_engine::{Damage, Loss, ReadError, Store, WriteError};
use torc_env::{Env, ShardId};

use crate::anti_entropy::catch_up;
use crate::api::Failure;
use crate::clock_mark;
use crate::core::{Core, tree};
use crate::replica::write_failure;

/// What earlier lives of a shard have left word of.
pub(crate) struct Remembered {
    /// See [`clock_mark::read`].
    pub(crate) clock_mark: u64,
    /// The shard is not whole.
    pub(crate) lacks_data: bool,
}

/// Reads what the store remembers of `shard`. What is damaged is cut out first, durably.
pub(crate) async fn remembered<E: Env, X>(
    env: &E,
    shard: ShardId,
    store: &Store<E>,
) -> Result<Remembered, X>
where
    X: From<ReadError> + From<WriteError>,
{
    loop {
        let read = async {
            Ok(Remembered {
                clock_mark: clock_mark::read(env, store).await?,
                lacks_data: catch_up::is_marked(shard, store).await?,
            })
        };
        let error = match read.await {
            Ok(found) => {
                let losses = store.losses();
                let has_lost_some = losses
                    .iter()
                    .any(|loss| loss.tree.is_some_and(tree::is_own));
                return Ok(Remembered {
                    lacks_data: found.lacks_data || has_lost_some,
                    ..found
                });
            }
            Err(error) => error,
        };
        let cut: Result<(), X> = cut_out(store, error).await;
        cut?;
    }
}

fn own_damages<E: Env>(store: &Store<E>) -> Vec<Damage> {
    let mut damages = store.damages();
    damages.retain(|damage| tree::is_own(damage.tree));
    damages
}

/// Cuts the damage that a read of these trees has met out of the store. Durable on return.
///
/// # Errors
/// When it was not damage, and when the store cannot be written.
pub(crate) async fn cut_out<E: Env, X>(store: &Store<E>, error: ReadError) -> Result<(), X>
where
    X: From<ReadError> + From<WriteError>,
{
    let own = own_damages(store);
    if !error.is_corrupt() || own.is_empty() {
        return Err(error.into());
    }
    store.quarantine(&own).await?;
    tracing::warn!(
        %error,
        "damage in what this node keeps for itself is cut out: it asks its replicas what it lacks, and hints may be lost"
    );
    Ok(())
}

/// Cuts out what has been found of such damage while the shard runs.
pub(crate) async fn give_up_damage<E: Env>(core: &Core<E>) -> Result<(), Failure> {
    let lost = core
        .store
        .quarantine(&own_damages(&core.store))
        .await
        .map_err(|error| write_failure(&error))?;
    core.clock.mark_is_gone();
    core.hints.may_be_gone();
    core.repairs.mark_all();
    tracing::warn!(
        shard = %core.env.shard(),
        parts = lost.len(),
        "damage in what this shard keeps for itself is cut out; hints may be lost, and repair makes up for them"
    );
    Ok(())
}

/// Says that a shard that has caught up lacks nothing but what it knows to have lost, once its clock's mark leads durably
/// again: to be tried until then. That stamps are given out is no sign of it, for on a full disk they are without a mark.
/// No I/O where it is said already. The caller has the [`turn`](crate::lacking::Lacking::turn).
pub(crate) async fn made_good<E: Env>(core: &Core<E>) -> Result<(), Failure> {
    if core.clock.high_water_due(core.env.wall()).is_some() {
        return Ok(());
    }
    let said = async {
        core.store.set_losses(&core.lacking.lost()).await?;
        core.store.forget_amnesia().await
    };
    said.await
        .map_err(|error: WriteError| write_failure(&error))
}

/// What the shard remembers of losses in these trees, and in the log, where it may have been one of them.
pub(crate) fn losses<E: Env>(core: &Core<E>) -> impl Iterator<Item = Loss> {
    let losses = core.store.losses().into_iter();
    losses.filter(|loss| loss.tree.is_none_or(tree::is_own))
}
