//! The rolling hash over everything that happens, and on request its text.
//!
//! Two runs of one seed have the same hash or the world is not deterministic; the text of two
//! runs side by side shows the first event at which they part.

use std::fmt;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// What happened. The number is part of the hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Poll = 1,
    Timer = 2,
    DiskBegin = 3,
    DiskEnd = 4,
    Send = 5,
    Deliver = 6,
    Answer = 7,
    Crash = 8,
    Restart = 9,
    Pause = 10,
    Link = 11,
    Clock = 12,
    Note = 13,
}

/// The log of a run.
pub(crate) struct Log {
    hasher: Xxh3,
    count: u64,
    lines: Option<Vec<String>>,
}

impl Log {
    pub(crate) fn new() -> Self {
        Self {
            hasher: Xxh3::new(),
            count: 0,
            lines: None,
        }
    }

    /// Keeps the text of every event from now on.
    pub(crate) fn keep_lines(&mut self) {
        self.lines.get_or_insert_default();
    }

    pub(crate) fn lines(&self) -> &[String] {
        self.lines.as_deref().unwrap_or_default()
    }

    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    pub(crate) fn hash(&self) -> u128 {
        self.hasher.digest128()
    }

    pub(crate) fn record(&mut self, now: u64, event: Event, a: u64, b: u64) {
        let mut bytes = [0; 25];
        bytes[0] = event as u8;
        bytes[1..9].copy_from_slice(&now.to_le_bytes());
        bytes[9..17].copy_from_slice(&a.to_le_bytes());
        bytes[17..25].copy_from_slice(&b.to_le_bytes());
        self.hasher.update(&bytes);
        self.count += 1;
        if let Some(lines) = &mut self.lines {
            lines.push(format!("{now:>14} {event:?} {a:x} {b:x}"));
        }
    }

    pub(crate) fn note(&mut self, now: u64, text: fmt::Arguments<'_>) {
        let text = text.to_string();
        self.record(now, Event::Note, xxh3_64(text.as_bytes()), 0);
        if let Some(lines) = &mut self.lines {
            lines.push(format!("{now:>14} {text}"));
        }
    }
}
