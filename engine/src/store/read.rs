//! Reads: memtables, then tables, newest first.

use std::cell::RefCell;
use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, TryStreamExt, stream};
use torc_env::{Env, SECTOR_BYTES, Token, TokenRange, TreeId};

use super::Inner;
use super::tables::Tree;
use crate::ahead::Held;
use crate::cache::Lookup;
use crate::compaction::Scanned;
use crate::error::ReadError;
use crate::le::len64;
use crate::levels::Run;
use crate::merge::{Merge, RunIter, Source};
use crate::record::{Entry, Record, ScanFrom};
use crate::table::{Ahead, ReadAhead, Separate, Stored};

/// Values of a page that are read from blobs at the same time.
const VALUES_AT_ONCE: usize = 8;

/// Bounds of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanLimits {
    /// Most records of a page.
    pub records: usize,
    /// Bytes of keys and values after which a page ends. The first record always gets in.
    pub bytes: usize,
}

/// A part of a scan's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScanPage {
    /// Ascending by (token, key), tombstones and expired records included.
    pub entries: Vec<Entry>,
    /// Where to go on; `None` when the range is at its end.
    pub next: Option<ScanFrom>,
}

impl<E: Env> Inner<E> {
    pub(super) async fn get(
        &self,
        tree: TreeId,
        token: Token,
        key: &[u8],
    ) -> Result<Option<Record>, ReadError> {
        self.count(|counts| counts.gets += 1);
        if let Some(record) = self.memory.borrow().get(tree, token, key) {
            self.count(|counts| counts.memtable_hits += 1);
            return Ok(Some(record));
        }
        // A flush moves records from memory to tables in one step, and the tables of that moment
        // are taken here without waiting: nothing falls between.
        match self.cache.lookup(tree, token, key) {
            Lookup::Hit(record) => Ok(record),
            Lookup::Miss(fill) => {
                let (record, asked) = self.get_from_tables(tree, token, key).await?;
                // What the filters alone tell is not worth a place.
                if asked > 0 {
                    fill.fill(key, record.as_ref());
                }
                Ok(record)
            }
        }
    }

    /// The key's record in tables, and how many of them were asked for it.
    pub(super) async fn get_from_tables(
        &self,
        tree: TreeId,
        token: Token,
        key: &[u8],
    ) -> Result<(Option<Record>, u64), ReadError> {
        let Some(tables) = self.tables.borrow().tree(tree) else {
            return Ok((None, 0));
        };
        let mut asked = 0;
        for candidate in tables.levels.candidates(token) {
            let table = tables.table(candidate);
            if !table.may_contain(token) {
                continue;
            }
            asked += 1;
            let reading = || self.count(|counts| counts.table_reads += 1);
            // Boxed: every request's future has room for a read, few come to the device.
            let found = Box::pin(table.get_through(&self.blocks, token, key, reading)).await;
            let Some(mut found) = self.count_corrupt(found)? else {
                continue;
            };
            if let Some(reference) = found.reference {
                let table = candidate.info.file_id;
                let separate = Separate { table, reference };
                self.count(|counts| counts.blob_gets += 1);
                found.record.value = Box::pin(self.value(&tables, token, &separate)).await?;
            }
            return Ok((Some(found.record), asked));
        }
        Ok((None, asked))
    }

    /// A record's value, out of the blob where it is. One device read.
    pub(super) async fn value(
        &self,
        tables: &Tree<E::Disk>,
        token: Token,
        separate: &Separate,
    ) -> Result<Bytes, ReadError> {
        self.count(|counts| counts.blob_reads += 1);
        let reference = &separate.reference;
        let blob = tables.blob(reference.file_id);
        let blob = blob.expect("a tree has every blob open to which its tables refer");
        let value = blob.get(reference).await;
        self.count_corrupt(value.map_err(|error| error.of_value(separate.table, token)))
    }

