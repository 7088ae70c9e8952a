//! What a server must be told. `torc server` reads it from its configuration file.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use torc_cluster::node::CLIENT_BYTES_MAX_DEFAULT;
use torc_engine::{Fsync, Keys};
use torc_runtime::{Background, DiskRates};

use crate::keys::KeySource;
use crate::limits::CONNECTIONS_MAX_DEFAULT;

/// Settings of one node.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// `[node]`
    pub node: NodeConfig,
    /// `[listen]`; port 0 lets the system choose.
    pub listen: ListenConfig,
    /// `[cluster]`
    pub cluster: ClusterConfig,
    /// `[shards]`
    pub shards: ShardsConfig,
    /// `[durability]`: what an acknowledgement promises.
    pub fsync: Fsync,
    /// `[archive]`: where full segments of the log go; `None` for nowhere.
    pub archive: Option<ArchiveConfig>,
    /// `[encryption]`: the master keys, as read for this start.
    pub keys: Keys,
    /// `[encryption]`: where they are read anew.
    pub key_source: KeySource,
    /// `[memory]`
    pub memory: MemoryConfig,
    /// How data lies on the disk.
    pub storage: StorageConfig,
    /// `[disk]`: what the disk was measured to do.
    pub disk_rates: Option<DiskRates>,
    /// Client connections of one shard.
    pub connections_max: usize,
}

/// `[node]`
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Unique in the cluster.
    pub name: String,
    /// Directory of all data.
    pub data_dir: PathBuf,
    /// Failure domain within a zone.
    pub rack: String,
    /// Failure domain within a data centre.
    pub zone: String,
    /// Data centre.
    pub datacenter: String,
}

/// `[listen]`
#[derive(Clone, Copy, Debug)]
pub struct ListenConfig {
    /// Binary client protocol.
    pub client: SocketAddr,
    /// HTTP: data, admin, metrics, status page.
    pub http: SocketAddr,
    /// Redis protocol.
    pub resp: SocketAddr,
    /// Other nodes.
    pub internode: SocketAddr,
}

/// `[cluster]`
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// Nodes of another name are refused.
    pub name: String,
    /// Internode addresses of the founders; empty: this node alone.
    pub seeds: Vec<SocketAddr>,
    /// Positions on the ring that this node takes.
    pub vnodes: u16,
    /// Time between two gossip rounds.
    pub gossip_interval: Duration,
    /// Whether writes that a replica missed are kept as hints for it.
    pub hints: bool,
    /// Within this time every range is compared with its other replicas.
    pub repair_interval: Duration,
}

/// `[shards]`
#[derive(Clone, Copy, Debug)]
pub struct ShardsConfig {
    /// Number of shards; 0 means one for each core that this process may use.
    pub count: u16,
    /// Whether each shard's thread is pinned to a core of its own.
    pub pin: bool,
    /// Where flushes and compactions run.
    pub background: Background,
    /// How long an idle, pinned shard looks for work before it sleeps.
    pub spin: Duration,
}

/// `[archive]`
#[derive(Clone, Debug)]
pub struct ArchiveConfig {
    /// A directory that exists, best on another device.
    pub dir: PathBuf,
    /// Segments of a shard that are kept only because they are not archived yet, in bytes; beyond it the oldest is given up.
    pub held_bytes_max: u64,
    /// The log is archived at least this often; `None` for when a segment is full.
    pub interval: Option<Duration>,
}

/// `[memory]`, each figure for one shard.
#[derive(Clone, Copy, Debug)]
pub struct MemoryConfig {
    /// Memory of recent writes.
    pub memtable_bytes: usize,
    /// Memory of the record cache.
    pub cache_bytes: usize,
    /// Requests and answers held for clients; large ones beyond it are refused.
    pub client_bytes: usize,
}

/// `[storage]`
#[derive(Clone, Copy, Debug)]
pub struct StorageConfig {
    /// Values of at least so many bytes go to blobs; `None`: none does.
    pub separate_from: Option<usize>,
}

impl ServerConfig {
    /// A node on its own: one unpinned shard, ports that the system chooses on loopback.
    pub fn standalone(data_dir: impl Into<PathBuf>) -> Self {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        Self {
            node: NodeConfig {
                name: "n1".into(),
                data_dir: data_dir.into(),
                rack: "rack1".into(),
                zone: "zone1".into(),
                datacenter: "dc1".into(),
            },
            listen: ListenConfig {
                client: any,
                http: any,
                resp: any,
                internode: any,
            },
            cluster: ClusterConfig {
                name: "torc".into(),
                seeds: Vec::new(),
                vnodes: 128,
                gossip_interval: Duration::from_millis(500),
                hints: true,
                repair_interval: Duration::from_secs(24 * 3600),
            },
            shards: ShardsConfig {
                count: 1,
                pin: false,
                background: Background::default(),
                spin: Duration::ZERO,
            },
            fsync: Fsync::Group,
            archive: None,
            keys: Keys::default(),
            key_source: KeySource::None,
            memory: MemoryConfig {
                memtable_bytes: 64 << 20,
                cache_bytes: 64 << 20,
                client_bytes: CLIENT_BYTES_MAX_DEFAULT,
            },
            storage: StorageConfig {
                separate_from: Some(8 << 10),
            },
            disk_rates: None,
            connections_max: CONNECTIONS_MAX_DEFAULT,
        }
    }

    /// The number of shards that runs.
    pub fn shard_count(&self) -> u16 {
        if self.shards.count > 0 {
            return self.shards.count;
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        u16::try_from(cores).unwrap_or(u16::MAX)
    }
}
