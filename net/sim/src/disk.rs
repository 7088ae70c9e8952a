//! The simulated disk: operations take time, can fail, and may be cut off by a power failure at
//! any moment. What they do to names and content is in [`volume`].

mod inode;
mod survivors;
pub(crate) mod volume;

use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use torc_env::disk::Space;
use torc_env::{AlignedBuf, DirEntry, Disk, File, OpenMode, SECTOR_BYTES};

use crate::host::{Host, HostId, Life};
use crate::log::Event;
use crate::oneshot;
use crate::rng::Rng;
use crate::timer::GiveWay;
use crate::world::World;

pub(crate) use survivors::Survivors;
use volume::InodeId;

/// A host's disk as one life of its process sees it.
#[derive(Clone)]
pub struct SimDisk {
    world: Rc<World>,
    host: HostId,
    life: Life,
}

/// An open file of a simulated disk.
#[derive(Clone)]
pub struct SimFile {
    disk: SimDisk,
    /// As it was named when it was opened.
    path: Rc<Path>,
    inode: InodeId,
    mode: OpenMode,
    opened: Rc<()>,
}

/// What an operation costs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cost {
    Read,
    Write,
    DurableWrite,
    Sync,
    Name,
}

impl SimDisk {
    pub(crate) fn new(world: Rc<World>, host: HostId, life: Life) -> Self {
        Self { world, host, life }
    }

    /// Begins an operation now and ends it when its time has passed. When the process dies in
    /// between, it never returns.
    async fn operate<B: 'static, T: 'static>(
        &self,
        cost: Cost,
        begin: impl FnOnce(&mut Host) -> B,
        end: impl FnOnce(&mut Host, &mut Rng, B) -> T + 'static,
    ) -> T {
        let Some(receiver) = self.submit(cost, begin, end) else {
            return std::future::pending().await;
        };
        match receiver.await {
            Some(result) => result,
            None => std::future::pending().await,
        }
    }

    fn submit<B: 'static, T: 'static>(
        &self,
        cost: Cost,
        begin: impl FnOnce(&mut Host) -> B,
        end: impl FnOnce(&mut Host, &mut Rng, B) -> T + 'static,
    ) -> Option<oneshot::Receiver<T>> {
        let (host_id, life) = (self.host, self.life);
        let mut hosts = self.world.hosts.borrow_mut();
        let host = &mut hosts[host_id.index()];
        let is_cut = host
            .power_cut
            .is_some_and(|cut| cut.operation < host.disk_operations);
        if !host.is_alive(life) || is_cut {
            return None;
        }
        let begun = begin(host);
        if cost != Cost::Read {
            if let Some(cut) = host.power_cut
                && cut.operation == host.disk_operations
            {
                self.world.cut_soon(host_id, cut);
            }
            host.disk_operations += 1;
        }
        let delay_us = {
            let rng = &mut self.world.streams.borrow_mut().disk;
            let disk = &host.disk;
            let base = match cost {
                Cost::Read => rng.within(disk.read_us.clone()),
                Cost::Write => rng.within(disk.write_us.clone()),
                Cost::DurableWrite => {
                    rng.within(disk.write_us.clone()) + rng.within(disk.sync_us.clone())
                }
                Cost::Sync => rng.within(disk.sync_us.clone()),
                Cost::Name => rng.within(disk.write_us.clone()),
            };
            if rng.chance(disk.slow) {
                base * 100
            } else {
                base
            }
        };
        let operation = host.disk_operations;
        drop(hosts);
        self.world.record(
            Event::DiskBegin,
            host_id.number(),
            operation << 3 | cost as u64,
        );
        let (sender, receiver) = oneshot::channel();
        self.world.schedule_after_us(delay_us, move |world| {
            let result = {
                let mut hosts = world.hosts.borrow_mut();
                let host = &mut hosts[host_id.index()];
                if !host.is_alive(life) {
                    return;
                }
                end(host, &mut world.streams.borrow_mut().disk, begun)
            };
            world.record(
                Event::DiskEnd,
                host_id.number(),
                operation << 3 | cost as u64,
            );
            sender.send(result);
        });
        Some(receiver)
    }
}

fn io_error() -> io::Error {
    const EIO: i32 = 5;
    io::Error::from_raw_os_error(EIO)
}

/// How a failed operation leaves things: by a random variant of a power cut.
fn partly(rng: &mut Rng) -> Survivors {
    const RANDOM: u32 = 3;
    Survivors::variant(rng.number(), RANDOM)
}

impl Disk for SimDisk {
    type File = SimFile;

    async fn open(&self, path: &Path, mode: OpenMode) -> io::Result<SimFile> {
        let path = path.to_path_buf();
        let path_of_file: Rc<Path> = path.as_path().into();
        let creates = matches!(mode, OpenMode::CreateNew | OpenMode::CreateNewDurable);
        let cost = if creates { Cost::Name } else { Cost::Read };
        let opened = self.operate(
            cost,
            |_| (),
            move |host, _, ()| {
                if creates {
                    host.volume.create(&path)
                } else {
                    host.volume.open(&path)
                }
            },
        );
        let (inode, opened) = opened.await?;
        Ok(SimFile {
            path: path_of_file,
            disk: self.clone(),
            inode,
            mode,
            opened,
        })
    }

    async fn remove(&self, path: &Path) -> io::Result<()> {
        let begin = |host: &mut Host| host.volume.begin_remove(path);
        self.operate(Cost::Name, begin, |host, _, id| host.volume.complete(id))
            .await
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let begin = |host: &mut Host| host.volume.begin_rename(from, to);
        self.operate(Cost::Name, begin, |host, _, id| host.volume.complete(id))
            .await
    }