    /// Gives the records of a page their values, in order, several reads at a time.
    async fn with_values(
        &self,
        tables: Option<&Tree<E::Disk>>,
        page: Vec<Stored>,
    ) -> Result<Vec<Entry>, ReadError> {
        if page.iter().all(|stored| stored.separate.is_none()) {
            return Ok(page.into_iter().map(|stored| stored.entry).collect());
        }
        stream::iter(page)
            .map(|stored| async move {
                let mut entry = stored.entry;
                if let (Some(separate), Some(tables)) = (stored.separate, tables) {
                    entry.record.value = self.value(tables, entry.token, &separate).await?;
                }
                Ok(entry)
            })
            .buffered(VALUES_AT_ONCE)
            .try_collect()
            .await
    }

    /// What a scan of a tree holds while it looks into the runs: a block of each as read, which is whole sectors, and one
    /// decoded.
    fn blocks_bytes(&self, runs: usize) -> usize {
        runs * (2 * self.options.block_bytes + SECTOR_BYTES)
    }

    /// Memory for a scan to begin with: for blocks, and for a page as is expected.
    async fn hold_scan(&self, tree: TreeId, range: TokenRange, limits: ScanLimits) -> Held {
        let tables = self.tables.borrow().tree(tree);
        let runs = tables.as_ref().map_or(&[][..], |tree| tree.levels.runs());
        let densities: Vec<Density> = runs.iter().map(|run| Density::of(run, range)).collect();
        let page = expected_page_bytes(&densities, limits);
        let bytes = self.blocks_bytes(runs.len()).saturating_add(page);
        // What is waited for may be merged away meanwhile.
        drop(tables);
        self.scans.hold(bytes).await
    }

    /// What memory has of a page of so many records: the records, and the last of them if there may be more, for then the page
    /// must end there. Twice what is expected by the density of records in memory and in the runs: where memory holds a hundredth
    /// of them, a page needs one, and not as many as it has.
    fn in_memory(
        &self,
        tree: TreeId,
        from: &ScanFrom,
        range: TokenRange,
        records: usize,
        densities: &[Density],
    ) -> (Vec<Entry>, Option<(Token, Bytes)>) {
        let memory = self.memory.borrow();
        // One more tells whether the page is the last.
        let all = records.saturating_add(1);
        let per_ring = memory.per_ring(tree);
        let of_runs = densities.iter().map(|run| run.entries);
        let most = of_runs.max().unwrap_or(0).max(per_ring).max(1);
        let expected = u128::from(len64(all)).saturating_mul(per_ring) / most;
        let expected = usize::try_from(expected).unwrap_or(all);
        let count = all.min(expected.saturating_mul(2).max(IN_MEMORY_MIN));
        let entries = memory.range(tree, from, range.last, count);
        let is_cut = count < all && entries.len() == count;
        let last = entries.last().filter(|_| is_cut);
        let last = last.map(|entry| (entry.token, Bytes::clone(&entry.key)));
        (entries, last)
    }

