//! The task that writes the log: gathered batches become frames, and frames that are as durable as
//! promised become visible records.
//!
//! A few frames are on their way to the device at once, so that neither it nor the writers wait for the
//! other. They count in the order in which they were begun: one that is durable before an older one
//! is acknowledged behind it, and none behind one that failed.

use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use futures_util::future::{Either, LocalBoxFuture, select};
use futures_util::poll;
use futures_util::stream::{FuturesOrdered, StreamExt};
use torc_env::{AlignedBuf, Class, Env, File, mutation};

use super::{FileOf, Inner};
use crate::commit::{Batch, Fate};
use crate::error::WriteError;
use crate::frame::Mark;
use crate::le::len64;
use crate::options::Fsync;
use crate::wal::{FLAG_CLOSED, FLAG_UNSYNCED, FrameMeta, Log};

/// Frames that may be on their way to the device at once. With one, half of the writers wait for the
/// frame after it; more than two only make frames smaller.
const FLYING_MAX: usize = 2;

/// Frames on their way; they land in the order in which they were begun.
type Flying = FuturesOrdered<LocalBoxFuture<'static, Landed>>;

/// A frame that was written, or could not be.
struct Landed {
    batch: Batch,
    frame_bytes: usize,
    result: io::Result<Mark>,
    buffer: AlignedBuf,
}

/// What the commit task waits for.
enum Event {
    /// A frame landed.
    Landed(Landed),
    /// A frame may be begun.
    Work,
    /// The store is closed, and nothing is left to write.
    End,
}

impl<E: Env> Inner<E> {
    /// The commit task, until the store is closed or poisoned.
    pub(super) async fn run_commits(self: Rc<Self>, mut log: Log<FileOf<E>>) {
        let mut flying = Flying::new();
        let written = match self.commit(&mut log, &mut flying).await {
            Ok(()) => self.write_closing_frame(&mut log).await,
            Err(cause) => Err(cause),
        };
        let Err(cause) = written else {
            self.health.closed.set(true);
            return self.ring_all();
        };
        self.poison_with(&cause);
        // Behind a frame that failed none is acknowledged, whether or not it is on disk.
        while let Some(landed) = flying.next().await {
            landed.batch.fate.decide(Err(in_doubt(cause.clone())));
        }
    }

    /// Writes what is gathered, until the store is closed and nothing is left.
    async fn commit(
        self: &Rc<Self>,
        log: &mut Log<FileOf<E>>,
        flying: &mut Flying,
    ) -> Result<(), Rc<str>> {
        let mut acknowledged: Option<Acknowledged> = None;
        loop {
            while self.may_begin(log, flying.len()) {
                let Some(payload_len) = self.memory.borrow().gather.next_payload_len() else {
                    break;
                };
                if self.has_place(log, payload_len) {
                    self.begin(log, flying);
                } else {
                    if let Some(acknowledged) = acknowledged.take() {
                        acknowledged.decide();
                    }
                    // More may join the frame meanwhile, so it is asked for its size again.
                    self.make_room(log, payload_len).await?;
                }
            }
            if self.may_rekey(flying.len()) {
                if let Some(acknowledged) = acknowledged.take() {
                    acknowledged.decide();
                }
                self.rekey(log).await?;
            }
            // A frame is on its way once it was polled. Whoever waited for the one before is told
            // only then: the device need not wait for their answers.
            let at_once = poll!(flying.next());
            if let Some(acknowledged) = acknowledged.take() {
                acknowledged.decide();
            }
            let event = match at_once {
                Poll::Ready(Some(landed)) => Event::Landed(landed),
                Poll::Ready(None) | Poll::Pending => self.next_event(log, flying).await?,
            };
            match event {
                Event::Landed(landed) => acknowledged = Some(self.land(log, landed)?),
                Event::Work => {}
                Event::End => return Ok(()),
            }
        }
    }

