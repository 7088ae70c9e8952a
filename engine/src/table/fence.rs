//! Fences: which block of a table may hold a token, and where that block is.
//!
//! Kept wholly in memory for every open table, so they are small:
//!
//! - The first token of each block, cut to as many leading bits as tell most blocks of this table from
//!   the one before, in Elias–Fano form. The few that need more have their next 64 bits in a list of
//!   exceptions: one pair of close tokens does not make every fence longer.
//! - The offset of each block less what the shortest block would have made of it, in Elias–Fano form:
//!   blocks are of nearly one length.
//!
//! The writer only cuts blocks between different tokens, so a token maps to exactly one block and a
//! get never reads two.

use torc_env::{Token, TokenRange};

use super::elias_fano::EliasFano;
use super::format::BLOCK_ALIGN;
use crate::le;

/// Bytes before the two lists of an encoded section.
const HEADER_BYTES: usize = 32;

/// Bytes of an exception: the block's index and the next bits of its first token.
const EXCEPTION_BYTES: usize = 12;

/// What an exception costs, in bits.
const EXCEPTION_BITS: u64 = 96;

/// Bits of a first token that an exception adds.
const MORE_BITS: u32 = u64::BITS;

/// Where a block lies in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Offset of the block's header, in bytes; a multiple of [`BLOCK_ALIGN`].
    pub(crate) offset: u64,
    /// Bytes up to the next block, padding included.
    pub(crate) len: u64,
}

/// The fences of one table.
#[derive(Debug)]
pub(crate) struct Fences {
    /// Bits cut off the right of every token.
    shift: u32,
    /// The first token of the first block, cut.
    base: u128,
    /// Cut first tokens of the blocks, less `base`.
    tokens: EliasFano,
    /// Least distance of two blocks, in units of [`BLOCK_ALIGN`].
    stride: u64,
    /// Offsets of the blocks in units of [`BLOCK_ALIGN`], less the index times `stride`.
    offsets: EliasFano,
    /// Where the last block ends, in bytes.
    end: u64,
    /// Blocks whose cut token is also that of the last token of the block before, ascending.
    exceptions: Vec<u32>,
    /// What follows the cut in the first token of each of them.
    more: Vec<u64>,
}

/// Collects fences while a table is written.
#[derive(Debug, Default)]
pub(crate) struct FenceBuilder {
    first_tokens: Vec<u128>,
    offsets: Vec<u64>,
    /// Leading bits needed to tell each block from the one before.
    bits: Vec<u32>,
}

impl FenceBuilder {
    /// Adds the block at `offset` that begins with `first`; `before` is the last token of the block
    /// before it and must be smaller.
    pub(crate) fn push(&mut self, before: Option<Token>, first: Token, offset: u64) {
        if let Some(before) = before {
            assert!(before < first, "a block may not begin inside a token");
        }
        let bits = before.map_or(0, |before| bits_to_separate(before, first));
        self.bits.push(bits);
        self.first_tokens.push(first.0);
        self.offsets.push(offset / BLOCK_ALIGN);
    }

    /// The encoded section: bits cut off (4), exceptions (4), first token cut (16), stride (8), the
    /// list of tokens, the list of offsets, the exceptions (index 4, next bits 8).
    pub(crate) fn encode(mut self) -> Vec<u8> {
        let bits = fewest_bits(&self.bits);
        let shift = u128::BITS - bits;
        let exceptions: Vec<(u32, u64)> = (0..)
            .zip(self.bits.iter().zip(&self.first_tokens))
            .filter(|(_, (needed, _))| **needed > bits)
            .map(|(index, (_, first))| (index, more_of(*first, shift)))
            .collect();
        let base = self.first_tokens.first().map_or(0, |first| first >> shift);
        for token in &mut self.first_tokens {
            *token = (*token >> shift) - base;
        }
        let distances = self.offsets.windows(2).map(|pair| pair[1] - pair[0]);
        let stride = distances.min().unwrap_or(0);
        let offsets = (0..).zip(&self.offsets);
        let offsets: Vec<u128> = offsets
            .map(|(index, offset)| u128::from(offset - index * stride))
            .collect();
        let count = u32::try_from(exceptions.len()).expect("a table has below 2^32 blocks");
        let mut out = Vec::new();
        out.extend_from_slice(&shift.to_le_bytes());
        out.extend_from_slice(&count.to_le_bytes());
        out.extend_from_slice(&base.to_le_bytes());
        out.extend_from_slice(&stride.to_le_bytes());
        EliasFano::build(&self.first_tokens).encode(&mut out);
        EliasFano::build(&offsets).encode(&mut out);
        for (index, more) in exceptions {
            out.extend_from_slice(&index.to_le_bytes());
            out.extend_from_slice(&more.to_le_bytes());
        }
        out
    }
}

