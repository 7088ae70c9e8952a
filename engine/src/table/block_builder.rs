//! Collects records for the next block of a table and lays them out in columns (see
//! [`super::block`] for the layout).

use torc_env::{Token, TreeId};

use super::block::{
    BODY_HEADER_BYTES, FLAG_TOKENS, FLAG_WIDE, KIND_SEPARATE_TOMBSTONE, KIND_SEPARATE_VALUE,
    KIND_TOMBSTONE, KIND_VALUE,
};
use super::fence::bits_to_separate;
use crate::le;
use crate::record::{EntryRef, Kind};

/// What a record costs besides its key and value, about.
const ROW_BYTES: usize = 16;

/// A record without its key and value, which stand in the arenas.
#[derive(Debug, Clone, Copy)]
struct Row {
    token: Token,
    key_end: usize,
    value_end: usize,
    seqno: u64,
    stamp: u64,
    expires_at_ms: u64,
    kind: Kind,
    is_separate: bool,
}

impl Row {
    fn kind_number(&self) -> u64 {
        match (self.kind, self.is_separate) {
            (Kind::Value, false) => KIND_VALUE,
            (Kind::Tombstone, false) => KIND_TOMBSTONE,
            (Kind::Value, true) => KIND_SEPARATE_VALUE,
            (Kind::Tombstone, true) => KIND_SEPARATE_TOMBSTONE,
        }
    }
}

/// Records waiting for their block, in order.
#[derive(Debug)]
pub(crate) struct BlockBuilder {
    tree: TreeId,
    rows: Vec<Row>,
    keys: Vec<u8>,
    values: Vec<u8>,
}

impl BlockBuilder {
    pub(crate) fn new(tree: TreeId) -> BlockBuilder {
        BlockBuilder {
            tree,
            rows: Vec::new(),
            keys: Vec::new(),
            values: Vec::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.rows.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Size of the body with one more record, about.
    pub(crate) fn bytes_with(&self, entry: &EntryRef<'_>) -> usize {
        BODY_HEADER_BYTES
            + ROW_BYTES * (self.rows.len() + 1)
            + self.keys.len()
            + self.values.len()
            + entry.key.len()
            + entry.value.len()
    }

    /// Takes a record; `is_separate`: its value is a reference to a blob.
    pub(crate) fn push(&mut self, entry: &EntryRef<'_>, is_separate: bool) {
        self.keys.extend_from_slice(entry.key);
        self.values.extend_from_slice(entry.value);
        self.rows.push(Row {
            token: entry.token,
            key_end: self.keys.len(),
            value_end: self.values.len(),
            seqno: entry.seqno,
            stamp: entry.stamp,
            expires_at_ms: entry.expires_at_ms,
            kind: entry.kind,
            is_separate,
        });
    }

    /// How many of the records should make a block, given that `next` comes behind them. `None`
    /// when all, and `next`, are of one token and cannot be parted.
    ///
    /// Of the last sixteenth of the places, the one that needs the fewest bits to tell its two sides
    /// apart: a few choices a block save bits in every fence of the table. More of them would leave
    /// more of each page empty.
    pub(crate) fn cut(&self, next: Token) -> Option<usize> {
        let len = self.rows.len();
        let bits = |at: usize| {
            let before = self.rows[at - 1].token;
            let behind = self.rows.get(at).map_or(next, |row| row.token);
            (before < behind).then(|| bits_to_separate(before, behind))
        };
        let preferred = (len - len / 16).max(1)..=len;
        preferred
            .filter_map(|at| Some((bits(at)?, len - at)))
            .min()
            .map(|(_, kept)| len - kept)
            .or_else(|| (1..len).rev().find(|at| bits(*at).is_some()))
    }

    /// Tokens of the waiting records.
    pub(crate) fn tokens(&self) -> impl Iterator<Item = Token> + '_ {
        self.rows.iter().map(|row| row.token)
    }

    /// Appends the body of a block with the first `count` records, at least one.
    pub(crate) fn encode(&self, count: usize, out: &mut Vec<u8>) {
        let rows = &self.rows[..count];
        let (first, last) = (rows[0], rows[count - 1]);
        let token_bits = (first.token.0 ^ last.token.0).leading_zeros();
        let derived =
            (0..count).all(|index| rows[index].token == Token::of(self.tree, self.key(index)));
        let prefix = self.common_prefix(count);
        let suffixes_len = last.key_end - prefix * count;
        let is_wide = suffixes_len.max(last.value_end) > usize::from(u16::MAX);
        let mut flags = 0;
        if is_wide {
            flags |= FLAG_WIDE;
        }
        if !derived {
            flags |= FLAG_TOKENS;
        }
        let kinds = Column::of(rows, Row::kind_number, 0);
        let seqnos = Column::of(rows, |row| row.seqno, first.seqno);
        let stamps = Column::of(rows, |row| row.stamp, first.stamp);
        let expiries = Column::of(rows, |row| row.expires_at_ms, first.expires_at_ms);

        out.extend_from_slice(&first.token.0.to_le_bytes());
        out.push(u8::try_from(token_bits).expect("at most 128"));
        out.push(flags);
        out.extend_from_slice(&u16::try_from(prefix).expect("bounded above").to_le_bytes());
        for width in [kinds.width, seqnos.width, stamps.width, expiries.width] {
            out.push(u8::try_from(width).expect("at most eight"));
        }
        for base in [seqnos.base, stamps.base, expiries.base] {
            out.extend_from_slice(&base.to_le_bytes());
        }
        for row in rows {
            let discriminator = super::block::discriminator(row.token, token_bits);
            out.extend_from_slice(&discriminator.to_le_bytes());
        }
        let width = if is_wide { 4 } else { 2 };
        for (index, row) in rows.iter().enumerate() {
            le::push_uint(out, le::len64(row.key_end - prefix * (index + 1)), width);
        }
        for row in rows {
            le::push_uint(out, le::len64(row.value_end), width);
        }
        kinds.encode(rows, out);
        seqnos.encode(rows, out);
        stamps.encode(rows, out);
        expiries.encode(rows, out);
        if !derived {
            for row in rows {
                out.extend_from_slice(&row.token.0.to_le_bytes());
            }
        }
        out.extend_from_slice(&self.key(0)[..prefix]);
        for index in 0..count {
            out.extend_from_slice(&self.key(index)[prefix..]);
        }
        out.extend_from_slice(&self.values[..last.value_end]);
    }

    /// The first `count` records, which must be there, without their values.
    pub(crate) fn stats(&self, count: usize) -> impl Iterator<Item = RowStats> + '_ {
        self.rows[..count].iter().map(|row| RowStats {
            seqno: row.seqno,
            stamp: row.stamp,
            expires_at_ms: row.expires_at_ms,
            kind: row.kind,
        })
    }

