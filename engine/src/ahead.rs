//! Memory of the scans of a store: how many read at once, and how far ahead.
//!
//! A scan reads every run at the same time, and of each a window that is larger than what is asked of it now. What one
//! scan holds is little, but many over many runs would take more than caches and memtables together. So each holds
//! what it needs at least, before it begins, and waits for that if it must: a block as read and one decoded for each run, and
//! what its page is expected to take, with what is read to get values out of blobs. Windows are larger, and a page takes
//! more than was expected, only as long as there is memory left and nobody waits; a page that finds none ends there.
//!
//! So no scan waits for memory while it has some, and all go on. A block that is larger than usual, because of one large value,
//! is read in any case: what it has beyond that is owed, and nobody begins until it is given back.

use std::cell::Cell;
use std::rc::Rc;

use crate::signal::{Signal, Turn};

/// What the scans of a store may hold together.
pub struct AheadBudget {
    bytes: usize,
    /// Below zero when more was taken than there is.
    left: Cell<isize>,
    /// Scans that wait to begin: no window grows meanwhile.
    waiting: Cell<usize>,
    /// Who waits for memory; the others wait behind it.
    turn: Turn,
    freed: Signal,
}

/// Memory that is held; given back when dropped.
pub struct Held {
    budget: Rc<AheadBudget>,
    bytes: usize,
}

impl AheadBudget {
    /// A budget of so many bytes; with none, one scan goes at a time.
    pub fn new(bytes: usize) -> Rc<AheadBudget> {
        let bytes = bytes.max(1);
        Rc::new(AheadBudget {
            bytes,
            left: Cell::new(signed(bytes)),
            waiting: Cell::new(0),
            turn: Turn::default(),
            freed: Signal::default(),
        })
    }

    /// Waits until there are `bytes`, or all, if that is less: a scan that holds everything may go on alone.
    pub(crate) async fn hold(self: &Rc<Self>, bytes: usize) -> Held {
        let bytes = bytes.min(self.bytes);
        let _waiting = Waiting::new(&self.waiting);
        let _turn = self.turn.take().await;
        let is_there = || (self.left.get() >= signed(bytes)).then_some(());
        self.freed.until(is_there).await;
        self.held(bytes)
    }

    /// What nobody holds.
    #[cfg(test)]
    pub(crate) fn left(&self) -> usize {
        self.there()
    }

    /// How many wait.
    #[cfg(test)]
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.get()
    }

    /// Up to `bytes`, as many as there are.
    pub(crate) fn hold_up_to(self: &Rc<Self>, bytes: usize) -> Held {
        let left = if self.waiting.get() == 0 {
            self.there()
        } else {
            0
        };
        self.held(bytes.min(left))
    }

    /// `bytes`, whether or not they are there.
    pub(crate) fn owe(self: &Rc<Self>, bytes: usize) -> Held {
        self.held(bytes)
    }

    fn there(&self) -> usize {
        usize::try_from(self.left.get()).unwrap_or(0)
    }

    fn held(self: &Rc<Self>, bytes: usize) -> Held {
        self.left.set(self.left.get() - signed(bytes));
        Held {
            budget: Rc::clone(self),
            bytes,
        }
    }
}

impl Held {
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether it holds `bytes`, or everything: then it is alone, and what it does is bounded by what it was asked for.
    pub(crate) fn covers(&self, bytes: usize) -> bool {
        self.bytes >= bytes.min(self.budget.bytes)
    }

    /// Holds `bytes` in all, if it does not need to wait for that. Whether it does.
    pub(crate) fn grow(&mut self, bytes: usize) -> bool {
        if self.covers(bytes) {
            return true;
        }
        let bytes = bytes.min(self.budget.bytes);
        let mut more = self.budget.hold_up_to(bytes.saturating_sub(self.bytes));
        if self.bytes + more.bytes < bytes {
            return false;
        }
        self.bytes += std::mem::take(&mut more.bytes);
        true
    }

