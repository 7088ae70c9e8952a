//! A look through a tree of the store, in order, while the tree goes on being written: what lets a
//! figure over all records be made page by page and still count each record once.
//!
//! Whoever writes a record says so ([`Walk::written`]) and counts its new state; the walk counts what it
//! [reaches](Walk::reached), except for what was written ahead of it.

use std::collections::BTreeSet;

use bytes::Bytes;
use torc_engine::ScanFrom;
use torc_env::Token;

/// How far a look through a tree has come.
#[derive(Debug, Default)]
pub(crate) struct Walk {
    /// The last record that was reached; `None` = none yet.
    done: Option<(Token, Bytes)>,
    /// Keys beyond `done` that were written since the walk began: they are counted already.
    ahead: BTreeSet<(Token, Bytes)>,
}

impl Walk {
    /// A record of this key is being written. Returns whether the walk still lay before it and did not
    /// know of it: what it replaces has then been counted by nobody, and will not be.
    pub(crate) fn written(&mut self, token: Token, key: &[u8]) -> bool {
        let done = self.done.as_ref();
        let is_done = done.is_some_and(|(last, last_key)| (token, key) <= (*last, last_key));
        !is_done && self.ahead.insert((token, Bytes::copy_from_slice(key)))
    }

    /// The walk has come to the record of this key. Records come in order. Returns whether it is to be
    /// counted.
    pub(crate) fn reached(&mut self, token: Token, key: &Bytes) -> bool {
        let place = (token, key.clone());
        let was_ahead = self.ahead.remove(&place);
        self.done = Some(place);
        !was_ahead
    }

    /// Where it goes on.
    pub(crate) fn next(&self) -> ScanFrom {
        match self.done.clone() {
            None => ScanFrom::Token(Token(0)),
            Some((token, key)) => ScanFrom::After(token, key),
        }
    }
}
