//! RESP commands, carried out on the keyspace `default`.
//!
//! A client of this protocol carries no contexts, so every write reads what is there first: nothing
//! is left behind as a sibling when nothing runs concurrently. When there are siblings all the same,
//! a read answers with the newest one by stamp; the next write replaces them all.

use std::rc::Rc;

use bytes::Bytes;
use torc_cluster::api::{
    BATCH_OPERATIONS_MAX, BatchRequest, Condition, DeleteRequest, Failure, FailureCode, GetAnswer,
    GetRequest, Level, Operation, Outcome, PutRequest, Sibling, WriteOptions, Written,
};
use torc_env::{Env, Instant};

use crate::limits::TIMEOUT_MS_DEFAULT;
use crate::resp::command::{Command, Only, Set, Ttl};
use crate::resp::reply::Reply;
use crate::service::{Service, default_keyspace};

/// How often a command that depends on the value it replaces is tried again when another write came
/// between.
const ATTEMPTS_MAX: usize = 8;

/// Carries out a command that needs the store.
pub async fn execute(service: Rc<Service>, command: Command) -> Reply {
    let run = Run {
        deadline: service.deadline(TIMEOUT_MS_DEFAULT),
        service,
    };
    match run.command(command).await {
        Ok(reply) => reply,
        Err(failure) => error(&failure),
    }
}

/// A failure as a reply. Clients that know Redis retry on the kinds that say so.
pub fn error(failure: &Failure) -> Reply {
    let kind = match failure.code {
        FailureCode::NotReady => "LOADING",
        FailureCode::DiskFull => "OOM",
        _ if failure.retryable => "TRYAGAIN",
        _ => "ERR",
    };
    let doubt = if failure.in_doubt {
        " (in doubt: it may have been applied)"
    } else {
        ""
    };
    Reply::Error(format!(
        "{kind} {}: {}{doubt}",
        failure.code.name(),
        failure.message
    ))
}

struct Run {
    service: Rc<Service>,
    deadline: Instant,
}

impl Run {
    async fn command(&self, command: Command) -> Result<Reply, Failure> {
        match command {
            Command::Local(_) => Ok(Reply::error("a local command has no business here")),
            Command::Get(key) => Ok(self.value(key).await?.map_or(Reply::Null, Reply::Bulk)),
            Command::Strlen(key) => {
                let value = self.value(key).await?.unwrap_or_default();
                Ok(count(value.len()))
            }
            Command::Type(key) => Ok(match self.value(key).await? {
                Some(_) => Reply::Status("string"),
                None => Reply::Status("none"),
            }),
            Command::Set(set) => self.set(set).await,
            Command::GetDel(key) => {
                let read = self.get(key.clone()).await?;
                let Some(value) = newest(&read).map(|sibling| sibling.value.clone()) else {
                    return Ok(Reply::Null);
                };
                self.delete(key, &read).await?;
                Ok(Reply::Bulk(value))
            }
            Command::Del(keys) => self.del(keys).await,
            Command::Exists(keys) => {
                let mut found = 0;
                for read in self.get_all(keys).await? {
                    found += usize::from(!read.siblings.is_empty());
                }
                Ok(count(found))
            }
            Command::MGet(keys) => {
                let reads = self.get_all(keys).await?;
                let values = reads.iter().map(|read| {
                    newest(read).map_or(Reply::Null, |sibling| Reply::Bulk(sibling.value.clone()))
                });
                Ok(Reply::Array(values.collect()))
            }
            Command::MSet(pairs) => self.mset(pairs).await,
            Command::Expire { key, ttl } => self.expire(key, ttl).await,
            Command::Persist(key) => self.expire(key, Ttl::Default).await,
            Command::Ttl { key, millis } => {
                let read = self.get(key).await?;
                Ok(Reply::Integer(match newest(&read) {
                    None => -2,
                    Some(sibling) if sibling.expires_at_ms == 0 => -1,
                    Some(sibling) => {
                        let left_ms = sibling.expires_at_ms.saturating_sub(self.now_ms());
                        let left = if millis {
                            left_ms
                        } else {
                            left_ms.div_ceil(1000)
                        };
                        i64::try_from(left).unwrap_or(i64::MAX)
                    }
                }))
            }
        }
    }

    async fn get(&self, key: Bytes) -> Result<GetAnswer, Failure> {
        self.service.node.get(self.read_of(key)).await
    }

    fn read_of(&self, key: Bytes) -> GetRequest {
        GetRequest {
            keyspace: default_keyspace(),
            key,
            r: Level::Quorum,
            at_least: None,
            deadline: self.deadline,
        }
    }

