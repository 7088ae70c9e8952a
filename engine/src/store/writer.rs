//! The tasks that write the log: one appends frames, one syncs when the policy does not sync every
//! frame.

use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use futures_util::future::{Either, select};
use futures_util::poll;
use torc_env::{AlignedBuf, Class, Env, File};

use super::{FileOf, Inner};
use crate::commit::{Batch, Fate};
use crate::error::WriteError;
use crate::frame::{Mark, frame_bytes};
use crate::le::len64;
use crate::options::Fsync;
use crate::wal::{FLAG_CLOSED, FLAG_UNSYNCED, FrameMeta, Log};

impl<E: Env> Inner<E> {
    /// The commit task: one frame at a time, until the store is closed or poisoned.
    pub(super) async fn run_commits(self: Rc<Self>, mut log: Log<FileOf<E>>) {
        let mut acknowledged = None;
        while let Some(batch) = self.next_batch(acknowledged.is_some()).await {
            match self.write_batch(&mut log, batch, acknowledged.take()).await {
                Ok(written) if self.memory.borrow().gather.is_empty() => written.decide(),
                Ok(written) => acknowledged = Some(written),
                Err(cause) => {
                    self.poison_with(&cause);
                    return;
                }
            }
        }
        // Only when the store was poisoned after that frame.
        if let Some(acknowledged) = acknowledged {
            acknowledged.decide();
        }
        if self.health.poison.borrow().is_some() {
            return;
        }
        match self.write_closing_frame(&mut log).await {
            Ok(()) => {
                self.health.closed.set(true);
                self.ring_all();
            }
            Err(cause) => self.poison_with(&cause),
        }
    }

    /// The next batch; `None` when the store is poisoned, or closed with nothing left to write.
    /// `is_busy`: a frame has just been written.
    async fn next_batch(&self, is_busy: bool) -> Option<Batch> {
        let found = self
            .work
            .until(|| {
                if self.health.poison.borrow().is_some() {
                    return Some(false);
                }
                if !self.memory.borrow().gather.is_empty() {
                    return Some(true);
                }
                self.health.closing.get().then_some(false)
            })
            .await;
        if !found {
            return None;
        }
        if self.options.fsync == Fsync::Group && !is_busy {
            // One more turn: what is runnable now joins the frame.
            give_turn().await;
        }
        self.memory.borrow_mut().take_batch()
    }

    /// Writes a frame. Whoever waited for the frame before is told as soon as this one is on its way: the
    /// device need not wait for their answers.
    async fn write_batch(
        self: &Rc<Self>,
        log: &mut Log<FileOf<E>>,
        mut batch: Batch,
        acknowledged: Option<Acknowledged>,
    ) -> Result<Acknowledged, Rc<str>> {
        let meta = FrameMeta {
            flags: self.policy_flags(),
            durable_through: self.health.synced.get(),
            payload_len: batch.payload_len(),
            record_count: u32::try_from(batch.entries.len()).expect("a batch is bounded"),
            first_seqno: batch.first_seqno,
        };
        let frame = batch.take_frame();
        let written = {
            let mut writing = pin!(self.write_frame(log, frame, meta));
            let at_once = poll!(writing.as_mut());
            if let Some(acknowledged) = acknowledged {
                acknowledged.decide();
            }
            match at_once {
                Poll::Ready(written) => written,
                Poll::Pending => writing.await,
            }
        };
        let (outcome, buffer) = match written {
            Ok((mark, buffer)) => (self.not_poisoned(mark), buffer),
            Err(cause) => (Err(cause), AlignedBuf::default()),
        };
        match outcome {
            Ok(mark) => {
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
            Err(cause) => {
                batch.fate.decide(Err(WriteError::Poisoned {
                    cause: Rc::clone(&cause),
                    in_doubt: true,
                }));
                Err(cause)
            }
        }
    }

    fn not_poisoned(&self, mark: Mark) -> Result<Mark, Rc<str>> {
        match self.poison() {
            Some(cause) => Err(cause),
            None => Ok(mark),
        }
    }

    /// Writes one frame, in a new segment if need be.
    async fn write_frame(
        self: &Rc<Self>,
        log: &mut Log<FileOf<E>>,
        frame: AlignedBuf,
        meta: FrameMeta,
    ) -> Result<(Mark, AlignedBuf), Rc<str>> {
        let bytes = frame.len();
        if !log.fits(bytes) {
            self.switch_segment(log).await?;
        }
        if log.must_wait(bytes) {
            self.segments
                .until(|| (!log.must_wait(bytes)).then_some(()))
                .await;
        }
        let (result, buffer) = log.append(frame, meta).await;
        let mark = result.map_err(|error| failed("write", &error))?;
        self.count(|counts| counts.wal_frames += 1);
        self.count(|counts| counts.wal_bytes += len64(bytes));
        self.count(|counts| counts.wal_records += u64::from(meta.record_count));
        self.health.written.set(mark.sequence);
        if self.options.fsync.is_synced() {
            self.count(|counts| counts.wal_syncs += 1);
            self.health.synced.set(mark.sequence);
            self.sync.ring();
        }
        self.after_frame(log);
        Ok((mark, buffer))
    }

    /// Looks after the segment that frames go to.
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
        self.supply.borrow_mut().want_segment();
        self.segments.ring();
        let next = self
            .segments
            .until(|| match self.poison() {
                Some(cause) => Some(Err(cause)),
                None => self.supply.borrow_mut().take_spare().map(Ok),
            })
            .await?;
        log.switch(next);
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
        let meta = FrameMeta {
            flags: self.policy_flags() | FLAG_CLOSED,
            durable_through: self.health.synced.get(),
            ..FrameMeta::default()
        };
        let frame = AlignedBuf::zeroed(frame_bytes(0));
        self.write_frame(log, frame, meta).await?;
        if !self.options.fsync.is_synced() {
            self.sync_log(log).await?;
        }
        Ok(())
    }

