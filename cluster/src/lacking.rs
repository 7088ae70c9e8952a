//! What a shard lacks of what it has acknowledged, and of what its ranges should hold.
//!
//! On the path: asked before every read of this shard's store on somebody's behalf, and before every mint. Two
//! things are told apart:
//!
//! - The shard is **catching up**: it may lack anything, since it joins, or lost the end of its log to a policy that
//!   acknowledges before it syncs. Until it has compared all its ranges it answers nothing.
//! - Something was **lost** through damage, and it is known where ([`Loss`]). Only there it answers nothing.
//!
//! Invariant: what is missing here is durably known to be, in the store or by a mark, before it is missing
//! ([`catch_up`](crate::anti_entropy::catch_up), [`Store::losses`](torc_engine::Store::losses)).
//!
//! It decides nothing: see [`loss`](crate::anti_entropy::loss).

use std::cell::{Cell, RefCell};

use futures_util::lock::{Mutex, MutexGuard};
use torc_engine::{Damage, Loss};
use torc_env::{Token, TokenRange, TreeId};

use crate::api::{Failure, FailureCode};
use crate::core::tree;

/// See the module.
#[derive(Debug)]
pub(crate) struct Lacking {
    is_whole: Cell<bool>,
    is_catching_up: Cell<bool>,
    lost: RefCell<Vec<Loss>>,
    turn: Mutex<()>,
    cuts: Cell<u64>,
}

/// How often something has been cut out in this life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cuts(u64);

impl Lacking {
    /// At a start; `losses` as the store reports them.
    pub(crate) fn new(is_catching_up: bool, losses: Vec<Loss>) -> Self {
        let lacking = Self {
            is_whole: Cell::new(true),
            is_catching_up: Cell::new(is_catching_up),
            lost: RefCell::new(losses),
            turn: Mutex::new(()),
            cuts: Cell::new(0),
        };
        let mut lost = lacking.lost.borrow_mut();
        lost.retain(is_of_keyspaces);
        drop(lost);
        lacking.look();
        lacking
    }

    fn look(&self) {
        let is_whole = !self.is_catching_up.get() && self.lost.borrow().is_empty();
        self.is_whole.set(is_whole);
    }

    /// Whether nothing lacks.
    pub(crate) fn is_whole(&self) -> bool {
        self.is_whole.get()
    }

    /// Whether anything may lack.
    pub(crate) fn is_catching_up(&self) -> bool {
        self.is_catching_up.get()
    }

    /// What was lost, accepted losses included.
    pub(crate) fn lost(&self) -> Vec<Loss> {
        self.lost.borrow().clone()
    }

    /// Whether nothing lacks at a token.
    pub(crate) fn has(&self, tree: TreeId, token: Token) -> bool {
        let at = TokenRange {
            first: token,
            last: token,
        };
        self.has_all(tree, at)
    }

    /// Whether nothing lacks in a range.
    pub(crate) fn has_all(&self, tree: TreeId, range: TokenRange) -> bool {
        self.is_whole.get() || self.check_in(tree, range).is_ok()
    }

    /// # Errors
    /// While this shard may lack something at the token that it should have.
    pub(crate) fn check(&self, tree: TreeId, token: Token) -> Result<(), Failure> {
        let at = TokenRange {
            first: token,
            last: token,
        };
        self.check_in(tree, at)
    }

    /// # Errors
    /// While this shard may lack something in the range that it should have.
    pub(crate) fn check_in(&self, tree: TreeId, range: TokenRange) -> Result<(), Failure> {
        if self.is_whole.get() {
            return Ok(());
        }
        if self.is_catching_up.get() {
            return Err(Failure::refused(
                FailureCode::NotReady,
                "this replica is still fetching its data",
            ));
        }
        let lost = self.lost.borrow();
        if lost.iter().any(|loss| part(loss, tree, range).is_some()) {
            return Err(Failure::refused(
                FailureCode::Unreadable,
                "damage has cost this replica what it had here, and it is neither fetched from others nor given up yet: \
                 `torc damage` says why",
            ));
        }
        Ok(())
    }

    /// Where in `range` this shard lacks something through damage, `damages` being what is not cut out yet.
    pub(crate) fn lost_in(
        &self,
        damages: &[Damage],
        tree: TreeId,
        range: TokenRange,
    ) -> Vec<TokenRange> {
        let damages = damages.iter().filter(|damage| damage.tree == tree);
        let unreadable = damages.filter_map(|damage| damage.range.intersection(&range));
        let lost = self.lost.borrow();
        let lost = lost.iter().filter_map(|loss| part(loss, tree, range));
        unreadable.chain(lost).collect()
    }

