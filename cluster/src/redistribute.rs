//! What a shard keeps besides the keyspaces, when a node's data is divided among another number of
//! shards.
//!
//! Runs at a start, before any shard serves. The engine has given the new stores the keyspaces' tables
//! ([`torc_engine::redistribute`]); here each hint goes to the shard that owns its key, and every shard is
//! told what any of the old ones had to remember: the highest clock mark, and that data may be missing.
//!
//! Invariants: no hint that can be read is lost or shadowed; no new shard believes itself whole when an old one did not.

use bytes::Bytes;
use torc_engine::{
    Decision, Entry, Kind, Record, RedistributeError, Redistribution, ScanFrom, ScanLimits, Store,
    Ticket, WriteError,
};
use torc_env::{Env, ShardId, Token, TreeId, mutation};

use crate::anti_entropy::catch_up;
use crate::clock_mark;
use crate::core::tree;
use crate::hint;
use crate::own_trees;

const PAGE: ScanLimits = ScanLimits {
    records: 256,
    bytes: 1 << 20,
};

/// Whether each record of a tree belongs to the shard that owns its token: all keyspaces' do.
pub fn is_divided(tree: TreeId) -> bool {
    !tree::is_own(tree)
}

/// Carries over what [`is_divided`] leaves out. Durable when the new stores are closed.
///
/// # Errors
/// When a store cannot be read or written.
pub async fn carry_over<E: Env>(
    env: &E,
    stores: &Redistribution<E>,
) -> Result<(), RedistributeError> {
    let mut clock = 0;
    let mut lacks_data = false;
    for (store, shard) in stores.old.iter().zip((0..).map(ShardId)) {
        let remembered = own_trees::remembered::<E, RedistributeError>(env, shard, store).await?;
        clock = clock.max(remembered.clock_mark);
        lacks_data |= remembered.lacks_data;
        let mut from = ScanFrom::Token(Token(0));
        loop {
            let page = match store
                .scan(tree::HINTS, from.clone(), Token::MAX, PAGE)
                .await
            {
                Ok(page) => page,
                Err(error) => {
                    own_trees::cut_out::<E, RedistributeError>(store, error).await?;
                    continue;
                }
            };
            let mut tickets = Vec::new();
            for entry in &page.entries {
                tickets.extend(carry_hint(entry, &stores.new).await?);
            }
            for ticket in tickets {
                ticket.wait().await?;
            }
            match page.next {
                Some(next) => from = next,
                None => break,
            }
            env.give_way().await;
        }
    }
    for (store, shard) in stores.new.iter().zip((0..).map(ShardId)) {
        let clock = Bytes::copy_from_slice(&u64::to_le_bytes(clock));
        write_mark(store, &clock_mark::key(shard), clock).await?;
        if lacks_data {
            write_mark(store, &catch_up::mark_key(shard), Bytes::new()).await?;
        }
    }
    Ok(())
}

async fn write_mark<E: Env>(
    store: &Store<E>,
    key: &str,
    value: Bytes,
) -> Result<(), RedistributeError> {
    let record = Record {
        kind: Kind::Value,
        stamp: 0,
        expires_at_ms: 0,
        value,
    };
    let token = Token::of(tree::SYSTEM, key.as_bytes());
    let write = |_: Option<&Record>| Decision::Write(record.clone(), ());
    let ((), ticket) = update(store, tree::SYSTEM, token, key.as_bytes(), write).await?;
    Ok(ticket.wait().await?)
}

/// An update that makes room in memory when there is none: nobody else writes.
async fn update<E: Env, R>(
    store: &Store<E>,
    tree: TreeId,
    token: Token,
    key: &[u8],
    decide: impl Fn(Option<&Record>) -> Decision<R>,
) -> Result<(R, Ticket<E>), RedistributeError> {
    loop {
        match store.update(tree, token, key, &decide).await {
            Err(WriteError::Overloaded { .. }) => store.flush().await?,
            done => return Ok(done?),
        }
    }
}

/// Gives a hint to its new shard; the ticket says when it is durable there.
async fn carry_hint<E: Env>(
    entry: &Entry,
    new: &[Store<E>],
) -> Result<Option<Ticket<E>>, RedistributeError> {
    if entry.record.kind != Kind::Value || mutation::on("redistribution_forgets_hints") {
        return Ok(None);
    }
    let shards = u16::try_from(new.len()).unwrap_or(u16::MAX);
    let owner = hint::token_of_key(&entry.key).unwrap_or(entry.token);
    let store = &new[usize::from(owner.shard(shards).0)];
    let join = |known: Option<&Record>| {
        let known = known.filter(|known| known.kind == Kind::Value);
        let record = match known {
            None => Some(entry.record.clone()),
            Some(known) => hint::joined(&entry.key, known, &entry.record),
        };
        match record {
            Some(record) => Decision::Write(record, true),
            None => Decision::Keep(false),
        }
    };
    let (is_kept, ticket) = update(store, tree::HINTS, entry.token, &entry.key, join).await?;
    if !is_kept {
        tracing::error!("two hints for one key cannot be merged; repair makes up for the second");
    }
    Ok(Some(ticket))
}

