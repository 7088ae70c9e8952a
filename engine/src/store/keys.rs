//! Master keys of an open store: which are in use, and going over to another.
//!
//! Not on a request's path. New keys are taken at once for whatever is begun from then on: the next
//! frame of the log goes into a segment of its own, the next table, the next edit of the manifest. What lies
//! under an older key stays readable as long as that key is given, and leaves when it is merged or
//! flushed; [`crate::Store::compact`] makes all of it leave.

use std::cell::RefCell;
use std::collections::BTreeMap;

use torc_env::{Env, mutation};

use super::Inner;
use super::supply::unlisting;
use crate::crypt::{KeyId, Keys, MissingKey, Sealing};
use crate::error::WriteError;

impl<E: Env> super::Store<E> {
    /// Takes other master keys: what is written from now on is encrypted with their active one. All
    /// that [`Store::files_by_key`](Self::files_by_key) names must be among them.
    ///
    /// # Errors
    /// When a key that is in use is missing. Nothing has changed then.
    pub fn set_keys(&self, keys: &Keys) -> Result<(), MissingKey> {
        if let Some(missing) = self.missing_key(keys) {
            return Err(missing);
        }
        self.0.keys.replace(keys.clone());
        self.0.manifest.set_keys(keys);
        Ok(())
    }

    /// The master keys as last given.
    pub fn keys(&self) -> Keys {
        self.0.keys.borrow().clone()
    }

    /// A key that is in use and not among `keys`.
    pub fn missing_key(&self, keys: &Keys) -> Option<MissingKey> {
        let known = keys.ids();
        let in_use = self.files_by_key().into_keys().flatten();
        let active = self.0.active_key().into_iter();
        let mut needed = active.chain(self.0.writing.ids()).chain(in_use);
        let needed = needed.find(|id| !known.contains(id))?;
        Some(MissingKey { needed, known })
    }

    /// The files of the store by the master key that each needs; `None` for those in the clear. Files of
    /// its snapshots are not counted.
    pub fn files_by_key(&self) -> BTreeMap<Option<KeyId>, u64> {
        let mut files = BTreeMap::new();
        let mut count = |key| *files.entry(key).or_default() += 1;
        self.0.manifest.key_ids().into_iter().for_each(&mut count);
        if !mutation::on("keys_of_log_forgotten") {
            self.0.supply.borrow().keys().for_each(&mut count);
        }
        self.0.tables.borrow().keys().for_each(count);
        files
    }
}

/// The master keys under which files are being written that nobody lists yet.
#[derive(Default)]
pub(super) struct Writing(RefCell<BTreeMap<KeyId, usize>>);

impl Writing {
    /// Files under `key` are begun. They count until what this returns is dropped: not before they are listed.
    pub(super) fn begin(&self, key: Option<KeyId>) -> BeingWritten<'_> {
        if let Some(key) = key {
            *self.0.borrow_mut().entry(key).or_default() += 1;
        }
        BeingWritten { keys: &self.0, key }
    }

    fn ids(&self) -> Vec<KeyId> {
        self.0.borrow().keys().copied().collect()
    }
}

/// See [`Writing::begin`].
#[must_use]
pub(super) struct BeingWritten<'a> {
    keys: &'a RefCell<BTreeMap<KeyId, usize>>,
    key: Option<KeyId>,
}

impl Drop for BeingWritten<'_> {
    fn drop(&mut self) {
        let mut keys = self.keys.borrow_mut();
        if let Some(key) = self.key
            && let Some(count) = keys.get_mut(&key)
        {
            *count -= 1;
            if *count == 0 {
                keys.remove(&key);
            }
        }
    }
}

impl<E: Env> Inner<E> {
    /// The key that new files are encrypted with.
    pub(super) fn active_key(&self) -> Option<KeyId> {
        self.keys.borrow().active()
    }

    /// What a job reads and writes tables with.
    pub(super) fn sealing(&self) -> Sealing {
        Sealing::new(&self.keys.borrow(), &self.env)
    }

