//! A data block, as read: checked, decompressed, searched in place.
//!
//! On disk, a header of 20 bytes and the body, raw or LZ4:
//!
//! ```text
//! header  checksum u32 | codec u8 | 0 u8×3 | stored length u32 | raw length u32 | count u32
//! body    first token u128 | token bits u8 | flags u8 | key prefix length u16
//!         | widths u8×4 (kind, seqno, stamp, expiry) | bases u64×3 (seqno, stamp, expiry)
//!         | discriminators u32×n | key ends ×n | value ends ×n | kinds | seqnos | stamps | expiries
//!         | tokens u128×n (flag) | key prefix | key suffixes | values
//! ```
//!
//! There are no restart points: every column is addressed directly. A *discriminator* is the 32
//! token bits behind the leading bits that all tokens of the block share; a lookup compares
//! discriminators and, in nearly every case, one key. Tokens are recomputed from the keys, unless
//! one of them is not its key's hash: then the block stores them all.
//!
//! Header and stored body are [`super::body`].

use std::cmp::Ordering;

use bytes::Bytes;
use torc_env::{Token, TreeId};

use super::body;
use super::format::Mismatch;
use crate::blob::BlobRef;
use crate::crypt::DataKey;
use crate::le;
use crate::record::{Entry, Kind, Record, ScanFrom};

/// Bytes of a body before its columns.
pub(crate) const BODY_HEADER_BYTES: usize = 48;
/// Key and value ends take four bytes each, not two.
pub(crate) const FLAG_WIDE: u8 = 1;
/// The block stores its tokens.
pub(crate) const FLAG_TOKENS: u8 = 2;

/// A record that has its value.
pub(crate) const KIND_VALUE: u64 = 0;
/// A tombstone.
pub(crate) const KIND_TOMBSTONE: u64 = 1;
/// A record whose value is in a blob.
pub(crate) const KIND_SEPARATE_VALUE: u64 = 2;
/// A tombstone with a large value, which is in a blob.
pub(crate) const KIND_SEPARATE_TOMBSTONE: u64 = 3;

/// Neighbours looked at one by one around the interpolated place before the search turns binary.
const WALK: usize = 8;

/// A decoded block.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    tree: TreeId,
    body: Bytes,
    /// The body is a part of what was read.
    is_part: bool,
    count: usize,
    first_token: Token,
    token_bits: u32,
    ends_width: usize,
    prefix_len: usize,
    discriminators: usize,
    key_ends: usize,
    value_ends: usize,
    kinds: Column,
    seqnos: Column,
    stamps: Column,
    expiries: Column,
    /// Position of the stored tokens, if they are stored.
    tokens: Option<usize>,
    prefix: usize,
    suffixes: usize,
    values: usize,
}

/// Where a column of numbers lies in the body.
#[derive(Debug, Clone, Copy)]
struct Column {
    at: usize,
    width: usize,
    base: u64,
}

/// The 32 bits of a token behind its first `bits`.
pub(crate) fn discriminator(token: Token, bits: u32) -> u32 {
    let top = token.0.checked_shl(bits).unwrap_or(0) >> 96;
    u32::try_from(top).expect("the top 32 of 128 bits")
}

impl Block {
    /// Checks, decrypts and decompresses the block that begins `bytes` (and may be followed by padding),
    /// read at `offset` of the file. A raw body is shared, not copied, unless it is encrypted.
    pub(crate) fn decode(
        bytes: &Bytes,
        (file_id, offset): (u64, u64),
        tree: TreeId,
        key: Option<&DataKey>,
    ) -> Result<Block, Mismatch> {
        let (body, count) = body::open(bytes, (file_id, offset), key)?;
        let is_part = bytes.as_ptr_range().contains(&body.as_ptr());
        let block = Block::from_body(body, count, tree)
            .ok_or_else(|| Mismatch::new("columns that fit the body", "others"))?;
        Ok(Block { is_part, ..block })
    }

    /// The block in memory of its own, which costs a copy if it is a part of what was read.
    pub(crate) fn apart(&self) -> Block {
        let body = match self.is_part {
            true => Bytes::copy_from_slice(&self.body),
            false => self.body.clone(),
        };
        Block {
            body,
            is_part: false,
            ..*self
        }
    }

