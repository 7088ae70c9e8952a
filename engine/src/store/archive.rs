//! The task that archives full segments of the log, and the orders to archive what is being written.
//!
//! Not on a request's path. With an archive, a segment whose records are in tables stays in the log until its copy is
//! durable. What waits only for the archive is bounded: beyond it the oldest is given up, so that a broken archive never
//! fills the disk that data needs; the archive then has a gap, which is counted and logged, and restores across it
//! are refused until there is a younger backup.
//!
//! Invariants: segments are archived in their order, and unlisted only after that, or after they were given up; what a segment says it
//! reaches was no longer to come when it was full.

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::select;
use torc_env::{Env, mutation};

use super::Inner;
use super::supply::Live;
use crate::archive::copy::{CopyError, Full, copy};
use crate::error::WriteError;
use crate::manifest::Change;
use crate::options::ArchiveOptions;

/// How long the archive rests after it has failed; doubled up to [`RETRY_MAX`].
const RETRY: Duration = Duration::from_millis(250);
/// The longest such rest.
const RETRY_MAX: Duration = Duration::from_secs(8);

/// Why the log could not be archived up to now.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ArchiveError {
    /// There is no archive.
    #[error("this store has no log archive")]
    Off,
    /// The store takes no updates any more.
    #[error(transparent)]
    Store(#[from] WriteError),
    /// A segment could not be archived; it is tried again.
    #[error("{0}")]
    Failing(Rc<str>),
    /// Segments were given up: the archive has a gap.
    #[error(
        "segments of the log were given up because they could not be archived in time; take a backup"
    )]
    Gap,
}

/// Tells the newest stamp that was given to any record, in microseconds since 1970. What is decided later is stamped
/// later.
pub type NewestStamp = Box<dyn Fn() -> u64>;

/// How archiving goes.
#[derive(Default)]
pub(super) struct Archiving {
    /// The newest stamp that was given to any record: a clock that may be ahead of civil time.
    newest_stamp: RefCell<Option<NewestStamp>>,
    /// Everything decided up to here had been gathered when a frame took all that was; in microseconds since 1970.
    emptied_us: Cell<u64>,
    /// The log is to go on in another segment.
    switch_wanted: Cell<bool>,
    /// How often it has.
    switches: Cell<u64>,
    /// Attempts that ended, well or not.
    attempts: Cell<u64>,
    /// Why the last attempt failed.
    failure: RefCell<Option<Rc<str>>>,
    /// Everything decided up to here is archived, in microseconds since 1970.
    reach_us: Cell<u64>,
}

impl Archiving {
    /// Whether the log should go on in another segment.
    pub(super) fn wants_switch(&self) -> bool {
        self.switch_wanted.get()
    }

    /// The log goes on in another segment.
    pub(super) fn note_switch(&self) {
        self.switch_wanted.set(false);
        self.switches.set(self.switches.get() + 1);
    }

    /// Whether the last attempt failed.
    pub(super) fn is_failing(&self) -> bool {
        self.failure.borrow().is_some()
    }

    /// Up to when the log is archived.
    pub(super) fn reach_us(&self) -> u64 {
        self.reach_us.get()
    }
}

/// What there is to do.
enum Work {
    /// This segment is full.
    Copy(Live),
    /// These are in tables, and archived or given up.
    Retire(Vec<Live>),
    /// The store ends.
    End,
}

impl<E: Env> Inner<E> {
    /// The archiving task, until the log is closed.
    pub(super) async fn run_archive(self: Rc<Self>) {
        let Some(options) = self.options.archive.clone() else {
            return;
        };
        let mut rest = RETRY;
        loop {
            self.give_up_beyond(options.held_bytes_max);
            match self.segments.until(|| self.archive_work()).await {
                Work::End => return,
                Work::Retire(gone) => {
                    if self.retire_archived(&gone).await.is_err() {
                        return;
                    }
                }
                Work::Copy(live) => {
                    if self.archive_one(&options, live).await {
                        rest = RETRY;
                    } else {
                        self.rest(rest).await;
                        rest = RETRY_MAX.min(rest * 2);
                    }
                }
            }
        }
    }

    /// Asks for another segment now and then, so that what was written, and that nothing was, does not wait for a segment
    /// to fill.
    pub(super) async fn run_archive_clock(self: Rc<Self>) {
        let archive = self.options.archive.as_ref();
        let Some(interval) = archive.and_then(|found| found.interval) else {
            return;
        };
        while !self.is_stopping() {
            let switches = self.archiving.switches.get();
            self.rest(interval).await;
            // One that has just been begun is left to fill for an interval of its own.
            if switches == self.archiving.switches.get() {
                self.archiving.switch_wanted.set(true);
                self.work.ring();
            }
        }
    }

    async fn rest(&self, time: Duration) {
        let timer = pin!(self.env.sleep(time));
        let stopping = pin!(self.stopped.until(|| self.is_stopping().then_some(())));
        select(timer, stopping).await;
    }

    fn archive_work(&self) -> Option<Work> {
        if self.has_ended() || self.is_stopping() && self.archiving.is_failing() {
            return Some(Work::End);
        }
        let supply = self.supply.borrow();
        let gone = supply.archived_through(self.manifest.state().flushed.sequence);
        if !gone.is_empty() {
            return Some(Work::Retire(gone));
        }
        supply.next_to_archive().map(Work::Copy)
    }