    async fn value(&self, key: Bytes) -> Result<Option<Bytes>, Failure> {
        let read = self.get(key).await?;
        Ok(newest(&read).map(|sibling| sibling.value.clone()))
    }

    async fn get_all(&self, keys: Vec<Bytes>) -> Result<Vec<GetAnswer>, Failure> {
        let mut reads: Vec<GetAnswer> = Vec::with_capacity(keys.len());
        let mut charge = self.service.node.held().charge();
        for part in keys.chunks(BATCH_OPERATIONS_MAX) {
            let operations = part
                .iter()
                .map(|key| Operation::Get(self.read_of(key.clone())));
            let operations = operations.collect();
            for outcome in self.service.node.batch(BatchRequest { operations }).await? {
                match outcome {
                    Outcome::Got(read) => {
                        let read = read?;
                        charge.grow(read.value_bytes())?;
                        reads.push(read);
                    }
                    Outcome::Written(written) => drop(written?),
                }
            }
        }
        Ok(reads)
    }

    fn put_of(
        &self,
        key: Bytes,
        value: Bytes,
        ttl: Option<u64>,
        write: WriteOptions,
    ) -> PutRequest {
        PutRequest {
            keyspace: default_keyspace(),
            key,
            value,
            ttl_seconds: ttl,
            write,
        }
    }

    /// A write over whatever is there.
    fn blind(&self) -> WriteOptions {
        WriteOptions {
            read_context_first: true,
            ..WriteOptions::until(self.deadline)
        }
    }

    async fn set(&self, set: Set) -> Result<Reply, Failure> {
        let needs_read = set.get || set.ttl == Ttl::Keep || set.only == Only::Present;
        let mut attempts = ATTEMPTS_MAX;
        loop {
            attempts -= 1;
            let read = if needs_read {
                Some(self.get(set.key.clone()).await?)
            } else {
                None
            };
            let old = read.as_ref().and_then(newest);
            let old_value = old.map_or(Reply::Null, |old| Reply::Bulk(old.value.clone()));
            let refusal = match (set.get, set.counted) {
                (true, _) => old_value.clone(),
                (false, true) => Reply::Integer(0),
                (false, false) => Reply::Null,
            };
            if read.is_some() && !allows(set.only, old.is_some()) {
                return Ok(refusal);
            }
            let expires_at_ms = old.map_or(0, |old| old.expires_at_ms);
            let Some(ttl) = self.ttl_seconds(set.ttl, expires_at_ms) else {
                // An expiry in the past: the value would be gone at once.
                let read = match read {
                    Some(read) => read,
                    None => self.get(set.key.clone()).await?,
                };
                if !allows(set.only, newest(&read).is_some()) {
                    return Ok(refusal);
                }
                self.delete(set.key, &read).await?;
                return Ok(if set.get { old_value } else { Reply::OK });
            };
            let condition = match (&read, set.only) {
                (_, Only::Absent) => Condition::Absent,
                (Some(read), _) if old.is_some() => Condition::Match(read.context.clone()),
                _ => Condition::None,
            };
            let is_conditional = condition != Condition::None;
            let write = WriteOptions {
                condition,
                read_context_first: !is_conditional,
                ..WriteOptions::until(self.deadline)
            };
            let put = self.put_of(set.key.clone(), set.value.clone(), ttl, write);
            match self.service.node.put(put).await {
                Ok(_) => {
                    return Ok(match (set.get, set.counted) {
                        (true, _) => old_value,
                        (false, true) => Reply::Integer(1),
                        (false, false) => Reply::OK,
                    });
                }
                Err(failure) if failure.code == FailureCode::ConditionFailed => {
                    // What the old value is, only another look can tell.
                    if set.only == Only::Absent && !set.get {
                        return Ok(refusal);
                    }
                    if attempts == 0 {
                        return Err(failure);
                    }
                    // Another write came between: look again.
                }
                Err(failure) => return Err(failure),
            }
        }
    }

    async fn delete(&self, key: Bytes, read: &GetAnswer) -> Result<Written, Failure> {
        let write = WriteOptions {
            context: Some(read.context.clone()),
            ..WriteOptions::until(self.deadline)
        };
        let delete = DeleteRequest {
            keyspace: default_keyspace(),
            key,
            write,
        };
        self.service.node.delete(delete).await
    }

