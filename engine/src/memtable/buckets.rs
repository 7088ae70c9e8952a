//! An ordered map for keys whose tokens are spread evenly: small sorted buckets below a directory.
//!
//! Tokens are hashes, so a key's rank among the others is known before looking: the high bits
//! name a page, an interpolation in the page's directory names a bucket, and a binary search among at
//! most [`BUCKET_ENTRIES_MAX`] half-tokens ends it. Directory and buckets are searched by the high
//! halves of tokens alone, eight to a cache line: what a search costs is the lines that it touches.
//! Uneven tokens only make a page's directory longer, equal halves only a bucket; nothing relies on
//! the spread for being correct.

use std::cmp::Ordering;

use torc_env::{Token, TokenRange};

use super::packed::Packed;
use crate::le;
use crate::record::ScanFrom;

/// Entries at which a bucket is split.
const BUCKET_ENTRIES_MAX: usize = 32;
/// Pages of a grown map.
const PAGES: u64 = 256;
/// Entries at which the single page of a small map is dealt out over [`PAGES`].
const SPREAD_ENTRIES: usize = 4096;

/// How far a guess by interpolation may miss, in buckets, before the whole directory is searched.
const GUESS_MISS: usize = 8;

/// The map.
pub(crate) struct Buckets {
    /// High halves of the expected tokens: first, and how many to a page.
    first: u64,
    per_page: u64,
    pages: Vec<Page>,
    len: usize,
}

/// A run of buckets. `firsts[i]` is at or below every high half in `buckets[i]` and above every one in
/// the bucket before: equal halves never straddle two buckets.
#[derive(Default)]
pub(crate) struct Page {
    firsts: Vec<u64>,
    buckets: Vec<Bucket>,
}

/// Entries in order, and the high halves of their tokens beside them.
#[derive(Default)]
struct Bucket {
    highs: Vec<u64>,
    entries: Vec<Packed>,
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
        let page = &self.pages[self.page_of(token)];
        let bucket = page.buckets.get(page.bucket_index(high(token)))?;
        let index = bucket.search(token, key).ok()?;
        Some(&bucket.entries[index])
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
        let bucket_index = page.bucket_index(high(token));
        let bucket = page
            .buckets
            .get(bucket_index)
            .map_or(&[][..], |bucket| &bucket.entries);
        let start = bucket.partition_point(|packed| from.is_after(packed.token, packed.key()));
        let later_buckets = page.buckets.get(bucket_index + 1..).unwrap_or(&[]);
        bucket[start..]
            .iter()
            .chain(later_buckets.iter().flat_map(|bucket| &bucket.entries))
            .chain(self.pages[page_index + 1..].iter().flat_map(Page::iter))
    }

    /// Its parts, to be dropped one by one.
    pub(crate) fn into_pages(self) -> impl Iterator<Item = Page> {
        self.pages.into_iter()
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
        for packed in entries
            .buckets
            .into_iter()
            .flat_map(|bucket| bucket.entries)
        {
            let page = self.page_of(packed.token);
            self.pages[page].append(packed);
        }
    }
}

impl Page {
    fn iter(&self) -> impl Iterator<Item = &Packed> {
        self.buckets.iter().flat_map(|bucket| &bucket.entries)
    }

    /// The bucket that holds tokens with this high half if any does; 0 for an empty page.
    fn bucket_index(&self, high: u64) -> usize {
        let firsts = &self.firsts;
        let (Some(first), Some(last)) = (firsts.first(), firsts.last()) else {
            return 0;
        };
        if high <= *first {
            return 0;
        }
        // Where it would be if the firsts were spread evenly.
        let offset = u128::from(high - first) * u128::from(le::len64(firsts.len()));
        let guess = offset / (u128::from(last - first) + 1);
        let guess = usize::try_from(guess).map_or(firsts.len(), |guess| guess.min(firsts.len()));
        let low = guess.saturating_sub(GUESS_MISS);
        let end = firsts.len().min(guess + GUESS_MISS);
        let is_within = firsts[low] <= high && firsts.get(end).is_none_or(|first| *first > high);
        let (low, end) = if is_within {
            (low, end)
        } else {
            (0, firsts.len())
        };
        let after = low + firsts[low..end].partition_point(|first| *first <= high);
        after.saturating_sub(1)
    }

    /// See [`Buckets::insert`].
    fn insert(&mut self, packed: Packed) -> Option<Packed> {
        if self.buckets.is_empty() {
            self.push_bucket(packed);
            return None;
        }
        let high = high(packed.token);
        let index = self.bucket_index(high);
        let bucket = &mut self.buckets[index];
        match bucket.search(packed.token, packed.key()) {
            Ok(at) if bucket.entries[at].seqno > packed.seqno => Some(packed),
            Ok(at) => Some(std::mem::replace(&mut bucket.entries[at], packed)),
            Err(at) => {
                // Only the first bucket of a page can get a token below its mark.
                self.firsts[index] = self.firsts[index].min(high);
                bucket.highs.insert(at, high);
                bucket.entries.insert(at, packed);
                if bucket.entries.len() > BUCKET_ENTRIES_MAX {
                    self.split(index);
                }
                None
            }
        }
    }

    /// Adds an entry above all others.
    fn append(&mut self, packed: Packed) {
        let high = high(packed.token);
        match self.buckets.last_mut() {
            Some(bucket)
                if bucket.entries.len() < BUCKET_ENTRIES_MAX / 2
                    || bucket.highs.last() == Some(&high) =>
            {
                bucket.highs.push(high);
                bucket.entries.push(packed);
            }
            _ => self.push_bucket(packed),
        }
    }

    fn push_bucket(&mut self, packed: Packed) {
        let high = high(packed.token);
        let mut bucket = Bucket {
            highs: Vec::with_capacity(BUCKET_ENTRIES_MAX + 1),
            entries: Vec::with_capacity(BUCKET_ENTRIES_MAX / 2),
        };
        bucket.highs.push(high);
        bucket.entries.push(packed);
        self.firsts.push(high);
        self.buckets.push(bucket);
    }

    /// Splits a bucket near its middle, between two half-tokens. A bucket of equal ones stays
    /// whole.
    fn split(&mut self, index: usize) {
        let bucket = &mut self.buckets[index];
        let highs = &bucket.highs;
        let middle = highs.len() / 2;
        let differs = |at: &usize| highs[*at] != highs[*at - 1];
        let Some(at) = (middle..highs.len())
            .find(differs)
            .or_else(|| (1..middle).rev().find(differs))
        else {
            return;
        };
        let mut upper = Bucket {
            highs: Vec::with_capacity(BUCKET_ENTRIES_MAX + 1),
            entries: bucket.entries.split_off(at),
        };
        upper.highs.extend_from_slice(&bucket.highs[at..]);
        bucket.highs.truncate(at);
        self.firsts.insert(index + 1, upper.highs[0]);
        self.buckets.insert(index + 1, upper);
    }
}

impl Bucket {
    /// Where a key is, or where it would have to be put in.
    fn search(&self, token: Token, key: &[u8]) -> Result<usize, usize> {
        let high = high(token);
        let mut at = self.highs.partition_point(|other| *other < high);
        // Nearly always one round at most.
        while self.highs.get(at) == Some(&high) {
            match self.entries[at].cmp_key(token, key) {
                Ordering::Less => at += 1,
                Ordering::Equal => return Ok(at),
                Ordering::Greater => return Err(at),
            }
        }
        Err(at)
    }
}

fn high(token: Token) -> u64 {
    u64::try_from(token.0 >> 64).expect("the high half of 128 bits")
}
