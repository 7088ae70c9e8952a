//! What every connection of a shard shares: the way into the cluster, the counts, the flag that stops.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::lock::Mutex;
use torc_cluster::api::{Idempotency, KEYSPACE_DEFAULT};
use torc_cluster::membership::View;
use torc_cluster::node::Node;
use torc_engine::{KeyId, Store};
use torc_env::{Env, Instant, Token, TreeId};
use torc_runtime::{RealEnv, ShardHandle};

use crate::boot::identity::Identity;
use crate::config::ServerConfig;
use crate::connection::Touches;
use crate::metrics::{ShardMetrics, Snapshot};
use crate::signal::Flag;

thread_local! {
    /// The service of the shard whose thread this is.
    static CURRENT: RefCell<Option<Rc<Service>>> = const { RefCell::new(None) };
}

/// One shard, as its connections see it.
pub struct Service {
    /// The shard's world.
    pub env: RealEnv,
    /// The way to the other shards of this node.
    pub handle: ShardHandle,
    /// The shard's half of the cluster.
    pub node: Node<RealEnv>,
    /// The shard's store, for orders about the disk and for metrics.
    pub store: Store<RealEnv>,
    /// What the node was told.
    pub config: Rc<ServerConfig>,
    /// Who this node is.
    pub identity: Identity,
    /// What is counted here.
    pub metrics: ShardMetrics,
    /// Raised when the server stops: clients are answered and sent away.
    pub stop: Rc<Flag>,
    /// Raised when the clients are gone: links of peers end.
    pub stop_links: Rc<Flag>,
    /// Whose turn it is to change which snapshots the node keeps; the one shard's that does so counts.
    pub snapshot_turn: Mutex<()>,
    /// Client connections open on this shard.
    pub connections: Cell<usize>,
    /// Client connections that this shard has had.
    pub connections_ever: Cell<u64>,
}

impl Service {
    /// Makes this the service of the calling thread's shard, until the guard is dropped.
    pub fn register(self: &Rc<Self>) -> Registered {
        CURRENT.with(|current| *current.borrow_mut() = Some(Rc::clone(self)));
        Registered(())
    }

    /// The service of the calling thread's shard.
    pub fn current() -> Option<Rc<Service>> {
        CURRENT.with(|current| current.borrow().clone())
    }

    /// The deadline of a request that waits for `timeout_ms` from now.
    pub fn deadline(&self, timeout_ms: u64) -> Instant {
        self.env.now() + Duration::from_millis(timeout_ms)
    }

    /// What this shard knows about the cluster; `None` before the node is in one.
    pub fn view(&self) -> Option<Rc<View>> {
        self.node.membership().view()
    }

    /// Counts a client connection in; `None` when there are too many.
    pub fn admit(self: &Rc<Self>) -> Option<Seat> {
        if self.connections.get() >= self.config.connections_max {
            self.metrics.refused();
            return None;
        }
        self.connections.set(self.connections.get() + 1);
        self.connections_ever.set(self.connections_ever.get() + 1);
        Some(Seat(Rc::clone(self)))
    }

