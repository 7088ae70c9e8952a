//! Merging sorted sources into one: the newest record of each key, in order.
//!
//! Scans merge memtables (already in memory) with tables (which wait for the device); compactions
//! merge tables alone. Of several records of one key the one with the highest sequence number
//! comes out, whole, and the others are passed over. The merge knows nothing of deletion: tombstones
//! come out like values, and so do references to values that stand elsewhere.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::collections::VecDeque;
use std::collections::binary_heap::PeekMut;

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

/// The merge of several sources.
pub struct Merge<D: Disk, M> {
    sources: Vec<Source<D, M>>,
    /// The next record of every source that has one.
    heads: BinaryHeap<Head>,
    /// Whether `heads` was filled.
    is_begun: bool,
    superseded: u64,
}

/// The next record of a source. The greatest head is the one to come out first.
struct Head {
    stored: Stored,
    source: usize,
}

impl Head {
    fn is_same_key(&self, other: &Stored) -> bool {
        let (entry, other) = (&self.stored.entry, &other.entry);
        entry.token == other.token && entry.key == other.key
    }
}

impl Ord for Head {
    fn cmp(&self, other: &Self) -> Ordering {
        let (a, b) = (&self.stored.entry, &other.stored.entry);
        (b.token.cmp(&a.token))
            .then_with(|| b.key.cmp(&a.key))
            .then_with(|| a.seqno.cmp(&b.seqno))
            .then_with(|| other.source.cmp(&self.source))
    }
}

impl PartialOrd for Head {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Head {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Head {}

impl<D: Disk, M: Iterator<Item = Entry>> Merge<D, M> {
    /// Merges `sources`. Of two records with one key and one sequence number (which are the same
    /// record, met twice) that of the earlier source comes out.
    pub fn new(sources: Vec<Source<D, M>>) -> Merge<D, M> {
        Merge {
            heads: BinaryHeap::with_capacity(sources.len()),
            sources,
            is_begun: false,
            superseded: 0,
        }
    }

    /// The newest record of the next key, or `None` when every source has ended. After an error
    /// the merge must not be used again.
    pub async fn next(&mut self) -> Result<Option<Stored>, ReadError> {
        if !self.is_begun {
            self.is_begun = true;
            // Each may wait for the device: at the same time.
            let firsts = join_all(self.sources.iter_mut().map(Source::next)).await;
            for (source, first) in firsts.into_iter().enumerate() {
                if let Some(stored) = first? {
                    self.heads.push(Head { stored, source });
                }
            }
        }
        let Some(newest) = self.pop().await? else {
            return Ok(None);
        };
        while self
            .heads
            .peek()
            .is_some_and(|head| head.is_same_key(&newest))
        {
            self.superseded += 1;
            self.pop().await?;
        }
        Ok(Some(newest))
    }

    /// Records passed over so far because a newer one of their key came out.
    pub fn superseded(&self) -> u64 {
        self.superseded
    }

    /// Takes the first head out and puts its source's next record in.
    async fn pop(&mut self) -> Result<Option<Stored>, ReadError> {
        let Some(source) = self.heads.peek().map(|head| head.source) else {
            return Ok(None);
        };
        let next = self.sources[source].next().await?;
        let Some(mut first) = self.heads.peek_mut() else {
            return Ok(None);
        };
        Ok(Some(match next {
            Some(stored) => std::mem::replace(&mut first.stored, stored),
            None => PeekMut::pop(first).stored,
        }))
    }
}
