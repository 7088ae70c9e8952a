//! A simulated file's content: what a read sees now, and how to get back to what is durable.
//!
//! The content is kept once, in its newest state; each write that no sync has covered carries what
//! it replaced. A power cut undoes them all and applies again those that happened to reach the
//! medium. Pages are shared, so an undo costs no copy.

use std::collections::VecDeque;
use std::rc::Rc;

use torc_env::SECTOR_BYTES;

use super::survivors::{Fate, Survivors};

/// What a device writes atomically; a power cut tears a write between these.
const ATOMIC_BYTES: usize = 512;
const PAGE_BYTES: usize = SECTOR_BYTES;

/// A page of content; `None` is a page of zeros that was never written.
type Page = Option<Rc<[u8]>>;

/// A change of a file that only a sync makes durable.
pub(super) enum Change {
    Write { page: usize, pages: Vec<Page> },
    Resize { len: u64 },
}

impl Change {
    /// A write of whole sectors.
    pub(super) fn write(offset: u64, bytes: &[u8]) -> Self {
        Change::Write {
            page: page_of(offset),
            pages: bytes
                .chunks(PAGE_BYTES)
                .map(|chunk| Some(Rc::from(chunk)))
                .collect(),
        }
    }

    /// The length that the file has at least afterwards.
    pub(super) fn end(&self) -> u64 {
        match self {
            Change::Write { page, pages } => bytes_of(page + pages.len()),
            Change::Resize { len } => *len,
        }
    }
}

struct Undo {
    len: u64,
    page: usize,
    pages: Vec<Page>,
}

struct Pending {
    sequence: u64,
    durable: bool,
    change: Change,
    undo: Undo,
}

/// A bit that reads wrong until its sector is written again.
struct Flip {
    offset: u64,
    mask: u8,
}

/// A file apart from its names.
#[derive(Default)]
pub(super) struct Inode {
    len: u64,
    pages: Vec<Page>,
    pending: VecDeque<Pending>,
    flips: Vec<Flip>,
    /// Cloned by every open file: a file without name lives on while it is open.
    pub(super) opened: Rc<()>,
}