    /// Gives back what is more than `bytes`.
    pub(crate) fn shrink(&mut self, bytes: usize) {
        let rest = self.bytes.saturating_sub(bytes);
        if rest > 0 {
            self.bytes -= rest;
            self.budget.left.set(self.budget.left.get() + signed(rest));
            self.budget.freed.ring();
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.shrink(0);
    }
}

fn signed(bytes: usize) -> isize {
    isize::try_from(bytes).unwrap_or(isize::MAX)
}

/// One more that waits, until it is dropped.
struct Waiting<'a>(&'a Cell<usize>);

impl<'a> Waiting<'a> {
    fn new(count: &'a Cell<usize>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn who_needs_memory_waits_for_it_in_turn_and_windows_do_not_grow_meanwhile() {
        let budget = AheadBudget::new(100);
        let first = budget.hold(60).now_or_never().unwrap();
        let ahead = budget.hold_up_to(30);
        assert_eq!(ahead.bytes(), 30);
        let mut large = Box::pin(budget.hold(50));
        assert!((&mut large).now_or_never().is_none());
        let mut small = Box::pin(budget.hold(5));
        assert!(
            (&mut small).now_or_never().is_none(),
            "behind the large one"
        );
        assert_eq!(budget.hold_up_to(5).bytes(), 0);
        drop(first);
        let large = large.now_or_never().unwrap();
        let small = small.now_or_never().unwrap();
        assert_eq!(budget.hold_up_to(50).bytes(), 15);
        drop((ahead, large, small));
        assert_eq!(budget.left(), 100);
    }

    #[test]
    fn who_has_memory_gets_more_or_none_and_never_waits() {
        let budget = AheadBudget::new(100);
        let mut first = budget.hold(60).now_or_never().unwrap();
        assert!(first.grow(50), "it has them");
        assert!(first.grow(90));
        let other = budget.hold(5).now_or_never().unwrap();
        assert!(!first.grow(1000));
        drop(other);
        assert_eq!((first.bytes(), budget.left()), (90, 10));
        let mut waiting = Box::pin(budget.hold(20));
        assert!((&mut waiting).now_or_never().is_none());
        assert!(!first.grow(95), "somebody waits for these");
        first.shrink(80);
        assert_eq!(waiting.now_or_never().unwrap().bytes(), 20);
        assert!(
            first.grow(1000) && first.covers(1000),
            "it is alone with all of it"
        );
    }

    #[test]
    fn nobody_begins_until_what_is_owed_is_given_back() {
        let budget = AheadBudget::new(100);
        let first = budget.hold(60).now_or_never().unwrap();
        let owed = budget.owe(60);
        assert_eq!((budget.left(), budget.hold_up_to(1).bytes()), (0, 0));
        drop(first);
        let mut next = Box::pin(budget.hold(50));
        assert!((&mut next).now_or_never().is_none());
        drop(owed);
        assert_eq!(next.now_or_never().unwrap().bytes(), 50);
        assert_eq!(budget.left(), 100);
    }

    #[test]
    fn a_scan_that_needs_more_than_all_goes_alone() {
        let budget = AheadBudget::new(100);
        let all = budget.hold(1000).now_or_never().unwrap();
        assert_eq!(all.bytes(), 100);
        let mut next = Box::pin(budget.hold(1));
        assert!((&mut next).now_or_never().is_none());
        drop(all);
        assert_eq!(next.now_or_never().unwrap().bytes(), 1);
    }

    #[test]
    fn one_that_is_given_up_while_it_waits_holds_up_nobody() {
        let budget = AheadBudget::new(100);
        let first = budget.hold(90).now_or_never().unwrap();
        let mut given_up = Box::pin(budget.hold(50));
        assert!((&mut given_up).now_or_never().is_none());
        let mut next = Box::pin(budget.hold(10));
        assert!((&mut next).now_or_never().is_none());
        drop(given_up);
        assert_eq!(next.now_or_never().unwrap().bytes(), 10);
        drop(first);
        assert_eq!(budget.hold_up_to(1000).bytes(), 100);
    }
}