    async fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        let begin = |host: &mut Host| host.volume.begin_link(from, to);
        self.operate(Cost::Name, begin, |host, _, id| host.volume.complete(id))
            .await
    }

    async fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        let begin = |host: &mut Host| host.volume.begin_remove_dir(dir);
        self.operate(Cost::Name, begin, |host, _, id| host.volume.complete(id))
            .await
    }

    async fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        let dir: PathBuf = dir.to_path_buf();
        self.operate(
            Cost::Read,
            |_| (),
            move |host, _, ()| host.volume.list(&dir),
        )
        .await
    }

    async fn create_dir(&self, dir: &Path) -> io::Result<()> {
        let begin = |host: &mut Host| host.volume.begin_create_dir(dir);
        self.operate(Cost::Sync, begin, |host, _, id| host.volume.complete(id))
            .await
    }

    async fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let begin = |host: &mut Host| host.volume.begin_sync_dir(dir);
        self.operate(Cost::Sync, begin, |host, _, id| host.volume.complete(id))
            .await
    }

    async fn space(&self) -> io::Result<Space> {
        let end = |host: &mut Host, _: &mut Rng, ()| Space {
            total_bytes: host.volume.capacity_bytes(),
            free_bytes: host.volume.free_bytes(),
        };
        Ok(self.operate(Cost::Read, |_| (), end).await)
    }

    async fn give_way(&self) {
        GiveWay::drawn(&self.world).await;
    }
}

impl SimFile {
    /// O_DIRECT would refuse anything else.
    fn assert_aligned(offset: u64, buf: &AlignedBuf) {
        let sector = u64::try_from(SECTOR_BYTES).expect("a sector is small");
        assert!(
            offset.is_multiple_of(sector),
            "offset {offset} within a sector"
        );
        assert!(
            buf.len().is_multiple_of(SECTOR_BYTES),
            "length {} is not whole sectors",
            buf.len()
        );
    }

    fn assert_writable(&self) {
        assert!(
            self.mode != OpenMode::Read,
            "the file is open for reading only"
        );
    }
}

impl File for SimFile {
    async fn read_at(&self, offset: u64, mut buf: AlignedBuf) -> (io::Result<usize>, AlignedBuf) {
        Self::assert_aligned(offset, &buf);
        let (inode, opened) = (self.inode, self.opened.clone());
        let end = move |host: &mut Host, rng: &mut Rng, ()| {
            let _open = opened;
            if rng.chance(host.disk.read_error) {
                return (Err(io_error()), buf);
            }
            let count = host.volume.read(inode, offset, &mut buf);
            (Ok(count), buf)
        };
        self.disk.operate(Cost::Read, |_| (), end).await
    }

    async fn write_at(&self, offset: u64, buf: AlignedBuf) -> (io::Result<()>, AlignedBuf) {
        self.assert_writable();
        Self::assert_aligned(offset, &buf);
        let durable = matches!(
            self.mode,
            OpenMode::WriteDurable | OpenMode::CreateNewDurable
        );
        let cost = if durable {
            Cost::DurableWrite
        } else {
            Cost::Write
        };
        let (inode, opened) = (self.inode, self.opened.clone());
        let path = Rc::clone(&self.path);
        let begin = |host: &mut Host| host.volume.begin_write(inode, offset, buf, durable);
        let end = move |host: &mut Host, rng: &mut Rng, id| {
            let _open = opened;
            let failed = rng.chance(host.disk.write_error);
            let is_full = host.disk.full_dir.is_some_and(|dir| path.starts_with(dir));
            let error = match (is_full, failed) {
                (true, _) => Some((io::ErrorKind::StorageFull.into(), partly(rng))),
                (false, true) => Some((io_error(), partly(rng))),
                (false, false) => None,
            };
            host.volume.complete_write(id, error)
        };
        self.disk.operate(cost, begin, end).await
    }

    async fn sync(&self) -> io::Result<()> {
        let (inode, opened) = (self.inode, self.opened.clone());
        let begin = |host: &mut Host| host.volume.begin_sync(inode);
        let end = move |host: &mut Host, rng: &mut Rng, id| {
            let _open = opened;
            if rng.chance(host.disk.sync_error) {
                host.volume.fail_sync(id, &mut partly(rng));
                return Err(io_error());
            }
            host.volume.complete(id)
        };
        self.disk.operate(Cost::Sync, begin, end).await
    }

    async fn allocate(&self, len: u64) -> io::Result<()> {
        self.resize(len, true).await
    }

    async fn set_len(&self, len: u64) -> io::Result<()> {
        self.resize(len, false).await
    }

    async fn len(&self) -> io::Result<u64> {
        let (inode, opened) = (self.inode, self.opened.clone());
        let end = move |host: &mut Host, _: &mut Rng, ()| {
            let _open = opened;
            host.volume.len(inode)
        };
        Ok(self.disk.operate(Cost::Read, |_| (), end).await)
    }
}

impl SimFile {
    async fn resize(&self, len: u64, only_grow: bool) -> io::Result<()> {
        self.assert_writable();
        let (inode, opened) = (self.inode, self.opened.clone());
        let begin = |host: &mut Host| host.volume.begin_resize(inode, len, only_grow);
        let end = move |host: &mut Host, _: &mut Rng, id| {
            let _open = opened;
            host.volume.complete(id)
        };
        self.disk.operate(Cost::Name, begin, end).await
    }
}
