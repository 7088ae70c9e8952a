//! Which tables a tree consists of, and in which order they are asked.
//!
//! A *run* is a list of tables that do not overlap; a *level* holds runs. Level 0 takes what
//! flushes write, the last one ([`BOTTOM`]) holds a single run with the bulk of the data. For every
//! token, a run with a lower level, or on one level with a higher id, is newer: the first hit of
//! [`Levels::candidates`] is the current record.
//!
//! A table need not count as a whole: its *extent* is the part of the ring for which it still
//! answers. A compaction takes a piece of the ring out of several runs, so that jobs stay small; the
//! file goes when its last extent does.
//!
//! Plain data, held by the shard. The manifest stores [`TableRef`]s and [`Edit`]s.

use std::rc::Rc;

use torc_env::{Token, TokenRange};

use crate::table::TableInfo;

/// The last level. Levels between 0 and it are used from its end, as many as the data needs.
pub const BOTTOM: u8 = 7;

/// A table's place in a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableRef {
    /// The table.
    pub info: Rc<TableInfo>,
    /// Its level, at most [`BOTTOM`].
    pub level: u8,
    /// Its run within the level; the higher, the newer.
    pub run: u64,
    /// The tokens for which it answers.
    pub extent: TokenRange,
}

impl TableRef {
    /// What is left of it on both sides of `range`.
    pub(crate) fn outside(&self, range: &TokenRange) -> impl Iterator<Item = TableRef> {
        let extent = self.extent;
        let left = (extent.first < range.first).then(|| TokenRange {
            first: extent.first,
            last: Token(range.first.0 - 1),
        });
        let right = (extent.last > range.last).then(|| TokenRange {
            first: Token(range.last.0 + 1),
            last: extent.last,
        });
        [left, right].into_iter().flatten().map(|extent| TableRef {
            info: Rc::clone(&self.info),
            extent,
            ..*self
        })
    }

    /// Bytes of the table that lie in `range`, from the even spread of tokens.
    pub fn bytes_in(&self, range: &TokenRange) -> u64 {
        let whole = TokenRange {
            first: self.info.first_token,
            last: self.info.last_token,
        };
        let part = range
            .intersection(&self.extent)
            .and_then(|part| part.intersection(&whole));
        let Some(part) = part else {
            return 0;
        };
        if part == whole {
            return self.info.bytes;
        }
        // Both widths cut to 64 bits, so that the product fits.
        let width = |range: &TokenRange| range.last.0 - range.first.0;
        let shift = 64_u32.saturating_sub(width(&whole).leading_zeros());
        let (part, whole) = (width(&part) >> shift, (width(&whole) >> shift).max(1));
        let bytes = u128::from(self.info.bytes) * part / whole;
        u64::try_from(bytes).map_or(self.info.bytes, |bytes| bytes.max(1))
    }

    /// Bytes for which it answers.
    pub fn bytes(&self) -> u64 {
        self.bytes_in(&self.extent)
    }

    fn key(&self) -> TableKey {
        TableKey {
            file_id: self.info.file_id,
            first: self.extent.first,
        }
    }
}

/// Names a [`TableRef`]: one file may have several, with different extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableKey {
    /// The table's file.
    pub file_id: u64,
    /// First token of the extent.
    pub first: Token,
}

/// A change of a tree's tables, applied as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Edit {
    /// Extents that end.
    pub removed: Vec<TableKey>,
    /// Extents that begin. What remains of a table that was cut is removed and added anew.
    pub added: Vec<TableRef>,
}

/// Tables that do not overlap, ascending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Its level.
    pub level: u8,
    /// Its id within the level; the higher, the newer.
    pub id: u64,
    /// Its tables, ascending by extent.
    pub tables: Vec<TableRef>,
}

impl Run {
    /// The table that answers for `token`.
    pub fn table(&self, token: Token) -> Option<&TableRef> {
        let after = self
            .tables
            .partition_point(|table| table.extent.first <= token);
        let table = self.tables.get(after.checked_sub(1)?)?;
        table.extent.contains(token).then_some(table)
    }

    /// The tables that answer for a token in `range`, ascending.
    pub fn overlapping(&self, range: TokenRange) -> &[TableRef] {
        let from = self
            .tables
            .partition_point(|table| table.extent.last < range.first);
        let to = self
            .tables
            .partition_point(|table| table.extent.first <= range.last);
        self.tables.get(from..to).unwrap_or(&[])
    }

    /// Bytes for which its tables answer within `range`.
    pub fn bytes_in(&self, range: &TokenRange) -> u64 {
        let tables = self.overlapping(*range).iter();
        tables.map(|table| table.bytes_in(range)).sum()
    }
}

/// The tables of one tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Levels {
    /// Newest first: ascending level, descending id.
    runs: Vec<Run>,
}

impl Levels {
    /// No tables.
    pub fn new() -> Levels {
        Levels::default()
    }

    /// Every run, newest first.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The runs of a level, newest first.
    pub fn level(&self, level: u8) -> &[Run] {
        let from = self.runs.partition_point(|run| run.level < level);
        let to = self.runs.partition_point(|run| run.level <= level);
        &self.runs[from..to]
    }

