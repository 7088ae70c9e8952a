//! Fences: which block of a table may hold a token, and where that block is.
//!
//! Kept wholly in memory for every open table, so they are small: the first token of each block,
//! cut to as many leading bits as tell the blocks of this table apart, and the block's offset, both
//! in Elias–Fano form. The writer only cuts blocks where the cut tokens differ, so a token maps to
//! exactly one block and a get never reads two.

use torc_env::{Token, TokenRange};

use super::elias_fano::EliasFano;
use super::format::BLOCK_ALIGN;
use crate::le;

/// Bytes before the two lists of an encoded section.
const HEADER_BYTES: usize = 24;

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
    /// Offsets of the blocks and the end of the last one, in units of [`BLOCK_ALIGN`].
    offsets: EliasFano,
}

/// Collects fences while a table is written.
#[derive(Debug, Default)]
pub(crate) struct FenceBuilder {
    first_tokens: Vec<u128>,
    offsets: Vec<u128>,
    /// Leading bits needed to tell every block from its neighbour.
    bits: u32,
}

impl FenceBuilder {
    /// Adds the block at `offset` that begins with `first`; `before` is the last token of the block
    /// before it and must be smaller.
    pub(crate) fn push(&mut self, before: Option<Token>, first: Token, offset: u64) {
        if let Some(before) = before {
            assert!(before < first, "a block may not begin inside a token");
            self.bits = self.bits.max(bits_to_separate(before, first));
        }
        self.first_tokens.push(first.0);
        self.offsets.push(u128::from(offset / BLOCK_ALIGN));
    }

    /// The encoded section: bits cut off (4), zero (4), first token cut (16), the list of tokens,
    /// the list of offsets. `end` is the end of the last block's padding.
    pub(crate) fn encode(mut self, end: u64) -> Vec<u8> {
        let shift = u128::BITS - self.bits.max(1);
        let base = self.first_tokens.first().map_or(0, |first| first >> shift);
        for token in &mut self.first_tokens {
            *token = (*token >> shift) - base;
        }
        self.offsets.push(u128::from(end / BLOCK_ALIGN));
        let mut out = Vec::new();
        out.extend_from_slice(&shift.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&base.to_le_bytes());
        EliasFano::build(&self.first_tokens).encode(&mut out);
        EliasFano::build(&self.offsets).encode(&mut out);
        out
    }
}

impl Fences {
    /// Reads an encoded section, or says what was expected instead.
    pub(crate) fn decode(bytes: &[u8], blocks: u64, data_end: u64) -> Result<Fences, &'static str> {
        if bytes.len() < HEADER_BYTES {
            return Err("a fence section of at least 24 bytes");
        }
        let shift = le::u32_at(bytes, 0);
        if shift >= u128::BITS {
            return Err("tokens cut to at least one bit");
        }
        let (tokens, len) = EliasFano::decode(&bytes[HEADER_BYTES..])?;
        let rest = &bytes[HEADER_BYTES + len..];
        let (offsets, len) = EliasFano::decode(rest)?;
        if len != rest.len() {
            return Err("nothing behind the lists of fences");
        }
        let count = tokens.len();
        if le::len64(count) != blocks || offsets.len() != count + 1 {
            return Err("one fence a block and one end");
        }
        if offsets.get(count) != u128::from(data_end / BLOCK_ALIGN) {
            return Err("the last block to end where the data ends");
        }
        Ok(Fences {
            shift,
            base: le::u128_at(bytes, 8),
            tokens,
            offsets,
        })
    }

    /// Blocks of the table.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The only block that may hold `token`; none when the token is below the first block.
    pub(crate) fn find(&self, token: Token) -> Option<usize> {
        let cut = (token.0 >> self.shift).checked_sub(self.base)?;
        self.tokens.predecessor(cut)
    }

    /// Where block `index` lies.
    pub(crate) fn extent(&self, index: usize) -> Extent {
        let unit = |at: usize| {
            u64::try_from(self.offsets.get(at)).unwrap_or(u64::MAX / BLOCK_ALIGN) * BLOCK_ALIGN
        };
        let offset = unit(index);
        Extent {
            offset,
            len: unit(index + 1).saturating_sub(offset),
        }
    }

    /// The block that begins at `offset`, if one does.
    pub(crate) fn block_at(&self, offset: u64) -> Option<usize> {
        let index = self.offsets.predecessor(u128::from(offset / BLOCK_ALIGN))?;
        (index < self.len() && self.extent(index).offset == offset).then_some(index)
    }

    /// The tokens that only block `index` may hold.
    pub(crate) fn range(&self, index: usize) -> TokenRange {
        let first = |index| (self.tokens.get(index) + self.base) << self.shift;
        let next = index + 1;
        TokenRange {
            first: Token(first(index)),
            last: if next < self.len() {
                Token(first(next) - 1)
            } else {
                Token::MAX
            },
        }
    }

    /// Bytes in memory.
    pub(crate) fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.tokens.memory_bytes() + self.offsets.memory_bytes()
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
        let bytes = builder.encode(end);
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
}
