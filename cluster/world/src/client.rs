//! Clients: each reads, writes and deletes through any node, keeps what it was shown as contexts,
//! and writes down truthfully what it asked and what it was answered.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{Either, select};
use torc_cluster::api::{
    Condition, Context, DeleteRequest, Failure, FailureCode, GetAnswer, GetRequest, Idempotency,
    Level, PutRequest, WriteOptions, Written,
};
use torc_env::{Env, Instant};
use torc_sim::Rng;

use crate::cluster::{self, Cluster, NODE_CLASS};
use crate::config::{Config, Expiry, Load};
use crate::history::{KeyId, Kind, Outcome, Read, Value, Write, WriteId};
use crate::record::Recorder;
use crate::value;

/// What a client knows of a key: the product's context, and in the checkers' terms the writes that
/// were shown with it.
#[derive(Clone, Default)]
struct Known {
    context: Context,
    seen: Vec<WriteId>,
}

impl Known {
    fn add(&mut self, write: WriteId) {
        if !self.seen.contains(&write) {
            self.seen.push(write);
        }
    }
}

/// What a client makes of silence: the process died, or stands still.
fn no_answer() -> Failure {
    Failure::refused(FailureCode::DeadlinePassed, "no answer came").in_doubt()
}

/// One client.
pub(crate) struct Client {
    number: u16,
    n: u8,
    load: Load,
    expiry: Expiry,
    keyspace: Bytes,
    cluster: Rc<Cluster>,
    recorder: Recorder,
    rng: Rng,
    /// Of its own, so that all else is the same with and without values that expire.
    expiry_rng: Rng,
    known: BTreeMap<KeyId, Known>,
}

impl Client {
    pub(crate) fn new(
        number: u16,
        config: &Config,
        cluster: &Rc<Cluster>,
        recorder: &Recorder,
    ) -> Self {
        Self {
            number,
            n: config.effective_n(),
            load: config.load.clone(),
            expiry: config.expiry,
            keyspace: cluster.keyspace(),
            cluster: cluster.clone(),
            recorder: recorder.clone(),
            rng: Rng::stream(config.seed, &format!("client {number}")),
            expiry_rng: Rng::stream(config.seed, &format!("expiry {number}")),
            known: BTreeMap::new(),
        }
    }

    /// Does all of its operations.
    pub(crate) async fn run(mut self) {
        for _ in 0..self.load.operations {
            let think_us = self.rng.within(0..=self.load.think_ms * 1_000);
            self.cluster
                .simulation()
                .sleep(Duration::from_micros(think_us))
                .await;
            let key = self.rng.below(u64::from(self.load.keys));
            let key = KeyId(u16::try_from(key).expect("a handful of keys"));
            if !self.rng.chance(self.load.writes) {
                self.read(key).await;
            } else if self.rng.chance(self.load.deletes) {
                self.write(key, Kind::Delete).await;
            } else {
                self.write(key, Kind::Put).await;
            }
        }
    }

    /// Reads most keys and deletes what it has seen: no sloppy writes, nothing unseen.
    pub(crate) async fn clean_up(mut self) {
        self.load = Load {
            blind: 0.0,
            conditional: 0.0,
            keyed: 0.0,
            sloppy: 0.0,
            ..self.load
        };
        for key in (0..self.load.keys).map(KeyId) {
            if self.rng.chance(0.9) {
                self.read(key).await;
                self.write(key, Kind::Delete).await;
            }
        }
    }