    /// Brings manifest and log under the active key. Flushes what the log holds under another.
    pub(super) async fn rekey_log(&self) -> Result<(), WriteError> {
        let active = self.active_key();
        let stale = self.manifest.key_ids().iter().any(|id| *id != active);
        if stale && let Err(cause) = self.manifest.rekey().await {
            self.poison_with(&cause);
            self.check_open()?;
        }
        let is_stale = || self.supply.borrow().keys().any(|key| key != active);
        if !is_stale() {
            return Ok(());
        }
        self.segments
            .until(|| {
                if self.supply.borrow_mut().pass_over_stale(active) {
                    // The log may be waiting for the one that was given up, and nobody else makes another be made.
                    self.segments.ring();
                }
                if self.supply.borrow().is_under(active) || self.is_stopping() {
                    return Some(());
                }
                // Again whenever the log went on in a segment that was made under an older key.
                self.health.rekey_wanted.set(true);
                self.work.ring();
                None
            })
            .await;
        self.flush_all().await?;
        let flushed = self.manifest.state().flushed.sequence;
        let retired = self.supply.borrow().retirable(flushed);
        // A flush may have unlisted some meanwhile.
        self.edit_with(|state| unlisting(&retired, state).collect())
            .await?;
        let surplus = self.supply.borrow_mut().retire(&retired, active);
        self.remove_segments(&surplus).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use torc_env::{Token, TreeId};
    use torc_sim::{Cuts, SimEnv, at_every_power_cut};

    use crate::crypt::{audit, test_keys};
    use crate::options::Options;
    use crate::record::{Kind, Record};
    use crate::store::{Decision, Store};

    const TREE: TreeId = TreeId(1);

    fn options() -> Options {
        Options {
            keys: test_keys(&[1]),
            memtable_bytes: 1 << 20,
            wal_segment_bytes: 1 << 20,
            ..Options::new("shard-00")
        }
    }

    async fn put(store: &Store<SimEnv>, stamp: u64, len: usize) {
        let key = [u8::try_from(stamp % 5).unwrap()];
        let record = Record {
            kind: Kind::Value,
            stamp,
            expires_at_ms: 0,
            value: Bytes::from(vec![1; len]),
        };
        let decide = |_: Option<&Record>| Decision::Write(record, ());
        let token = Token::of(TREE, &key);
        let (_, ticket) = store.update(TREE, token, &key, decide).await.unwrap();
        ticket.wait().await.unwrap();
    }

    async fn workload(env: SimEnv) {
        audit::reset();
        let (store, _) = Store::open(env.clone(), options()).await.unwrap();
        for stamp in 0..12 {
            put(&store, stamp, if stamp == 5 { 700_000 } else { 900 }).await;
            if stamp % 4 == 3 {
                store.flush().await.unwrap();
            }
        }
        store.compact().await.unwrap();
        put(&store, 12, 900).await;
        store.close().await.unwrap();
        let (store, _) = Store::open(env, options()).await.unwrap();
        put(&store, 13, 900).await;
        store.set_keys(&test_keys(&[1, 2])).unwrap();
        put(&store, 14, 900).await;
        store.compact().await.unwrap();
    }

    /// Goes on where power was cut, twice, with other content than was there.
    async fn go_on(env: SimEnv) {
        let options = Options {
            keys: test_keys(&[1, 2]),
            ..options()
        };
        for round in 1..3 {
            let (store, _) = Store::open(env.clone(), options.clone()).await.unwrap();
            put(&store, 100 * round, 300).await;
            store.flush().await.unwrap();
            put(&store, 100 * round + 1, 300).await;
            store.compact().await.unwrap();
            store.close().await.unwrap();
            assert!(audit::sealed() > 10);
        }
    }

    #[test]
    fn no_nonce_is_used_twice_whenever_power_is_cut() {
        let cuts = Cuts {
            variants: 3,
            ..Cuts::default()
        };
        let images =
            at_every_power_cut::<(), _, _>(&cuts, |env, _| workload(env), |env, _| go_on(env));
        assert!(images > 300, "{images} images");
    }

    #[cfg(mutations)]
    mod mutations {
        use std::panic::{AssertUnwindSafe, catch_unwind};

        use torc_env::mutation;

        #[test]
        fn a_nonce_used_twice_is_found() {
            mutation::select(Some("share_salts"));
            let test = super::no_nonce_is_used_twice_whenever_power_is_cut;
            let found = catch_unwind(AssertUnwindSafe(test)).is_err();
            mutation::select(None);
            assert!(found);
        }
    }
}
