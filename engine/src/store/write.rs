//! Updates: read the newest record, decide, gather.

use std::rc::Rc;

use torc_env::{Env, Token, TreeId, mutation};

use super::Inner;
use super::memory::Newest;
use crate::cache::Lookup;
use crate::commit::Fate;
use crate::error::WriteError;
use crate::le::len64;
use crate::record::{Kind, Record};

/// What an update decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision<R> {
    /// The key gets this record.
    Write(Record, R),
    /// The key stays as it is.
    Keep(R),
}

/// Tells when an update is acknowledged. Dropping it changes nothing about the update.
#[must_use = "an update is only acknowledged when its ticket says so"]
pub struct Ticket<E: Env> {
    store: Rc<Inner<E>>,
    /// The batch to wait for: the update's own, or, for a kept record, the one that wrote it.
    fate: Option<Rc<Fate>>,
}

impl<E: Env> Ticket<E> {
    /// Completes when the update is as durable as the fsync policy promises. For an update that
    /// kept a record: when that record is.
    ///
    /// # Errors
    /// See [`WriteError::in_doubt`] for what is known then.
    pub async fn wait(self) -> Result<(), WriteError> {
        match self.fate {
            Some(fate) => fate.wait().await.map(|_| ()),
            None => Ok(()),
        }
    }

    /// As [`Ticket::wait`], but durable whatever the policy: for promises that must outlive a
    /// power cut, like those of a consensus round.
    ///
    /// # Errors
    /// As for [`Ticket::wait`].
    pub async fn wait_durable(self) -> Result<(), WriteError> {
        let sequence = match self.fate {
            Some(fate) => fate.wait().await?,
            None => self.store.health.written.get(),
        };
        self.store.synced_through(sequence).await
    }
}

impl<E: Env> Inner<E> {
    pub(super) async fn update<R>(
        self: &Rc<Self>,
        tree: TreeId,
        token: Token,
        key: &[u8],
        decide: impl FnOnce(Option<&Record>) -> Decision<R>,
    ) -> Result<(R, Ticket<E>), WriteError> {
        debug_assert_eq!(token, Token::of(tree, key), "the token of the key");
        self.check_open()?;
        self.check_size(key.len(), self.options.key_bytes_max)?;
        let due = self.admitted().await?;
        let mut deadline = None;
        let (base, base_fate) = loop {
            self.hold.released(&self.env).await;
            let newest = self.newest(tree, token, key).await?;
            if self.hold.is_on(&self.env) {
                continue;
            }
            // Others may have filled memory while this one read.
            if self.may_wait_for_room() {
                let now = self.env.now();
                let deadline = *deadline.get_or_insert(now + self.options.wait_max);
                if now < deadline {
                    self.room(deadline).await;
                    continue;
                }
            }
            break newest;
        };
        // From here to the submission nothing waits, so nothing comes between.
        match decide(base.as_ref()) {
            Decision::Keep(answer) => {
                due.settle(0);
                let ticket = Ticket {
                    store: Rc::clone(self),
                    fate: base_fate,
                };
                Ok((answer, ticket))
            }
            Decision::Write(record, answer) => {
                // The store may have been closed or poisoned while the base was read.
                self.check_open()?;
                let ticket = self.submit(tree, token, key, &record)?;
                due.settle(len64(key.len() + record.value.len()));
                Ok((answer, ticket))
            }
        }
    }

    /// See [`super::Store::append`].
    pub(super) async fn append(
        self: &Rc<Self>,
        tree: TreeId,
        key: &[u8],
        record: &Record,
    ) -> Result<Ticket<E>, WriteError> {
        self.check_size(key.len(), self.options.key_bytes_max)?;
        let due = self.admitted().await?;
        self.hold.released(&self.env).await;
        self.check_open()?;
        let ticket = self.submit(tree, Token::of(tree, key), key, record)?;
        due.settle(len64(key.len() + record.value.len()));
        Ok(ticket)
    }

    /// Puts a decided record into the frame that is gathered.
    fn submit(
        self: &Rc<Self>,
        tree: TreeId,
        token: Token,
        key: &[u8],
        record: &Record,
    ) -> Result<Ticket<E>, WriteError> {
        self.check_size(record.value.len(), self.options.value_bytes_max)?;
        self.admit(record.kind, key.len() + record.value.len())?;
        let mut memory = self.memory.borrow_mut();
        let fate = memory.submit(tree, token, key, record, &self.options);
        drop(memory);
        self.count(|counts| counts.updates += 1);
        self.work.ring();
        Ok(Ticket {
            store: Rc::clone(self),
            fate: Some(fate),
        })
    }

    /// A key's newest record, pending ones included, and the fate that a pending one waits for.
    async fn newest(
        &self,
        tree: TreeId,
        token: Token,
        key: &[u8],
    ) -> Result<(Option<Record>, Option<Rc<Fate>>), WriteError> {
        loop {
            match self.memory.borrow().newest(tree, token, key) {
                Newest::Pending(record, fate) => return Ok((Some(record), Some(fate))),
                Newest::Durable(record) => return Ok((Some(record), None)),
                Newest::Absent => {}
            }
            let fill = match self.cache.lookup(tree, token, key) {
                Lookup::Hit(record) => return Ok((record, None)),
                Lookup::Miss(fill) => fill,
            };
            let generation = self.tables.borrow().generation();
            let (record, asked) = self
                .get_from_tables(tree, token, key)
                .await
                .map_err(|error| WriteError::Read(Rc::new(error)))?;
            // Whatever was written while the device read is in memory, or was even flushed: then
            // the answer may be old.
            let is_absent = matches!(
                self.memory.borrow().newest(tree, token, key),
                Newest::Absent
            );
            let is_current = is_absent && generation == self.tables.borrow().generation();
            if is_current || mutation::on("decide_on_stale_base") {
                // A place for the key: the next flush brings what is written now.
                if is_current && asked > 0 {
                    fill.fill(key, record.as_ref());
                }
                return Ok((record, None));
            }
        }
    }

    fn check_size(&self, bytes: usize, bytes_max: usize) -> Result<(), WriteError> {
        if bytes > bytes_max {
            return Err(WriteError::TooLarge { bytes, bytes_max });
        }
        Ok(())
    }

    /// Refuses a record that there is no room for. Deletions get through where values do not: they
    /// are what makes room again.
    fn admit(&self, kind: Kind, bytes: usize) -> Result<(), WriteError> {
        let memory = self.memory.borrow();
        let is_value = kind == Kind::Value;
        if is_value && self.health.disk_full.get() {
            self.count(|counts| counts.refused_full += 1);
            return Err(WriteError::DiskFull);
        }
        let mut memtable_bytes_max = self.options.memtable_bytes;
        if !is_value {
            memtable_bytes_max += memtable_bytes_max / 4;
        }
        let what = if memory.pending_bytes() + bytes > self.options.pending_bytes_max {
            "too much is waiting for the log"
        } else if memory.memtable_bytes() > memtable_bytes_max {
            "memtables are full and wait to be flushed"
        } else if is_value && self.tables.borrow().level0_runs() >= self.options.level0_runs_max {
            "tables wait to be compacted"
        } else {
            return Ok(());
        };
        self.count(|counts| counts.refused_overload += 1);
        Err(WriteError::Overloaded { what })
    }
}