    async fn sync_log(&self, log: &Log<FileOf<E>>) -> Result<(), Rc<str>> {
        if let Some(file) = log.file() {
            let through = log.last().sequence;
            file.sync().await.map_err(|error| failed("sync", &error))?;
            self.note_synced(through);
        }
        Ok(())
    }

    fn note_synced(&self, through: u64) {
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

    /// The sync task of the weaker policies: syncs at every interval in which something was
    /// written, and when somebody asks.
    pub(super) async fn run_syncs(self: Rc<Self>) {
        let interval = match self.options.fsync {
            Fsync::Interval(interval) => Some(interval.max(Duration::from_millis(1))),
            Fsync::Always | Fsync::Group | Fsync::Never => None,
        };
        loop {
            self.sync_due(interval).await;
            if self.is_stopping() {
                return;
            }
            let through = self.health.written.get();
            let file = self.supply.borrow().active_file();
            let Some(file) = file.filter(|_| through > self.health.synced.get()) else {
                continue;
            };
            match file.sync().await {
                Ok(()) => self.note_synced(through),
                Err(error) => {
                    self.poison_with(&failed("sync", &error));
                    return;
                }
            }
        }
    }

    async fn sync_due(&self, interval: Option<Duration>) {
        let asked = std::pin::pin!(self.sync.until(|| {
            let is_wanted = self.health.sync_wanted.get() > self.health.synced.get();
            let can = self.health.written.get() >= self.health.sync_wanted.get();
            (self.is_stopping() || is_wanted && can).then_some(())
        }));
        match interval {
            None => asked.await,
            Some(interval) => {
                let timer = std::pin::pin!(self.env.sleep(interval));
                match select(asked, timer).await {
                    Either::Left(((), _)) | Either::Right(((), _)) => {}
                }
            }
        }
    }

    /// Completes when all frames up to `sequence` are durable.
    pub(super) async fn synced_through(&self, sequence: u64) -> Result<(), WriteError> {
        let wanted = self.health.sync_wanted.get().max(sequence);
        self.health.sync_wanted.set(wanted);
        self.sync.ring();
        self.sync
            .until(|| {
                if self.health.synced.get() >= sequence {
                    return Some(Ok(()));
                }
                self.poison().map(|cause| {
                    Err(WriteError::Poisoned {
                        cause,
                        in_doubt: true,
                    })
                })
            })
            .await
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

fn failed(doing: &str, error: &io::Error) -> Rc<str> {
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