    pub(super) async fn scan(
        &self,
        tree: TreeId,
        from: ScanFrom,
        last: Token,
        limits: ScanLimits,
    ) -> Result<ScanPage, ReadError> {
        let range = TokenRange {
            first: from.token(),
            last: last.max(from.token()),
        };
        // Before anything is looked at: memory and tables must be of one moment.
        let mut held = self.hold_scan(tree, range, limits).await;
        let mut page: Vec<Stored> = Vec::new();
        let mut next = None;
        let records = limits.records.max(1);
        let tables = self.tables.borrow().tree(tree);
        let runs = tables.as_ref().map_or(&[][..], |tree| tree.levels.runs());
        let densities: Vec<Density> = runs.iter().map(|run| Density::of(run, range)).collect();
        let (in_memory, known) = self.in_memory(tree, &from, range, records, &densities);
        let mut sources = vec![Source::Memory(in_memory.into_iter())];
        let expected = expected_bytes(&densities, limits);
        let scanned: Rc<RefCell<Scanned>> = Rc::default();
        for (run, expected) in runs.iter().zip(expected) {
            let parts = run.overlapping(range).iter().filter_map(|table| {
                let part = table.extent.intersection(&range)?;
                let tree = tables.as_ref()?;
                Some((tree.table(table).clone(), part))
            });
            sources.push(Source::Run(RunIter::new(
                parts,
                from.clone(),
                ReadAhead::Foreground(Ahead {
                    budget: Rc::clone(&self.scans),
                    blocks: self.blocks.clone(),
                    block_bytes: self.options.block_bytes,
                    expected,
                    level: run.level,
                    scanned: Rc::clone(&scanned),
                }),
            )));
        }
        let mut merge = Merge::new(sources);
        let blocks_bytes = self.blocks_bytes(runs.len());
        let mut bytes = 0;
        let mut memory = PageMemory::default();
        let mut apart = Apart::default();
        while let Some(stored) = self.count_corrupt(merge.next().await)? {
            let entry = &stored.entry;
            if entry.token > last {
                break;
            }
            let entry_bytes = entry.key.len() + stored.value_len();
            let is_beyond = known
                .as_ref()
                .is_some_and(|(token, key)| (entry.token, &entry.key) > (*token, key));
            let with_entry = memory.with(&stored);
            let mut has_room = || held.grow(blocks_bytes.saturating_add(with_entry.bytes()));
            let is_full = page.len() == records
                || is_beyond
                || !page.is_empty() && (bytes + entry_bytes > limits.bytes || !has_room());
            if is_full {
                next = page.last().map(|stored| after(&stored.entry));
                break;
            }
            bytes += entry_bytes;
            memory = with_entry;
            page.push(apart.take(stored));
        }
        // Tables may end before what was taken from memory does.
        if next.is_none() && known.is_some() {
            next = page.last().map(|stored| after(&stored.entry));
        }
        drop(merge);
        self.note_scanned(tree, *scanned.borrow());
        held.shrink(memory.bytes());
        if !held.covers(memory.bytes()) {
            // A single record: it holds nothing while it waits.
            held.shrink(0);
            held = self.scans.hold(memory.bytes()).await;
        }
        let entries = self.with_values(tables.as_deref(), page).await?;
        drop(held);
        self.count(|counts| {
            counts.scanned += u64::try_from(entries.len()).expect("a count in memory fits 64 bits")
        });
        Ok(ScanPage { entries, next })
    }

    /// Notes what a scan has read; a merge may have been paid for.
    fn note_scanned(&self, tree: TreeId, scanned: Scanned) {
        // A page out of memory and caches costs nothing, not even this.
        if scanned == Scanned::default() {
            return;
        }
        let mut tables = self.tables.borrow_mut();
        tables.note_scanned(tree, scanned);
        // Nothing of a damaged tree is merged, however much it would be worth.
        if tables.is_scan_paid(&self.options, tree) && !self.damages.is_in(tree) {
            self.compaction.ring();
        }
    }
}

/// Records of memory that a page begins with at least, should there be as many.
const IN_MEMORY_MIN: usize = 16;

/// Bytes of each run that the next page needs, from the even spread of tokens: as much of a run as it is dense where the page begins.
fn expected_bytes(densities: &[Density], limits: ScanLimits) -> Vec<u64> {
    let (entries, bytes) = densities.iter().fold((1, 1), |(entries, bytes), run| {
        (
            u128::saturating_add(entries, run.entries),
            u128::saturating_add(bytes, run.bytes),
        )
    });
    // More makes no difference to anybody.
    let at_most = |limit: usize| u128::from(u32::try_from(limit).unwrap_or(u32::MAX));
    let expected = |run: &Density| {
        let by_records = run.bytes.saturating_mul(at_most(limits.records)) / entries;
        let by_bytes = run.bytes.saturating_mul(at_most(limits.bytes)) / bytes;
        u64::try_from(by_records.min(by_bytes)).unwrap_or(u64::MAX)
    };
    densities.iter().map(expected).collect()
}

/// What a page is expected to take, from the records that the runs have where it begins.
fn expected_page_bytes(densities: &[Density], limits: ScanLimits) -> usize {
    let sum = |of: fn(&Density) -> u128| densities.iter().map(of).fold(0, u128::saturating_add);
    let (entries, records, stored) = (
        sum(|run| run.entries).max(1),
        sum(|run| run.record_bytes),
        sum(|run| run.blob_bytes),
    );
    // Of what stands in blobs only the compressed size is known; half of it is what most values become.
    let of_record = (records.saturating_add(stored.saturating_mul(2)) / entries).max(1);
    let of_value = stored / entries;
    let limit = |limit: usize| u128::try_from(limit).unwrap_or(u128::MAX);
    let kept = of_record
        .saturating_mul(limit(limits.records))
        .min(limit(limits.bytes));
    let at_once = limit(VALUES_AT_ONCE).min(kept / of_record + 1);
    let read = of_value.saturating_mul(at_once);
    usize::try_from(kept.saturating_add(read)).unwrap_or(usize::MAX)
}