impl Inode {
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Fills `buf` from `offset` on and returns the bytes that there were.
    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> usize {
        let there = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX);
        let count = buf.len().min(there);
        let first = page_of(offset);
        for (index, chunk) in buf[..count].chunks_mut(PAGE_BYTES).enumerate() {
            match self.pages.get(first + index) {
                Some(Some(page)) => chunk.copy_from_slice(&page[..chunk.len()]),
                _ => chunk.fill(0),
            }
        }
        for flip in &self.flips {
            let at = flip.offset.checked_sub(offset).map(usize::try_from);
            if let Some(Ok(at)) = at
                && at < count
            {
                buf[at] ^= flip.mask;
            }
        }
        count
    }

    /// Makes `change` visible, to be made durable by a sync whose mark is at or above `sequence`,
    /// or at once.
    pub(super) fn apply(&mut self, sequence: u64, change: Change, durable: bool) {
        let undo = self.perform(&change);
        if durable && self.pending.is_empty() {
            return;
        }
        self.pending.push_back(Pending {
            sequence,
            durable,
            change,
            undo,
        });
    }

    /// Makes every change up to `mark` durable.
    pub(super) fn sync(&mut self, mark: u64) {
        for pending in &mut self.pending {
            if pending.sequence <= mark {
                pending.durable = true;
            }
        }
        while self.pending.front().is_some_and(|front| front.durable) {
            self.pending.pop_front();
        }
    }

    /// A sync that failed: of the changes up to `mark`, some are durable in whole or in part and
    /// the others are gone, for readers too. Later changes stay pending.
    pub(super) fn fail_sync(&mut self, mark: u64, survivors: &mut Survivors) {
        for pending in self.rewind() {
            if pending.sequence > mark && !pending.durable {
                self.apply(pending.sequence, pending.change, false);
            } else {
                self.settle(pending, survivors);
            }
        }
        self.sync(mark);
    }

    /// The newest change failed midway: any part of it may be there, none of it durable.
    pub(super) fn fail_newest(&mut self, survivors: &mut Survivors) {
        let mut pending = self.rewind();
        let newest = pending.pop_back();
        for earlier in pending {
            self.apply(earlier.sequence, earlier.change, earlier.durable);
        }
        if let Some(newest) = newest {
            let change = match survivors.fate() {
                Fate::Lost => return,
                Fate::Whole => newest.change,
                Fate::Torn => self.tear(newest.change, survivors),
            };
            self.apply(newest.sequence, change, false);
        }
    }

    /// A power cut: some of the changes that no sync covered survive.
    pub(super) fn cut_power(&mut self, survivors: &mut Survivors) {
        for pending in self.rewind() {
            self.settle(pending, survivors);
        }
        self.pending.clear();
    }

    /// Whether there are changes that a power cut may lose.
    pub(super) fn is_pending(&self) -> bool {
        self.pending.iter().any(|pending| !pending.durable)
    }

    /// Lets the bits of `mask` read inverted at `offset` until the sector is written again.
    pub(super) fn flip(&mut self, offset: u64, mask: u8) {
        self.flips.push(Flip { offset, mask });
    }

    fn settle(&mut self, pending: Pending, survivors: &mut Survivors) {
        let fate = if pending.durable {
            Fate::Whole
        } else {
            survivors.fate()
        };
        let change = match fate {
            Fate::Lost => return,
            Fate::Whole => pending.change,
            Fate::Torn => self.tear(pending.change, survivors),
        };
        self.apply(pending.sequence, change, true);
    }

    /// Takes every pending change back and hands them out in order.
    fn rewind(&mut self) -> VecDeque<Pending> {
        let mut pending = std::mem::take(&mut self.pending);
        for entry in pending.iter_mut().rev() {
            let pages = std::mem::take(&mut entry.undo.pages);
            self.put(entry.undo.page, pages);
            self.set_len(entry.undo.len);
        }
        pending
    }

    /// The change with only some of its atomic units written.
    fn tear(&self, change: Change, survivors: &mut Survivors) -> Change {
        let Change::Write { page, pages } = change else {
            return change;
        };
        let units = pages.len() * PAGE_BYTES / ATOMIC_BYTES;
        let kept = survivors.torn_units(units);
        let torn = pages.into_iter().enumerate().map(|(index, new)| {
            let mut bytes = vec![0; PAGE_BYTES];
            if let Some(Some(old)) = self.pages.get(page + index) {
                bytes.copy_from_slice(old);
            }
            let units = PAGE_BYTES / ATOMIC_BYTES;
            for unit in 0..units {
                if kept[index * units + unit] {
                    let at = unit * ATOMIC_BYTES..(unit + 1) * ATOMIC_BYTES;
                    match &new {
                        Some(new) => bytes[at.clone()].copy_from_slice(&new[at]),
                        None => bytes[at].fill(0),
                    }
                }
            }
            Some(Rc::from(bytes))
        });
        Change::Write {
            page,
            pages: torn.collect(),
        }
    }

    fn perform(&mut self, change: &Change) -> Undo {
        let len = self.len;
        match change {
            Change::Write { page, pages } => {
                let (first, end) = (bytes_of(*page), change.end());
                self.flips
                    .retain(|flip| flip.offset < first || flip.offset >= end);
                let old = (*page..page + pages.len())
                    .map(|index| self.pages.get(index).cloned().flatten())
                    .collect();
                self.put(*page, pages.clone());
                self.len = self.len.max(end);
                Undo {
                    len,
                    page: *page,
                    pages: old,
                }
            }
            Change::Resize { len: new } => {
                let page = page_of(*new);
                let old = self.pages.get(page..).map(<[Page]>::to_vec);
                self.set_len(*new);
                Undo {
                    len,
                    page,
                    pages: old.unwrap_or_default(),
                }
            }
        }
    }

    fn put(&mut self, page: usize, pages: Vec<Page>) {
        let end = page + pages.len();
        if self.pages.len() < end {
            self.pages.resize(end, None);
        }
        for (slot, page) in self.pages[page..end].iter_mut().zip(pages) {
            *slot = page;
        }
    }

    /// Cuts the content to `len`, or extends it by zeros.
    pub(super) fn set_len(&mut self, len: u64) {
        self.len = len;
        let page = page_of(len);
        let within = usize::try_from(len - bytes_of(page)).expect("a part of a page");
        if within == 0 {
            self.pages.truncate(page);
            return;
        }
        self.pages.truncate(page + 1);
        if let Some(Some(last)) = self.pages.get_mut(page)
            && last[within..].iter().any(|byte| *byte != 0)
        {
            let mut bytes = last.to_vec();
            bytes[within..].fill(0);
            *last = Rc::from(bytes);
        }
    }
}