    /// This shard's numbers.
    pub fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot::of(&self.metrics, self.connections.get());
        let counts = self.node.counts().into_iter();
        snapshot.counters = counts
            .map(|(name, count)| (format!("{name}_total"), count))
            .collect();
        let gauges = self.node.gauges();
        snapshot.gauges.extend([
            (
                "requests_in_flight".into(),
                u64::from(gauges.requests_in_flight),
            ),
            (
                "replica_requests_in_flight".into(),
                u64::from(gauges.replica_requests_in_flight),
            ),
            ("hints".into(), gauges.hints),
            ("hint_bytes".into(), gauges.hint_bytes),
            ("ranges".into(), gauges.ranges),
            ("damage_waiting".into(), gauges.damage_waiting),
            ("client_bytes".into(), gauges.client_bytes),
        ]);
        let arrivals = self.handle.arrivals().into_iter();
        let shard = self.env.shard().0;
        snapshot.arrivals = arrivals.map(|(cpu, count)| ((shard, cpu), count)).collect();
        let background_wait = self.handle.background_waited().as_micros();
        snapshot.greatest.extend([
            (
                "background_disk_wait_us".into(),
                u64::try_from(background_wait).unwrap_or(u64::MAX),
            ),
            (
                "removed_pending_bytes".into(),
                self.handle.removed_pending_bytes(),
            ),
            ("hint_age_ms".into(), gauges.hint_age_ms),
            ("oldest_unrepaired_ms".into(), gauges.oldest_unrepaired_ms),
            ("hedge_delay_us".into(), gauges.hedge_delay_us),
            ("clock_ahead_us".into(), gauges.clock_ahead_us),
        ]);
        self.add_store_numbers(&mut snapshot);
        snapshot
    }

    fn add_store_numbers(&self, snapshot: &mut Snapshot) {
        let stats = self.store.stats();
        let counts = &stats.counts;
        let counters = [
            ("corrupt_blocks", counts.corrupt_blocks),
            ("scrubbed_bytes", counts.scrubbed_bytes),
            ("store_updates", counts.updates),
            ("store_updates_refused_full", counts.refused_full),
            ("store_updates_refused_overload", counts.refused_overload),
            ("store_updates_delayed", counts.delayed),
            ("store_gets", counts.gets),
            ("store_memtable_hits", counts.memtable_hits),
            ("store_table_reads", counts.table_reads),
            ("store_blob_reads", counts.blob_reads),
            ("wal_frames", counts.wal_frames),
            ("wal_bytes", counts.wal_bytes),
            ("wal_records", counts.wal_records),
            ("wal_syncs", counts.wal_syncs),
            ("flushes", counts.flushes),
            ("flushed_bytes", counts.flushed_bytes),
            ("flushes_failed", counts.failed_flushes),
            ("compactions", counts.compactions),
            ("compacted_bytes", counts.compacted_bytes),
            ("blob_bytes_written", counts.blob_bytes_written),
            ("compactions_failed", counts.failed_compactions),
            ("tables_dropped", counts.dropped_tables),
            ("purged_records", counts.purged),
            ("archived_segments", counts.archived_segments),
            ("archived_bytes", counts.archived_bytes),
            ("archive_failures", counts.archive_failures),
            ("archive_gaps", counts.archive_gaps),
            ("cache_hits", stats.cache.hits),
            ("cache_misses", stats.cache.misses),
            ("cache_evictions", stats.cache.evictions),
            ("block_cache_hits", stats.blocks.hits),
            ("block_cache_misses", stats.blocks.misses),
            ("block_cache_evictions", stats.blocks.evictions),
        ];
        let counters = counters.map(|(name, count)| (format!("{name}_total"), count));
        snapshot.counters.extend(counters);
        let gauges = [
            ("memory_memtable_bytes", stats.memtable_bytes as u64),
            ("memory_pending_bytes", stats.pending_bytes as u64),
            ("memory_cache_bytes", stats.cache.bytes),
            ("memory_block_cache_bytes", stats.blocks.bytes),
            ("memory_table_index_bytes", stats.table_memory_bytes as u64),
            (
                "memory_memtable_budget_bytes",
                self.config.memory.memtable_bytes as u64,
            ),
            (
                "memory_cache_budget_bytes",
                self.config.memory.cache_bytes as u64,
            ),
            ("sealed_memtables", stats.sealed_memtables as u64),
            ("tables", stats.tables as u64),
            ("table_bytes", stats.table_bytes),
            ("blobs", stats.blobs as u64),
            ("blob_bytes", stats.blob_bytes),
            ("blob_dead_bytes", stats.blob_dead_bytes),
            ("compaction_debt_bytes", stats.compaction_debt_bytes),
            ("wal_segments", stats.wal_segments as u64),
            ("wal_live_bytes", stats.wal_live_bytes),
            ("archive_waiting_segments", stats.archive_waiting as u64),
            ("archive_held_bytes", stats.archive_held_bytes),
        ];
        let gauges = gauges.map(|(name, value)| (name.to_owned(), value));
        snapshot.gauges.extend(gauges);
        let files = self.store.files_by_key().into_iter();
        let name = |key: Option<KeyId>| key.map_or("none".into(), |id| id.to_string());
        snapshot.files_by_key = files.map(|(key, count)| (name(key), count)).collect();
        let shard = self.env.shard().0;
        #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
        let backlog = stats.compaction_debt_bytes as f64;
        let by_shard = [
            ("compaction_backlog_bytes", backlog),
            ("write_amplification", stats.write_amplification()),
            ("read_amplification", stats.read_amplification()),
            ("space_amplification", stats.space_amplification()),
        ];
        let by_shard = by_shard.map(|(name, value)| (shard, name, value));
        snapshot.by_shard.extend(by_shard);
        snapshot.greatest.extend([
            ("runs".into(), stats.runs_max as u64),
            ("level0_runs".into(), stats.level0_runs as u64),
            ("disk_full".into(), u64::from(stats.disk_full)),
            ("archive_failing".into(), u64::from(stats.archive_failing)),
            ("store_poisoned".into(), u64::from(stats.poisoned)),
            ("disk_free_bytes".into(), stats.free_bytes),
        ]);
    }
}

/// The calling thread's shard has a service while this lives.
#[must_use]
pub struct Registered(());

impl Drop for Registered {
    fn drop(&mut self) {
        let service = CURRENT.with(|current| current.borrow_mut().take());
        drop(service);
    }
}

/// A client connection counts while this lives.
#[must_use]
pub struct Seat(Rc<Service>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.connections.set(self.0.connections.get() - 1);
    }
}

/// What a request for one key touches.
pub fn touches_key(keyspace: &[u8], key: &[u8], write: bool) -> Touches {
    let keyspace = Token::of(TreeId(0), keyspace).0;
    Touches::Key {
        hash: keyspace.rotate_left(1) ^ Token::of(TreeId(0), key).0,
        write,
    }
}

/// Names a client's write by a key of its choice and what it asks for. `parts` are told apart by
/// their lengths.
pub fn idempotency(id: &[u8], parts: &[&[u8]]) -> Idempotency {
    let mut content = Vec::new();
    for part in parts {
        content.extend_from_slice(&(part.len() as u64).to_le_bytes());
        content.extend_from_slice(part);
    }
    let body = Token::of(IDEMPOTENCY_BODY, &content).0 >> 64;
    Idempotency {
        id: Token::of(IDEMPOTENCY_ID, id).0,
        body_hash: u64::try_from(body).expect("half of 128 bits"),
    }
}

/// Domains of the two hashes. Ids and bodies are stored with the keys, so they never change.
const IDEMPOTENCY_ID: TreeId = TreeId(0xffff_fff1);
const IDEMPOTENCY_BODY: TreeId = TreeId(0xffff_fff2);

/// The keyspace that RESP commands work on.
pub fn default_keyspace() -> Bytes {
    KEYSPACE_DEFAULT.clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_body_cannot_be_shifted_into_each_other() {
        let one = idempotency(b"id", &[b"ab", b"c"]);
        let other = idempotency(b"id", &[b"a", b"bc"]);
        assert_eq!(one.id, other.id);
        assert_ne!(one.body_hash, other.body_hash);
    }
}