#[cfg(test)]
mod tests {
    use torc_engine::{Layout, Options, redistribute};
    use torc_sim::{SimEnv, Simulation};

    use super::*;
    use crate::hint::tests::stored_hint;

    /// Little memory, so that few hints make many tables.
    fn options(layout: Layout, shard: ShardId) -> Options {
        Options {
            memtable_bytes: 32 << 10,
            file_id_first: layout.file_id_first(shard),
            ..Options::new(layout.dir(shard))
        }
    }

    #[test]
    fn hints_that_fill_many_memtables_are_carried_over() {
        const HINTS: usize = 2_000;
        torc_sim::run(61, |env| async move {
            let from = Layout {
                number: 0,
                shards: 1,
            };
            let to = Layout {
                number: 1,
                shards: 2,
            };
            let (store, _) = Store::open(env.clone(), options(from, ShardId(0)))
                .await
                .unwrap();
            let mut tickets = Vec::new();
            for number in 0..HINTS {
                let (token, key, record) = stored_hint(&format!("key {number}"), 1_000);
                let write = |_: Option<&Record>| Decision::Write(record.clone(), ());
                let ticket = loop {
                    match store.update(tree::HINTS, token, &key, write).await {
                        Ok(((), ticket)) => break ticket,
                        Err(WriteError::Overloaded { .. }) => store.compact().await.unwrap(),
                        Err(error) => panic!("{error}"),
                    }
                };
                tickets.push(ticket);
            }
            for ticket in tickets {
                ticket.wait().await.unwrap();
            }
            store.close().await.unwrap();
            drop(store);

            let stores = redistribute(&env, from, to, options, is_divided)
                .await
                .unwrap();
            carry_over(&env, &stores).await.unwrap();
            let mut found = 0;
            for store in &stores.new {
                found += hint_count(store).await;
            }
            assert_eq!(found, HINTS);
            stores.finish().await.unwrap();
        });
    }

    async fn hint_count(store: &Store<SimEnv>) -> usize {
        let limits = ScanLimits {
            records: 1 << 20,
            bytes: usize::MAX,
        };
        let from = ScanFrom::Token(Token(0));
        let page = store.scan(tree::HINTS, from, Token::MAX, limits).await;
        page.unwrap().entries.len()
    }

    async fn keep_hint(store: &Store<SimEnv>, key: &str) {
        let (token, key, record) = stored_hint(key, 1_000);
        let write = |_: Option<&Record>| Decision::Write(record.clone(), ());
        let ((), ticket) = update(store, tree::HINTS, token, &key, write)
            .await
            .unwrap();
        ticket.wait().await.unwrap();
    }

    /// Every table of the store rots, and the store is divided in two.
    #[test]
    fn damage_in_hints_and_marks_is_cut_out_and_no_new_shard_believes_itself_whole() {
        let [from, to] = [(0, 1), (1, 2)].map(|(number, shards)| Layout { number, shards });
        let simulation = Simulation::new(62, torc_sim::Options::default());
        let host = simulation.add_host(1);
        let fill = |env: SimEnv| async move {
            let (store, _) = Store::open(env, options(from, ShardId(0))).await.unwrap();
            write_mark(
                &store,
                &clock_mark::key(ShardId(0)),
                Bytes::from_static(b"12345678"),
            )
            .await
            .unwrap();
            keep_hint(&store, "lost").await;
            store.flush().await.unwrap();
            keep_hint(&store, "kept").await;
            store.close().await.unwrap();
        };
        simulation.run_on(host, ShardId(0), fill).expect("it runs");
        for (path, _) in simulation.files(host) {
            if path.extension().is_some_and(|name| name == "table") {
                assert!(simulation.flip_bits(host, &path, 20, 1));
            }
        }
        let divide = move |env: SimEnv| async move {
            let stores = redistribute(&env, from, to, options, is_divided)
                .await
                .unwrap();
            carry_over(&env, &stores).await.unwrap();
            let mut hints = 0;
            for (store, shard) in stores.new.iter().zip((0..).map(ShardId)) {
                assert!(catch_up::is_marked(shard, store).await.unwrap(), "{shard}");
                hints += hint_count(store).await;
            }
            assert_eq!(hints, 1, "the one that can be read");
            stores.finish().await.unwrap();
        };
        simulation
            .run_on(host, ShardId(0), divide)
            .expect("it runs");
    }
}
