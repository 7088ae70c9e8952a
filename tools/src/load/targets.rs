//! Where operations go: the server that was asked, or the shard that owns the key.

use std::net::SocketAddr;
use std::time::Duration;

use torc_client::Connection;
use torc_client::wire::message::{ArchivedAnswer, ArchivedRoute, Operation, Request};
use torc_env::{Token, TreeId};

use super::connection::write_key;

/// Names of the targets, and which one an operation has.
pub struct Targets {
    /// Names, in the order of their numbers.
    pub names: Vec<String>,
    shards: Option<Shards>,
}

/// Torc's ring, reduced to the first replica of each range.
struct Shards {
    keyspace: TreeId,
    /// Last token of each range, the number of its first target, and the shards there.
    ranges: Vec<(u128, usize, u16)>,
}

impl Targets {
    /// One target a server.
    pub fn servers(addresses: &[SocketAddr]) -> Self {
        Self {
            names: addresses.iter().map(ToString::to_string).collect(),
            shards: None,
        }
    }

    /// One target a shard of a Torc cluster: the shard of the first replica that owns the key.
    /// `None` when the node at `client` does not tell.
    pub fn shards(client: SocketAddr, keyspace: &str) -> Option<Self> {
        let mut connection = Connection::connect(client, None, Duration::from_secs(2)).ok()?;
        let request = Request {
            timeout_ms: 2000,
            keyspace: keyspace.as_bytes(),
            operation: Operation::Route,
        };
        let answered = connection.call(&request).ok()?;
        match answered.answer().ok()? {
            ArchivedAnswer::Route(route) => Self::of_route(route),
            _ => None,
        }
    }

    fn of_route(route: &ArchivedRoute<'_>) -> Option<Self> {
        let mut names = Vec::new();
        let mut first = Vec::new();
        for node in route.nodes.iter() {
            first.push((names.len(), node.shard_count.to_native()));
            for shard in 0..node.shard_count.to_native() {
                names.push(format!("{}/{shard}", &*node.name));
            }
        }
        let ranges = route.ranges.iter().map(|range| {
            let replica = usize::from(range.replicas.first()?.to_native());
            let (target, shards) = *first.get(replica)?;
            (shards > 0).then_some((range.last.to_native(), target, shards))
        });
        Some(Self {
            names,
            shards: Some(Shards {
                keyspace: TreeId(route.keyspace.to_native()),
                ranges: ranges.collect::<Option<_>>()?,
            }),
        })
    }

    /// Where a key stands on the ring; 0 for all where that is not known.
    pub fn place(&self, key: &[u8]) -> u128 {
        let shards = self.shards.as_ref();
        shards.map_or(0, |shards| Token::of(shards.keyspace, key).0)
    }

    /// The target of an operation on `key` that goes to the server with number `address`.
    pub fn of(&self, key: u64, address: usize) -> usize {
        let Some(shards) = &self.shards else {
            return address;
        };
        let mut bytes = Vec::with_capacity(16);
        write_key(&mut bytes, key);
        let token = Token::of(shards.keyspace, &bytes);
        let at = shards.ranges.partition_point(|(last, ..)| *last < token.0);
        match shards.ranges.get(at).or(shards.ranges.first()) {
            Some((_, first, count)) => first + usize::from(token.shard(*count).0),
            None => 0,
        }
    }
}
