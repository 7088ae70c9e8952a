//! The supply of log segments: one ready before it is needed, retired ones recycled.

use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use torc_env::{Disk, Env, File};

use super::{FileOf, Inner};
use crate::crypt::{DataKey, FileUse, KeyId, WriterSalt};
use crate::manifest::{Change, State};
use crate::stats::Stats;
use crate::wal::{Segment, SegmentId, SegmentPlan};

/// Retired segments kept for recycling.
const RETIRED_MAX: usize = 2;
/// How long to wait after a segment could not be created.
const RETRY: Duration = Duration::from_millis(250);

/// A segment that holds frames.
#[derive(Clone, Copy, Debug)]
pub(super) struct Live {
    pub(super) id: SegmentId,
    pub(super) bytes: u64,
    /// Where its last frame ends.
    pub(super) end: u64,
    /// Its last frame; 0 when it holds none.
    pub(super) last: u64,
    /// Whether it was written since the open: then `last` is the last of frames that follow each other.
    pub(super) is_exact: bool,
    /// See [`crate::archive::trailer::Trailer::reach_us`].
    pub(super) reach_us: u64,
    /// Whether the archive does not need it (any more).
    pub(super) is_archived: bool,
    /// The master key of its frames; `None` when they are in the clear.
    pub(super) key: Option<KeyId>,
}

impl Live {
    /// One without frames.
    fn empty<F: File>(segment: &Segment<F>) -> Self {
        Self {
            id: segment.id,
            bytes: segment.len,
            end: 0,
            last: 0,
            is_exact: true,
            reach_us: 0,
            is_archived: false,
            key: segment.key_id(),
        }
    }
}

/// A segment that is not listed any more, and all that its file holds is under one key.
#[derive(Clone, Copy, Debug)]
pub(super) struct Retired {
    pub(super) id: SegmentId,
    pub(super) bytes: u64,
    pub(super) key: Option<KeyId>,
}

/// The edit that takes segments out of the list: those that nobody else has taken out meanwhile.
pub(super) fn unlisting(segments: &[Live], state: &State) -> impl Iterator<Item = Change> {
    let listed = segments
        .iter()
        .filter(|live| state.segments.contains(&live.id));
    listed.map(|live| Change::RemoveSegment(live.id))
}

/// All segments of the store.
pub(super) struct Supply<F> {
    /// Full segments, oldest first.
    live: VecDeque<Live>,
    /// The one that is written.
    active: Option<(Live, F)>,
    /// Listed by the manifest and empty.
    spare: Option<Segment<F>>,
    is_wanted: bool,
    /// One is being made.
    is_making: bool,
    /// No longer listed.
    retired: Vec<Retired>,
    /// Whether full segments are archived.
    archives: bool,
}

impl<F: File> Supply<F> {
    /// After a replay: `live` is listed, `retired` is not.
    pub(super) fn new(live: VecDeque<Live>, retired: Vec<Retired>, archives: bool) -> Self {
        Self {
            archives,
            live,
            active: None,
            spare: None,
            is_wanted: false,
            is_making: false,
            retired,
        }
    }

    /// Notes a frame in the active segment, which reaches to `end` now.
    pub(super) fn frame_written(&mut self, sequence: u64, end: u64, is_half_used: bool) {
        if let Some((active, _)) = &mut self.active {
            active.last = sequence;
            active.bytes = active.bytes.max(end);
            active.end = end;
        }
        self.is_wanted |= is_half_used;
    }

    /// Asks for a segment even though the active one is not half used.
    pub(super) fn want_segment(&mut self) {
        self.is_wanted = true;
    }

    /// Gives up a spare segment that is not under the key `active`: it leaves with those that are flushed
    /// next. Returns whether there was one; whoever waits for a segment then waits for another.
    pub(super) fn pass_over_stale(&mut self, active: Option<KeyId>) -> bool {
        let stale = self.spare.take_if(|spare| spare.key_id() != active);
        let is_given_up = stale.is_some();
        self.live.extend(stale.map(|spare| Live {
            is_archived: true,
            ..Live::empty(&spare)
        }));
        is_given_up
    }

    /// Takes the spare segment to be the active one. The one before is full, and reaches to `reach_us`.
    pub(super) fn take_spare(&mut self, reach_us: impl FnOnce() -> u64) -> Option<Segment<F>> {
        let spare = self.spare.take()?;
        self.is_wanted = false;
        let live = Live::empty(&spare);
        if let Some((full, _)) = self.active.replace((live, spare.file.clone())) {
            self.live.push_back(Live {
                reach_us: reach_us(),
                is_archived: full.last == 0,
                ..full
            });
        }
        Some(spare)
    }

