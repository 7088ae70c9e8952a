//! A run over a table's records in order, for scans, which use the block cache, and merges, which do not.

use std::cell::RefCell;
use std::rc::Rc;

use bytes::Bytes;
use torc_env::{Disk, TokenRange};

use super::block::Block;
use super::fence::Extent;
use super::reader::Table;
use super::{Separate, Stored};
use crate::ahead::{AheadBudget, Held};
use crate::cache::BlockCache;
use crate::compaction::Scanned;
use crate::error::ReadError;
use crate::le;
use crate::record::ScanFrom;

/// What a block takes on the disk, about.
const BLOCK_BYTES: u64 = 8 << 10;

/// How much is read at once.
#[derive(Clone)]
pub enum ReadAhead {
    /// For a client's scan.
    Foreground(Ahead),
    /// For compaction and streaming: so many bytes.
    Background(u64),
}

/// A client's scan of a run reads at first what it is expected to need, then a block, then twice as much each time up to 128 KiB, as
/// long as the budget has it; otherwise a block. Most pages end after a few records of each run, and what is read beyond
/// them is taken from other requests.
#[derive(Clone)]
pub struct Ahead {
    /// What all scans read.
    pub budget: Rc<AheadBudget>,
    /// What is here is not read; blocks that the scan comes to get here.
    pub blocks: BlockCache,
    /// Bytes of a block that the scan holds already, as read and once more decoded.
    pub block_bytes: usize,
    /// Bytes of the run that the scan is expected to need.
    pub expected: u64,
    /// The level of the run.
    pub level: u8,
    /// What the scan reads of all runs is added here.
    pub scanned: Rc<RefCell<Scanned>>,
}

/// What a background job reads at once, at most. More gains nothing on any device that we know.
const BACKGROUND_BYTES: u64 = 1 << 20;
/// What all sources of a job read at once, and no less of each than a scan.
const JOB_BYTES: u64 = 8 << 20;
const JOB_BYTES_EACH_MIN: u64 = 128 << 10;

impl ReadAhead {
    /// That of each of so many sources that a background job reads at the same time.
    pub fn background(sources: usize) -> ReadAhead {
        let each = JOB_BYTES / le::len64(sources.max(1));
        ReadAhead::Background(each.clamp(JOB_BYTES_EACH_MIN, BACKGROUND_BYTES))
    }

    fn bytes_first(&self) -> u64 {
        match self {
            // What is wanted rarely begins where a block does.
            ReadAhead::Foreground(ahead) => {
                let more = ahead.expected.min(BLOCK_BYTES);
                ahead.expected.saturating_add(more).min(self.bytes_max())
            }
            ReadAhead::Background(bytes) => *bytes,
        }
    }

    /// Of the window behind the first: what is still expected; else more of the run was needed than was expected, and most likely it
    /// is little more.
    fn bytes_second(&self) -> u64 {
        match self {
            ReadAhead::Foreground(ahead) => {
                let rest = ahead.expected.saturating_sub(self.bytes_first());
                rest.clamp(BLOCK_BYTES, self.bytes_max())
            }
            ReadAhead::Background(bytes) => *bytes,
        }
    }

    fn bytes_max(&self) -> u64 {
        match self {
            ReadAhead::Foreground(..) => 128 << 10,
            ReadAhead::Background(bytes) => *bytes,
        }
    }

    /// Memory for what a window has beyond its first block; `None` when there is no bound.
    fn hold_up_to(&self, bytes: u64) -> Option<Held> {
        let ReadAhead::Foreground(ahead) = self else {
            return None;
        };
        Some(
            ahead
                .budget
                .hold_up_to(usize::try_from(bytes).unwrap_or(usize::MAX)),
        )
    }

    /// Memory for what a block of so many bytes has beyond the usual; `None` when there is no bound.
    fn owe_beyond(&self, bytes: usize) -> Option<Held> {
        let ReadAhead::Foreground(ahead) = self else {
            return None;
        };
        let beyond = bytes.saturating_sub(ahead.block_bytes);
        (beyond > 0).then(|| ahead.budget.owe(beyond))
    }