/// To how many leading bits the tokens are cut, of which each block needs `needed`: where another
/// bit for all costs more than the exceptions that it spares.
fn fewest_bits(needed: &[u32]) -> u32 {
    let most = needed.iter().copied().max().unwrap_or(0).max(1);
    let cost = |bits: &u32| {
        let exceptions = needed.iter().filter(|needed| **needed > *bits).count();
        le::len64(needed.len()) * u64::from(*bits) + le::len64(exceptions) * EXCEPTION_BITS
    };
    let least = most.saturating_sub(MORE_BITS).max(1);
    (least..=most).rev().min_by_key(cost).unwrap_or(most)
}

/// The bits of `token` behind the cut, as many as an exception has; further ones are left out.
fn more_of(token: u128, shift: u32) -> u64 {
    let rest = token & ((1 << shift) - 1);
    let more = rest >> shift.saturating_sub(MORE_BITS);
    u64::try_from(more).expect("at most 64 bits are left")
}

impl Fences {
    /// Reads an encoded section, or says what was expected instead.
    pub(crate) fn decode(bytes: &[u8], blocks: u64, data_end: u64) -> Result<Fences, &'static str> {
        if bytes.len() < HEADER_BYTES {
            return Err("a fence section of at least 32 bytes");
        }
        let shift = le::u32_at(bytes, 0);
        if shift >= u128::BITS {
            return Err("tokens cut to at least one bit");
        }
        let (tokens, len) = EliasFano::decode(&bytes[HEADER_BYTES..])?;
        let rest = &bytes[HEADER_BYTES + len..];
        let (offsets, len) = EliasFano::decode(rest)?;
        let exceptions = &rest[len..];
        let count = tokens.len();
        if count == 0 || le::len64(count) != blocks || offsets.len() != count {
            return Err("one fence a block");
        }
        let stride = le::u64_at(bytes, 24);
        let last = u64::try_from(offsets.get(count - 1)).ok();
        let last = (blocks - 1)
            .checked_mul(stride)
            .and_then(|skipped| skipped.checked_add(last?));
        if last.is_none_or(|last| last >= data_end / BLOCK_ALIGN) {
            return Err("the last block to begin where data is");
        }
        // No cut token lies beyond what a token cut so can be.
        let base = le::u128_at(bytes, 8);
        let highest = tokens.get(count - 1).checked_add(base);
        if highest.is_none_or(|highest| highest > u128::MAX >> shift) {
            return Err("cut tokens of as many bits as are left");
        }
        let exceptions_len = usize::try_from(le::u32_at(bytes, 4)).ok();
        if exceptions_len.and_then(|len| len.checked_mul(EXCEPTION_BYTES)) != Some(exceptions.len())
        {
            return Err("nothing behind the exceptions");
        }
        let (exceptions, more): (Vec<u32>, Vec<u64>) = exceptions
            .chunks_exact(EXCEPTION_BYTES)
            .map(|exception| (le::u32_at(exception, 0), le::u64_at(exception, 4)))
            .unzip();
        let ascend = exceptions.windows(2).all(|pair| pair[0] < pair[1]);
        let in_bounds = |index: &u32| *index > 0 && u64::from(*index) < blocks;
        if !ascend || !exceptions.iter().all(in_bounds) || more.contains(&0) {
            return Err("exceptions that ascend, of blocks but the first, with further bits");
        }
        Ok(Fences {
            shift,
            base,
            tokens,
            stride,
            offsets,
            end: data_end,
            exceptions,
            more,
        })
    }

    /// Blocks of the table.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The only block that may hold `token`; none when the token is below the first block.
    pub(crate) fn find(&self, token: Token) -> Option<usize> {
        let cut = (token.0 >> self.shift).checked_sub(self.base)?;
        let mut index = self.tokens.predecessor(cut)?;
        // Not so often: the block before ends with the same cut token.
        while let Some(more) = self.exception(index) {
            if self.tokens.get(index) != cut || more_of(token.0, self.shift) >= more {
                break;
            }
            index -= 1;
        }
        Some(index)
    }

    /// What follows the cut in the first token of block `index`, if the cut is not enough.
    fn exception(&self, index: usize) -> Option<u64> {
        let index = u32::try_from(index).ok()?;
        let at = self.exceptions.binary_search(&index).ok()?;
        Some(self.more[at])
    }

    /// Where block `index` lies.
    pub(crate) fn extent(&self, index: usize) -> Extent {
        let offset = self.offset(index);
        let next = index + 1;
        let end = if next < self.len() {
            self.offset(next)
        } else {
            self.end
        };
        Extent {
            offset,
            len: end.saturating_sub(offset),
        }
    }

    fn offset(&self, index: usize) -> u64 {
        let above = u64::try_from(self.offsets.get(index)).expect("the last one was checked");
        (above + le::len64(index) * self.stride) * BLOCK_ALIGN
    }

    /// The block that begins at `offset`, if one does. About one access for each doubling of the
    /// number of blocks.
    pub(crate) fn block_at(&self, offset: u64) -> Option<usize> {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low.midpoint(high);
            if self.offset(middle) < offset {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        (low < self.len() && self.offset(low) == offset).then_some(low)
    }

    /// The tokens that only block `index` may hold.
    pub(crate) fn range(&self, index: usize) -> TokenRange {
        let first = |index| {
            let cut = (self.tokens.get(index) + self.base) << self.shift;
            let more = self.exception(index).map_or(0, u128::from);
            cut | more << self.shift.saturating_sub(MORE_BITS)
        };
        let next = index + 1;
        TokenRange {
            first: Token(first(index)),
            last: if next < self.len() {
                Token(first(next).saturating_sub(1))
            } else {
                Token::MAX
            },
        }
    }

    /// Bytes in memory.
    pub(crate) fn memory_bytes(&self) -> usize {
        size_of::<Self>()
            + self.tokens.memory_bytes()
            + self.offsets.memory_bytes()
            + self.exceptions.len() * EXCEPTION_BYTES
    }
}

