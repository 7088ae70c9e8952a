//! Identifiers that must not be swapped: each is a type of its own.

use std::fmt;

/// A node's identity: a random 128-bit number, stored in its data directory, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct NodeId(pub u128);

impl fmt::Display for NodeId {
    /// 32 hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// A shard of one node, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ShardId(pub u16);

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A tree of the engine: one keyspace's data within each shard. The number is the keyspace's id,
/// given once by the topology and never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct TreeId(pub u32);

/// A position on the ring of 2^128.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Token(pub u128);

/// Seed of the token hash. Part of the on-disk and on-wire contract: changing it moves every key.
const TOKEN_SEED: u64 = 0x746f_7263_2d72_696e;

impl Token {
    /// The last position of the ring.
    pub const MAX: Token = Token(u128::MAX);

    /// The ring position of a key: xxh3-128 over the keyspace's id (4 bytes, little-endian) and
    /// the key, with a fixed seed.
    pub fn of(tree: TreeId, key: &[u8]) -> Token {
        // Every request hashes its key: in one piece that is four times as fast as streamed.
        const PIECE_BYTES: usize = 256;
        let len = 4 + key.len();
        if len <= PIECE_BYTES {
            let mut piece = [0; PIECE_BYTES];
            piece[..4].copy_from_slice(&tree.0.to_le_bytes());
            piece[4..len].copy_from_slice(key);
            return Token(xxhash_rust::xxh3::xxh3_128_with_seed(
                &piece[..len],
                TOKEN_SEED,
            ));
        }
        let mut hasher = xxhash_rust::xxh3::Xxh3::with_seed(TOKEN_SEED);
        hasher.update(&tree.0.to_le_bytes());
        hasher.update(key);
        Token(hasher.digest128())
    }

    /// The shard that owns this position on a node of `shard_count` shards: the ring is cut into
    /// `shard_count` equal slices, in order. The cut depends on nothing else, so it is stable
    /// under every change of the ring.
    pub fn shard(self, shard_count: u16) -> ShardId {
        assert!(shard_count > 0, "a node has at least one shard");
        let slice = ((self.0 >> 64) * u128::from(shard_count)) >> 64;
        ShardId(u16::try_from(slice).expect("a slice index is below the shard count"))
    }

    /// The first position of `shard`'s slice (see [`Token::shard`]).
    pub fn shard_start(shard: ShardId, shard_count: u16) -> Token {
        assert!(shard.0 < shard_count, "shard {shard} of {shard_count}");
        let high = (u128::from(shard.0) << 64).div_ceil(u128::from(shard_count));
        Token(high << 64)
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// A run of ring positions that does not wrap: `first..=last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenRange {
    /// First position, included.
    pub first: Token,
    /// Last position, included; at or above `first`.
    pub last: Token,
}

impl TokenRange {
    /// The whole ring.
    pub const ALL: TokenRange = TokenRange {
        first: Token(0),
        last: Token::MAX,
    };

    /// Whether `token` lies inside.
    pub fn contains(&self, token: Token) -> bool {
        self.first <= token && token <= self.last
    }

    /// The common part of two ranges, if there is one.
    pub fn intersection(&self, other: &TokenRange) -> Option<TokenRange> {
        let first = self.first.max(other.first);
        let last = self.last.min(other.last);
        (first <= last).then_some(TokenRange { first, last })
    }

    /// The positions that `shard` owns on a node of `shard_count` shards.
    pub fn of_shard(shard: ShardId, shard_count: u16) -> TokenRange {
        let first = Token::shard_start(shard, shard_count);
        let last = if shard.0 + 1 == shard_count {
            Token::MAX
        } else {
            Token(Token::shard_start(ShardId(shard.0 + 1), shard_count).0 - 1)
        };
        TokenRange { first, last }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_hash_is_pinned() {
        assert_eq!(
            Token::of(TreeId(1), b"greeting"),
            Token::of(TreeId(1), b"greeting")
        );
        assert_ne!(
            Token::of(TreeId(1), b"greeting"),
            Token::of(TreeId(2), b"greeting")
        );
        assert_eq!(Token::of(TreeId(1), b"greeting").to_string(), GREETING);
    }

    /// Computed once; a change of this value moves every key of every cluster.
    const GREETING: &str = "8ebf2e4803177b93d2ed392fd3e2b16f";

    #[test]
    fn long_and_short_keys_are_hashed_alike() {
        for len in [0, 1, 12, 251, 252, 253, 1024] {
            let key = vec![7; len];
            let mut hasher = xxhash_rust::xxh3::Xxh3::with_seed(TOKEN_SEED);
            hasher.update(&3u32.to_le_bytes());
            hasher.update(&key);
            assert_eq!(Token::of(TreeId(3), &key).0, hasher.digest128(), "{len}");
        }
    }

    #[test]
    fn shard_slices_cover_the_ring_without_overlap() {
        for count in [1, 2, 3, 7, 64, 1000] {
            let mut next = Token(0);
            for shard in (0..count).map(ShardId) {
                let slice = TokenRange::of_shard(shard, count);
                assert_eq!(slice.first, next);
                assert_eq!(slice.first.shard(count), shard);
                assert_eq!(slice.last.shard(count), shard);
                next = Token(slice.last.0.wrapping_add(1));
            }
            assert_eq!(next, Token(0), "the last slice ends at the end of the ring");
        }
    }

    #[test]
    fn ranges_intersect_where_they_overlap() {
        let range = |first, last| TokenRange {
            first: Token(first),
            last: Token(last),
        };
        assert_eq!(range(0, 9).intersection(&range(5, 20)), Some(range(5, 9)));
        assert_eq!(range(0, 9).intersection(&range(10, 20)), None);
    }
}
