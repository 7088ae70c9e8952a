//! Copies a full segment into the archive.
//!
//! Write order: frames and trailer into `<id>.wal.part`, sync, rename to `<id>.wal`, sync of the directory. A crash leaves the
//! segment in the log and at most a `.part`, which the next attempt replaces.

use std::io;
use std::path::{Path, PathBuf};

use torc_env::{AlignedBuf, Disk, File, OpenMode, SECTOR_BYTES, mutation};
use xxhash_rust::xxh3::Xxh3;

use super::trailer::{Origin, Trailer};
use crate::crypt::KeyId;
use crate::error::OpenError;
use crate::frame::{Header, Mark};
use crate::le::len64;
use crate::wal::{Reader, SegmentId};

/// Bytes written at a time.
const PIECE_BYTES: usize = 1 << 20;

/// A full segment to be archived.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Full {
    pub(crate) id: SegmentId,
    /// Where its last frame ends.
    pub(crate) end: u64,
    /// See [`Trailer::reach_us`].
    pub(crate) reach_us: u64,
}

/// Why a segment was not archived.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    /// The segment cannot be read, or the archive cannot be written.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// The segment cannot be read.
    #[error(transparent)]
    Segment(#[from] OpenError),
    /// The store ends.
    #[error("the store is being closed")]
    Stopped,
}

/// Copies `full` of the log in `wal_dir` into the directory `to`, made if it is missing, and returns what its copy says of itself; `None`
/// when it holds no frame. Durable on return. One that is there already is left. Gives up between two
/// pieces when `is_over`.
pub(crate) async fn copy<D: Disk>(
    disk: &D,
    wal_dir: &Path,
    to: &Path,
    origin: &Origin,
    full: Full,
    is_over: impl Fn() -> bool,
) -> Result<Option<Trailer>, CopyError> {
    let target = full.id.path(to);
    disk.create_dir(to).await.map_err(io("create", to))?;
    if let Some(trailer) = archived(disk, &target, full.id).await? {
        return Ok(Some(trailer));
    }
    let part = to.join(format!("{}.part", full.id));
    match disk.remove(&part).await {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(io("remove", &part)(error));
        }
        _ => {}
    }
    let opened = disk.open(&part, OpenMode::CreateNew).await;
    let mut copy = Copy {
        reader: Reader::of_full(disk, wal_dir, full.id).await?,
        out: Out::new(opened.map_err(io("create", &part))?, &part),
        run: Run::default(),
    };
    copy.frames(full.end, is_over).await?;
    if copy.run.is_empty() {
        disk.remove(&part).await.map_err(io("remove", &part))?;
        return Ok(None);
    }
    let trailer = copy.finish(origin, full).await?;
    let renamed = disk.rename(&part, &target).await;
    renamed.map_err(io("rename", &target))?;
    disk.sync_dir(to).await.map_err(io("sync", to))?;
    Ok(Some(trailer))
}

/// What an archived segment says, if it was archived already. Its name promises that it is whole.
async fn archived<D: Disk>(
    disk: &D,
    target: &Path,
    id: SegmentId,
) -> Result<Option<Trailer>, CopyError> {
    let file = match disk.open(target, OpenMode::Read).await {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io("open", target)(error)),
    };
    let len = file.len().await.map_err(io("measure", target))?;
    let sector = len64(SECTOR_BYTES);
    let Some(at) = len.checked_sub(sector).filter(|at| at % sector == 0) else {
        return Ok(None);
    };
    let (read, buffer) = file.read_at(at, AlignedBuf::zeroed(SECTOR_BYTES)).await;
    read.map_err(io("read", target))?;
    let trailer = Trailer::decode(&buffer, len).ok();
    Ok(trailer.filter(|trailer| trailer.segment == id))
}

struct Copy<'a, 'b, F> {
    reader: Reader<'a, F>,
    out: Out<'b, F>,
    run: Run,
}