    /// The file that is written.
    pub(super) fn active_file(&self) -> Option<F> {
        self.active.as_ref().map(|(_, file)| file.clone())
    }

    /// Full segments that hold nothing beyond frame `sequence`; none when the archive lets them go.
    pub(super) fn retirable(&self, sequence: u64) -> Vec<Live> {
        let live = self.live.iter().filter(|_| !self.archives);
        live.filter(|live| live.last <= sequence).copied().collect()
    }

    /// Full segments that hold nothing beyond frame `flushed`, and that the archive does not need.
    pub(super) fn archived_through(&self, flushed: u64) -> Vec<Live> {
        let live = self.live.iter().filter(|live| live.is_archived);
        live.filter(|live| live.last <= flushed).copied().collect()
    }

    /// The oldest full segment that the archive needs.
    pub(super) fn next_to_archive(&self) -> Option<Live> {
        self.live.iter().find(|live| !live.is_archived).copied()
    }

    /// The archive does not need this segment any more.
    pub(super) fn note_archived(&mut self, id: SegmentId) {
        let found = self.live.iter_mut().find(|live| live.id == id);
        if let Some(live) = found {
            live.is_archived = true;
        }
    }

    /// The last frame of all full segments.
    pub(super) fn full_last(&self) -> u64 {
        self.live.iter().map(|live| live.last).max().unwrap_or(0)
    }

    /// Whether the archive needs no full segment with a frame up to `last`.
    pub(super) fn is_archived(&self, last: u64) -> bool {
        !self
            .live
            .iter()
            .any(|live| !live.is_archived && live.last <= last)
    }

    /// Takes the oldest of the segments that only the archive needs from it, when they have more than `held_bytes_max`
    /// bytes.
    pub(super) fn give_up(&mut self, flushed: u64, held_bytes_max: u64) -> Option<Live> {
        if self.held(flushed).map(|live| live.bytes).sum::<u64>() <= held_bytes_max {
            return None;
        }
        let id = self.held(flushed).next()?.id;
        let live = self.live.iter_mut().find(|live| live.id == id)?;
        live.is_archived = true;
        Some(*live)
    }

    /// Segments that only the archive needs.
    fn held(&self, flushed: u64) -> impl Iterator<Item = &Live> {
        let live = self.live.iter().filter(|live| !live.is_archived);
        live.filter(move |live| live.last <= flushed)
    }

    /// Segments with frames that are not in tables.
    pub(super) fn needed_count(&self, flushed: u64) -> usize {
        let live = self.live.iter().filter(|live| live.last > flushed);
        live.count() + usize::from(self.active.is_some())
    }

    /// Notes that these are no longer listed; those that somebody else has noted already do not count. Returns what
    /// is too much to keep, and what may not be recycled because it holds something under another key than `active`.
    pub(super) fn retire(&mut self, segments: &[Live], active: Option<KeyId>) -> Vec<SegmentId> {
        let (gone, live): (VecDeque<Live>, VecDeque<Live>) = std::mem::take(&mut self.live)
            .into_iter()
            .partition(|live| segments.iter().any(|gone| gone.id == live.id));
        self.live = live;
        self.retired.extend(gone.iter().map(|gone| Retired {
            id: gone.id,
            bytes: gone.bytes,
            key: gone.key,
        }));
        let (kept, stale) = std::mem::take(&mut self.retired)
            .into_iter()
            .partition(|retired| retired.key == active);
        self.retired = kept;
        let keep = self.retired.len().min(RETIRED_MAX);
        let surplus = self.retired.drain(keep..);
        surplus.chain(stale).map(|retired| retired.id).collect()
    }

    /// The next file to be recycled under the key `active`.
    fn take_retired(&mut self, active: Option<KeyId>) -> Option<Retired> {
        let at = self
            .retired
            .iter()
            .rposition(|retired| retired.key == active)?;
        Some(self.retired.remove(at))
    }

    /// Whether frames, and the next segment, are under `key` and none is being made.
    pub(super) fn is_under(&self, key: Option<KeyId>) -> bool {
        let active = self.active.iter().map(|(live, _)| live.key);
        let spare = self.spare.iter().map(Segment::key_id);
        !self.is_making && active.chain(spare).all(|found| found == key)
    }