    /// Archives a segment; `false` when that failed.
    async fn archive_one(&self, options: &ArchiveOptions, live: Live) -> bool {
        let full = Full {
            id: live.id,
            end: live.end,
            reach_us: live.reach_us,
        };
        let (disk, archive) = (self.env.disk(), &self.archiving);
        let is_over = || self.has_ended();
        let copied = copy(
            disk,
            &self.wal_dir,
            &options.dir,
            &options.origin,
            full,
            is_over,
        )
        .await;
        archive.attempts.set(archive.attempts.get() + 1);
        let is_done = match copied {
            Ok(trailer) => {
                let bytes = trailer.map_or(0, |trailer| trailer.body_bytes);
                self.count(|counts| {
                    counts.archived_segments += u64::from(trailer.is_some());
                    counts.archived_bytes += bytes;
                });
                if trailer.is_none_or(|trailer| live.is_exact && trailer.last != live.last) {
                    self.count(|counts| counts.archive_gaps += 1);
                    tracing::error!(
                        segment = %live.id,
                        expected = live.last,
                        found = trailer.map(|trailer| trailer.last),
                        "a log segment was damaged before it was archived: moments behind it cannot be \
                         restored; take a backup"
                    );
                }
                archive
                    .reach_us
                    .set(archive.reach_us.get().max(live.reach_us));
                if archive.failure.replace(None).is_some() {
                    tracing::info!(segment = %live.id, "the log archive works again");
                }
                self.supply.borrow_mut().note_archived(live.id);
                self.flush_for_log();
                true
            }
            Err(CopyError::Stopped) => true,
            Err(error) => {
                self.count(|counts| counts.archive_failures += 1);
                tracing::warn!(%error, segment = %live.id, "a log segment is not archived; trying again");
                archive.failure.replace(Some(error.to_string().into()));
                false
            }
        };
        self.segments.ring();
        is_done
    }

    /// Has memory flushed when too many segments wait for it: those that were left before they were full may hold too little
    /// to have done so.
    fn flush_for_log(&self) {
        let flushed = self.manifest.state().flushed.sequence;
        let needed = self.supply.borrow().needed_count(flushed);
        if needed > self.options.wal_segments_max && self.memory.borrow().sealed_count() == 0 {
            self.begin_flush();
        }
    }

    /// Lets go of the oldest segments that only the archive needs, while they take more than `held_bytes_max`.
    fn give_up_beyond(&self, held_bytes_max: u64) {
        let flushed = self.manifest.state().flushed.sequence;
        while let Some(live) = self.supply.borrow_mut().give_up(flushed, held_bytes_max) {
            self.count(|counts| counts.archive_gaps += 1);
            tracing::error!(
                segment = %live.id,
                "the log archive is behind by more than archive.held_mb: this segment is lost to it, and moments \
                 behind it cannot be restored until there is a younger backup"
            );
        }
    }

    /// Takes segments that nothing needs any more out of the log.
    async fn retire_archived(&self, gone: &[Live]) -> Result<(), WriteError> {
        let ids: Vec<_> = gone.iter().map(|live| live.id).collect();
        if mutation::on("recycle_before_edit") {
            self.remove_segments(&ids).await;
        }
        let changes: Vec<Change> = ids.iter().map(|id| Change::RemoveSegment(*id)).collect();
        self.edit(&changes).await?;
        let surplus = self.supply.borrow_mut().retire(gone, self.active_key());
        self.segments.ring();
        self.remove_segments(&surplus).await;
        Ok(())
    }

    /// Takes the clock by which records are stamped.
    pub(super) fn set_newest_stamp(&self, newest: NewestStamp) {
        self.archiving.newest_stamp.replace(Some(newest));
    }

    /// Everything decided up to here is in a frame, in microseconds since 1970: what comes next is stamped later.
    pub(super) fn log_reach_us(&self) -> u64 {
        let nothing_waits = self.memory.borrow().gather.next_payload_len().is_none();
        if nothing_waits {
            self.decided_us()
        } else {
            self.archiving.emptied_us.get()
        }
    }

    /// What is decided from now on is stamped later than this. Civil time alone would leave out what a clock ahead of it has
    /// stamped.
    fn decided_us(&self) -> u64 {
        let newest = self.archiving.newest_stamp.borrow();
        let newest = newest.as_ref().map_or(0, |newest| newest());
        self.env.wall().0.saturating_sub(1).max(newest)
    }

    /// A frame was begun: notes whether it took all that was gathered.
    pub(super) fn note_gathered(&self) {
        if self.options.archive.is_some()
            && self.memory.borrow().gather.next_payload_len().is_none()
        {
            self.archiving.emptied_us.set(self.decided_us());
        }
    }

    pub(super) async fn archive_log(&self) -> Result<u64, ArchiveError> {
        if self.options.archive.is_none() {
            return Err(ArchiveError::Off);
        }
        self.check_open()?;
        let (switches, gaps) = (
            self.archiving.switches.get(),
            self.counts.borrow().archive_gaps,
        );
        self.archiving.switch_wanted.set(true);
        self.work.ring();
        let full = self.segments.until(|| {
            if let Err(error) = self.check_open() {
                return Some(Err(error));
            }
            let is_switched = self.archiving.switches.get() > switches;
            is_switched.then(|| Ok(self.supply.borrow().full_last()))
        });
        let through = full.await?;
        let attempts = self.archiving.attempts.get();
        let archived = self.segments.until(|| {
            if self.supply.borrow().is_archived(through) {
                return Some(Ok(()));
            }
            if let Err(error) = self.check_open() {
                return Some(Err(error.into()));
            }
            let failure = self.archiving.failure.borrow().clone();
            failure
                .filter(|_| self.archiving.attempts.get() > attempts)
                .map(|failure| Err(ArchiveError::Failing(failure)))
        });
        archived.await?;
        if self.counts.borrow().archive_gaps > gaps {
            return Err(ArchiveError::Gap);
        }
        Ok(self.archiving.reach_us.get())
    }
}
