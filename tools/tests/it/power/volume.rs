//! A file system of its own, in a file behind a loop device, whose power can be cut.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::cluster::{scratch, text};

/// What a volume can be formatted with.
#[derive(Clone, Copy, Debug)]
pub enum FileSystem {
    Ext4,
    Xfs,
}

impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        })
    }
}

/// What becomes of the journal when the power goes. The numbers are those of the ioctl.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub enum Cut {
    /// The journal is written out first: what was renamed or created is there, what was not synced of
    /// the files' contents may not be.
    FlushJournal = 1,
    /// Nothing that was not on the disk gets there.
    Hard = 2,
}

/// `FS_IOC_SHUTDOWN`, `XFS_IOC_GOINGDOWN`.
const SHUTDOWN: libc::Ioctl = 0x8004_587D;

/// Size of a volume. Its file is sparse.
const VOLUME_BYTES: u64 = 2 << 30;

/// How long a process's ring may take to let go of the volume.
const UNMOUNT_WITHIN: Duration = Duration::from_secs(30);

/// Mounted until dropped.
pub struct Volume {
    scratch: tempfile::TempDir,
    kind: FileSystem,
    is_mounted: bool,
}

impl Volume {
    /// Formats and mounts a new volume.
    ///
    /// # Errors
    /// What this machine lacks for it.
    pub fn create(kind: FileSystem) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("mounting needs root".into());
        }
        let mut volume = Self {
            scratch: scratch(),
            kind,
            is_mounted: false,
        };
        let image = File::create(volume.image()).unwrap();
        image.set_len(VOLUME_BYTES).unwrap();
        std::fs::create_dir(volume.path()).unwrap();
        let program = format!("mkfs.{kind}");
        run(Command::new(program).arg("-q").arg(volume.image()))?;
        volume.mount()?;
        Ok(volume)
    }

    fn image(&self) -> PathBuf {
        self.scratch.path().join("image")
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.scratch.path().join("volume")
    }

    /// Mounts it. The kernel frees the loop device when it is unmounted.
    pub fn mount(&mut self) -> Result<(), String> {
        let kind = self.kind.to_string();
        let mut mount = Command::new("mount");
        mount.args(["-t", &kind, "-o", "loop"]);
        run(mount.arg(self.image()).arg(self.path()))?;
        self.is_mounted = true;
        Ok(())
    }

    /// Cuts its power: from now on everything fails.
    pub fn cut(&self, cut: Cut) {
        let root = File::open(self.path()).unwrap();
        let flags = cut as u32;
        // SAFETY: the kernel reads four bytes behind the pointer, which outlive the call; the
        // descriptor is open for as long as `root` is.
        let result = unsafe { libc::ioctl(root.as_raw_fd(), SHUTDOWN, &raw const flags) };
        assert_eq!(result, 0, "shutdown: {}", io::Error::last_os_error());
    }

    /// Unmounts it, once nobody uses it any more.
    pub fn unmount(&mut self) -> Result<(), String> {
        let begun = Instant::now();
        while let Err(error) = run(Command::new("umount").arg(self.path())) {
            if begun.elapsed() > UNMOUNT_WITHIN {
                return Err(error);
            }
            std::thread::yield_now();
        }
        self.is_mounted = false;
        Ok(())
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        if !self.is_mounted {
            return;
        }
        if let Err(error) = self.unmount() {
            eprintln!("{error}; it goes when it is not in use any more");
            run(Command::new("umount").arg("--lazy").arg(self.path())).ok();
        }
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program}: {}", text(&output.stderr).trim()))
}

/// Whether anything is mounted below `path`.
fn is_mounted_below(path: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    mounts.contains(path.to_str().unwrap())
}

/// The instrument itself: without this, a cut that cuts nothing would pass all other tests.
#[test]
fn a_power_cut_takes_what_was_not_synced_and_leaves_nothing_mounted() {
    for kind in [FileSystem::Ext4, FileSystem::Xfs] {
        let mut volume = match Volume::create(kind) {
            Ok(volume) => volume,
            Err(why) => {
                super::not_available(kind, &why);
                continue;
            }
        };
        let (synced, unsynced) = (volume.path().join("synced"), volume.path().join("unsynced"));
        std::fs::write(&synced, "here").unwrap();
        for path in [synced.clone(), volume.path()] {
            File::open(path).unwrap().sync_all().unwrap();
        }
        std::fs::write(&unsynced, "gone").unwrap();
        volume.cut(Cut::Hard);
        assert!(std::fs::write(&unsynced, "after").is_err(), "{kind}");
        volume.unmount().unwrap();
        volume.mount().unwrap();
        assert_eq!(std::fs::read_to_string(&synced).unwrap(), "here", "{kind}");
        assert!(!unsynced.exists(), "{kind}");
        let path = volume.path();
        drop(volume);
        assert!(!is_mounted_below(&path), "{kind}");
        assert!(!path.exists(), "{kind}");
    }
}
