//! Merging sorted sources into one: the newest record of each key, in order.
//!
//! Scans merge memtables (already in memory) with tables (which wait for the device); compactions
//! merge tables alone. Of several records of one key the one with the highest sequence number
//! comes out, whole, and the others are passed over. The merge knows nothing of deletion: tombstones
//! come out like values, and so do references to values that stand elsewhere.

use std::cmp::Ordering;
use std::collections::VecDeque;

use futures_util::future::join_all;
use torc_env::{Disk, TokenRange};

use crate::error::ReadError;
use crate::record::{Entry, ScanFrom};
use crate::table::{ReadAhead, Stored, Table, TableIter};

/// A sorted source of records, ascending by (token, key), one record a key.
pub enum Source<D: Disk, M> {
    /// Records in memory.
    Memory(M),
    /// The tables of one run.
    Run(RunIter<D>),
}

impl<D: Disk, M: Iterator<Item = Entry>> Source<D, M> {
    async fn next(&mut self) -> Result<Option<Stored>, ReadError> {
        match self {
            Source::Memory(entries) => Ok(entries.next().map(Stored::whole)),
            Source::Run(run) => run.next().await,
        }
    }
}

/// Goes over the tables of one run, one after the other.
pub struct RunIter<D: Disk> {
    /// Tables not yet begun, ascending, each with the part of the ring that it answers for.
    tables: VecDeque<(Table<D>, TokenRange)>,
    from: ScanFrom,
    ahead: ReadAhead,
    /// Boxed, for it is large.
    current: Option<Box<TableIter<D>>>,
}

impl<D: Disk> RunIter<D> {
    /// Goes over `tables` from `from` on. They must ascend, and their ranges must not overlap.
    pub fn new(
        tables: impl IntoIterator<Item = (Table<D>, TokenRange)>,
        from: ScanFrom,
        ahead: ReadAhead,
    ) -> RunIter<D> {
        RunIter {
            tables: tables.into_iter().collect(),
            from,
            ahead,
            current: None,
        }
    }

    /// The next record, or `None` behind the last.
    pub async fn next(&mut self) -> Result<Option<Stored>, ReadError> {
        loop {
            if let Some(current) = &mut self.current {
                if let Some(stored) = current.next().await? {
                    return Ok(Some(stored));
                }
                self.current = None;
            }
            let Some((table, range)) = self.tables.pop_front() else {
                return Ok(None);
            };
            if range.last >= self.from.token() {
                self.current = Some(Box::new(table.iter(&self.from, range, self.ahead.clone())));
            }
        }
    }
}

/// The merge of several sources: a tree of losers (D. Knuth, "The Art of Computer Programming" 3, section 5.4.1), so that each record
/// costs one comparison for every doubling of the sources, and none is moved but into its place and out of it.
pub struct Merge<D: Disk, M> {
    sources: Vec<Source<D, M>>,
    /// The next record of every source; `None` when it has ended, or before the merge has begun.
    heads: Vec<Option<Stored>>,
    /// By node of the tree, the source that lost there; of the first one, the winner of all. Source `i` is a leaf below node
    /// `(i + sources) / 2`. Empty before the merge has begun.
    losers: Vec<usize>,
    superseded: u64,
}

impl<D: Disk, M: Iterator<Item = Entry>> Merge<D, M> {
    /// Merges `sources`. Of two records with one key and one sequence number (which are the same
    /// record, met twice) that of the earlier source comes out.
    pub fn new(sources: Vec<Source<D, M>>) -> Merge<D, M> {
        Merge {
            heads: Vec::new(),
            losers: Vec::new(),
            sources,
            superseded: 0,
        }
    }

    /// The newest record of the next key, or `None` when every source has ended. After an error
    /// the merge must not be used again.
    pub async fn next(&mut self) -> Result<Option<Stored>, ReadError> {
        if self.losers.is_empty() {
            self.begin().await?;
        }
        let Some(newest) = self.pop().await? else {
            return Ok(None);
        };
        while self.is_next_of_key(&newest.entry) {
            self.superseded += 1;
            self.pop().await?;
        }
        Ok(Some(newest))
    }

    /// Records passed over so far because a newer one of their key came out.
    pub fn superseded(&self) -> u64 {
        self.superseded
    }

    async fn begin(&mut self) -> Result<(), ReadError> {
        // Each may wait for the device: at the same time.
        let firsts = join_all(self.sources.iter_mut().map(Source::next)).await;
        self.heads = firsts.into_iter().collect::<Result<_, _>>()?;
        let count = self.heads.len();
        self.losers = vec![0; count.max(1)];
        // Who comes out of each node, from the leaves up.
        let mut winners: Vec<usize> = (0..2 * count)
            .map(|node| node.saturating_sub(count))
            .collect();
        for node in (1..count).rev() {
            let (one, other) = (winners[2 * node], winners[2 * node + 1]);
            let is_one = self.is_before(one, other);
            (winners[node], self.losers[node]) = if is_one { (one, other) } else { (other, one) };
        }
        self.losers[0] = winners.get(1).copied().unwrap_or(0);
        Ok(())
    }

    /// Takes the first head out and puts its source's next record in.
    async fn pop(&mut self) -> Result<Option<Stored>, ReadError> {
        let mut winner = self.losers[0];
        if self.heads.get(winner).is_none_or(Option::is_none) {
            return Ok(None);
        }
        let next = self.sources[winner].next().await?;
        let first = std::mem::replace(&mut self.heads[winner], next);
        let mut node = (winner + self.heads.len()) / 2;
        while node > 0 {
            let other = self.losers[node];
            if self.is_before(other, winner) {
                self.losers[node] = winner;
                winner = other;
            }
            node /= 2;
        }
        self.losers[0] = winner;
        Ok(first)
    }

    fn is_next_of_key(&self, entry: &Entry) -> bool {
        let next = self.heads.get(self.losers[0]).and_then(Option::as_ref);
        next.is_some_and(|next| next.entry.token == entry.token && next.entry.key == entry.key)
    }

    /// Whether the next record of source `one` comes out before that of `other`. A source that has ended is behind all.
    fn is_before(&self, one: usize, other: usize) -> bool {
        let (Some(a), Some(b)) = (&self.heads[one], &self.heads[other]) else {
            return self.heads[one].is_some();
        };
        let (a, b) = (&a.entry, &b.entry);
        let order = a.token.cmp(&b.token);
        let order = order.then_with(|| a.key.cmp(&b.key));
        let order = order.then_with(|| b.seqno.cmp(&a.seqno));
        order.then_with(|| one.cmp(&other)) == Ordering::Less
    }
}