    /// Whether a frame may be begun beside so many others. One that needs another segment, or room that is
    /// still being made, waits until it is alone.
    fn may_begin(&self, log: &Log<FileOf<E>>, flying: usize) -> bool {
        let next = self.memory.borrow().gather.next_payload_len();
        next.is_some_and(|len| flying == 0 || flying < FLYING_MAX && self.has_place(log, len))
    }

    /// Whether a frame can be begun now, under the active key.
    fn has_place(&self, log: &Log<FileOf<E>>, payload_len: usize) -> bool {
        !self.must_switch(log) && !self.must_sign(log) && log.has_place(payload_len)
    }

    /// Whether the segment has yet to say, durably, that this life acknowledges before it syncs. Each must: those before
    /// it go once they are in tables, and were nothing of the last one durable when the power is cut, the next life
    /// would take the log for whole.
    fn must_sign(&self, log: &Log<FileOf<E>>) -> bool {
        let is_synced = self.options.fsync.is_synced();
        !is_synced && log.offset() == 0 && !mutation::on("early_life_is_not_said")
    }

    /// Whether the next frame belongs into another segment, however much room this one has: under another key, or for
    /// the archive.
    fn must_switch(&self, log: &Log<FileOf<E>>) -> bool {
        let is_left = self.archiving.wants_switch() && log.offset() > 0;
        is_left || log.key_id() != self.active_key()
    }

    /// Whether the log is to go on in another segment though there is nothing to write.
    fn may_rekey(&self, flying: usize) -> bool {
        let is_idle = flying == 0 && self.memory.borrow().gather.next_payload_len().is_none();
        is_idle && (self.health.rekey_wanted.get() || self.archiving.wants_switch())
    }

    /// Goes on in another segment: one under the active key, which an empty frame begins, or an empty one, so that
    /// the one before can be archived.
    async fn rekey(self: &Rc<Self>, log: &mut Log<FileOf<E>>) -> Result<(), Rc<str>> {
        self.health.rekey_wanted.set(false);
        let is_stale = log.file().is_some() && log.key_id() != self.active_key();
        // Only a frame makes a segment say how far it reaches.
        let is_unused = self.archiving.wants_switch() && log.offset() == 0;
        if is_stale || is_unused {
            let mark = self.write_empty_frame(log, self.policy_flags()).await?;
            self.memory.borrow_mut().passed(mark);
        }
        if self.archiving.wants_switch() {
            self.switch_segment(log).await?;
        }
        self.segments.ring();
        Ok(())
    }

    /// Waits until a frame has its place, in a new segment if need be. None is on its way.
    async fn make_room(
        self: &Rc<Self>,
        log: &mut Log<FileOf<E>>,
        payload_len: usize,
    ) -> Result<(), Rc<str>> {
        if !log.fits(payload_len) || self.must_switch(log) {
            self.switch_segment(log).await?;
        }
        let is_free = || (!log.must_wait(payload_len)).then_some(());
        self.segments.until(is_free).await;
        if self.must_sign(log) {
            let mark = self.write_frame_here(log, self.policy_flags()).await?;
            log.sign();
            self.memory.borrow_mut().passed(mark);
            self.sync_log(log).await?;
        }
        Ok(())
    }

    /// Gives the oldest batch its frame.
    fn begin(self: &Rc<Self>, log: &mut Log<FileOf<E>>, flying: &mut Flying) {
        let Some(mut batch) = self.memory.borrow_mut().take_batch() else {
            return;
        };
        self.note_gathered();
        let meta = FrameMeta {
            flags: self.policy_flags(),
            durable_through: self.durable_through(log),
            payload_len: batch.payload_len(),
            record_count: u32::try_from(batch.entries.len()).expect("a batch is bounded"),
            first_seqno: batch.first_seqno,
        };
        let frame_bytes = log.frame_bytes(meta.payload_len);
        let frame = batch.take_frame(frame_bytes);
        let writing = log.begin(frame, meta);
        self.after_frame(log);
        flying.push_back(Box::pin(async move {
            let (result, buffer) = writing.run().await;
            Landed {
                batch,
                frame_bytes,
                result,
                buffer,
            }
        }));
    }