    async fn read(&mut self, key: KeyId) {
        let known = self.known.get(&key).cloned();
        let session = known.filter(|_| self.rng.chance(self.load.sessions));
        let (r, level) = self.level();
        let request = GetRequest {
            keyspace: self.keyspace.clone(),
            key: value::key(key),
            r: level,
            at_least: session.as_ref().map(|known| known.context.clone()),
            deadline: Instant(0),
        };
        let begun_ns = self.now_ns();
        let answer = self
            .ask(move |node, deadline| async move {
                node.get(GetRequest {
                    deadline,
                    ..request
                })
                .await
            })
            .await;
        let answer = answer.unwrap_or_else(|| Err(no_answer()));
        if let Err(failure) = &answer {
            self.recorder.failure(format!("read {failure}"));
        }
        let answer: Option<GetAnswer> = answer.ok();
        let values = answer.as_ref().map(|answer| {
            let values = answer.siblings.iter();
            values
                .map(|sibling| value::parse(key, &sibling.value))
                .collect::<Vec<Value>>()
        });
        let expire_ns = answer.as_ref().map(|answer| {
            let values = answer.siblings.iter();
            values
                .map(|sibling| cluster::expires_ns(sibling.expires_at_ms))
                .collect::<Vec<_>>()
        });
        self.recorder.read(Read {
            client: self.number,
            key,
            r,
            at_least: session.as_ref().map(|known| known.seen.clone()),
            begun_ns,
            ended_ns: self.now_ns(),
            values: values.clone(),
            expire_ns: expire_ns.unwrap_or_default(),
        });
        let (Some(answer), Some(values)) = (answer, values) else {
            return;
        };
        // An answer that covers the session's context extends it; any other replaces it.
        let mut next = Known {
            context: answer.context,
            seen: session.map_or_else(Vec::new, |known| known.seen),
        };
        for write in values.iter().filter_map(Value::write) {
            next.add(write);
        }
        self.known.insert(key, next);
    }

    async fn write(&mut self, key: KeyId, kind: Kind) {
        let known = self.known.get(&key).cloned();
        let known = known.filter(|_| !self.rng.chance(self.load.blind));
        let (mut w, mut level) = self.level();
        let mut options = WriteOptions::until(Instant(0));
        options.sloppy = self.rng.chance(self.load.sloppy);
        let context = known.as_ref().map(|known| known.context.clone());
        if self.rng.chance(self.load.conditional) {
            (w, level) = (self.n / 2 + 1, Level::Quorum);
            options.sloppy = false;
            options.condition = context.map_or(Condition::Absent, Condition::Match);
        } else {
            options.context = context;
        }
        options.w = level;
        let seen = known.map_or_else(Vec::new, |known| known.seen);
        let ttl_seconds = match kind {
            Kind::Put => self.expiry.draw_seconds(&mut self.expiry_rng),
            Kind::Delete => None,
        };
        let default = Some(self.expiry.default_seconds);
        let default = default.filter(|seconds| kind == Kind::Put && *seconds > 0);
        let lives_seconds = ttl_seconds.or(default);
        let id = self.recorder.begin(Write {
            client: self.number,
            key,
            kind,
            seen: seen.clone(),
            w,
            sloppy: options.sloppy,
            lives_ns: lives_seconds.map(|seconds| seconds * 1_000_000_000),
            is_retried: false,
            begun_ns: self.now_ns(),
            ended_ns: u64::MAX,
            outcome: Outcome::InDoubt("never answered".to_owned()),
        });
        if self.rng.chance(self.load.keyed) {
            options.idempotency = Some(Idempotency {
                id: u128::from(id.0) << 64 | u128::from(self.rng.number()),
                body_hash: u64::from(id.0),
            });
        }
        let length = self.rng.log_within(1..=self.load.value_bytes);
        let value = (kind == Kind::Put).then(|| value::of(key, id, length));
        let value = value.map(|value| (value, ttl_seconds));
        let answer = self.attempt(id, key, value, options).await;
        let outcome = match &answer {
            Ok(written) => Outcome::Done {
                replicas: written.replicas,
                hints: written.hints,
            },
            Err(failure) if failure.in_doubt => Outcome::InDoubt(failure.to_string()),
            Err(failure) => Outcome::Refused(failure.to_string()),
        };
        self.recorder.end(id, self.now_ns(), outcome);
        if let Ok(written) = answer {
            let mut next = Known {
                context: written.context,
                seen,
            };
            next.add(id);
            self.known.insert(key, next);
        }
    }

