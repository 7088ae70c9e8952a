//! Decides what the frames found in a log mean: which to apply, and whether what is missing was
//! never finished (a torn tail) or was lost (rot).
//!
//! Pure. A frame is applied when it continues the chain. What follows a break is held, and judged
//! when all has been seen: a held frame that says "durable through n" proves that every frame up
//! to n had been on disk, so if the chain ends before n, something rotted, and the log may not be
//! cut there. Without such a proof the break is where writing stopped: the frames held are what a
//! weaker fsync policy lost out of order, or the leavings of a log that was continued elsewhere.

use torc_env::mutation;

use crate::frame::Mark;

/// A valid frame, as found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) sequence: u64,
    pub(crate) previous: u64,
    pub(crate) hash: u64,
    pub(crate) durable_through: u64,
    pub(crate) flags: u16,
    /// Which of the log's files, in order, and where in it.
    pub(crate) file: usize,
    pub(crate) offset: u64,
}

/// What to do with a frame now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is in tables already.
    Skip,
    /// It is next: apply it.
    Apply,
    /// Not next. [`Chain::finish`] decides.
    Hold,
}

/// The chain so far.
#[derive(Debug)]
pub(crate) struct Chain {
    flushed: u64,
    last: Mark,
    last_flags: u16,
    held: Vec<Seen>,
}

/// How the log ends.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct End {
    /// The last frame applied, those of `gap` included: what the next frame must continue.
    pub(crate) last: Mark,
    /// Flags of that frame.
    pub(crate) last_flags: u16,
    /// What rotted, if anything did.
    pub(crate) gap: Option<Gap>,
    /// Valid frames that are not part of the log.
    pub(crate) discarded: usize,
}

/// Frames were lost that had been durable.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Gap {
    /// The first missing sequence.
    pub(crate) missing_from: u64,
    /// The valid frames behind the gap, to be applied in this order: each holds acknowledged
    /// records, and dropping them would add to the loss.
    pub(crate) resume: Vec<Seen>,
}

impl Chain {
    /// A log of which everything through `flushed` is in tables.
    pub(crate) fn new(flushed: Mark) -> Self {
        Self {
            flushed: flushed.sequence,
            last: flushed,
            last_flags: 0,
            held: Vec::new(),
        }
    }

    /// Judges the next frame, in the order of files and offsets.
    pub(crate) fn offer(&mut self, seen: Seen) -> Verdict {
        if seen.sequence <= self.flushed && !mutation::on("apply_any_frame") {
            if self.last.sequence == self.flushed {
                self.last_flags = seen.flags;
            }
            return Verdict::Skip;
        }
        let continues = seen.sequence == self.last.sequence + 1 && seen.previous == self.last.hash;
        if continues || mutation::on("apply_any_frame") {
            self.last = Mark {
                sequence: seen.sequence,
                hash: seen.hash,
            };
            self.last_flags = seen.flags;
            return Verdict::Apply;
        }
        self.held.push(seen);
        Verdict::Hold
    }

    /// Judges what was held.
    pub(crate) fn finish(self) -> End {
        let missing_from = self.last.sequence + 1;
        let proof = self.held.iter().position(|seen| {
            seen.durable_through >= missing_from && !mutation::on("truncate_log_at_rot")
        });
        let Some(proof) = proof else {
            return End {
                last: self.last,
                last_flags: self.last_flags,
                gap: None,
                discarded: self.held.len(),
            };
        };
        let mut resume = self.behind_the_gap(proof);
        let mut reached = resume
            .last()
            .map_or(self.last.sequence, |seen| seen.sequence);
        for seen in &self.held[proof..] {
            if seen.sequence > reached {
                reached = seen.sequence;
                resume.push(*seen);
            }
        }
        let last = resume.last().map_or(self.last, |seen| Mark {
            sequence: seen.sequence,
            hash: seen.hash,
        });
        End {
            last,
            last_flags: resume.last().map_or(self.last_flags, |seen| seen.flags),
            discarded: self.held.len() - resume.len(),
            gap: Some(Gap {
                missing_from,
                resume,
            }),
        }
    }