    fn note_read(&self, bytes: u64) {
        if let ReadAhead::Foreground(ahead) = self {
            ahead.scanned.borrow_mut().add(ahead.level, bytes);
        }
    }

    fn blocks(&self) -> Option<&BlockCache> {
        match self {
            ReadAhead::Foreground(ahead) => Some(&ahead.blocks),
            ReadAhead::Background(_) => None,
        }
    }
}

/// An iterator that waits for the device. Holds one window of read-ahead and one decoded block.
pub struct TableIter<D: Disk> {
    table: Table<D>,
    range: TokenRange,
    /// Where to begin within the first block; `None` once begun.
    from: Option<ScanFrom>,
    window: Window,
    ahead: ReadAhead,
    /// Of the next window, and of the one behind it.
    ahead_bytes: u64,
    ahead_bytes_then: u64,
    /// The block to decode next.
    next_block: usize,
    /// The first block behind the range. What lies there is not touched: it may be unreadable.
    end_block: usize,
    current: Option<Current>,
}

/// Blocks in memory, not yet decoded.
#[derive(Default)]
struct Window {
    bytes: Bytes,
    /// Where `bytes` begin in the file.
    start: u64,
    /// The first block that is not in it.
    end_block: usize,
    /// Memory of the blocks behind its first one, and of what that one has beyond the usual.
    _held: [Option<Held>; 2],
}

struct Current {
    block: Block,
    index: usize,
    at: usize,
    /// Memory of what it has beyond the usual.
    _owed: Option<Held>,
}

impl<D: Disk> TableIter<D> {
    pub(super) fn new(
        table: Table<D>,
        from: &ScanFrom,
        range: TokenRange,
        ahead: ReadAhead,
    ) -> TableIter<D> {
        let from = if from.token() < range.first {
            ScanFrom::Token(range.first)
        } else {
            from.clone()
        };
        let next_block = table.block_of(from.token());
        TableIter {
            range,
            from: Some(from),
            window: Window {
                end_block: next_block,
                ..Window::default()
            },
            ahead_bytes: ahead.bytes_first(),
            ahead_bytes_then: ahead.bytes_second(),
            ahead,
            next_block,
            end_block: table.block_of(range.last) + 1,
            current: None,
            table,
        }
    }

    /// The next record, or `None` at the end of the range. Waits for the device once for each
    /// window.
    pub async fn next(&mut self) -> Result<Option<Stored>, ReadError> {
        loop {
            if let Some(current) = &mut self.current {
                if current.at < current.block.len() {
                    let corrupt = |mismatch| self.table.corrupt_block(current.index, mismatch);
                    let (entry, reference) = current.block.entry(current.at).map_err(corrupt)?;
                    let checked = self.table.check_reference(reference.as_ref());
                    checked.map_err(corrupt)?;
                    current.at += 1;
                    if entry.token > self.range.last {
                        self.end();
                        return Ok(None);
                    }
                    let table = self.table.info().file_id;
                    return Ok(Some(Stored {
                        entry,
                        separate: reference.map(|reference| Separate { table, reference }),
                    }));
                }
                self.current = None;
            }
            if self.next_block >= self.end_block {
                return Ok(None);
            }
            self.enter_block().await?;
        }
    }

    /// Goes on behind the block that [`TableIter::next`] found damaged.
    pub(crate) fn skip_block(&mut self) {
        // A block that was entered is behind `next_block` already.
        if self.current.take().is_none() {
            self.next_block += 1;
        }
    }