/// Small records in memory of their own. Where they come from, each shares it with a block, a whole window of the run, or a chunk
/// of a memtable; a page would keep all of these for as long as somebody has it.
#[derive(Default)]
struct Apart(BytesMut);

/// From so many bytes on a record is most of what it would keep.
const APART_BYTES: usize = 8 << 10;
/// Memory for small records, as much at a time.
const CHUNK_BYTES: usize = 16 << 10;

impl Apart {
    /// The record, in memory of its own if it is small. One copy then, and an allocation every [`CHUNK_BYTES`].
    fn take(&mut self, mut stored: Stored) -> Stored {
        let Entry { key, record, .. } = &mut stored.entry;
        let bytes = key.len() + record.value.len();
        if bytes < APART_BYTES {
            if self.0.capacity() < bytes {
                self.0 = BytesMut::with_capacity(CHUNK_BYTES);
            }
            self.0.extend_from_slice(key);
            self.0.extend_from_slice(&record.value);
            let mut copied = self.0.split().freeze();
            record.value = copied.split_off(key.len());
            *key = copied;
        }
        stored
    }
}

/// What a page takes in memory: its records, and the values of blobs as they are read.
#[derive(Clone, Copy, Default)]
struct PageMemory {
    kept: usize,
    /// Values that stand in blobs, and what is read of the largest.
    values: usize,
    read_max: usize,
}

impl PageMemory {
    /// With one more record.
    fn with(self, stored: &Stored) -> PageMemory {
        let kept = self.kept + stored.entry.key.len() + stored.value_len();
        let Some(separate) = &stored.separate else {
            return PageMemory { kept, ..self };
        };
        // From the sector where it begins to the one where it ends.
        let read = usize::try_from(separate.reference.stored_len).unwrap_or(usize::MAX);
        PageMemory {
            kept,
            values: self.values + 1,
            read_max: self.read_max.max(read.saturating_add(2 * SECTOR_BYTES)),
        }
    }

    fn bytes(self) -> usize {
        let at_once = self.values.min(VALUES_AT_ONCE);
        self.kept
            .saturating_add(self.read_max.saturating_mul(at_once))
    }
}

/// What a whole ring of records like those of a run at one place would hold.
#[derive(Clone, Copy, Default)]
struct Density {
    entries: u128,
    /// Of tables.
    bytes: u128,
    /// Of records, without values that stand in blobs.
    record_bytes: u128,
    /// Of values in blobs, as they stand there.
    blob_bytes: u128,
}

impl Density {
    /// That of a run where `range` begins.
    fn of(run: &Run, range: TokenRange) -> Density {
        let Some(table) = run.overlapping(range).first() else {
            return Density::default();
        };
        let info = &table.info;
        let width = ((info.last_token.0 - info.first_token.0) >> 64) + 1;
        let of_ring = |part: u64| (u128::from(part) << 64) / width;
        let blob_bytes = info.blobs.iter().map(|used| used.bytes).sum();
        Density {
            entries: of_ring(info.entries),
            bytes: of_ring(info.bytes),
            record_bytes: of_ring(info.key_bytes + info.value_bytes),
            blob_bytes: of_ring(blob_bytes),
        }
    }
}