    /// Sends a write; one that has a name of its own until it is answered for good. What any
    /// attempt left in doubt stays so until one is done.
    async fn attempt(
        &mut self,
        id: WriteId,
        key: KeyId,
        value: Option<(Bytes, Option<u64>)>,
        options: WriteOptions,
    ) -> Result<Written, Failure> {
        let attempts = if options.idempotency.is_some() { 5 } else { 1 };
        let mut doubt = false;
        let mut last = Err(no_answer());
        for attempt in 0..attempts {
            if attempt > 0 {
                self.recorder.retried(id);
            }
            let answer = match &value {
                Some((value, ttl_seconds)) => {
                    let value = value.clone();
                    self.put(key, value, *ttl_seconds, options.clone()).await
                }
                None => self.delete(key, options.clone()).await,
            };
            last = answer.unwrap_or_else(|| Err(no_answer()));
            let Err(failure) = &last else { break };
            self.recorder.failure(format!("write {failure}"));
            doubt |= failure.in_doubt;
            if !failure.in_doubt && !failure.retryable {
                break;
            }
        }
        last.map_err(|failure| Failure {
            in_doubt: doubt,
            ..failure
        })
    }

    async fn put(
        &mut self,
        key: KeyId,
        value: Bytes,
        ttl_seconds: Option<u64>,
        write: WriteOptions,
    ) -> Option<Result<Written, Failure>> {
        let request = PutRequest {
            keyspace: self.keyspace.clone(),
            key: value::key(key),
            value,
            ttl_seconds,
            write,
        };
        self.ask(move |node, deadline| async move {
            let write = WriteOptions {
                deadline,
                ..request.write.clone()
            };
            node.put(PutRequest { write, ..request }).await
        })
        .await
    }

    async fn delete(
        &mut self,
        key: KeyId,
        write: WriteOptions,
    ) -> Option<Result<Written, Failure>> {
        let request = DeleteRequest {
            keyspace: self.keyspace.clone(),
            key: value::key(key),
            write,
        };
        self.ask(move |node, deadline| async move {
            let write = WriteOptions {
                deadline,
                ..request.write.clone()
            };
            node.delete(DeleteRequest { write, ..request }).await
        })
        .await
    }

    /// Sends a request to any shard of any node that runs, and waits for its answer as long as a
    /// client with a socket would: `None` when the process dies or nothing comes.
    async fn ask<T: 'static, F: Future<Output = T> + 'static>(
        &mut self,
        request: impl FnOnce(crate::cluster::SimNode, Instant) -> F + 'static,
    ) -> Option<T> {
        let patience =
            Duration::from_millis(self.rng.log_within(20..=self.load.patience_ms.max(20)));
        let (env, node) = loop {
            match self.cluster.any_node(&mut self.rng) {
                Some(found) => break found,
                None => {
                    let pause = Duration::from_millis(50);
                    self.cluster.simulation().sleep(pause).await;
                }
            }
        };
        let deadline = env.now() + patience;
        let answer = env.execute(NODE_CLASS, request(node, deadline));
        let gives_up = self.cluster.simulation().sleep(patience * 2);
        match select(answer, std::pin::pin!(gives_up)).await {
            Either::Left((answer, _)) => answer,
            Either::Right(_) => None,
        }
    }

    fn level(&mut self) -> (u8, Level) {
        if self.load.mixed_levels {
            let count = u8::try_from(self.rng.within(1..=u64::from(self.n))).unwrap_or(1);
            return (count, Level::Count(count));
        }
        (self.n / 2 + 1, Level::Quorum)
    }

    fn now_ns(&self) -> u64 {
        cluster::civil_ns(self.cluster.simulation())
    }
}
