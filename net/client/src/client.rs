//! A client of one node: one connection a shard, each request to the shard that owns its key.

use std::net::SocketAddr;
use std::time::Duration;

use torc_env::{ShardId, Token, TreeId};

use crate::answer::{Got, Outcome, Page, Written, unexpected};
use crate::connection::{Answered, Connection};
use crate::error::ClientError;
use crate::wire::message::{
    ArchivedAnswer, ArchivedOutcome, Delete, Get, Level, Operation, Put, Request, Scan, Single,
    Write,
};

/// How a client behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// Keyspace that requests are about. Default `default`.
    pub keyspace: String,
    /// How long the node may take for a request, 1 ms to 60 s. Default 5 s.
    pub timeout: Duration,
    /// How long connecting may take. Default 2 s.
    pub connect_timeout: Duration,
    /// Replicas that must answer a read.
    pub r: Level,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            keyspace: "default".into(),
            timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(2),
            r: Level::Quorum,
        }
    }
}

/// A blocking client of one node. Connects when it is first needed, and again when a connection has
/// broken.
#[derive(Debug)]
pub struct Client {
    address: SocketAddr,
    options: Options,
    /// By shard; filled as they are needed.
    connections: Vec<Option<Connection>>,
    /// The keyspace's id, which goes into the hash of its keys; learned with the first connection.
    keyspace: Option<TreeId>,
}

impl Client {
    /// A client of the node whose binary protocol listens at `address`. Does not connect yet.
    pub fn new(address: SocketAddr, options: Options) -> Client {
        Client {
            address,
            options,
            connections: Vec::new(),
            keyspace: None,
        }
    }

