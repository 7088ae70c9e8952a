//! An ordered map for keys whose tokens are spread evenly: small sorted buckets below a directory.
//!
//! Tokens are hashes, so a key's rank among the others is known before looking: the high bits
//! name a page, the page's directory names a bucket of at most [`BUCKET_ENTRIES_MAX`] entries, and a binary
//! search ends it. That costs a third to a half of a `BTreeMap`. Uneven tokens only make a page's
//! directory longer; nothing relies on the spread for being correct.

use torc_env::{Token, TokenRange};

use super::packed::Packed;
use crate::record::ScanFrom;

/// Entries at which a bucket is split.
const BUCKET_ENTRIES_MAX: usize = 32;
/// Pages of a grown map.
const PAGES: u64 = 256;
/// Entries at which the single page of a small map is dealt out over [`PAGES`].
const SPREAD_ENTRIES: usize = 4096;

/// The map.
pub(crate) struct Buckets {
    /// High halves of the expected tokens: first, and how many to a page.
    first: u64,
    per_page: u64,
    pages: Vec<Page>,
    len: usize,
}

/// A run of buckets. `firsts[i]` is at or below every token of `buckets[i]` and above every token
/// of the bucket before: equal tokens never straddle two buckets.
#[derive(Default)]
struct Page {
    firsts: Vec<Token>,
    buckets: Vec<Vec<Packed>>,
}

impl Buckets {
    /// Empty, for tokens expected in `range`.
    pub(crate) fn new(range: TokenRange) -> Self {
        let first = high(range.first);
        Self {
            first,
            per_page: (high(range.last) - first) / PAGES + 1,
            pages: vec![Page::default()],
            len: 0,
        }
    }

    /// Number of entries.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Puts an entry in; returns the one that it replaced. An entry that is older than the present
    /// one is itself returned.
    pub(crate) fn insert(&mut self, packed: Packed) -> Option<Packed> {
        let page = self.page_of(packed.token);
        let replaced = self.pages[page].insert(packed);
        if replaced.is_none() {
            self.len += 1;
            if self.pages.len() == 1 && self.len == SPREAD_ENTRIES {
                self.spread();
            }
        }
        replaced
    }

    /// The entry of a key.
    pub(crate) fn get(&self, token: Token, key: &[u8]) -> Option<&Packed> {
        let bucket = self.pages[self.page_of(token)].bucket_of(token)?;
        let index = bucket
            .binary_search_by(|packed| packed.cmp_key(token, key))
            .ok()?;
        Some(&bucket[index])
    }

    /// All entries in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Packed> {
        self.pages.iter().flat_map(Page::iter)
    }

    /// The entries from `from` on, in order.
    pub(crate) fn iter_from<'a>(
        &'a self,
        from: &ScanFrom,
    ) -> impl Iterator<Item = &'a Packed> + use<'a> {
        let token = from.token();
        let page_index = self.page_of(token);
        let page = &self.pages[page_index];
        let bucket_index = page.bucket_index(token);
        let bucket = page
            .buckets
            .get(bucket_index)
            .map_or(&[][..], Vec::as_slice);
        let start = bucket.partition_point(|packed| from.is_after(packed.token, packed.key()));
        let later_buckets = page.buckets.get(bucket_index + 1..).unwrap_or(&[]);
        bucket[start..]
            .iter()
            .chain(later_buckets.iter().flatten())
            .chain(self.pages[page_index + 1..].iter().flat_map(Page::iter))
    }

    /// Rises with the token, so that order over pages is order of tokens; what lies outside of the
    /// expected range goes to the first or last page.
    fn page_of(&self, token: Token) -> usize {
        if self.pages.len() == 1 {
            return 0;
        }
        let page = high(token).saturating_sub(self.first) / self.per_page;
        usize::try_from(page.min(PAGES - 1)).expect("below the number of pages")
    }

    fn spread(&mut self) {
        let entries = std::mem::take(&mut self.pages[0]);
        self.pages.resize_with(
            usize::try_from(PAGES).expect("a small constant"),
            Page::default,
        );
        for packed in entries.buckets.into_iter().flatten() {
            let page = self.page_of(packed.token);
            self.pages[page].append(packed);
        }
    }
}

impl Page {
    fn iter(&self) -> impl Iterator<Item = &Packed> {
        self.buckets.iter().flatten()
    }

    /// The bucket that holds `token` if any does; 0 for an empty page.
    fn bucket_index(&self, token: Token) -> usize {
        self.firsts
            .partition_point(|first| *first <= token)
            .saturating_sub(1)
    }

    fn bucket_of(&self, token: Token) -> Option<&Vec<Packed>> {
        self.buckets.get(self.bucket_index(token))
    }

    /// See [`Buckets::insert`].
    fn insert(&mut self, packed: Packed) -> Option<Packed> {
        if self.buckets.is_empty() {
            self.push_bucket(packed);
            return None;
        }
        let index = self.bucket_index(packed.token);
        let bucket = &mut self.buckets[index];
        match bucket.binary_search_by(|old| old.cmp_key(packed.token, packed.key())) {
            Ok(at) if bucket[at].seqno > packed.seqno => Some(packed),
            Ok(at) => Some(std::mem::replace(&mut bucket[at], packed)),
            Err(at) => {
                // Only the first bucket of a page can get a token below its mark.
                self.firsts[index] = self.firsts[index].min(packed.token);
                bucket.insert(at, packed);
                if bucket.len() > BUCKET_ENTRIES_MAX {
                    self.split(index);
                }
                None
            }
        }
    }

    /// Adds an entry above all others.
    fn append(&mut self, packed: Packed) {
        match self.buckets.last_mut() {
            Some(bucket)
                if bucket.len() < BUCKET_ENTRIES_MAX / 2
                    || bucket.last().is_some_and(|last| last.token == packed.token) =>
            {
                bucket.push(packed);
            }
            _ => self.push_bucket(packed),
        }
    }

    fn push_bucket(&mut self, packed: Packed) {
        let mut bucket = Vec::with_capacity(BUCKET_ENTRIES_MAX / 2);
        self.firsts.push(packed.token);
        bucket.push(packed);
        self.buckets.push(bucket);
    }

    /// Splits a bucket near its middle, between two tokens. A bucket of one token only stays whole.
    fn split(&mut self, index: usize) {
        let bucket = &mut self.buckets[index];
        let middle = bucket.len() / 2;
        let differs = |at: &usize| bucket[*at].token != bucket[*at - 1].token;
        let Some(at) = (middle..bucket.len())
            .find(differs)
            .or_else(|| (1..middle).rev().find(differs))
        else {
            return;
        };
        let upper = bucket.split_off(at);
        self.firsts.insert(index + 1, upper[0].token);
        self.buckets.insert(index + 1, upper);
    }
}

fn high(token: Token) -> u64 {
    u64::try_from(token.0 >> 64).expect("the high half of 128 bits")
}