/// Leading bits that tell two different tokens apart. The writer cuts blocks where this is small,
/// which keeps the fences short.
pub(crate) fn bits_to_separate(low: Token, high: Token) -> u32 {
    (low.0 ^ high.0).leading_zeros() + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Fences over blocks of `per_block` tokens, cut wherever a token differs from the one before.
    fn fences(tokens: &[u128], per_block: usize) -> (Fences, Vec<usize>) {
        let mut builder = FenceBuilder::default();
        let mut starts: Vec<usize> = vec![];
        for (index, token) in tokens.iter().copied().enumerate() {
            let before = index.checked_sub(1).map(|before| tokens[before]);
            let due = starts.last().is_none_or(|start| index - start >= per_block);
            if due && before != Some(token) {
                let offset = le::len64(starts.len()) * 3 * BLOCK_ALIGN;
                builder.push(before.map(Token), Token(token), offset);
                starts.push(index);
            }
        }
        let end = le::len64(starts.len()) * 3 * BLOCK_ALIGN;
        let blocks = le::len64(starts.len());
        let bytes = builder.encode();
        (
            Fences::decode(&bytes, blocks, end).expect("own encoding"),
            starts,
        )
    }

    proptest! {
        #[test]
        fn a_token_maps_to_the_one_block_that_holds_it(
            mut tokens in prop::collection::vec(any::<u128>(), 1..300),
            shift in 0u32..128,
            per_block in 1usize..20,
        ) {
            for token in &mut tokens {
                *token >>= shift;
            }
            tokens.sort_unstable();
            let (fences, starts) = fences(&tokens, per_block);
            prop_assert_eq!(fences.len(), starts.len());
            for (index, token) in tokens.iter().enumerate() {
                let block = starts.iter().rposition(|start| *start <= index);
                prop_assert_eq!(fences.find(Token(*token)), block);
            }
            for block in 0..starts.len() {
                let expected = Extent {
                    offset: le::len64(block) * 3 * BLOCK_ALIGN,
                    len: 3 * BLOCK_ALIGN,
                };
                prop_assert_eq!(fences.extent(block), expected);
                prop_assert_eq!(fences.block_at(expected.offset), Some(block));
                prop_assert_eq!(fences.block_at(expected.offset + BLOCK_ALIGN), None);
                let range = fences.range(block);
                for (index, token) in tokens.iter().enumerate() {
                    let holds = starts.iter().rposition(|start| *start <= index) == Some(block);
                    prop_assert_eq!(range.contains(Token(*token)), holds);
                }
            }
        }
    }

    #[test]
    fn a_token_far_below_the_first_block_is_in_none() {
        let (fences, _) = fences(&[1 << 127, u128::MAX], 1);
        assert_eq!(fences.find(Token(0)), None);
        assert_eq!(fences.find(Token::MAX), Some(1));
    }

    /// The next of a fixed course of numbers that look random.
    fn next(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Fences of a table of `blocks` blocks of `per_block` records of `record_bytes` each, give or take
    /// a tenth, cut as the writer does; bits a block as one list each, with what the worst place
    /// needs, and as they are.
    fn bits_a_block(blocks: usize, per_block: usize, record_bytes: u64) -> (usize, usize) {
        let mut state = 7;
        let mut tokens: Vec<u128> = (0..blocks * per_block)
            .map(|_| u128::from(next(&mut state)) << 64 | u128::from(next(&mut state)))
            .collect();
        tokens.sort_unstable();
        let mut builder = FenceBuilder::default();
        builder.push(None, Token(tokens[0]), 0);
        let (mut first, mut offset) = (0, 0);
        while first + 2 * per_block < tokens.len() {
            let places = first + per_block - per_block / 4..=first + per_block;
            let bits = |at: &usize| bits_to_separate(Token(tokens[at - 1]), Token(tokens[*at]));
            let at = places.min_by_key(bits).expect("there is one");
            let records = le::len64(at - first);
            let spread = record_bytes / 5 * records.isqrt();
            let bytes = record_bytes * records - spread / 2 + next(&mut state) % spread.max(1);
            offset += bytes.next_multiple_of(BLOCK_ALIGN);
            builder.push(Some(Token(tokens[at - 1])), Token(tokens[at]), offset);
            first = at;
        }
        let count = builder.first_tokens.len();
        let worst = u128::BITS - builder.bits.iter().max().expect("not empty");
        let cut: Vec<u128> = builder.first_tokens.iter().map(|t| t >> worst).collect();
        let offsets: Vec<u128> = builder.offsets.iter().map(|o| u128::from(*o)).collect();
        let plain =
            EliasFano::build(&cut).memory_bytes() + EliasFano::build(&offsets).memory_bytes();
        let end = offset + 4096;
        let fences = Fences::decode(&builder.encode(), le::len64(count), end);
        let bytes = fences.expect("own encoding").memory_bytes();
        (plain * 8 / count, bytes * 8 / count)
    }

    #[test]
    fn a_block_costs_few_bits() {
        for (per_block, record_bytes, most) in [(64, 64, 13), (32, 128, 13), (8, 512, 15)] {
            let (plain, bits) = bits_a_block(16_000, per_block, record_bytes);
            println!(
                "{per_block} records a block: {bits} bits a block, {plain} by two plain lists"
            );
            assert!(bits <= most, "{bits} bits a block of {per_block} records");
            assert!(bits + 2 < plain);
        }
    }

    #[test]
    fn damaged_fences_are_refused_or_answer_without_panic() {
        let tokens: Vec<u128> = (0..200).map(|i| (i % 7) << 120 | i << 60 | i).collect();
        let mut tokens = tokens;
        tokens.sort_unstable();
        let mut builder = FenceBuilder::default();
        for (index, pair) in tokens.windows(2).enumerate() {
            let before = (index > 0).then_some(Token(pair[0]));
            builder.push(before, Token(pair[1]), le::len64(index) * 5 * BLOCK_ALIGN);
        }
        let blocks = le::len64(tokens.len() - 1);
        let end = blocks * 5 * BLOCK_ALIGN;
        let good = builder.encode();
        for at in 0..good.len() {
            assert!(
                Fences::decode(&good[..at], blocks, end).is_err(),
                "length {at}"
            );
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                if let Ok(fences) = Fences::decode(&bad, blocks, end) {
                    for token in tokens.iter().chain(&[0, u128::MAX]) {
                        let found = fences.find(Token(*token));
                        assert!(found.is_none_or(|index| index < fences.len()));
                    }
                    let extents = (0..fences.len()).map(|index| fences.extent(index));
                    assert!(extents.into_iter().all(|extent| extent.offset <= end));
                    for index in 0..fences.len() {
                        fences.range(index);
                    }
                }
            }
        }
    }
}
