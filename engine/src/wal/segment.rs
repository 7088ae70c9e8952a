//! Segments: the files of the log.

use std::cell::Cell;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use torc_env::{AlignedBuf, Disk, File, OpenMode, mutation};

use crate::crypt::{DataKey, KeyId};
use crate::options::Fsync;

/// How far ahead of the frames a segment is written with zeros, in bytes.
const PREWRITE_BYTES: u64 = 1 << 20;

/// A segment's identity: a counter (high half), so that names sort by age, and a random number
/// (low half), so that nobody who chooses values can forge a frame of it. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentId(pub(crate) u64);

impl SegmentId {
    /// The identity with this number.
    pub(crate) fn new(number: u32, random: u64) -> Self {
        Self(u64::from(number) << 32 | random >> 32)
    }

    /// Its counter.
    pub(crate) fn number(self) -> u32 {
        u32::try_from(self.0 >> 32).expect("half of 64 bits")
    }

    /// Its file.
    pub(crate) fn path(self, dir: &Path) -> PathBuf {
        dir.join(self.to_string())
    }

    /// The segment of a file name, as in `000000090badc0de.wal`; `None` for other files.
    pub fn from_name(name: &str) -> Option<Self> {
        let digits = name.strip_suffix(".wal")?;
        if digits.len() != 16 {
            return None;
        }
        u64::from_str_radix(digits, 16).ok().map(Self)
    }
}

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}.wal", self.0)
    }
}

/// An open segment, to be written.
pub(crate) struct Segment<F> {
    pub(crate) id: SegmentId,
    pub(crate) file: F,
    pub(crate) len: u64,
    pub(crate) prewritten: Rc<Prewritten>,
    /// Of this identity of the file alone; `None` when its frames are written in the clear.
    pub(crate) key: Option<DataKey>,
}

/// What a segment is to be.
pub(crate) struct SegmentPlan {
    pub(crate) id: SegmentId,
    pub(crate) fsync: Fsync,
    pub(crate) key: Option<DataKey>,
}

/// Up to where a segment was written with zeros or frames.
pub(crate) struct Prewritten {
    /// Frames below this do not meet a zero write that is still in flight.
    done: Cell<u64>,
    /// Whether a zero write behind `done` is in flight.
    in_flight: Cell<bool>,
}

impl<F: File> Segment<F> {
    /// Creates a segment of `len` bytes, its beginning written. On failure no file stays behind,
    /// as far as the disk allows.
    pub(crate) async fn create<D: Disk<File = F>>(
        disk: &D,
        dir: &Path,
        len: u64,
        plan: SegmentPlan,
    ) -> io::Result<Self> {
        let path = plan.id.path(dir);
        let created = Self::create_at(disk, dir, &path, len, plan).await;
        if created.is_err() {
            // Best effort: what stays is an unlisted file, which the next open removes.
            if let Err(error) = disk.remove(&path).await {
                tracing::debug!(%error, path = %path.display(), "cannot remove a failed segment");
            }
        }
        created
    }

    async fn create_at<D: Disk<File = F>>(
        disk: &D,
        dir: &Path,
        path: &Path,
        len: u64,
        plan: SegmentPlan,
    ) -> io::Result<Self> {
        let file = disk.open(path, OpenMode::CreateNew).await?;
        file.allocate(len).await?;
        let first = len.min(PREWRITE_BYTES);
        write_zeros(&file, 0, first).await?;
        file.sync().await?;
        drop(file);
        disk.sync_dir(dir).await?;
        Self::open(disk, path, len, first, plan).await
    }

    /// Gives a retired segment's file a new identity. What its frames said is void with the old
    /// one. Fails like any rename; the file is then under one of the two names.
    pub(crate) async fn recycle<D: Disk<File = F>>(
        disk: &D,
        dir: &Path,
        (old, len): (SegmentId, u64),
        plan: SegmentPlan,
    ) -> io::Result<Self> {
        let path = plan.id.path(dir);
        disk.rename(&old.path(dir), &path).await?;
        disk.sync_dir(dir).await?;
        Self::open(disk, &path, len, len, plan).await
    }