    /// Every table, in order of runs.
    pub fn tables(&self) -> impl Iterator<Item = &TableRef> {
        self.runs.iter().flat_map(|run| &run.tables)
    }

    /// The tables that may hold `token`, newest first: at most one a run.
    pub fn candidates(&self, token: Token) -> impl Iterator<Item = &TableRef> {
        self.runs.iter().filter_map(move |run| run.table(token))
    }

    /// Bytes for which the tables of a level answer.
    pub fn level_bytes(&self, level: u8) -> u64 {
        let runs = self.level(level).iter();
        runs.map(|run| run.bytes_in(&TokenRange::ALL)).sum()
    }

    /// Whether any extent of this file is left.
    pub fn holds_file(&self, file_id: u64) -> bool {
        self.tables().any(|table| table.info.file_id == file_id)
    }

    /// Puts a table in.
    ///
    /// # Panics
    /// When it overlaps another one of its run, or its level is beyond [`BOTTOM`].
    pub fn insert(&mut self, table: TableRef) {
        assert!(table.level <= BOTTOM, "level {}", table.level);
        let place = (table.level, std::cmp::Reverse(table.run));
        let place_of = |run: &Run| (run.level, std::cmp::Reverse(run.id));
        let index = match self.runs.binary_search_by_key(&place, place_of) {
            Ok(index) => index,
            Err(index) => {
                let run = Run {
                    level: table.level,
                    id: table.run,
                    tables: Vec::new(),
                };
                self.runs.insert(index, run);
                index
            }
        };
        let run = &mut self.runs[index];
        assert!(
            run.overlapping(table.extent).is_empty(),
            "tables of a run do not overlap"
        );
        let at = run
            .tables
            .partition_point(|other| other.extent.first < table.extent.first);
        run.tables.insert(at, table);
    }

    /// Takes a table out; `None` when it is not there.
    pub fn remove(&mut self, key: TableKey) -> Option<TableRef> {
        for (index, run) in self.runs.iter_mut().enumerate() {
            let Some(at) = run.tables.iter().position(|table| table.key() == key) else {
                continue;
            };
            let table = run.tables.remove(at);
            if run.tables.is_empty() {
                self.runs.remove(index);
            }
            return Some(table);
        }
        None
    }

    /// Applies an edit that was made for these levels.
    ///
    /// # Panics
    /// When the edit removes what is not there.
    pub fn apply(&mut self, edit: &Edit) {
        for key in &edit.removed {
            let removed = self.remove(*key);
            assert!(removed.is_some(), "an edit removes what is there: {key:?}");
        }
        for table in &edit.added {
            self.insert(table.clone());
        }
    }

    /// The edit that adds the tables of a flush as the newest run of level 0. Flushes must be
    /// applied in the order in which their memtables were sealed.
    pub fn flush_edit(outputs: &[TableInfo]) -> Edit {
        let run = outputs.iter().map(|info| info.file_id).min().unwrap_or(0);
        Edit {
            removed: Vec::new(),
            added: outputs.iter().map(|info| whole(info, 0, run)).collect(),
        }
    }

    /// Takes `range` of a damaged file out, and with it what older runs have there: that may have been
    /// deleted in the part that cannot be read. Each key then has its newest state, or none.
    pub fn cut(&mut self, file_id: u64, range: TokenRange) {
        let of_file = self.tables().filter(|table| table.info.file_id == file_id);
        let parts: Vec<(u8, u64, TokenRange)> = of_file
            .filter_map(|table| Some((table.level, table.run, table.extent.intersection(&range)?)))
            .collect();
        for (level, run, part) in parts {
            let is_newer = |other: &&Run| {
                (other.level, std::cmp::Reverse(other.id)) < (level, std::cmp::Reverse(run))
            };
            let older = self.runs.iter().skip_while(is_newer);
            let hit: Vec<TableRef> = older
                .flat_map(|run| run.overlapping(part))
                .cloned()
                .collect();
            for table in hit {
                self.remove(table.key());
                for rest in table.outside(&part) {
                    self.insert(rest);
                }
            }
        }
    }

    /// The edit that makes `newer` of these levels.
    pub fn edit_to(&self, newer: &Levels) -> Edit {
        let is_in = |levels: &Levels, table: &TableRef| {
            levels.tables().any(|other| {
                other.key() == table.key()
                    && other.extent == table.extent
                    && (other.level, other.run) == (table.level, table.run)
            })
        };
        Edit {
            removed: self
                .tables()
                .filter(|table| !is_in(newer, table))
                .map(TableRef::key)
                .collect(),
            added: newer
                .tables()
                .filter(|table| !is_in(self, table))
                .cloned()
                .collect(),
        }
    }
}