    /// Reads a key. Sent again by itself when the connection was broken.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn get(&mut self, key: &[u8]) -> Result<Got, ClientError> {
        let r = self.options.r;
        let operation = Operation::Single(Single::Get(Get { key, r }));
        let answered = self.call(Some(key), operation, true)?;
        match answered.answer()? {
            ArchivedAnswer::Single(ArchivedOutcome::Got(got)) => {
                Ok(Got::of(&answered.payload, got))
            }
            other => Err(unexpected("get", other)),
        }
    }

    /// Writes a key as [`Write::default`] says: over whatever a read would find.
    ///
    /// # Errors
    /// See [`ClientError::in_doubt`] for whether it may have happened all the same.
    pub fn put(&mut self, key: &[u8], value: &[u8]) -> Result<Written, ClientError> {
        self.put_with(key, value, None, Write::default())
    }

    /// Writes a key, with everything that can be said about it.
    ///
    /// # Errors
    /// See [`ClientError::in_doubt`] for whether it may have happened all the same.
    pub fn put_with(
        &mut self,
        key: &[u8],
        value: &[u8],
        ttl_seconds: Option<u64>,
        write: Write<'_>,
    ) -> Result<Written, ClientError> {
        // A write that carries its own name is applied once however often it is sent.
        let again = write.idempotency.is_some();
        let operation = Operation::Single(Single::Put(Put {
            key,
            value,
            ttl_seconds,
            write,
        }));
        self.write(key, operation, again)
    }

    /// Deletes a key, whether or not it exists.
    ///
    /// # Errors
    /// See [`ClientError::in_doubt`] for whether it may have happened all the same.
    pub fn delete(&mut self, key: &[u8]) -> Result<Written, ClientError> {
        self.delete_with(key, Write::default())
    }

    /// Deletes a key, with everything that can be said about it.
    ///
    /// # Errors
    /// See [`ClientError::in_doubt`] for whether it may have happened all the same.
    pub fn delete_with(&mut self, key: &[u8], write: Write<'_>) -> Result<Written, ClientError> {
        let again = write.idempotency.is_some();
        let operation = Operation::Single(Single::Delete(Delete { key, write }));
        self.write(key, operation, again)
    }

    fn write(
        &mut self,
        key: &[u8],
        operation: Operation<'_>,
        again: bool,
    ) -> Result<Written, ClientError> {
        let answered = self.call(Some(key), operation, again)?;
        match answered.answer()? {
            ArchivedAnswer::Single(ArchivedOutcome::Written(written)) => {
                Ok(Written::of(&answered.payload, written))
            }
            other => Err(unexpected("write", other)),
        }
    }

    /// Carries out many operations, each for itself; the outcomes are in the same order.
    ///
    /// # Errors
    /// When the batch as a whole was refused or lost.
    pub fn batch(&mut self, operations: Vec<Single<'_>>) -> Result<Vec<Outcome>, ClientError> {
        let reads_only = operations.iter().all(|one| matches!(one, Single::Get(_)));
        let answered = self.call(None, Operation::Batch(operations), reads_only)?;
        match answered.answer()? {
            ArchivedAnswer::Batch(outcomes) => {
                let outcomes = outcomes.iter();
                Ok(outcomes
                    .map(|outcome| Outcome::of(&answered.payload, outcome))
                    .collect())
            }
            other => Err(unexpected("batch", other)),
        }
    }

    /// One page of keys; give its cursor back to get the next one.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn scan(
        &mut self,
        prefix: &[u8],
        cursor: Option<&str>,
        limit: u32,
        values: bool,
    ) -> Result<Page, ClientError> {
        let scan = Scan {
            cursor,
            limit,
            prefix,
            values,
            r: self.options.r,
        };
        let answered = self.call(None, Operation::Scan(scan), true)?;
        match answered.answer()? {
            ArchivedAnswer::Page(page) => Ok(Page::of(&answered.payload, page)),
            other => Err(unexpected("scan", other)),
        }
    }

    /// Sends a request to the shard that owns `key` (or to any) and waits for the answer. `again`: it
    /// may be sent a second time when the connection breaks under it.
    fn call(
        &mut self,
        key: Option<&[u8]>,
        operation: Operation<'_>,
        again: bool,
    ) -> Result<Answered, ClientError> {
        let timeout_ms = self.options.timeout.as_millis().clamp(1, 60_000);
        let keyspace = self.options.keyspace.clone();
        let request = Request {
            timeout_ms: u32::try_from(timeout_ms).expect("clamped to a minute"),
            keyspace: keyspace.as_bytes(),
            operation,
        };
        let shard = match key {
            Some(key) => self.shard_of(key)?,
            None => 0,
        };
        // A connection that was idle may have been closed by the node long ago.
        let had_connection = self.connections.get(shard).is_some_and(Option::is_some);
        let outcome = self.connection(shard)?.call(&request);
        match outcome {
            Err(error) if error.is_fatal() => {
                if let Some(connection) = self.connections.get_mut(shard) {
                    *connection = None;
                }
                if again && had_connection {
                    return self.connection(shard)?.call(&request);
                }
                Err(error)
            }
            other => other,
        }
    }

    /// The index of the shard that owns `key`.
    fn shard_of(&mut self, key: &[u8]) -> Result<usize, ClientError> {
        if self.keyspace.is_none() {
            self.learn_route()?;
        }
        let count = u16::try_from(self.connections.len().max(1)).unwrap_or(u16::MAX);
        let token = Token::of(self.keyspace.unwrap_or_default(), key);
        Ok(usize::from(token.shard(count).0))
    }

    fn learn_route(&mut self) -> Result<(), ClientError> {
        let answered = self.call(None, Operation::Route, true)?;
        match answered.answer()? {
            ArchivedAnswer::Route(route) => {
                self.keyspace = Some(TreeId(route.keyspace.to_native()));
                Ok(())
            }
            other => Err(unexpected("route", other)),
        }
    }

    fn connection(&mut self, shard: usize) -> Result<&mut Connection, ClientError> {
        let mut index = shard;
        if self.connections.get(shard).is_none_or(Option::is_none) {
            let wanted = u16::try_from(shard).map(ShardId).ok();
            let options = &self.options;
            let connection = Connection::connect(self.address, wanted, options.connect_timeout)?;
            // The node answers within the request's timeout; silence beyond that is a fault.
            let patience = options.timeout + options.connect_timeout;
            connection.set_read_timeout(Some(patience))?;
            let count = usize::from(connection.welcome().shard_count).max(1);
            if count != self.connections.len() {
                // The first connection, or another node answers at this address now. Any shard
                // takes any request, so this one is good enough for the request under way.
                self.connections.clear();
                self.connections.resize_with(count, || None);
                self.keyspace = None;
                index = shard.min(count - 1);
            }
            self.connections[index] = Some(connection);
        }
        let connection = self.connections[index].as_mut();
        Ok(connection.expect("filled by the branch above"))
    }
}