    async fn open<D: Disk<File = F>>(
        disk: &D,
        path: &Path,
        len: u64,
        prewritten: u64,
        plan: SegmentPlan,
    ) -> io::Result<Self> {
        let mode = if plan.fsync.is_synced() && !mutation::on("ack_before_sync") {
            OpenMode::WriteDurable
        } else {
            OpenMode::Write
        };
        Ok(Self {
            id: plan.id,
            key: plan.key,
            file: disk.open(path, mode).await?,
            len,
            prewritten: Rc::new(Prewritten {
                done: Cell::new(prewritten),
                in_flight: Cell::new(false),
            }),
        })
    }

    /// The master key of its frames; `None` when they are written in the clear.
    pub(crate) fn key_id(&self) -> Option<KeyId> {
        self.key.as_ref().map(DataKey::id)
    }

    /// The next stretch of zeros to write, when the frames, which reach to `frames_end`, come near
    /// the end of the last one. The caller runs [`Prewrite::run`] beside the frames.
    pub(crate) fn prewrite_due(&self, frames_end: u64) -> Option<Prewrite<F>> {
        let done = self.prewritten.done.get();
        let due = done < self.len
            && !self.prewritten.in_flight.get()
            && frames_end + PREWRITE_BYTES / 2 > done;
        due.then(|| {
            self.prewritten.in_flight.set(true);
            Prewrite {
                file: self.file.clone(),
                state: Rc::clone(&self.prewritten),
                from: done,
                to: self.len.min(done + PREWRITE_BYTES),
            }
        })
    }

    /// Whether a frame that ends at `end` would meet a zero write in flight.
    pub(crate) fn must_wait(&self, end: u64) -> bool {
        self.prewritten.in_flight.get() && end > self.prewritten.done.get()
    }

    /// A frame is about to be written up to `end`: no zeros go below it any more.
    pub(crate) fn claim(&self, end: u64) {
        if end > self.prewritten.done.get() {
            assert!(!self.prewritten.in_flight.get(), "frame over a zero write");
            self.prewritten.done.set(end);
        }
    }
}

/// A zero write ahead of the frames.
pub(crate) struct Prewrite<F> {
    file: F,
    state: Rc<Prewritten>,
    from: u64,
    to: u64,
}

impl<F: File> Prewrite<F> {
    /// Writes the zeros. A failure only means that frames will meet the device's error themselves.
    pub(crate) async fn run(self) {
        if let Err(error) = write_zeros(&self.file, self.from, self.to).await {
            tracing::warn!(%error, "cannot write ahead in a WAL segment");
        }
        self.state.done.set(self.to);
        self.state.in_flight.set(false);
    }
}

async fn write_zeros<F: File>(file: &F, from: u64, to: u64) -> io::Result<()> {
    let mut at = from;
    let mut buffer = AlignedBuf::default();
    while at < to {
        let step = usize::try_from((to - at).min(PREWRITE_BYTES)).expect("at most 1 MiB");
        if buffer.len() != step {
            buffer = AlignedBuf::zeroed(step);
        }
        let (result, returned) = file.write_at(at, buffer).await;
        result?;
        buffer = returned;
        at += u64::try_from(step).expect("at most 1 MiB");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_sort_by_age() {
        let old = SegmentId::new(9, u64::MAX);
        let new = SegmentId::new(10, 0);
        assert_eq!(SegmentId::from_name(&old.to_string()), Some(old));
        assert!(old.to_string() < new.to_string());
        assert_eq!((old.number(), new.number()), (9, 10));
        for other in [
            "0.wal",
            "manifest",
            "00000000000000zz.wal",
            "0000000000000000.table",
        ] {
            assert_eq!(SegmentId::from_name(other), None);
        }
    }
}
