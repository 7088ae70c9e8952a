//! A host: a disk that outlives its process, and the process's present life.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;

use futures_util::future::LocalBoxFuture;
use torc_env::{Bytes, NodeId, Origin};

use crate::disk::volume::Volume;
use crate::options::DiskOptions;
use crate::tasks::TaskKey;

/// A host of the simulation, counted from 0 in order of addition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostId(pub u16);

impl HostId {
    pub(crate) fn index(self) -> usize {
        usize::from(self.0)
    }

    pub(crate) fn number(self) -> u64 {
        u64::from(self.0)
    }

    /// The internode address of this host's node.
    pub fn address(self) -> SocketAddr {
        let [high, low] = self.0.to_be_bytes();
        SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, high, low)), 7401)
    }

    /// The host at `address`, if it is one of a simulation's.
    pub(crate) fn at(address: SocketAddr) -> Option<HostId> {
        match address.ip() {
            IpAddr::V4(ip) if address.port() == 7401 => {
                let [ten, zero, high, low] = ip.octets();
                (ten == 10 && zero == 0).then_some(HostId(u16::from_be_bytes([high, low])))
            }
            _ => None,
        }
    }
}

/// Counts a host's starts: what belongs to an earlier life is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Life(pub(crate) u32);

/// Answers requests that arrive at a shard.
pub type Handler = Rc<dyn Fn(Origin, Bytes) -> LocalBoxFuture<'static, Bytes>>;

/// At which of a host's disk operations its power is cut, and which unsynced changes survive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PowerCut {
    /// Operations of the host's disk that begin before the cut; it strikes while this one, counted
    /// from 0 since the host was added, is in flight.
    pub operation: u64,
    /// 0: nothing unsynced survives; 1: everything; 2: a prefix, torn at its end; from 3 on: a
    /// random part, some of it torn.
    pub variant: u32,
}

pub(crate) struct Host {
    pub(crate) node: NodeId,
    pub(crate) shards: u16,
    pub(crate) life: Life,
    pub(crate) up: bool,
    pub(crate) paused: bool,
    pub(crate) starved: bool,
    /// Woken while the host was paused.
    pub(crate) parked: Vec<TaskKey>,
    pub(crate) handlers: Vec<Option<Handler>>,
    pub(crate) volume: Volume,
    pub(crate) disk: DiskOptions,
    pub(crate) disk_changes: u64,
    pub(crate) disk_operations: u64,
    pub(crate) power_cut: Option<PowerCut>,
    /// Added to the true time.
    pub(crate) skew_us: i64,
    /// How much faster the host's clock runs than the true one, in millionths.
    pub(crate) drift_ppm: i64,
}

impl Host {
    pub(crate) fn new(node: NodeId, shards: u16, disk: DiskOptions) -> Self {
        Self {
            node,
            shards,
            life: Life(0),
            up: true,
            paused: false,
            starved: false,
            parked: Vec::new(),
            handlers: vec![None; usize::from(shards)],
            volume: Volume::new(disk.capacity_bytes),
            disk,
            disk_changes: 0,
            disk_operations: 0,
            power_cut: None,
            skew_us: 0,
            drift_ppm: 0,
        }
    }

    pub(crate) fn is_alive(&self, life: Life) -> bool {
        self.up && self.life == life
    }
}