    /// Lays the columns over a body; `None` when they do not fit it.
    fn from_body(body: Bytes, count: usize, tree: TreeId) -> Option<Block> {
        if body.len() < BODY_HEADER_BYTES || count == 0 || count > body.len() {
            return None;
        }
        let flags = body[17];
        let widths: [usize; 4] = std::array::from_fn(|index| usize::from(body[20 + index]));
        if widths.iter().any(|width| *width > 8) || flags & !(FLAG_WIDE | FLAG_TOKENS) != 0 {
            return None;
        }
        let mut at = BODY_HEADER_BYTES;
        let mut take = |width: usize| {
            let start = at;
            at += width * count;
            start
        };
        let ends_width = if flags & FLAG_WIDE == 0 { 2 } else { 4 };
        let discriminators = take(4);
        let key_ends = take(ends_width);
        let value_ends = take(ends_width);
        let mut column = |index: usize, base: u64| Column {
            at: take(widths[index]),
            width: widths[index],
            base,
        };
        let kinds = column(0, 0);
        let seqnos = column(1, le::u64_at(&body, 24));
        let stamps = column(2, le::u64_at(&body, 32));
        let expiries = column(3, le::u64_at(&body, 40));
        let tokens = (flags & FLAG_TOKENS != 0).then(|| take(16));
        let prefix = at;
        let prefix_len = usize::from(le::u16_at(&body, 18));
        let suffixes = prefix + prefix_len;
        if suffixes > body.len() {
            return None;
        }
        let mut block = Block {
            tree,
            is_part: false,
            count,
            first_token: Token(le::u128_at(&body, 0)),
            token_bits: body[16].into(),
            ends_width,
            prefix_len,
            discriminators,
            key_ends,
            value_ends,
            kinds,
            seqnos,
            stamps,
            expiries,
            tokens,
            prefix,
            suffixes,
            values: suffixes,
            body,
        };
        block.values = suffixes + block.end(key_ends, count - 1);
        let end = block.values + block.end(value_ends, count - 1);
        (block.token_bits <= u128::BITS && end == block.body.len()).then_some(block)
    }

    /// Records in this block, at least one.
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// Memory that holds the block, in bytes.
    pub(crate) fn body_bytes(&self) -> usize {
        self.body.len()
    }

    /// The record of a key, if the block has it.
    pub(crate) fn find(&self, token: Token, key: &[u8]) -> Result<Option<usize>, Mismatch> {
        let Ordering::Equal = self.cmp_prefix(token) else {
            return Ok(None);
        };
        let wanted = discriminator(token, self.token_bits);
        let first = self.lower_bound(wanted);
        for index in first..self.count {
            if self.discriminator_at(index) != wanted {
                break;
            }
            if self.is_key(index, key)? && self.token_at(index)? == token {
                return Ok(Some(index));
            }
        }
        Ok(None)
    }

    /// The first record that `from` does not exclude; the number of records when it excludes all.
    pub(crate) fn seek(&self, from: &ScanFrom) -> Result<usize, Mismatch> {
        let token = from.token();
        let mut index = match self.cmp_prefix(token) {
            Ordering::Less => return Ok(0),
            Ordering::Greater => return Ok(self.count),
            Ordering::Equal => self.lower_bound(discriminator(token, self.token_bits)),
        };
        while index < self.count {
            let token = self.token_at(index)?;
            // The key decides only between equal tokens.
            if token > from.token() || !from.is_after(token, &self.key_bytes(index)?) {
                break;
            }
            index += 1;
        }
        Ok(index)
    }

    /// The record at `index`, which must be below [`Block::len`]. The value shares the block's
    /// memory, and so does the key unless the block's keys share a prefix.
    pub(crate) fn entry(&self, index: usize) -> Result<(Entry, Option<BlobRef>), Mismatch> {
        let (record, reference) = self.record(index)?;
        let entry = Entry {
            token: self.token_at(index)?,
            key: self.key_bytes(index)?,
            seqno: self.seqno(index),
            record,
        };
        Ok((entry, reference))
    }

    /// The sequence number at `index`.
    pub(crate) fn seqno(&self, index: usize) -> u64 {
        self.number(self.seqnos, index)
    }

    /// What is stored at `index`; the value shares the block's memory, or is empty and in a blob.
    pub(crate) fn record(&self, index: usize) -> Result<(Record, Option<BlobRef>), Mismatch> {
        let (kind, is_separate) = match self.number(self.kinds, index) {
            KIND_VALUE => (Kind::Value, false),
            KIND_TOMBSTONE => (Kind::Tombstone, false),
            KIND_SEPARATE_VALUE => (Kind::Value, true),
            KIND_SEPARATE_TOMBSTONE => (Kind::Tombstone, true),
            kind => return Err(Mismatch::new("kind 0 to 3", format!("kind {kind}"))),
        };
        let (start, end) = self.span(self.value_ends, index);
        let (start, end) = (self.values + start, self.values + end);
        if start > end || end > self.body.len() {
            return Err(misplaced("value"));
        }
        let record = |value| Record {
            kind,
            stamp: self.number(self.stamps, index),
            expires_at_ms: self.number(self.expiries, index),
            value,
        };
        if !is_separate {
            return Ok((record(self.body.slice(start..end)), None));
        }
        let Some(reference) = BlobRef::decode(&self.body[start..end]) else {
            let found = format!("{} bytes", end - start);
            return Err(Mismatch::new("a reference of 24 bytes", found));
        };
        Ok((record(Bytes::new()), Some(reference)))
    }