    /// Deletes what is there; the reply counts what was.
    async fn del(&self, keys: Vec<Bytes>) -> Result<Reply, Failure> {
        let reads = self.get_all(keys.clone()).await?;
        let mut deletes = Vec::new();
        let mut seen: Vec<&Bytes> = Vec::new();
        for (key, read) in keys.iter().zip(&reads) {
            if read.siblings.is_empty() || seen.contains(&key) {
                continue;
            }
            seen.push(key);
            deletes.push(Operation::Delete(DeleteRequest {
                keyspace: default_keyspace(),
                key: key.clone(),
                write: WriteOptions {
                    context: Some(read.context.clone()),
                    ..WriteOptions::until(self.deadline)
                },
            }));
        }
        let deleted = deletes.len();
        self.write_all(deletes).await?;
        Ok(count(deleted))
    }

    async fn mset(&self, pairs: Vec<(Bytes, Bytes)>) -> Result<Reply, Failure> {
        let puts = pairs
            .into_iter()
            .map(|(key, value)| Operation::Put(self.put_of(key, value, None, self.blind())));
        self.write_all(puts.collect()).await?;
        Ok(Reply::OK)
    }

    /// Carries out writes; the first failure is the answer, after all were tried. It is in doubt when any of them has
    /// left something behind.
    async fn write_all(&self, mut operations: Vec<Operation>) -> Result<(), Failure> {
        let mut outcome = Ok(());
        let mut may_have_written = false;
        while !operations.is_empty() {
            let rest = operations.split_off(operations.len().min(BATCH_OPERATIONS_MAX));
            let results = match self.service.node.batch(BatchRequest { operations }).await {
                Ok(results) => results,
                Err(failure) => {
                    outcome = outcome.and(Err(failure));
                    break;
                }
            };
            for result in results {
                may_have_written |= result.may_have_written();
                outcome = outcome.and(match result {
                    Outcome::Written(written) => written.map(drop),
                    Outcome::Got(read) => read.map(drop),
                });
            }
            operations = rest;
        }
        outcome.map_err(|failure: Failure| {
            if may_have_written {
                failure.in_doubt()
            } else {
                failure
            }
        })
    }

    /// Writes the value again with another expiry.
    async fn expire(&self, key: Bytes, ttl: Ttl) -> Result<Reply, Failure> {
        for attempt in 0.. {
            let read = self.get(key.clone()).await?;
            let Some(old) = newest(&read) else {
                return Ok(Reply::Integer(0));
            };
            if ttl == Ttl::Default && old.expires_at_ms == 0 {
                return Ok(Reply::Integer(0));
            }
            let Some(ttl) = self.ttl_seconds(ttl, old.expires_at_ms) else {
                self.delete(key, &read).await?;
                return Ok(Reply::Integer(1));
            };
            let write = WriteOptions {
                condition: Condition::Match(read.context.clone()),
                ..WriteOptions::until(self.deadline)
            };
            let put = self.put_of(key.clone(), old.value.clone(), ttl, write);
            match self.service.node.put(put).await {
                Ok(_) => return Ok(Reply::Integer(1)),
                Err(failure)
                    if failure.code == FailureCode::ConditionFailed && attempt < ATTEMPTS_MAX => {}
                Err(failure) => return Err(failure),
            }
        }
        unreachable!("the last attempt returns")
    }

    fn now_ms(&self) -> u64 {
        self.service.env.wall().millis()
    }

    /// The time to live to write with, in whole seconds, rounded up; `None` when it is over.
    #[expect(
        clippy::option_option,
        reason = "no expiry and an expiry in the past differ"
    )]
    fn ttl_seconds(&self, ttl: Ttl, before_ms: u64) -> Option<Option<u64>> {
        let left_ms = |at_ms: u64| at_ms.checked_sub(self.now_ms()).filter(|left| *left > 0);
        let ms = match ttl {
            Ttl::Default => return Some(None),
            Ttl::Keep if before_ms == 0 => return Some(None),
            Ttl::Keep => left_ms(before_ms)?,
            Ttl::Millis(ms) => ms,
            Ttl::At(at_ms) => left_ms(at_ms)?,
            Ttl::Past => return None,
        };
        Some(Some(ms.div_ceil(1000)))
    }
}

/// The newest of concurrent values, by stamp.
fn newest(read: &GetAnswer) -> Option<&Sibling> {
    read.siblings.last()
}

fn allows(only: Only, exists: bool) -> bool {
    match only {
        Only::Always => true,
        Only::Absent => !exists,
        Only::Present => exists,
    }
}

fn count(number: usize) -> Reply {
    Reply::Integer(i64::try_from(number).unwrap_or(i64::MAX))
}