    /// What the held frame at `proof` goes on from. A frame that flew beside the missing one could not call it
    /// durable; it is part of the log all the same.
    fn behind_the_gap(&self, proof: usize) -> Vec<Seen> {
        let mut found = Vec::new();
        let mut next = self.held[proof];
        let is_before = |seen: &Seen, next: &Seen| {
            seen.sequence > self.last.sequence
                && seen.sequence + 1 == next.sequence
                && seen.hash == next.previous
        };
        while let Some(before) = self.held.iter().find(|seen| is_before(seen, &next)) {
            found.push(*before);
            next = *before;
        }
        found.reverse();
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(sequence: u64, durable_through: u64) -> Seen {
        Seen {
            sequence,
            previous: (sequence - 1) * 10,
            hash: sequence * 10,
            durable_through,
            flags: 0,
            file: 0,
            offset: sequence * 4096,
        }
    }

    fn run(flushed: u64, frames: &[Seen]) -> (Vec<u64>, End) {
        let mut chain = Chain::new(Mark {
            sequence: flushed,
            hash: flushed * 10,
        });
        let mut applied = Vec::new();
        for seen in frames {
            if chain.offer(*seen) == Verdict::Apply {
                applied.push(seen.sequence);
            }
        }
        (applied, chain.finish())
    }

    #[test]
    fn an_unbroken_log_is_applied_behind_the_flushed_mark() {
        let (applied, end) = run(2, &[frame(1, 0), frame(2, 1), frame(3, 2), frame(4, 3)]);
        assert_eq!(applied, [3, 4]);
        assert_eq!((end.last.sequence, end.gap), (4, None));
    }

    #[test]
    fn a_missing_last_frame_is_a_torn_tail() {
        let (applied, end) = run(0, &[frame(1, 0), frame(2, 1)]);
        assert_eq!(applied, [1, 2]);
        assert_eq!(end.gap, None);
    }

    #[test]
    fn a_missing_frame_that_a_later_one_calls_durable_is_rot() {
        let (applied, end) = run(0, &[frame(1, 0), frame(3, 2), frame(4, 3)]);
        assert_eq!(applied, [1]);
        let gap = end.gap.unwrap();
        assert_eq!(gap.missing_from, 2);
        assert_eq!(gap.resume, [frame(3, 2), frame(4, 3)]);
        assert_eq!(end.last.sequence, 4);
    }

    #[test]
    fn a_frame_that_flew_beside_a_damaged_one_is_kept() {
        let (applied, end) = run(0, &[frame(1, 0), frame(3, 1), frame(4, 3), frame(5, 4)]);
        assert_eq!(applied, [1]);
        let gap = end.gap.unwrap();
        assert_eq!(gap.missing_from, 2);
        assert_eq!(gap.resume, [frame(3, 1), frame(4, 3), frame(5, 4)]);
        assert_eq!(end.discarded, 0);
    }

    #[test]
    fn a_frame_of_another_past_is_not_kept_behind_a_gap() {
        let foreign = Seen {
            hash: 77,
            ..frame(3, 1)
        };
        let (_, end) = run(0, &[frame(1, 0), foreign, frame(4, 3)]);
        assert_eq!(end.gap.unwrap().resume, [frame(4, 3)]);
        assert_eq!(end.discarded, 1);
    }

    #[test]
    fn frames_that_were_never_synced_may_be_lost_out_of_order() {
        let (applied, end) = run(0, &[frame(1, 0), frame(3, 0), frame(4, 1)]);
        assert_eq!(applied, [1]);
        assert_eq!((end.last.sequence, end.gap, end.discarded), (1, None, 2));
    }

    #[test]
    fn leavings_of_a_log_continued_elsewhere_are_passed_over() {
        let stale = frame(3, 1);
        let continued = Seen {
            hash: 77,
            file: 1,
            ..frame(2, 1)
        };
        let next = Seen {
            previous: 77,
            file: 1,
            ..frame(3, 2)
        };
        let (applied, end) = run(0, &[frame(1, 0), stale, continued, next]);
        assert_eq!(applied, [1, 2, 3]);
        assert_eq!((end.gap, end.discarded), (None, 1));
    }

    #[test]
    fn damage_below_the_flushed_mark_is_harmless() {
        let (applied, end) = run(3, &[frame(1, 0), frame(4, 3)]);
        assert_eq!(applied, [4]);
        assert_eq!(end.gap, None);
    }

    #[test]
    fn a_frame_of_another_past_does_not_continue_the_chain() {
        let foreign = Seen {
            previous: 1,
            ..frame(2, 1)
        };
        let (applied, end) = run(0, &[frame(1, 0), foreign]);
        assert_eq!(applied, [1]);
        assert_eq!((end.gap, end.discarded), (None, 1));
    }
}