    /// Decodes the next block, reading a new window when it is not in memory.
    async fn enter_block(&mut self) -> Result<(), ReadError> {
        let index = self.next_block;
        let id = self.table.block_id(index);
        let cached = self.ahead.blocks().and_then(|blocks| blocks.get(id));
        let (block, owed) = match cached {
            Some(block) => (block, None),
            None => {
                let block = self.read_block(index).await?;
                let owed = self.ahead.owe_beyond(block.body_bytes());
                (block, owed)
            }
        };
        let at = match self.from.take() {
            Some(from) => block
                .seek(&from)
                .map_err(|mismatch| self.table.corrupt_block(index, mismatch))?,
            None => 0,
        };
        self.next_block = index + 1;
        self.current = Some(Current {
            block,
            index,
            at,
            _owed: owed,
        });
        Ok(())
    }

    async fn read_block(&mut self, index: usize) -> Result<Block, ReadError> {
        if index >= self.window.end_block {
            self.read_window(index).await?;
        }
        let Window { bytes, start, .. } = &self.window;
        let block = self.table.decode_block(index, bytes, *start)?;
        if let Some(blocks) = self.ahead.blocks() {
            self.table.cache_block(blocks, index, &block);
        }
        Ok(block)
    }

    /// Reads as many blocks from `first` on as fit the read-ahead and are not cached, at least one.
    async fn read_window(&mut self, first: usize) -> Result<(), ReadError> {
        // The one before is not held together with its successor.
        self.window = Window::default();
        let Extent { offset: start, len } = self.table.extent(first);
        let owed = self
            .ahead
            .owe_beyond(usize::try_from(len).unwrap_or(usize::MAX));
        let mut held = self.ahead.hold_up_to(self.ahead_bytes.saturating_sub(len));
        let ahead_bytes = match &held {
            Some(held) => len + le::len64(held.bytes()),
            None => self.ahead_bytes,
        };
        let mut end = first + 1;
        while end < self.end_block {
            let extent = self.table.extent(end);
            let id = self.table.block_id(end);
            if self.ahead.blocks().is_some_and(|blocks| blocks.has(id)) {
                break;
            }
            if extent.offset + extent.len - start > ahead_bytes {
                break;
            }
            end += 1;
        }
        self.ahead_bytes = self.ahead_bytes_then;
        self.ahead_bytes_then = (self.ahead_bytes * 2).min(self.ahead.bytes_max());
        let span = self.table.span(first, end);
        debug_assert!(span.len > 0 && le::len64(end) > 0);
        if let Some(held) = &mut held {
            held.shrink(usize::try_from(span.len - len).unwrap_or(usize::MAX));
        }
        self.ahead.note_read(span.len);
        self.window = Window {
            bytes: self.table.read_span(span, first).await?,
            start: span.offset,
            end_block: end,
            _held: [held, owed],
        };
        Ok(())
    }