fn after(entry: &Entry) -> ScanFrom {
    ScanFrom::After(entry.token, Bytes::clone(&entry.key))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::future::{Either, join_all, select};
    use torc_sim::SimEnv;

    use super::*;
    use crate::compaction::pick_stale;
    use crate::crypt::KeyId;
    use crate::levels::{Levels, TableRef};
    use crate::options::Options;
    use crate::record::Kind;
    use crate::store::{Decision, Store};
    use crate::table::TableInfo;

    const TREE: TreeId = TreeId(1);
    const RUNS: u64 = 6;
    const LIMITS: ScanLimits = ScanLimits {
        records: 100,
        bytes: 1 << 20,
    };

    async fn put(store: &Store<SimEnv>, number: u64) {
        let key = number.to_be_bytes();
        let record = Record {
            kind: Kind::Value,
            stamp: 1,
            expires_at_ms: 0,
            value: Bytes::copy_from_slice(&[7; 1000]),
        };
        let decide = |_: Option<&Record>| Decision::Write(record, ());
        let token = Token::of(TREE, &key);
        let written = store.update(TREE, token, &key, decide).await;
        written.unwrap().1.wait().await.unwrap();
    }

    /// A store with several runs that nobody merges.
    async fn with_runs(env: &SimEnv, scan_bytes_max: usize) -> Store<SimEnv> {
        let options = Options {
            strategy: None,
            scan_bytes_max,
            cache_blocks_percent: 0,
            ..Options::new("shard-00")
        };
        let (store, _) = Store::open(env.clone(), options).await.unwrap();
        for run in 0..RUNS {
            for number in 0..50 {
                put(&store, number * RUNS + run).await;
            }
            store.flush().await.unwrap();
        }
        store
    }

    #[test]
    fn a_page_is_expected_to_need_of_each_run_what_it_holds_there() {
        let table = |run, entries, bytes, last| {
            let info = TableInfo {
                file_id: run,
                entries,
                bytes,
                last_token: last,
                ..TableInfo::default()
            };
            let extent = TokenRange::ALL;
            let (info, level) = (Rc::new(info), 1);
            TableRef {
                info,
                level,
                run,
                extent,
            }
        };
        let expected = |tables: &[TableRef], records, bytes| {
            let mut levels = Levels::new();
            tables.iter().for_each(|table| levels.insert(table.clone()));
            let runs = levels.runs().iter();
            let densities: Vec<Density> =
                runs.map(|run| Density::of(run, TokenRange::ALL)).collect();
            expected_bytes(&densities, ScanLimits { records, bytes })
        };
        let half = Token(Token::MAX.0 / 2);
        // Newest run first. The second is as dense as the first in half of the ring.
        let runs = [
            table(3, 1000, 100_000, Token::MAX),
            table(2, 500, 50_000, half),
            table(1, 8000, 800_000, Token::MAX),
        ];
        assert_eq!(expected(&runs, 100, 1 << 20), [999, 999, 7999]);
        assert_eq!(expected(&runs, usize::MAX, 1000), [99, 99, 799]);
        assert_eq!(expected(&runs, 1, 0), [0, 0, 0]);
        // A run of one token, and none at all.
        let one_token = table(4, u64::MAX >> 32, u64::MAX >> 32, Token(0));
        let found = expected(&[one_token, runs[0].clone()], usize::MAX, usize::MAX);
        assert!(found[0] >= u64::from(u32::MAX) - 1, "{found:?}");
        assert!(expected(&[], 100, 100).is_empty());
    }

    #[test]
    fn runs_that_scans_read_again_and_again_become_one_and_others_stay() {
        torc_sim::run(6, |env| async move {
            let options = Options {
                cache_blocks_percent: 0,
                ..Options::new("shard-00")
            };
            let (store, _) = Store::open(env.clone(), options.clone()).await.unwrap();
            // One run fewer than is due by itself.
            for number in 0..50 * 3 {
                put(&store, number).await;
                if number % 50 == 49 {
                    store.flush().await.unwrap();
                }
            }
            let runs = || {
                store
                    .0
                    .tables
                    .borrow()
                    .tree(TREE)
                    .unwrap()
                    .levels
                    .runs()
                    .len()
            };
            let scan = || store.scan(TREE, ScanFrom::Token(Token(0)), Token::MAX, LIMITS);
            let expected = scan().await.unwrap();
            env.sleep(Duration::from_secs(10)).await;
            assert_eq!(runs(), 3, "one scan pays for nothing");
            // A table that is only written again where it is takes nothing from what was paid.
            let paid = store.0.tables.borrow().scanned_of(TREE);
            assert_ne!(paid, Scanned::default());
            let rewrite = {
                let tree = store.0.tables.borrow().tree(TREE).unwrap();
                pick_stale(&tree.levels, Some(KeyId(1))).unwrap()
            };
            store.0.tables.borrow_mut().forget_scanned(TREE, &rewrite);
            assert_eq!(store.0.tables.borrow().scanned_of(TREE), paid);
            for _ in 0..20 {
                assert_eq!(scan().await.unwrap(), expected);
            }
            env.sleep(Duration::from_secs(10)).await;
            assert_eq!(runs(), 1);
            assert_eq!(scan().await.unwrap(), expected);
        });
    }

    /// Keys whose tokens lie in the first part of the ring of so many.
    fn keys_in(part: u128, from: u64, count: usize) -> Vec<u64> {
        let is_in = |number: &u64| Token::of(TREE, &number.to_be_bytes()).0 < Token::MAX.0 / part;
        (from..).filter(is_in).take(count).collect()
    }

    #[test]
    fn a_page_ends_where_what_was_taken_from_memory_does_and_the_next_goes_on_there() {
        // More is in memory where the scan begins than its density lets expect; or more than in the table, which ends before.
        for (of_table, of_memory) in [(1, 50), (50, 1)] {
            torc_sim::run(5, move |env| async move {
                let options = Options::new("shard-00");
                let (store, _) = Store::open(env.clone(), options).await.unwrap();
                let in_table = keys_in(of_table, 0, 1000);
                for number in &in_table {
                    put(&store, *number).await;
                }
                store.flush().await.unwrap();
                let in_memory = keys_in(of_memory, in_table[999] + 1, 40);
                for number in &in_memory {
                    put(&store, *number).await;
                }
                let mut from = Some(ScanFrom::Token(Token(0)));
                let mut found = Vec::new();
                let mut pages = 0;
                while let Some(at) = from {
                    let page = store.scan(TREE, at, Token::MAX, LIMITS).await.unwrap();
                    let entries = page.entries.into_iter();
                    found.extend(entries.map(|entry| (entry.token, entry.key)));
                    from = page.next;
                    pages += 1;
                }
                let numbers = in_table.into_iter().chain(in_memory);
                let place = |number: u64| {
                    let key = Bytes::copy_from_slice(&number.to_be_bytes());
                    (Token::of(TREE, &key), key)
                };
                let mut expected: Vec<(Token, Bytes)> = numbers.map(place).collect();
                expected.sort();
                assert_eq!(found, expected);
                assert!(pages > expected.len().div_ceil(LIMITS.records));
            });
        }
    }

    #[test]
    fn scans_that_would_need_more_memory_than_there_is_wait_and_all_are_answered() {
        torc_sim::run(1, |env| async move {
            let blocks = usize::try_from(RUNS).unwrap() * (2 * (8 << 10) + SECTOR_BYTES);
            let each = blocks + LIMITS.records * (8 + 1000);
            let budgets = [(0, 1), (each, 1), (3 * each + 1000, 3), (1 << 30, 32)];
            for (scan_bytes_max, at_once) in budgets {
                let store = with_runs(&env, scan_bytes_max).await;
                let from = || ScanFrom::Token(Token(0));
                let scan = |_| store.scan(TREE, from(), Token::MAX, LIMITS);
                let expected = scan(0).await.unwrap();
                assert_eq!(expected.entries.len(), 100);
                let mut scans = Box::pin(join_all((0..32).map(scan)));
                let mut most_waiting = 0;
                let pages = loop {
                    let timer = Box::pin(env.sleep(Duration::from_micros(10)));
                    match select(scans, timer).await {
                        Either::Left((pages, _)) => break pages,
                        Either::Right((_, rest)) => scans = rest,
                    }
                    most_waiting = most_waiting.max(store.0.scans.waiting());
                };
                // The first ones read ahead before the others have come.
                assert!((32 - at_once..32).contains(&most_waiting));
                for page in pages {
                    assert_eq!(page.unwrap(), expected);
                }
                assert_eq!(store.0.scans.left(), scan_bytes_max.max(1));
                store.drop_tree(TREE).await.unwrap();
                store.close().await.unwrap();
            }
        });
    }
}