    /// The master key of each segment file.
    pub(super) fn keys(&self) -> impl Iterator<Item = Option<KeyId>> {
        let listed = self
            .live
            .iter()
            .chain(self.active.iter().map(|(live, _)| live));
        let listed = listed.map(|live| live.key);
        let spare = self.spare.iter().map(Segment::key_id);
        listed
            .chain(spare)
            .chain(self.retired.iter().map(|retired| retired.key))
    }

    /// Whether a segment is listed or kept for recycling.
    pub(super) fn knows(&self, id: SegmentId) -> bool {
        self.live.iter().any(|live| live.id == id)
            || self.retired.iter().any(|retired| retired.id == id)
    }

    /// Segments with frames.
    pub(super) fn live_count(&self) -> usize {
        self.live.len() + usize::from(self.active.is_some())
    }

    fn should_make(&self) -> bool {
        self.is_wanted && self.spare.is_none()
    }

    pub(super) fn add_stats(&self, flushed: u64, stats: &mut Stats) {
        stats.wal_segments = self.live_count();
        stats.archive_waiting = self.live.iter().filter(|live| !live.is_archived).count();
        stats.archive_held_bytes = self.held(flushed).map(|live| live.bytes).sum();
        let active = self.active.iter().map(|(live, _)| live.bytes);
        let live = self.live.iter().map(|live| live.bytes);
        stats.wal_live_bytes = active.chain(live).sum();
    }
}

impl<E: Env> Inner<E> {
    /// The task that makes segments, until the log is closed.
    pub(super) async fn run_supply(self: Rc<Self>) {
        loop {
            self.segments
                .until(|| (self.has_ended() || self.supply.borrow().should_make()).then_some(()))
                .await;
            if self.has_ended() {
                return;
            }
            self.supply.borrow_mut().is_making = true;
            let made = self.make_segment().await;
            match made {
                Ok(segment) => {
                    if self.edit(&[Change::AddSegment(segment.id)]).await.is_err() {
                        return;
                    }
                    let mut supply = self.supply.borrow_mut();
                    supply.spare = Some(segment);
                    supply.is_making = false;
                    drop(supply);
                    self.segments.ring();
                }
                Err(error) => {
                    // Nothing was promised on this file, so another attempt is sound.
                    self.supply.borrow_mut().is_making = false;
                    tracing::warn!(%error, "cannot make a WAL segment; trying again");
                    self.note_disk_error(&error);
                    self.env.sleep(RETRY).await;
                }
            }
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.health.closed.get() || self.health.poison.borrow().is_some()
    }

    async fn make_segment(&self) -> io::Result<Segment<FileOf<E>>> {
        let disk = self.env.disk();
        let number = self.manifest.state().segment_floor;
        let id = SegmentId::new(number, self.env.random());
        let dir = &self.wal_dir;
        let salt = || WriterSalt::draw(&self.env);
        let plan = SegmentPlan {
            id,
            fsync: self.options.fsync,
            key: self.keys.borrow().begin(salt, FileUse::Segment(id.0)),
        };
        let active = plan.key.as_ref().map(DataKey::id);
        let retired = self.supply.borrow_mut().take_retired(active);
        match retired {
            Some(old) => Segment::recycle(disk, dir, (old.id, old.bytes), plan).await,
            None => Segment::create(disk, dir, self.options.wal_segment_bytes, plan).await,
        }
    }

    /// Removes segment files that are neither listed nor kept. Best effort.
    pub(super) async fn remove_segments(&self, segments: &[SegmentId]) {
        for id in segments {
            let path = id.path(&self.wal_dir);
            if let Err(error) = self.env.disk().remove(&path).await {
                tracing::warn!(%error, path = %path.display(), "an old segment stays for now");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use torc_sim::SimFile;

    use super::*;

    #[test]
    fn a_segment_that_two_let_go_of_is_recycled_once() {
        let live = Live {
            id: SegmentId(7),
            bytes: 1 << 20,
            end: 4096,
            last: 3,
            is_exact: true,
            reach_us: 0,
            is_archived: true,
            key: None,
        };
        let mut supply = Supply::<SimFile>::new([live].into(), Vec::new(), false);
        let (first, second) = (supply.retirable(3), supply.retirable(3));
        assert!(supply.retire(&first, None).is_empty());
        assert!(supply.retire(&second, None).is_empty());
        assert_eq!(supply.take_retired(None).map(|old| old.id), Some(live.id));
        assert!(supply.take_retired(None).is_none());
    }
}
