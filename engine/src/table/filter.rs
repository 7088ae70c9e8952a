//! Filters: which tokens a table certainly does not hold, without reading it.
//!
//! Binary fuse filters (T. M. Graf, D. Lemire, "Binary Fuse Filters", 2022) from `xorf`, one for
//! each run of at most [`PARTITION_KEYS`] tokens, so that no build holds up a shard for more than
//! about half a millisecond. Sixteen bits a key above the bottom level, where a wrong "maybe"
//! costs every read of a key that lies deeper; eight on it, where most keys are.
//!
//! `xorf` trusts what it is given and panics on a bad descriptor; so lengths and shape are checked
//! here before any bytes reach it.

use torc_env::Token;
use xorf::{BinaryFuse8, BinaryFuse16, Filter as _};

use crate::le;

/// Tokens in one filter. A build takes about 26 ns a token and 24 bytes of memory.
const PARTITION_KEYS: usize = 16 * 1024;

/// Bytes of a partition's entry in the directory.
const ENTRY_BYTES: usize = 40;

/// Fingerprint width of a table's filters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FilterBits {
    /// 1 wrong "maybe" in 256; about 10 bits a key. For the bottom level.
    Eight,
    /// 1 in 65,536; about 20 bits a key. For every other level.
    Sixteen,
}

impl FilterBits {
    fn kind(self) -> u32 {
        match self {
            FilterBits::Eight => 8,
            FilterBits::Sixteen => 16,
        }
    }
}

/// One partition.
#[derive(Debug)]
enum Partition {
    Eight(BinaryFuse8),
    Sixteen(BinaryFuse16),
    /// No filter could be built (never seen for distinct keys): everything may be there.
    All,
}

/// The filters of one table.
#[derive(Debug)]
pub(crate) struct Filters {
    /// First token of each partition.
    starts: Vec<Token>,
    partitions: Vec<Partition>,
    memory_bytes: usize,
}

/// Collects tokens in order and builds a partition whenever one is full.
#[derive(Debug)]
pub(crate) struct FilterBuilder {
    bits: FilterBits,
    first: Token,
    last: Option<Token>,
    keys: Vec<u64>,
    directory: Vec<u8>,
    fingerprints: Vec<u8>,
}

impl FilterBuilder {
    pub(crate) fn new(bits: FilterBits) -> FilterBuilder {
        FilterBuilder {
            bits,
            first: Token(0),
            last: None,
            keys: Vec::new(),
            directory: Vec::new(),
            fingerprints: Vec::new(),
        }
    }

    /// Adds a token at or above the last one. Returns whether this built a partition, which is the
    /// moment to give way.
    pub(crate) fn push(&mut self, token: Token) -> bool {
        if self.last == Some(token) {
            return false;
        }
        let built = self.keys.len() >= PARTITION_KEYS;
        if built {
            self.build_partition();
        }
        if self.keys.is_empty() {
            self.first = token;
        }
        self.last = Some(token);
        self.keys.push(filter_key(token));
        built
    }

    /// The encoded section: count of partitions (4), zero (4), the directory, the fingerprints one
    /// after the other, zeros up to a whole number of 8 bytes.
    pub(crate) fn encode(mut self) -> Vec<u8> {
        if !self.keys.is_empty() {
            self.build_partition();
        }
        let count = u32::try_from(self.directory.len() / ENTRY_BYTES)
            .expect("a table has below 2^32 partitions");
        let mut out = Vec::with_capacity(8 + self.directory.len() + self.fingerprints.len());
        out.extend_from_slice(&count.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.directory);
        out.extend_from_slice(&self.fingerprints);
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }

    fn build_partition(&mut self) {
        // Two tokens may fold to one filter key, and the filters want distinct keys.
        self.keys.sort_unstable();
        self.keys.dedup();
        let keys = std::mem::take(&mut self.keys);
        match self.bits {
            FilterBits::Eight => match BinaryFuse8::try_from(&keys[..]) {
                Ok(filter) => {
                    let shape = Shape {
                        seed: filter.descriptor.seed,
                        segment_len: filter.descriptor.segment_length,
                        segments_len: filter.descriptor.segment_count_length,
                    };
                    self.push_entry(self.bits.kind(), shape);
                    self.fingerprints.extend_from_slice(&filter.fingerprints);
                }
                Err(_) => self.push_entry(0, Shape::default()),
            },
            FilterBits::Sixteen => match BinaryFuse16::try_from(&keys[..]) {
                Ok(filter) => {
                    let shape = Shape {
                        seed: filter.descriptor.seed,
                        segment_len: filter.descriptor.segment_length,
                        segments_len: filter.descriptor.segment_count_length,
                    };
                    self.push_entry(self.bits.kind(), shape);
                    for fingerprint in &filter.fingerprints {
                        self.fingerprints
                            .extend_from_slice(&fingerprint.to_le_bytes());
                    }
                }
                Err(_) => self.push_entry(0, Shape::default()),
            },
        }
    }