    /// What a frame may say of those before it.
    fn durable_through(&self, log: &Log<FileOf<E>>) -> u64 {
        if mutation::on("call_flying_durable") {
            return log.last().sequence;
        }
        self.health.synced.get()
    }

    /// Waits until there is something to do.
    async fn next_event(
        &self,
        log: &Log<FileOf<E>>,
        flying: &mut Flying,
    ) -> Result<Event, Rc<str>> {
        let count = flying.len();
        let work = pin!(self.work.until(|| {
            if let Some(cause) = self.poison() {
                return Some(Err(cause));
            }
            if self.may_begin(log, count) || self.may_rekey(count) {
                return Some(Ok(Event::Work));
            }
            let is_over = count == 0 && self.health.closing.get();
            is_over.then_some(Ok(Event::End))
        }));
        if count > 0 {
            return match select(flying.next(), work).await {
                Either::Left((landed, _)) => Ok(Event::Landed(landed.expect("one is on its way"))),
                Either::Right((event, _)) => event,
            };
        }
        let event = work.await;
        if self.options.fsync == Fsync::Group {
            // One more turn: what is runnable now joins the frame.
            give_turn().await;
        }
        event
    }

    /// Makes a frame's records visible, unless it failed or the store is poisoned.
    fn land(&self, log: &Log<FileOf<E>>, landed: Landed) -> Result<Acknowledged, Rc<str>> {
        let Landed {
            mut batch,
            frame_bytes,
            result,
            buffer,
        } = landed;
        let written = result.map_err(|error| failed("write", &error));
        let mark = match written.and_then(|mark| self.not_poisoned(mark)) {
            Ok(mark) => mark,
            Err(cause) => {
                batch.fate.decide(Err(in_doubt(Rc::clone(&cause))));
                return Err(cause);
            }
        };
        self.note_written(mark, frame_bytes, batch.entries.len());
        let mut memory = self.memory.borrow_mut();
        memory.gather.recycle(buffer);
        memory.complete(&mut batch, mark, &self.cache);
        drop(memory);
        self.seal_if_due(log);
        Ok(Acknowledged {
            fate: batch.fate,
            sequence: mark.sequence,
        })
    }

    fn not_poisoned(&self, mark: Mark) -> Result<Mark, Rc<str>> {
        match self.poison() {
            Some(cause) => Err(cause),
            None => Ok(mark),
        }
    }

    /// A frame was written: it is as durable as promised.
    fn note_written(&self, mark: Mark, frame_bytes: usize, records: usize) {
        self.count(|counts| {
            counts.wal_frames += 1;
            counts.wal_bytes += len64(frame_bytes);
            counts.wal_records += len64(records);
        });
        self.health.written.set(mark.sequence);
        if self.options.fsync.is_synced() {
            self.count(|counts| counts.wal_syncs += 1);
            self.health.synced.set(mark.sequence);
            self.sync.ring();
        }
    }

    /// Looks after the segment that a frame was given its place in.
    fn after_frame(self: &Rc<Self>, log: &Log<FileOf<E>>) {
        let is_half_used = log.offset() > log.segment_bytes() / 2;
        self.supply
            .borrow_mut()
            .frame_written(log.last().sequence, log.offset(), is_half_used);
        if is_half_used {
            self.segments.ring();
        }
        if let Some(prewrite) = log.prewrite_due() {
            let inner = Rc::clone(self);
            self.spawn(Class::Flush, async move {
                prewrite.run().await;
                inner.segments.ring();
            });
        }
    }