    /// Key of the record at `index`.
    pub(crate) fn key(&self, index: usize) -> &[u8] {
        let start = index
            .checked_sub(1)
            .map_or(0, |before| self.rows[before].key_end);
        &self.keys[start..self.rows[index].key_end]
    }

    /// Sums of key and value lengths of the first `count` records.
    pub(crate) fn lens(&self, count: usize) -> (usize, usize) {
        let last = &self.rows[count - 1];
        (last.key_end, last.value_end)
    }

    /// Forgets the first `count` records.
    pub(crate) fn drain(&mut self, count: usize) {
        let (key_end, value_end) = self.lens(count);
        self.rows.drain(..count);
        self.keys.drain(..key_end);
        self.values.drain(..value_end);
        for row in &mut self.rows {
            row.key_end -= key_end;
            row.value_end -= value_end;
        }
    }

    fn common_prefix(&self, count: usize) -> usize {
        let first = self.key(0);
        (1..count).fold(first.len().min(usize::from(u16::MAX)), |len, index| {
            let key = self.key(index);
            let same = first[..len].iter().zip(key).take_while(|(a, b)| a == b);
            same.count()
        })
    }
}

/// What the table's statistics need of a record.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowStats {
    pub(crate) seqno: u64,
    pub(crate) stamp: u64,
    pub(crate) expires_at_ms: u64,
    pub(crate) kind: Kind,
}

/// A column of numbers: a base and as few bytes each as the largest distance from it needs.
struct Column<F> {
    base: u64,
    width: usize,
    value: F,
}

impl<F: Fn(&Row) -> u64> Column<F> {
    /// The base is the lowest value, or `at_most` if that is lower.
    fn of(rows: &[Row], value: F, at_most: u64) -> Column<F> {
        let (min, max) = rows
            .iter()
            .map(&value)
            .fold((at_most, 0), |(min, max), v| (min.min(v), max.max(v)));
        Column {
            base: min,
            width: le::uint_width(max - min),
            value,
        }
    }

    fn encode(&self, rows: &[Row], out: &mut Vec<u8>) {
        for row in rows {
            le::push_uint(out, (self.value)(row) - self.base, self.width);
        }
    }
}
