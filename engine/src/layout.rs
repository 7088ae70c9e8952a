//! Where the stores of a node's shards lie, and which file ids each of them gives out.
//!
//! The data of a node is divided among its shards; another number of shards is another layout with
//! directories of its own. Ids of table files are unique in a node, over all its layouts: a table may be
//! linked into another store, and its checksums are bound to its id.

use std::path::{Path, PathBuf};

use torc_env::ShardId;

/// A division of a node's data among shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Rises by one with each redistribution; 0 for a node that has always had as many shards.
    pub number: u16,
    /// Shards.
    pub shards: u16,
}

impl Layout {
    /// The directory of a shard's store: `shard-00`, or `shard-00.1` after one redistribution.
    pub fn dir(self, shard: ShardId) -> PathBuf {
        match self.number {
            0 => PathBuf::from(format!("shard-{:02}", shard.0)),
            number => PathBuf::from(format!("shard-{:02}.{number}", shard.0)),
        }
    }

    /// Its shards, ascending.
    pub fn shards(self) -> impl Iterator<Item = ShardId> {
        (0..self.shards).map(ShardId)
    }

    /// The lowest id of a table that a shard's store writes: above every id of earlier layouts, and
    /// 2^32 below the next shard's.
    pub fn file_id_first(self, shard: ShardId) -> u64 {
        (u64::from(self.number) << 48 | u64::from(shard.0) << 32) + 1
    }

    /// Whether a name in the data directory is that of a store of this layout.
    pub fn holds(self, name: &str) -> bool {
        self.shards()
            .any(|shard| self.dir(shard) == Path::new(name))
    }
}

/// The root of the manifest, which every store has in its directory from its first start on.
pub const STORE_ROOT: &str = "manifest.root";

/// Whether a name in the data directory is that of a store, of whatever layout.
pub fn is_store(name: &str) -> bool {
    name.strip_prefix("shard-")
        .is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stores_of_all_layouts_have_directories_and_ids_of_their_own() {
        let first = Layout {
            number: 0,
            shards: 2,
        };
        let second = Layout {
            number: 1,
            shards: 1,
        };
        assert_eq!(first.dir(ShardId(1)), Path::new("shard-01"));
        assert_eq!(second.dir(ShardId(0)), Path::new("shard-00.1"));
        let ids = [
            first.file_id_first(ShardId(0)),
            first.file_id_first(ShardId(1)),
            second.file_id_first(ShardId(0)),
        ];
        assert_eq!(ids, [1, (1 << 32) + 1, (1 << 48) + 1]);
        assert!(first.holds("shard-01") && !first.holds("shard-02") && !first.holds("shard-00.1"));
        assert!(is_store("shard-02.7") && !is_store("shards") && !is_store("node"));
    }
}