impl<F: File> Copy<'_, '_, F> {
    /// Copies all that is before `end`, and looks at every frame.
    async fn frames(&mut self, end: u64, is_over: impl Fn() -> bool) -> Result<(), CopyError> {
        let end = end.min(self.reader.len());
        let mut offset = 0;
        while offset < end {
            if is_over() {
                return Err(CopyError::Stopped);
            }
            let bytes = match self.reader.frame_at(offset).await? {
                Some((header, hash, key)) => {
                    self.run.note(&header, hash, key);
                    header.frame_bytes()
                }
                // What a frame that was never finished has left: what it means, a restore decides as a start does.
                None => SECTOR_BYTES,
            };
            let stored = self.reader.stored(offset, bytes).await?;
            self.out.put(stored).await?;
            offset += len64(bytes);
        }
        Ok(())
    }

    async fn finish(mut self, origin: &Origin, full: Full) -> Result<Trailer, CopyError> {
        let run = &self.run;
        let trailer = Trailer {
            origin: *origin,
            segment: full.id,
            body_bytes: self.out.bytes,
            key: run.key,
            first: run.first,
            previous: run.previous,
            last: run.last.sequence,
            last_hash: run.last.hash,
            reach_us: full.reach_us,
            body_xxh3: self.out.hasher.digest128(),
        };
        self.out.put(&trailer.encode()).await?;
        self.out.finish().await?;
        Ok(trailer)
    }
}

/// The frames from a segment's first that follow each other.
#[derive(Default)]
struct Run {
    first: u64,
    previous: u64,
    last: Mark,
    key: Option<KeyId>,
    /// A frame came that does not follow.
    is_broken: bool,
}

impl Run {
    fn is_empty(&self) -> bool {
        self.first == 0
    }

    fn note(&mut self, header: &Header, hash: u64, key: Option<KeyId>) {
        if self.is_empty() {
            self.first = header.sequence;
            self.previous = header.previous;
        } else if header.sequence != self.last.sequence + 1 || header.previous != self.last.hash {
            self.is_broken = true;
        }
        if !self.is_broken {
            self.key = key;
            self.last = Mark {
                sequence: header.sequence,
                hash,
            };
        }
    }
}

/// The file that is written, piece by piece.
struct Out<'a, F> {
    file: F,
    path: &'a Path,
    piece: AlignedBuf,
    filled: usize,
    /// All that was put, of which what is in `piece` is not written yet.
    bytes: u64,
    hasher: Xxh3,
}

impl<'a, F: File> Out<'a, F> {
    fn new(file: F, path: &'a Path) -> Self {
        Self {
            file,
            path,
            piece: AlignedBuf::zeroed(PIECE_BYTES),
            filled: 0,
            bytes: 0,
            hasher: Xxh3::new(),
        }
    }

    async fn put(&mut self, mut bytes: &[u8]) -> Result<(), CopyError> {
        self.hasher.update(bytes);
        while !bytes.is_empty() {
            let count = bytes.len().min(PIECE_BYTES - self.filled);
            let (now, later) = bytes.split_at(count);
            self.piece[self.filled..self.filled + count].copy_from_slice(now);
            self.filled += count;
            self.bytes += len64(count);
            bytes = later;
            if self.filled == PIECE_BYTES {
                self.write().await?;
            }
        }
        Ok(())
    }

    /// Everything put is whole sectors.
    async fn write(&mut self) -> Result<(), CopyError> {
        let mut piece = std::mem::take(&mut self.piece);
        piece.set_len(self.filled);
        let at = self.bytes - len64(self.filled);
        let (written, mut piece) = self.file.write_at(at, piece).await;
        written.map_err(io("write", self.path))?;
        piece.set_len(PIECE_BYTES);
        self.piece = piece;
        self.filled = 0;
        Ok(())
    }

    async fn finish(mut self) -> Result<(), CopyError> {
        if self.filled > 0 {
            self.write().await?;
        }
        if mutation::on("archive_without_sync") {
            return Ok(());
        }
        self.file.sync().await.map_err(io("sync", self.path))
    }
}

fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CopyError + use<> {
    let path = path.to_owned();
    move |source| CopyError::Io {
        doing,
        path,
        source,
    }
}