    /// A directory entry: first token (16), fingerprint bits or 0 (4), zero (4), seed (8), segment
    /// length (4), length of all segments but the last two (4).
    fn push_entry(&mut self, kind: u32, shape: Shape) {
        let out = &mut self.directory;
        out.extend_from_slice(&self.first.0.to_le_bytes());
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&shape.seed.to_le_bytes());
        out.extend_from_slice(&shape.segment_len.to_le_bytes());
        out.extend_from_slice(&shape.segments_len.to_le_bytes());
    }
}

impl Filters {
    /// Reads an encoded section, or says what was expected instead.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Filters, &'static str> {
        if bytes.len() < 8 {
            return Err("a filter section of at least 8 bytes");
        }
        let count = usize::try_from(le::u32_at(bytes, 0)).expect("32 bits fit usize");
        let directory_end = 8 + count * ENTRY_BYTES;
        if bytes.len() < directory_end {
            return Err("a filter directory that fits its section");
        }
        let mut filters = Filters {
            starts: Vec::with_capacity(count),
            partitions: Vec::with_capacity(count),
            memory_bytes: 0,
        };
        let mut rest = &bytes[directory_end..];
        for index in 0..count {
            let entry = &bytes[8 + index * ENTRY_BYTES..][..ENTRY_BYTES];
            let start = Token(le::u128_at(entry, 0));
            if filters.starts.last().is_some_and(|before| *before >= start) {
                return Err("filter partitions in token order");
            }
            let shape = Shape {
                seed: le::u64_at(entry, 24),
                segment_len: le::u32_at(entry, 32),
                segments_len: le::u32_at(entry, 36),
            };
            let (partition, len) = decode_partition(le::u32_at(entry, 16), shape, rest)?;
            rest = &rest[len..];
            filters.starts.push(start);
            filters.partitions.push(partition);
            filters.memory_bytes += len;
        }
        if rest.len() >= 8 {
            return Err("nothing behind the fingerprints");
        }
        Ok(filters)
    }

    /// Whether the table may hold a key with this token; `false` is certain. A few nanoseconds.
    pub(crate) fn may_contain(&self, token: Token) -> bool {
        let after = self.starts.partition_point(|start| *start <= token);
        let Some(index) = after.checked_sub(1) else {
            return false;
        };
        let key = filter_key(token);
        match &self.partitions[index] {
            Partition::Eight(filter) => filter.contains(&key),
            Partition::Sixteen(filter) => filter.contains(&key),
            Partition::All => true,
        }
    }

    /// Bytes in memory.
    pub(crate) fn memory_bytes(&self) -> usize {
        size_of::<Self>()
            + self.memory_bytes
            + self.starts.len() * (size_of::<Token>() + size_of::<Partition>())
    }
}

/// What a binary fuse filter is besides its fingerprints.
#[derive(Debug, Clone, Copy, Default)]
struct Shape {
    seed: u64,
    segment_len: u32,
    segments_len: u32,
}

impl Shape {
    /// Fingerprints of a filter of this shape; `None` for a shape on which `xorf` would index out
    /// of bounds.
    fn fingerprints(self) -> Option<usize> {
        let whole = self.segment_len.is_power_of_two()
            && self.segments_len > 0
            && self.segments_len.is_multiple_of(self.segment_len);
        let len = u64::from(self.segments_len) + 2 * u64::from(self.segment_len);
        (whole && u32::try_from(len).is_ok())
            .then(|| usize::try_from(len).expect("32 bits fit usize"))
    }
}

