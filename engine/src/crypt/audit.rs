//! Watches, in tests, that no data key seals two different things under one nonce.

use std::cell::RefCell;
use std::collections::BTreeMap;

use xxhash_rust::xxh3::xxh3_128;

use super::{FileUse, KeyRef};

/// A data key, and a nonce.
type Place = (KeyRef, FileUse, u64);

thread_local! {
    static SEALED: RefCell<BTreeMap<Place, u128>> = const { RefCell::new(BTreeMap::new()) };
}

/// Forgets everything: another world begins, which may draw the same salts.
pub(crate) fn reset() {
    SEALED.with_borrow_mut(BTreeMap::clear);
}

/// How many places were sealed since the last reset.
pub(crate) fn sealed() -> usize {
    SEALED.with_borrow(BTreeMap::len)
}

pub(super) fn note(place: Place, context: &[u8], bytes: &[u8]) {
    let content = xxh3_128(&[context, bytes].concat());
    let before = SEALED.with_borrow_mut(|sealed| sealed.insert(place, content));
    assert!(
        before.is_none_or(|before| before == content),
        "{place:?} was sealed twice, with different content"
    );
}