    /// How `token` stands to the block's tokens by the leading bits that these share.
    fn cmp_prefix(&self, token: Token) -> Ordering {
        let shift = u128::BITS - self.token_bits;
        let top = |token: Token| token.0.checked_shr(shift).unwrap_or(0);
        top(token).cmp(&top(self.first_token))
    }

    /// The first index whose discriminator is at least `wanted`: interpolated, since tokens are
    /// spread evenly, then walked, then halved.
    fn lower_bound(&self, wanted: u32) -> usize {
        let last = self.count - 1;
        let (low, high) = (self.discriminator_at(0), self.discriminator_at(last));
        if wanted <= low {
            return 0;
        }
        if wanted > high {
            return self.count;
        }
        // Here low < wanted <= high.
        let distance = u64::from(wanted - low) * le::len64(last) / u64::from(high - low);
        let mut index = usize::try_from(distance).map_or(last, |guess| guess.min(last));
        for _ in 0..WALK {
            if self.discriminator_at(index) < wanted {
                index += 1;
            } else if self.discriminator_at(index - 1) < wanted {
                return index;
            } else {
                index -= 1;
            }
        }
        let (mut from, mut to) = if self.discriminator_at(index) < wanted {
            (index + 1, last)
        } else {
            (1, index)
        };
        while from < to {
            let middle = from.midpoint(to);
            if self.discriminator_at(middle) < wanted {
                from = middle + 1;
            } else {
                to = middle;
            }
        }
        from
    }

    fn discriminator_at(&self, index: usize) -> u32 {
        le::u32_at(&self.body, self.discriminators + 4 * index)
    }

    fn token_at(&self, index: usize) -> Result<Token, Mismatch> {
        match self.tokens {
            Some(at) => Ok(Token(le::u128_at(&self.body, at + 16 * index))),
            None => Ok(self.token_of(self.suffix(index)?)),
        }
    }

    /// That of the key that ends in `suffix`. Short keys, which most are, cost no allocation.
    fn token_of(&self, suffix: &[u8]) -> Token {
        const SHORT_BYTES: usize = 128;
        let (prefix, len) = (self.prefix(), self.prefix_len + suffix.len());
        if prefix.is_empty() {
            return Token::of(self.tree, suffix);
        }
        if len > SHORT_BYTES {
            return Token::of(self.tree, &[prefix, suffix].concat());
        }
        let mut key = [0; SHORT_BYTES];
        key[..prefix.len()].copy_from_slice(prefix);
        key[prefix.len()..len].copy_from_slice(suffix);
        Token::of(self.tree, &key[..len])
    }

    fn key_bytes(&self, index: usize) -> Result<Bytes, Mismatch> {
        let suffix = self.suffix(index)?;
        if self.prefix_len == 0 {
            return Ok(self.body.slice_ref(suffix));
        }
        let mut key = Vec::with_capacity(self.prefix_len + suffix.len());
        key.extend_from_slice(self.prefix());
        key.extend_from_slice(suffix);
        Ok(key.into())
    }

    fn is_key(&self, index: usize, key: &[u8]) -> Result<bool, Mismatch> {
        let suffix = self.suffix(index)?;
        Ok(key.strip_prefix(self.prefix()) == Some(suffix))
    }

    fn prefix(&self) -> &[u8] {
        &self.body[self.prefix..self.suffixes]
    }

    fn suffix(&self, index: usize) -> Result<&[u8], Mismatch> {
        let (start, end) = self.span(self.key_ends, index);
        self.body[self.suffixes..self.values]
            .get(start..end)
            .ok_or_else(|| misplaced("key"))
    }

    /// Start and end of an item in its column of bytes, from the column of ends at `ends`.
    fn span(&self, ends: usize, index: usize) -> (usize, usize) {
        let start = index
            .checked_sub(1)
            .map_or(0, |before| self.end(ends, before));
        (start, self.end(ends, index))
    }

    fn end(&self, ends: usize, index: usize) -> usize {
        let end = le::uint_at(&self.body, ends + self.ends_width * index, self.ends_width);
        usize::try_from(end).expect("at most 32 bits")
    }

    fn number(&self, column: Column, index: usize) -> u64 {
        let distance = le::uint_at(&self.body, column.at + column.width * index, column.width);
        column.base.wrapping_add(distance)
    }
}

#[cfg(test)]
impl Block {
    /// A block of one record, with a value of so many bytes.
    pub(crate) fn of_value(value_bytes: usize) -> Block {
        let (tree, key) = (TreeId(1), b"key");
        let record = Record {
            kind: Kind::Value,
            stamp: 1,
            expires_at_ms: 0,
            value: vec![7; value_bytes].into(),
        };
        let mut builder = super::block_builder::BlockBuilder::new(tree);
        builder.push(&record.at(Token::of(tree, key), key, 1), false);
        let mut body = Vec::new();
        builder.encode(1, &mut body);
        Block::from_body(body.into(), 1, tree).expect("a block as it was built")
    }
}

fn misplaced(what: &str) -> Mismatch {
    Mismatch::new(format!("a {what} inside its column"), "one outside")
}