/// A table with its whole content as extent.
pub(crate) fn whole(info: &TableInfo, level: u8, run: u64) -> TableRef {
    TableRef {
        extent: TokenRange {
            first: info.first_token,
            last: info.last_token,
        },
        info: Rc::new(info.clone()),
        level,
        run,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use torc_env::TreeId;

    fn info(file_id: u64, first: u128, last: u128) -> TableInfo {
        TableInfo {
            file_id,
            tree: TreeId(1),
            bytes: 1000,
            blocks: 1,
            entries: 1,
            first_token: Token(first),
            last_token: Token(last),
            ..TableInfo::default()
        }
    }

    fn range(first: u128, last: u128) -> TokenRange {
        TokenRange {
            first: Token(first),
            last: Token(last),
        }
    }

    fn levels() -> Levels {
        let mut levels = Levels::new();
        levels.insert(whole(&info(1, 0, 999), BOTTOM, 1));
        levels.insert(whole(&info(2, 1000, 1999), BOTTOM, 1));
        levels.apply(&Levels::flush_edit(&[info(3, 500, 1500)]));
        levels.apply(&Levels::flush_edit(&[info(4, 0, 1999)]));
        levels
    }

    fn ids<'a>(tables: impl Iterator<Item = &'a TableRef>) -> Vec<u64> {
        tables.map(|table| table.info.file_id).collect()
    }

    #[test]
    fn candidates_come_newest_first_one_a_run() {
        let levels = levels();
        assert_eq!(ids(levels.candidates(Token(600))), [4, 3, 1]);
        assert_eq!(ids(levels.candidates(Token(1700))), [4, 2]);
        assert_eq!(ids(levels.candidates(Token(2000))), [0; 0]);
        assert_eq!(levels.level_bytes(BOTTOM), 2000);
    }

    #[test]
    fn a_file_lives_as_long_as_any_of_its_extents() {
        let mut levels = levels();
        let key = TableKey {
            file_id: 4,
            first: Token(0),
        };
        let cut = |first, last| TableRef {
            extent: range(first, last),
            ..whole(&info(4, 0, 1999), 0, 4)
        };
        levels.apply(&Edit {
            removed: vec![key],
            added: vec![cut(0, 99), cut(1900, 1999)],
        });
        assert_eq!(ids(levels.candidates(Token(50))), [4, 1]);
        assert_eq!(ids(levels.candidates(Token(600))), [3, 1]);
        assert_eq!(levels.level(0)[0].bytes_in(&TokenRange::ALL), 49 + 49);
        levels.remove(key);
        assert!(levels.holds_file(4));
        levels.remove(TableKey {
            file_id: 4,
            first: Token(1900),
        });
        assert!(!levels.holds_file(4));
        assert_eq!(levels.runs().len(), 2);
    }

    #[test]
    fn what_is_damaged_goes_with_what_is_older_and_nothing_else_does() {
        let mut levels = Levels::new();
        for (file_id, level, run) in [(4, 0, 4), (3, 0, 3), (2, 5, 2), (1, BOTTOM, 1)] {
            levels.insert(whole(&info(file_id, 0, 99), level, run));
        }
        let before = levels.clone();
        levels.cut(3, range(20, 29));
        assert_eq!(ids(levels.candidates(Token(19))), [4, 3, 2, 1]);
        assert_eq!(ids(levels.candidates(Token(20))), [4]);
        assert_eq!(ids(levels.candidates(Token(29))), [4]);
        assert_eq!(ids(levels.candidates(Token(30))), [4, 3, 2, 1]);

        let edit = before.edit_to(&levels);
        assert_eq!((edit.removed.len(), edit.added.len()), (3, 6));
        let mut copy = before.clone();
        copy.apply(&edit);
        assert_eq!(copy, levels);

        // A file that answers for two pieces goes from both, and older ones only there.
        levels.cut(3, TokenRange::ALL);
        assert_eq!(ids(levels.tables()), [4]);
        let mut levels = before.clone();
        levels.cut(3, range(90, 99));
        levels.cut(2, TokenRange::ALL);
        assert_eq!(ids(levels.candidates(Token(50))), [4, 3]);
        assert_eq!(ids(levels.candidates(Token(95))), [4]);
        let unchanged = levels.clone();
        levels.cut(2, TokenRange::ALL);
        assert_eq!(levels, unchanged);
    }

    #[test]
    fn bytes_follow_the_width_of_the_range() {
        let table = whole(&info(1, 0, u128::MAX), 0, 1);
        assert_eq!(table.bytes(), 1000);
        assert_eq!(table.bytes_in(&range(0, u128::MAX / 2)), 499);
        assert_eq!(table.bytes_in(&range(5, 5)), 1);
        let point = whole(&info(1, 7, 7), 0, 1);
        assert_eq!(point.bytes_in(&range(0, 10)), 1000);
        assert_eq!(point.bytes_in(&range(8, 10)), 0);
    }

    #[test]
    #[should_panic(expected = "do not overlap")]
    fn tables_of_a_run_may_not_overlap() {
        let mut levels = levels();
        levels.insert(whole(&info(5, 1999, 3000), BOTTOM, 1));
    }

    #[test]
    #[should_panic(expected = "removes what is there")]
    fn an_edit_may_not_remove_what_is_not_there() {
        let key = TableKey {
            file_id: 9,
            first: Token(0),
        };
        levels().apply(&Edit {
            removed: vec![key],
            added: vec![],
        });
    }
}