fn page_of(offset: u64) -> usize {
    let page = u64::try_from(PAGE_BYTES).expect("a page is small");
    usize::try_from(offset / page).expect("a simulated file fits into memory")
}

fn bytes_of(pages: usize) -> u64 {
    u64::try_from(pages * PAGE_BYTES).expect("a simulated file fits into memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(inode: &Inode) -> Vec<u8> {
        let mut buf = vec![0xee; 16 * PAGE_BYTES];
        let count = inode.read(0, &mut buf);
        buf.truncate(count);
        buf
    }

    fn filled(byte: u8, pages: usize) -> Vec<u8> {
        vec![byte; pages * PAGE_BYTES]
    }

    #[test]
    fn a_synced_write_survives_where_a_pending_one_does_not() {
        let mut inode = Inode::default();
        inode.apply(1, Change::write(0, &filled(1, 2)), false);
        inode.sync(1);
        inode.apply(2, Change::write(bytes_of(1), &filled(2, 2)), false);
        assert_eq!(inode.len(), bytes_of(3));
        inode.cut_power(&mut Survivors::none());
        assert_eq!(content(&inode), filled(1, 2));
    }

    #[test]
    fn a_durable_write_over_a_pending_one_survives_alone() {
        let mut inode = Inode::default();
        inode.apply(1, Change::write(0, &filled(1, 2)), false);
        inode.apply(2, Change::write(bytes_of(1), &filled(2, 1)), true);
        inode.cut_power(&mut Survivors::none());
        let mut expected = filled(0, 1);
        expected.extend(filled(2, 1));
        assert_eq!(content(&inode), expected);
    }

    #[test]
    fn undoing_a_truncation_brings_the_content_back() {
        let mut inode = Inode::default();
        inode.apply(1, Change::write(0, &filled(7, 3)), true);
        inode.apply(2, Change::Resize { len: 100 }, false);
        inode.apply(3, Change::write(0, &filled(8, 1)), false);
        assert_eq!(inode.len(), bytes_of(1));
        inode.cut_power(&mut Survivors::none());
        assert_eq!(content(&inode), filled(7, 3));
    }

    #[test]
    fn a_shortened_file_grows_again_with_zeros() {
        let mut inode = Inode::default();
        inode.apply(1, Change::write(0, &filled(7, 1)), true);
        inode.apply(2, Change::Resize { len: 10 }, true);
        inode.apply(3, Change::Resize { len: 20 }, true);
        assert_eq!(
            content(&inode),
            [vec![7; 10], vec![0; 10]].concat(),
            "bytes beyond a cut are gone"
        );
    }

    #[test]
    fn a_failed_sync_loses_what_it_covered_and_keeps_later_writes_pending() {
        let mut inode = Inode::default();
        inode.apply(1, Change::write(0, &filled(1, 1)), false);
        inode.apply(2, Change::write(bytes_of(1), &filled(2, 1)), false);
        inode.fail_sync(1, &mut Survivors::none());
        assert_eq!(content(&inode), [filled(0, 1), filled(2, 1)].concat());
        inode.sync(2);
        inode.cut_power(&mut Survivors::none());
        assert_eq!(content(&inode), [filled(0, 1), filled(2, 1)].concat());
    }

    #[test]
    fn a_flipped_bit_reads_wrong_until_its_sector_is_written() {
        let mut inode = Inode::default();
        inode.apply(1, Change::write(0, &filled(1, 2)), true);
        inode.flip(5000, 0x80);
        assert_eq!(content(&inode)[5000], 0x81);
        inode.apply(2, Change::write(0, &filled(1, 1)), true);
        assert_eq!(content(&inode)[5000], 0x81, "another sector was written");
        inode.apply(3, Change::write(bytes_of(1), &filled(1, 1)), true);
        assert_eq!(content(&inode)[5000], 1);
    }
}
