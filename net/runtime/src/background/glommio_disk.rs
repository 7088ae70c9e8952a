//! The disk as a background job sees it: glommio's O_DIRECT files.
//!
//! glommio reads and writes only memory of its own, so every transfer is copied once. Transfers go
//! in pieces of at most [`PIECE_BYTES`]: much larger ones can hang the process on some kernels.

use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use glommio::GlommioError;
use glommio::io::{Directory, DmaFile, OpenOptions};
use glommio::timer::Timer;
use torc_env::disk::Space;
use torc_env::{AlignedBuf, DirEntry, Disk, File, JobClass, OpenMode};

use crate::background::executor::Settings;
use crate::background::pace::{Direction, Pace};
use crate::disk::{ancestry, assert_sectors, inside, list};
use crate::sys;

/// Largest single transfer.
const PIECE_BYTES: usize = 1 << 20;

/// The node's data directory, on a glommio executor.
#[derive(Clone)]
pub(crate) struct GlommioDisk {
    root: Rc<PathBuf>,
    turns: Turns,
}

/// When a transfer may begin.
#[derive(Clone)]
struct Turns {
    pace: Option<Arc<Pace>>,
    /// Flushes are booked and go at once.
    waits: bool,
}

impl Turns {
    async fn wait(&self, direction: Direction, bytes: usize) {
        let Some(pace) = &self.pace else { return };
        let wait = pace.book(direction, bytes);
        if self.waits && wait > Duration::ZERO {
            pace.waited(wait);
            Timer::new(wait).await;
        }
    }
}

/// A file on a glommio executor.
#[derive(Clone)]
pub(crate) struct GlommioFile {
    file: Rc<DmaFile>,
    turns: Turns,
}

/// The operating system's error inside glommio's.
pub(crate) fn system_error<T>(error: GlommioError<T>) -> io::Error {
    match error {
        GlommioError::IoError(source) | GlommioError::EnhancedIoError { source, .. } => source,
        other => io::Error::from(other),
    }
}

impl GlommioDisk {
    pub(super) fn new(settings: &Settings) -> GlommioDisk {
        GlommioDisk {
            root: Rc::new(settings.data_dir.clone()),
            turns: Turns {
                pace: settings.pace.clone(),
                waits: settings.class != JobClass::Flush,
            },
        }
    }

    fn path(&self, path: &Path) -> io::Result<PathBuf> {
        Ok(self.root.join(inside(path)?))
    }
}

impl Disk for GlommioDisk {
    type File = GlommioFile;

    async fn open(&self, path: &Path, mode: OpenMode) -> io::Result<GlommioFile> {
        let (write, create, durable) = match mode {
            OpenMode::Read => (false, false, false),
            OpenMode::Write => (true, false, false),
            OpenMode::CreateNew => (true, true, false),
            OpenMode::WriteDurable => (true, false, true),
            OpenMode::CreateNewDurable => (true, true, true),
        };
        let file = OpenOptions::new()
            .read(true)
            .write(write)
            .create_new(create)
            .custom_flags(if durable { libc::O_DSYNC } else { 0 })
            .dma_open(self.path(path)?)
            .await
            .map_err(system_error)?;
        Ok(GlommioFile {
            file: Rc::new(file),
            turns: self.turns.clone(),
        })
    }

    async fn remove(&self, path: &Path) -> io::Result<()> {
        glommio::io::remove(self.path(path)?)
            .await
            .map_err(system_error)
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        glommio::io::rename(self.path(from)?, self.path(to)?)
            .await
            .map_err(system_error)
    }

    async fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::hard_link(self.path(from)?, self.path(to)?)
    }

    async fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        std::fs::remove_dir(self.path(dir)?)
    }

    async fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        list(&self.path(dir)?)
    }

    async fn create_dir(&self, dir: &Path) -> io::Result<()> {
        for (holder, below) in ancestry(inside(dir)?) {
            match std::fs::create_dir(self.root.join(&below)) {
                Ok(()) => self.sync_dir(&holder).await?,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let directory = Directory::open(self.path(dir)?)
            .await
            .map_err(system_error)?;
        let synced = directory.sync().await.map_err(system_error);
        let closed = directory.close().await.map_err(system_error);
        synced.and(closed)
    }

    async fn space(&self) -> io::Result<Space> {
        use std::os::fd::AsFd;
        let root = std::fs::File::open(&*self.root)?;
        sys::space(root.as_fd())
    }

    async fn give_way(&self) {
        glommio::yield_if_needed().await;
    }
}

impl File for GlommioFile {
    async fn read_at(&self, offset: u64, mut buf: AlignedBuf) -> (io::Result<usize>, AlignedBuf) {
        assert_sectors(offset, buf.len());
        let mut filled = 0;
        while filled < buf.len() {
            let piece = (buf.len() - filled).min(PIECE_BYTES);
            let at = offset + filled as u64;
            self.turns.wait(Direction::Read, piece).await;
            let read = match self.file.read_at_aligned(at, piece).await {
                Ok(read) => read,
                Err(error) => return (Err(system_error(error)), buf),
            };
            buf[filled..filled + read.len()].copy_from_slice(&read);
            filled += read.len();
            if read.len() < piece {
                break;
            }
        }
        (Ok(filled), buf)
    }

    async fn write_at(&self, offset: u64, buf: AlignedBuf) -> (io::Result<()>, AlignedBuf) {
        assert_sectors(offset, buf.len());
        let mut written = 0;
        while written < buf.len() {
            let piece = (buf.len() - written).min(PIECE_BYTES);
            self.turns.wait(Direction::Write, piece).await;
            let mut copy = self.file.alloc_dma_buffer(piece);
            copy.as_bytes_mut()
                .copy_from_slice(&buf[written..written + piece]);
            match self.file.write_at(copy, offset + written as u64).await {
                Ok(0) => return (Err(io::ErrorKind::WriteZero.into()), buf),
                Ok(count) => written += count,
                Err(error) => return (Err(system_error(error)), buf),
            }
        }
        (Ok(()), buf)
    }

    async fn sync(&self) -> io::Result<()> {
        self.file.fdatasync().await.map_err(system_error)
    }

    async fn allocate(&self, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        self.file
            .pre_allocate(len, false)
            .await
            .map_err(system_error)
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.truncate(len).await.map_err(system_error)
    }

    async fn len(&self) -> io::Result<u64> {
        self.file.file_size().await.map_err(system_error)
    }
}