    fn end(&mut self) {
        self.current = None;
        self.next_block = self.end_block;
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use ahash::RandomState;
    use torc_env::{Disk as _, Env as _, Token, TreeId};

    use super::*;
    use crate::cache::RecordCache;
    use crate::crypt::{Keys, Sealing};
    use crate::record::{EntryRef, Kind};
    use crate::table::{FilterBits, TableOptions, TableWriter, table_path};

    const RECORDS: u64 = 600;

    /// A table of values that do not compress.
    async fn table(env: &torc_sim::SimEnv) -> Table<torc_sim::SimDisk> {
        let dir = Path::new("tables");
        env.disk().create_dir(dir).await.unwrap();
        let options = TableOptions {
            tree: TreeId(1),
            block_bytes: 8 << 10,
            filter: FilterBits::Eight,
        };
        let path = table_path(dir, 1);
        let sealing = Sealing::default();
        let mut writer = TableWriter::create(env.disk().clone(), &path, 1, options, &sealing)
            .await
            .unwrap();
        let mut word = 1_u64;
        for number in 0..RECORDS {
            let mut value = Vec::new();
            while value.len() < 1000 {
                word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                value.extend_from_slice(&word.to_be_bytes());
            }
            let entry = EntryRef {
                token: Token(u128::from(number)),
                key: &number.to_be_bytes(),
                seqno: number + 1,
                kind: Kind::Value,
                stamp: 1,
                expires_at_ms: 0,
                value: &value,
            };
            writer.add(&entry).await.unwrap();
        }
        writer.finish().await.unwrap();
        Table::open(env.disk(), dir, 1, &Keys::default())
            .await
            .unwrap()
    }

    fn foreground(budget: Rc<AheadBudget>, expected: u64) -> ReadAhead {
        ReadAhead::Foreground(Ahead {
            budget,
            blocks: BlockCache::none(),
            block_bytes: 8 << 10,
            expected,
            level: 0,
            scanned: Rc::default(),
        })
    }

    #[test]
    fn scans_at_once_read_ahead_no_more_than_their_budget() {
        torc_sim::run(2, |env| async move {
            const BUDGET: usize = 256 << 10;
            let table = table(&env).await;
            let budget = AheadBudget::new(BUDGET);
            let from = ScanFrom::Token(Token(0));
            let iter = |_| {
                let ahead = foreground(Rc::clone(&budget), 16 << 10);
                table.iter(&from, TokenRange::ALL, ahead)
            };
            let mut iters: Vec<_> = (0..64).map(iter).collect();
            let mut most = 0;
            for _ in 0..RECORDS {
                for iter in &mut iters {
                    assert!(iter.next().await.unwrap().is_some());
                }
                let bytes = iters.iter().map(|iter| iter.window.bytes.len()).sum();
                most = most.max(bytes);
            }
            // Each has a block in any case, with a sector at each end.
            let blocks = iters.len() * (16 << 10);
            assert!(most > BUDGET && most <= BUDGET + blocks, "{most} bytes");
            drop(iters);
            assert_eq!(budget.left(), BUDGET);
        });
    }

    #[test]
    fn a_table_that_is_no_longer_part_of_a_tree_is_read_but_not_cached() {
        torc_sim::run(3, |env| async move {
            let table = table(&env).await;
            for is_retired in [false, true] {
                if is_retired {
                    table.retire();
                }
                let records = RecordCache::new(64 << 20, RandomState::with_seeds(1, 2, 3, 4));
                let blocks = BlockCache::beside(&records, 50);
                let ahead = ReadAhead::Foreground(Ahead {
                    budget: AheadBudget::new(1 << 20),
                    blocks: blocks.clone(),
                    block_bytes: 8 << 10,
                    expected: 8 << 10,
                    level: 0,
                    scanned: Rc::default(),
                });
                let mut iter = table.iter(&ScanFrom::Token(Token(0)), TokenRange::ALL, ahead);
                let mut records = 0;
                while iter.next().await.unwrap().is_some() {
                    records += 1;
                }
                assert_eq!(records, RECORDS);
                let cached = if is_retired { 0 } else { table.info().blocks };
                assert_eq!(blocks.stats().entries, cached);
            }
        });
    }

    #[test]
    fn a_scan_reads_what_is_expected_then_a_block_and_more_as_it_goes_on() {
        torc_sim::run(1, |env| async move {
            let table = table(&env).await;
            let from = ScanFrom::Token(Token(0));
            let ahead = foreground(AheadBudget::new(1 << 20), 8 << 10);
            let mut iter = table.iter(&from, TokenRange::ALL, ahead);
            let mut windows = Vec::new();
            let mut records = 0;
            while iter.next().await.unwrap().is_some() {
                records += 1;
                if windows.last() != Some(&iter.window.start) {
                    windows.push(iter.window.start);
                }
            }
            assert_eq!(records, RECORDS);
            let lengths: Vec<u64> = windows.windows(2).map(|pair| pair[1] - pair[0]).collect();
            for (length, most) in lengths.iter().zip([16_u64, 8, 16, 32, 64, 128, 128]) {
                // As many whole blocks as fit, and a sector at each end.
                let range = most.saturating_sub(12) << 10..=(most + 4) << 10;
                assert!(range.contains(length), "{lengths:?}");
            }
            assert!(lengths.len() >= 7, "{lengths:?}");
        });
    }
}
