//! The disk on io_uring: files below the node's data directory, read and written past the page
//! cache.
//!
//! Every path is relative to the data directory's descriptor and may not leave it. What the ring
//! cannot do (listing a directory, asking for free space) is a plain system call: rare, and
//! answered from memory. Errors are the operating system's, unchanged.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use torc_env::disk::Space;
use torc_env::{AlignedBuf, DirEntry, Disk, File, OpenMode, SECTOR_BYTES};

use crate::executor;
use crate::reactor::op;
use crate::reclaim::PIECE_BYTES;
use crate::shard::{Core, Root};
use crate::sys;

/// The node's data directory, on this shard's ring. Cheap to clone.
#[derive(Clone)]
pub struct RingDisk {
    core: Rc<Core>,
}

/// A file on this shard's ring.
#[derive(Clone)]
pub struct RingFile {
    open: Rc<Open>,
}

/// An open file; the last clone closes it.
struct Open {
    core: Rc<Core>,
    /// `None` only while dropping.
    fd: Option<Rc<OwnedFd>>,
}

impl Drop for Open {
    fn drop(&mut self) {
        // Closing the last reference to a removed file frees its blocks, which takes long: the ring
        // does it aside. An operation in flight keeps the descriptor and closes it at its end.
        let fd = self.fd.take().and_then(|fd| Rc::try_unwrap(fd).ok());
        if let Some(fd) = fd {
            match self.core.reactor.try_borrow_mut() {
                Ok(mut reactor) => reactor.close(fd),
                Err(_) => drop(fd),
            }
        }
    }
}

impl Root {
    /// Opens the data directory, which exists, and finds out whether it takes O_DIRECT.
    pub(crate) fn open(path: &Path) -> io::Result<Root> {
        use std::os::unix::fs::OpenOptionsExt;
        let path = path.canonicalize()?;
        let dir = std::fs::File::open(&path)?;
        let probe = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE | libc::O_DIRECT)
            .open(&path);
        let direct = match probe {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                tracing::warn!(
                    path = %path.display(),
                    "the file system does not take O_DIRECT: reads and writes go through the page cache"
                );
                false
            }
            // A file system without O_TMPFILE says so here; opening real files will tell.
            _ => true,
        };
        Ok(Root {
            fd: Rc::new(OwnedFd::from(dir)),
            path,
            direct,
        })
    }
}

/// Open flags of a mode, without O_DIRECT.
fn flags(mode: OpenMode) -> i32 {
    match mode {
        OpenMode::Read => libc::O_RDONLY,
        OpenMode::Write => libc::O_RDWR,
        OpenMode::CreateNew => libc::O_RDWR | libc::O_CREAT | libc::O_EXCL,
        OpenMode::WriteDurable => libc::O_RDWR | libc::O_DSYNC,
        OpenMode::CreateNewDurable => libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_DSYNC,
    }
}

/// `path` if it stays inside the data directory; "." for the empty path.
pub(crate) fn inside(path: &Path) -> io::Result<&Path> {
    let stays = path
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if !stays {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} leaves the data directory", path.display()),
        ));
    }
    if path.as_os_str().is_empty() {
        return Ok(Path::new("."));
    }
    Ok(path)
}

/// The directories from the outermost to `dir` itself, each with the one that holds its name.
pub(crate) fn ancestry(dir: &Path) -> Vec<(PathBuf, PathBuf)> {
    let mut steps = Vec::new();
    let mut holder = PathBuf::new();
    for part in dir.components() {
        if let Component::Normal(name) = part {
            let below = holder.join(name);
            steps.push((holder, below.clone()));
            holder = below;
        }
    }
    steps
}

/// The entries of a directory, sorted by name.
pub(crate) fn list(dir: &Path) -> io::Result<Vec<DirEntry>> {
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let metadata = match entry.metadata() {
            Ok(metadata) => metadata,
            // Removed between the listing and the look.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        entries.push(DirEntry {
            name,
            len: if metadata.is_dir() { 0 } else { metadata.len() },
            is_dir: metadata.is_dir(),
        });
    }
    entries.sort();
    Ok(entries)
}

/// Whole sectors only: what O_DIRECT takes, asserted on every file system so that no test passes
/// on one that is more lenient.
pub(crate) fn assert_sectors(offset: u64, len: usize) {
    assert_eq!(offset % SECTOR_BYTES as u64, 0, "offset {offset}");
    assert_eq!(len % SECTOR_BYTES, 0, "length {len}");
}

impl RingDisk {
    pub(crate) fn new(core: Rc<Core>) -> RingDisk {
        RingDisk { core }
    }

    pub(crate) fn core(&self) -> &Rc<Core> {
        &self.core
    }

    fn root(&self) -> &Root {
        &self.core.root
    }