    /// Goes on in the next segment, waiting for it if need be. Under a policy that does not sync
    /// each frame, what the old segment holds is synced first, so that "durable through" is a
    /// single mark.
    async fn switch_segment(self: &Rc<Self>, log: &mut Log<FileOf<E>>) -> Result<(), Rc<str>> {
        if !self.options.fsync.is_synced()
            && let Some(file) = log.file()
        {
            let through = log.last().sequence;
            file.sync().await.map_err(|error| failed("sync", &error))?;
            self.note_synced(through);
        }
        let active = self.active_key();
        self.supply.borrow_mut().pass_over_stale(active);
        self.supply.borrow_mut().want_segment();
        self.segments.ring();
        let next = self
            .segments
            .until(|| match self.poison() {
                Some(cause) => Some(Err(cause)),
                None => {
                    let mut supply = self.supply.borrow_mut();
                    supply.take_spare(|| self.log_reach_us()).map(Ok)
                }
            })
            .await?;
        let has_left_one = log.offset() > 0;
        log.switch(next);
        if has_left_one {
            self.archiving.note_switch();
            self.segments.ring();
        }
        Ok(())
    }

    async fn write_closing_frame(self: &Rc<Self>, log: &mut Log<FileOf<E>>) -> Result<(), Rc<str>> {
        if log.file().is_none() {
            // Nothing was written since the open: the log ends as it did.
            return Ok(());
        }
        if !self.options.fsync.is_synced() {
            self.sync_log(log).await?;
        }
        let flags = self.policy_flags() | FLAG_CLOSED;
        self.write_empty_frame(log, flags).await?;
        if !self.options.fsync.is_synced() {
            self.sync_log(log).await?;
        }
        Ok(())
    }

    /// Writes a frame without records, alone.
    async fn write_empty_frame(
        self: &Rc<Self>,
        log: &mut Log<FileOf<E>>,
        flags: u16,
    ) -> Result<Mark, Rc<str>> {
        while !self.has_place(log, 0) {
            self.make_room(log, 0).await?;
        }
        self.write_frame_here(log, flags).await
    }

    /// Writes a frame without records where the log is, and has room.
    async fn write_frame_here(
        self: &Rc<Self>,
        log: &mut Log<FileOf<E>>,
        flags: u16,
    ) -> Result<Mark, Rc<str>> {
        let meta = FrameMeta {
            flags,
            durable_through: self.health.synced.get(),
            ..FrameMeta::default()
        };
        let bytes = log.frame_bytes(0);
        let writing = log.begin(AlignedBuf::zeroed(bytes), meta);
        self.after_frame(log);
        let (result, _) = writing.run().await;
        let mark = result.map_err(|error| failed("write", &error))?;
        self.note_written(mark, bytes, 0);
        Ok(mark)
    }

    async fn sync_log(&self, log: &Log<FileOf<E>>) -> Result<(), Rc<str>> {
        if let Some(file) = log.file() {
            let through = log.last().sequence;
            file.sync().await.map_err(|error| failed("sync", &error))?;
            self.note_synced(through);
        }
        Ok(())
    }

    pub(super) fn note_synced(&self, through: u64) {
        self.count(|counts| counts.wal_syncs += 1);
        if through > self.health.synced.get() {
            self.health.synced.set(through);
            self.sync.ring();
        }
    }

    fn policy_flags(&self) -> u16 {
        if self.options.fsync.is_synced() {
            0
        } else {
            FLAG_UNSYNCED
        }
    }
}

/// A batch that is as durable as promised, and whose waiters do not know it yet.
struct Acknowledged {
    fate: Rc<Fate>,
    sequence: u64,
}

impl Acknowledged {
    fn decide(self) {
        self.fate.decide(Ok(self.sequence));
    }
}

pub(super) fn in_doubt(cause: Rc<str>) -> WriteError {
    WriteError::Poisoned {
        cause,
        in_doubt: true,
    }
}

pub(super) fn failed(doing: &str, error: &io::Error) -> Rc<str> {
    format!("cannot {doing} the log: {error}").into()
}

/// Lets every other runnable task go first, once.
async fn give_turn() {
    let mut given = false;
    std::future::poll_fn(|context| {
        if std::mem::replace(&mut given, true) {
            return std::task::Poll::Ready(());
        }
        context.waker().wake_by_ref();
        std::task::Poll::Pending
    })
    .await;
}