    /// From now on anything may lack.
    pub(crate) fn catch_up(&self) {
        self.is_catching_up.set(true);
        self.look();
    }

    /// This is all that is lost, and some of it is new.
    pub(crate) fn lose(&self, losses: Vec<Loss>) {
        self.cuts.set(self.cuts.get() + 1);
        self.know(losses);
    }

    /// This is all that is lost.
    pub(crate) fn know(&self, losses: Vec<Loss>) {
        let losses = losses.into_iter().filter(is_of_keyspaces);
        self.lost.replace(losses.collect());
        self.look();
    }

    /// Everything is there again except what is `left`.
    pub(crate) fn found(&self, left: Vec<Loss>) {
        self.is_catching_up.set(false);
        self.know(left);
    }

    /// Held by whoever cuts something out, and by whoever says that nothing lacks any more.
    pub(crate) async fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// Tells whoever compares whether more has been lost meanwhile.
    pub(crate) fn cuts(&self) -> Cuts {
        Cuts(self.cuts.get())
    }
}

/// What a shard keeps for itself is made good in another way: see [`own_trees`](crate::own_trees).
fn is_of_keyspaces(loss: &Loss) -> bool {
    !loss.tree.is_some_and(tree::is_own)
}

fn part(loss: &Loss, tree: TreeId, range: TokenRange) -> Option<TokenRange> {
    let is_meant = loss.tree.is_none_or(|of| of == tree);
    loss.range.intersection(&range).filter(|_| is_meant)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TREE: TreeId = TreeId(1);

    fn range(first: u128, last: u128) -> TokenRange {
        TokenRange {
            first: Token(first),
            last: Token(last),
        }
    }

    fn loss(tree: Option<TreeId>, first: u128, last: u128) -> Loss {
        Loss {
            tree,
            range: range(first, last),
            is_accepted: false,
        }
    }

    #[test]
    fn what_is_lost_is_refused_and_nothing_else_is() {
        let lost = vec![loss(Some(TREE), 10, 19), loss(Some(tree::HINTS), 0, 99)];
        let lacking = Lacking::new(false, lost);
        assert!(!lacking.is_whole() && !lacking.is_catching_up());
        for (token, has) in [(9, true), (10, false), (19, false), (20, true)] {
            assert_eq!(lacking.has(TREE, Token(token)), has, "{token}");
            assert!(lacking.has(TreeId(2), Token(token)));
        }
        assert!(lacking.has_all(TREE, range(0, 9)) && !lacking.has_all(TREE, range(0, 10)));
        let failure = lacking.check(TREE, Token(15)).unwrap_err();
        assert_eq!(failure.code, FailureCode::Unreadable);
        let cuts = lacking.cuts();
        lacking.lose([lacking.lost(), vec![loss(None, 50, 59)]].concat());
        assert!(!lacking.has(TreeId(2), Token(55)) && !lacking.has(TREE, Token(15)));
        assert_ne!(lacking.cuts(), cuts);
        lacking.found(Vec::new());
        assert!(lacking.is_whole() && lacking.has(TREE, Token(15)));
    }

    #[test]
    fn a_shard_that_catches_up_has_nothing_and_says_what_it_has_lost() {
        let lacking = Lacking::new(true, vec![loss(None, 10, 19)]);
        assert!(!lacking.has(TREE, Token(5)));
        let damage = Damage {
            tree: TREE,
            file_id: 1,
            range: range(0, 4),
        };
        let lost = lacking.lost_in(&[damage], TREE, range(4, 15));
        assert_eq!(lost, [range(4, 4), range(10, 15)]);
        assert_eq!(lacking.lost_in(&[], TREE, range(20, 30)), []);
        lacking.found(lacking.lost());
        assert!(lacking.has(TREE, Token(5)) && !lacking.has(TREE, Token(10)));
    }

    #[test]
    fn damage_in_what_a_shard_keeps_for_itself_costs_no_keyspace_anything() {
        let own = vec![
            loss(Some(tree::HINTS), 0, 9),
            loss(Some(tree::SYSTEM), 0, 9),
        ];
        let lacking = Lacking::new(false, own.clone());
        assert!(lacking.is_whole());
        lacking.lose(own);
        assert!(lacking.is_whole());
    }
}