    async fn open_fd(&self, path: &Path, flags: i32) -> io::Result<Rc<OwnedFd>> {
        let fd = op::open(&self.core, &self.root().fd, path, flags, 0o644).await?;
        Ok(Rc::new(fd))
    }

    /// Opens a file that is about to be removed, if it is so large that its space should be given back in pieces.
    async fn open_large(&self, path: &Path) -> Option<OwnedFd> {
        let flags = libc::O_RDWR | libc::O_NOFOLLOW;
        let fd = self.open_fd(path, flags).await.ok()?;
        let is_large = sys::file_len(fd.as_fd()).is_ok_and(|len| len > PIECE_BYTES);
        is_large.then(|| Rc::try_unwrap(fd).ok()).flatten()
    }
}

impl Disk for RingDisk {
    type File = RingFile;

    async fn open(&self, path: &Path, mode: OpenMode) -> io::Result<RingFile> {
        let direct = if self.root().direct {
            libc::O_DIRECT
        } else {
            0
        };
        let path = inside(path)?;
        let opened = self.open_fd(path, flags(mode) | direct).await;
        let fd = match opened {
            // Below a link into another file system, which may not take O_DIRECT. A file that was created all the same is
            // there then.
            Err(error) if direct != 0 && error.raw_os_error() == Some(libc::EINVAL) => {
                let flags = flags(mode) & !libc::O_EXCL;
                self.open_fd(path, flags).await?
            }
            opened => opened?,
        };
        Ok(RingFile {
            open: Rc::new(Open {
                core: Rc::clone(&self.core),
                fd: Some(fd),
            }),
        })
    }

    async fn remove(&self, path: &Path) -> io::Result<()> {
        let path = inside(path)?;
        let large = self.open_large(path).await;
        op::unlink(&self.core, &self.root().fd, path).await?;
        if let Some(fd) = large
            && let Err(fd) = self.core.shared.reclaim.take(fd)
        {
            self.core.reactor.borrow_mut().close(fd);
        }
        Ok(())
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        op::rename(&self.core, &self.root().fd, inside(from)?, inside(to)?).await
    }

    async fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        op::link(&self.core, &self.root().fd, inside(from)?, inside(to)?).await
    }

    async fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        op::remove_dir(&self.core, &self.root().fd, inside(dir)?).await
    }

    async fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        list(&self.root().path.join(inside(dir)?))
    }

    async fn create_dir(&self, dir: &Path) -> io::Result<()> {
        for (holder, below) in ancestry(inside(dir)?) {
            match op::make_dir(&self.core, &self.root().fd, &below).await {
                Ok(()) => self.sync_dir(&holder).await?,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let fd = self.open_fd(inside(dir)?, flags).await?;
        op::sync(&self.core, &fd, false).await?;
        // XFS that has shut down, as when it cannot write its log, calls a directory synced of which it has lost
        // the last renames. Asked for its state it tells.
        sys::file_len(fd.as_fd()).map(drop)
    }

    async fn space(&self) -> io::Result<Space> {
        sys::space(self.root().fd.as_fd())
    }

    async fn give_way(&self) {
        executor::give_way().await;
    }
}

impl RingFile {
    fn fd(&self) -> &Rc<OwnedFd> {
        self.open.fd.as_ref().expect("taken only by drop")
    }
}

impl File for RingFile {
    async fn read_at(&self, offset: u64, mut buf: AlignedBuf) -> (io::Result<usize>, AlignedBuf) {
        assert_sectors(offset, buf.len());
        let mut filled = 0;
        while filled < buf.len() {
            let (read, back) = op::read(&self.open.core, self.fd(), offset, buf, filled).await;
            buf = back;
            match read {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (Err(error), buf),
            }
            if !filled.is_multiple_of(SECTOR_BYTES) {
                // Only the end of the file lies inside a sector.
                break;
            }
        }
        (Ok(filled), buf)
    }

    async fn write_at(&self, offset: u64, mut buf: AlignedBuf) -> (io::Result<()>, AlignedBuf) {
        assert_sectors(offset, buf.len());
        let mut written = 0;
        while written < buf.len() {
            let (wrote, back) = op::write(&self.open.core, self.fd(), offset, buf, written).await;
            buf = back;
            match wrote {
                Ok(0) => return (Err(io::ErrorKind::WriteZero.into()), buf),
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (Err(error), buf),
            }
        }
        (Ok(()), buf)
    }

    async fn sync(&self) -> io::Result<()> {
        op::sync(&self.open.core, self.fd(), true).await
    }

    async fn allocate(&self, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        op::allocate(&self.open.core, self.fd(), len).await
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        op::truncate(&self.open.core, self.fd(), len).await
    }

    async fn len(&self) -> io::Result<u64> {
        sys::file_len(self.fd().as_fd())
    }
}