fn decode_partition(
    kind: u32,
    shape: Shape,
    bytes: &[u8],
) -> Result<(Partition, usize), &'static str> {
    const EMPTY: [u64; 0] = [];
    if kind == 0 {
        return Ok((Partition::All, 0));
    }
    let count = shape
        .fingerprints()
        .ok_or("filter segments of a power of two")?;
    let len = match kind {
        8 => count,
        16 => 2 * count,
        _ => return Err("filters of 8 or 16 bits"),
    };
    let bytes = bytes
        .get(..len)
        .ok_or("fingerprints that fit their section")?;
    let failed = "a filter of no keys";
    let partition = if kind == 8 {
        let mut filter = BinaryFuse8::try_from(&EMPTY[..]).map_err(|_| failed)?;
        filter.descriptor.seed = shape.seed;
        filter.descriptor.segment_length = shape.segment_len;
        filter.descriptor.segment_length_mask = shape.segment_len - 1;
        filter.descriptor.segment_count_length = shape.segments_len;
        filter.fingerprints = bytes.into();
        Partition::Eight(filter)
    } else {
        let mut filter = BinaryFuse16::try_from(&EMPTY[..]).map_err(|_| failed)?;
        filter.descriptor.seed = shape.seed;
        filter.descriptor.segment_length = shape.segment_len;
        filter.descriptor.segment_length_mask = shape.segment_len - 1;
        filter.descriptor.segment_count_length = shape.segments_len;
        filter.fingerprints = (0..count)
            .map(|index| le::u16_at(bytes, 2 * index))
            .collect();
        Partition::Sixteen(filter)
    };
    Ok((partition, len))
}

/// What stands for a token in the filters: both halves folded, so that tokens that differ in either
/// half differ here.
fn filter_key(token: Token) -> u64 {
    let bytes = token.0.to_le_bytes();
    le::u64_at(&bytes, 0) ^ le::u64_at(&bytes, 8).rotate_left(32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use torc_env::TreeId;

    fn filters(tokens: &[Token], bits: FilterBits) -> Filters {
        let mut builder = FilterBuilder::new(bits);
        for token in tokens {
            builder.push(*token);
        }
        Filters::decode(&builder.encode()).expect("own encoding")
    }

    fn hashed(count: u32, salt: u32) -> Vec<Token> {
        let mut tokens: Vec<Token> = (0..count)
            .map(|key| Token::of(TreeId(salt), &key.to_le_bytes()))
            .collect();
        tokens.sort_unstable();
        tokens
    }

    #[test]
    fn every_token_is_found_over_several_partitions() {
        let tokens = hashed(40_000, 1);
        for bits in [FilterBits::Eight, FilterBits::Sixteen] {
            let filters = filters(&tokens, bits);
            assert_eq!(filters.partitions.len(), 3);
            assert!(tokens.iter().all(|token| filters.may_contain(*token)));
        }
    }

    #[test]
    fn wrong_maybes_are_as_rare_as_the_bits_say() {
        let tokens = hashed(20_000, 1);
        let others = hashed(100_000, 2);
        let wrong = |bits| {
            let filters = filters(&tokens, bits);
            others
                .iter()
                .filter(|token| filters.may_contain(**token))
                .count()
        };
        let eight = wrong(FilterBits::Eight);
        assert!((200..600).contains(&eight), "{eight} of 100,000");
        let sixteen = wrong(FilterBits::Sixteen);
        assert!(sixteen < 12, "{sixteen} of 100,000");
    }

    #[test]
    fn a_table_of_any_small_size_has_filters() {
        for count in 0..200 {
            let tokens = hashed(count, count);
            for bits in [FilterBits::Eight, FilterBits::Sixteen] {
                let filters = filters(&tokens, bits);
                assert!(tokens.iter().all(|token| filters.may_contain(*token)));
            }
        }
    }

    #[test]
    fn tokens_that_fold_to_one_key_are_both_found() {
        let tokens = [Token(1 << 32), Token(1 << 64)];
        assert_eq!(filter_key(tokens[0]), filter_key(tokens[1]));
        let filters = filters(&tokens, FilterBits::Sixteen);
        assert!(tokens.iter().all(|token| filters.may_contain(*token)));
    }

    proptest! {
        #[test]
        fn damaged_sections_are_refused_or_answer_without_panic(
            at in 0usize..2000, bit in 0u8..8, probe in any::<u128>(),
        ) {
            let mut builder = FilterBuilder::new(FilterBits::Eight);
            for token in hashed(500, 3) {
                builder.push(token);
            }
            let mut bytes = builder.encode();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            if let Ok(filters) = Filters::decode(&bytes) {
                filters.may_contain(Token(probe));
            }
        }

        #[test]
        fn truncated_sections_are_refused(len in 0usize..1000) {
            let mut builder = FilterBuilder::new(FilterBits::Sixteen);
            for token in hashed(500, 3) {
                builder.push(token);
            }
            let bytes = builder.encode();
            prop_assert!(Filters::decode(&bytes[..len.min(bytes.len() - 8)]).is_err());
        }
    }
}
