//! A host's file system: names, files, and what of both a power cut leaves.
//!
//! Pure state, no time: the rim (`disk.rs`) begins an operation, lets time pass, and completes it
//! here. An operation that has begun and not completed may have happened or not when power is cut.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use torc_env::{AlignedBuf, DirEntry, SECTOR_BYTES};

use super::inode::{Change, Inode};
use super::survivors::{Fate, Survivors};

/// A file of a volume, whatever its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct InodeId(u64);

/// An operation between its beginning and its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct OperationId(u64);

enum NameChange {
    Create {
        path: PathBuf,
        inode: InodeId,
    },
    Remove {
        path: PathBuf,
        inode: InodeId,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
        inode: InodeId,
    },
}

impl NameChange {
    fn touches(&self, dir: &Path) -> bool {
        let is_in = |path: &Path| path.parent() == Some(dir);
        match self {
            NameChange::Create { path, .. } | NameChange::Remove { path, .. } => is_in(path),
            NameChange::Rename { from, to, .. } => is_in(from) || is_in(to),
        }
    }

    fn apply(&self, names: &mut BTreeMap<PathBuf, InodeId>) {
        match self {
            NameChange::Create { path, inode } => {
                names.insert(path.clone(), *inode);
            }
            NameChange::Remove { path, inode } => {
                if names.get(path) == Some(inode) {
                    names.remove(path);
                }
            }
            NameChange::Rename { from, to, inode } => {
                if names.get(from) == Some(inode) {
                    names.remove(from);
                }
                names.insert(to.clone(), *inode);
            }
        }
    }

    fn inode(&self) -> InodeId {
        match self {
            NameChange::Create { inode, .. }
            | NameChange::Remove { inode, .. }
            | NameChange::Rename { inode, .. } => *inode,
        }
    }
}

/// What a begun operation will do when it completes.
enum Begun {
    Write {
        inode: InodeId,
        offset: u64,
        buf: AlignedBuf,
        durable: bool,
    },
    Resize {
        inode: InodeId,
        len: u64,
        only_grow: bool,
    },
    Sync {
        inode: InodeId,
        mark: u64,
    },
    SyncDir {
        dir: PathBuf,
        mark: u64,
    },
    Remove(PathBuf),
    Rename(PathBuf, PathBuf),
    Link(PathBuf, PathBuf),
    CreateDir(PathBuf),
    RemoveDir(PathBuf),
}

/// A host's file system.
pub(crate) struct Volume {
    capacity_bytes: u64,
    sequence: u64,
    inodes: BTreeMap<InodeId, Inode>,
    names: BTreeMap<PathBuf, InodeId>,
    durable_names: BTreeMap<PathBuf, InodeId>,
    name_changes: Vec<(u64, NameChange)>,
    dirs: BTreeSet<PathBuf>,
    begun: BTreeMap<OperationId, Begun>,
}

impl Volume {
    pub(crate) fn new(capacity_bytes: u64) -> Self {
        Self {
            capacity_bytes,
            sequence: 0,
            inodes: BTreeMap::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            name_changes: Vec::new(),
            dirs: BTreeSet::from([PathBuf::new()]),
            begun: BTreeMap::new(),
        }
    }

    pub(crate) fn set_capacity(&mut self, capacity_bytes: u64) {
        self.capacity_bytes = capacity_bytes;
    }

    pub(crate) fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    pub(crate) fn free_bytes(&mut self) -> u64 {
        self.collect();
        self.capacity_bytes.saturating_sub(self.used_bytes())
    }

    /// Opens a file by name. The guard keeps its content alive.
    pub(crate) fn open(&mut self, path: &Path) -> io::Result<(InodeId, Rc<()>)> {
        let path = relative(path);
        let inode = *self.names.get(&path).ok_or_else(|| not_found(&path))?;
        Ok((inode, self.inode(inode).opened.clone()))
    }

    /// Creates an empty file.
    pub(crate) fn create(&mut self, path: &Path) -> io::Result<(InodeId, Rc<()>)> {
        let path = relative(path);
        self.check_parent(&path)?;
        self.check_free(&path)?;
        let inode = InodeId(self.next_sequence());
        let file = Inode::default();
        let opened = file.opened.clone();
        self.inodes.insert(inode, file);
        self.change_name(NameChange::Create { path, inode });
        Ok((inode, opened))
    }

    pub(crate) fn list(&self, dir: &Path) -> io::Result<Vec<DirEntry>> {
        let dir = relative(dir);
        if !self.dirs.contains(&dir) {
            return Err(not_found(&dir));
        }
        let name = |path: &Path| {
            path.file_name()
                .map(|name| name.to_string_lossy().into_owned())
        };
        let files = self
            .names
            .iter()
            .filter(|(path, _)| path.parent() == Some(&dir));
        let files = files.map(|(path, inode)| (name(path), self.inode(*inode).len(), false));
        let dirs = self.dirs.iter().filter(|path| path.parent() == Some(&dir));
        let dirs = dirs.map(|path| (name(path), 0, true));
        let mut entries: Vec<DirEntry> = files
            .chain(dirs)
            .filter_map(|(name, len, is_dir)| name.map(|name| DirEntry { name, len, is_dir }))
            .collect();
        entries.sort();
        Ok(entries)
    }

    pub(crate) fn read(&self, inode: InodeId, offset: u64, buf: &mut [u8]) -> usize {
        self.inode(inode).read(offset, buf)
    }

    pub(crate) fn len(&self, inode: InodeId) -> u64 {
        self.inode(inode).len()
    }

    /// Begins a write. The buffer comes back from [`Volume::complete_write`].
    pub(crate) fn begin_write(
        &mut self,
        inode: InodeId,
        offset: u64,
        buf: AlignedBuf,
        durable: bool,
    ) -> OperationId {
        self.begin(Begun::Write {
            inode,
            offset,
            buf,
            durable,
        })
    }

    /// Ends a write: in whole, or with an error after which any part of it may be there.
    pub(crate) fn complete_write(
        &mut self,
        id: OperationId,
        error: Option<(io::Error, Survivors)>,
    ) -> (io::Result<()>, AlignedBuf) {
        let Some(Begun::Write {
            inode,
            offset,
            buf,
            durable,
        }) = self.begun.remove(&id)
        else {
            unreachable!("a write completes once");
        };
        let change = Change::write(offset, &buf);
        if let Err(full) = self.check_space(inode, change.end()) {
            return (Err(full), buf);
        }
        let sequence = self.next_sequence();
        let Some((error, mut survivors)) = error else {
            self.inode_mut(inode).apply(sequence, change, durable);
            return (Ok(()), buf);
        };
        let file = self.inode_mut(inode);
        file.apply(sequence, change, false);
        file.fail_newest(&mut survivors);
        (Err(error), buf)
    }

    pub(crate) fn begin_resize(
        &mut self,
        inode: InodeId,
        len: u64,
        only_grow: bool,
    ) -> OperationId {
        self.begin(Begun::Resize {
            inode,
            len,
            only_grow,
        })
    }

    /// Begins a sync of everything that was written before now.
    pub(crate) fn begin_sync(&mut self, inode: InodeId) -> OperationId {
        let mark = self.sequence;
        self.begin(Begun::Sync { inode, mark })
    }

    /// Begins a sync of every name that was changed before now.
    pub(crate) fn begin_sync_dir(&mut self, dir: &Path) -> OperationId {
        let mark = self.sequence;
        let dir = relative(dir);
        self.begin(Begun::SyncDir { dir, mark })
    }

    pub(crate) fn begin_remove(&mut self, path: &Path) -> OperationId {
        self.begin(Begun::Remove(relative(path)))
    }

    pub(crate) fn begin_rename(&mut self, from: &Path, to: &Path) -> OperationId {
        self.begin(Begun::Rename(relative(from), relative(to)))
    }

    pub(crate) fn begin_link(&mut self, from: &Path, to: &Path) -> OperationId {
        self.begin(Begun::Link(relative(from), relative(to)))
    }

    pub(crate) fn begin_remove_dir(&mut self, dir: &Path) -> OperationId {
        self.begin(Begun::RemoveDir(relative(dir)))
    }

    pub(crate) fn begin_create_dir(&mut self, dir: &Path) -> OperationId {
        self.begin(Begun::CreateDir(relative(dir)))
    }

    /// Ends any operation but a write.
    pub(crate) fn complete(&mut self, id: OperationId) -> io::Result<()> {
        let begun = self.begun.remove(&id).expect("an operation completes once");
        self.perform(begun)
    }

    /// Ends a sync with an error: what it should have covered is durable in part, the rest is gone.
    pub(crate) fn fail_sync(&mut self, id: OperationId, survivors: &mut Survivors) {
        if let Some(Begun::Sync { inode, mark }) = self.begun.remove(&id) {
            self.inode_mut(inode).fail_sync(mark, survivors);
        }
    }

    /// Inverts bits of a file as they are read, until the sector is written again. False when
    /// there is no such byte.
    pub(crate) fn flip(&mut self, path: &Path, offset: u64, mask: u8) -> bool {
        let Some(inode) = self.names.get(&relative(path)).copied() else {
            return false;
        };
        let file = self.inode_mut(inode);
        let there = offset < file.len();
        if there {
            file.flip(offset, mask);
        }
        there
    }

    /// Cuts a file short, for good. False when there is none that is longer, or it is still being written.
    pub(crate) fn cut(&mut self, path: &Path, len: u64) -> bool {
        let Some(inode) = self.names.get(&relative(path)).copied() else {
            return false;
        };
        let file = self.inode_mut(inode);
        let at_rest = len < file.len() && !file.is_pending();
        if at_rest {
            file.set_len(len);
        }
        at_rest
    }

    /// All of a file as it reads now; `None` when there is none of this name.
    pub(crate) fn content(&self, path: &Path) -> Option<Vec<u8>> {
        let inode = self.inode(*self.names.get(&relative(path))?);
        let mut content = vec![0; usize::try_from(inode.len()).ok()?];
        inode.read(0, &mut content);
        Some(content)
    }

    /// Every file with its length, by name.
    pub(crate) fn files(&self) -> Vec<(PathBuf, u64)> {
        let files = self.names.iter();
        files
            .map(|(path, inode)| (path.clone(), self.inode(*inode).len()))
            .collect()
    }

    /// Whether any operation has begun that is not complete, or any change is not durable.
    pub(crate) fn is_settled(&self) -> bool {
        self.begun.is_empty()
            && self.name_changes.is_empty()
            && self.inodes.values().all(|inode| !inode.is_pending())
    }

    /// A power cut: what was synced stays, of the rest `survivors` decides; every open file is
    /// closed.
    pub(crate) fn cut_power(&mut self, survivors: &mut Survivors) {
        for begun in std::mem::take(&mut self.begun).into_values() {
            // A sync that did not complete promises nothing; the rest is as if it had just
            // completed, and then as likely to be lost as any other unsynced change.
            if !matches!(begun, Begun::Sync { .. } | Begun::SyncDir { .. }) {
                self.perform_unsynced(begun);
            }
        }
        for inode in self.inodes.values_mut() {
            survivors.next_file();
            inode.cut_power(survivors);
            inode.opened = Rc::new(());
        }
        survivors.next_file();
        let mut names = std::mem::take(&mut self.durable_names);
        for (_, change) in std::mem::take(&mut self.name_changes) {
            if survivors.fate() == Fate::Whole {
                change.apply(&mut names);
            }
        }
        self.names = names.clone();
        self.durable_names = names;
        self.collect();
    }

    fn perform_unsynced(&mut self, begun: Begun) {
        match begun {
            Begun::Write {
                inode, offset, buf, ..
            } => {
                let change = Change::write(offset, &buf);
                if self.check_space(inode, change.end()).is_ok() {
                    let sequence = self.next_sequence();
                    self.inode_mut(inode).apply(sequence, change, false);
                }
            }
            // An operation that fails leaves nothing behind; there is nobody to tell.
            other => drop(self.perform(other)),
        }
    }

    fn perform(&mut self, begun: Begun) -> io::Result<()> {
        match begun {
            Begun::Write { .. } => unreachable!("writes complete on their own way"),
            Begun::Resize {
                inode,
                len,
                only_grow,
            } => {
                if only_grow && len <= self.inode(inode).len() {
                    return Ok(());
                }
                self.check_space(inode, len)?;
                let sequence = self.next_sequence();
                self.inode_mut(inode)
                    .apply(sequence, Change::Resize { len }, false);
            }
            Begun::Sync { inode, mark } => self.inode_mut(inode).sync(mark),
            Begun::SyncDir { dir, mark } => {
                if !self.dirs.contains(&dir) {
                    return Err(not_found(&dir));
                }
                let changes = std::mem::take(&mut self.name_changes);
                for (sequence, change) in changes {
                    if sequence <= mark && change.touches(&dir) {
                        change.apply(&mut self.durable_names);
                    } else {
                        self.name_changes.push((sequence, change));
                    }
                }
                self.collect();
            }
            Begun::Remove(path) => {
                let inode = *self.names.get(&path).ok_or_else(|| not_found(&path))?;
                self.change_name(NameChange::Remove { path, inode });
            }
            Begun::Rename(from, to) => {
                let inode = *self.names.get(&from).ok_or_else(|| not_found(&from))?;
                self.check_parent(&to)?;
                self.change_name(NameChange::Rename { from, to, inode });
            }
            Begun::Link(from, to) => {
                let inode = *self.names.get(&from).ok_or_else(|| not_found(&from))?;
                self.check_parent(&to)?;
                self.check_free(&to)?;
                self.change_name(NameChange::Create { path: to, inode });
            }
            Begun::RemoveDir(dir) => {
                if !self.dirs.contains(&dir) {
                    return Err(not_found(&dir));
                }
                let is_below = |path: &PathBuf| path.parent() == Some(&dir);
                if self.names.keys().any(is_below) || self.dirs.iter().any(is_below) {
                    return Err(io::ErrorKind::DirectoryNotEmpty.into());
                }
                self.dirs.remove(&dir);
            }
            Begun::CreateDir(dir) => {
                let mut dir = Some(dir.as_path());
                while let Some(path) = dir {
                    self.dirs.insert(path.to_path_buf());
                    dir = path.parent();
                }
            }
        }
        Ok(())
    }

    fn begin(&mut self, begun: Begun) -> OperationId {
        let id = OperationId(self.next_sequence());
        self.begun.insert(id, begun);
        id
    }

    fn change_name(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        let sequence = self.next_sequence();
        self.name_changes.push((sequence, change));
    }

    fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    fn check_parent(&self, path: &Path) -> io::Result<()> {
        match path.parent() {
            Some(parent) if self.dirs.contains(parent) => Ok(()),
            _ => Err(not_found(path)),
        }
    }

    fn check_free(&self, path: &Path) -> io::Result<()> {
        if self.names.contains_key(path) || self.dirs.contains(path) {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                path.display().to_string(),
            ));
        }
        Ok(())
    }

    fn check_space(&mut self, inode: InodeId, end: u64) -> io::Result<()> {
        let more = charge(end).saturating_sub(charge(self.inode(inode).len()));
        if more > 0 && self.used_bytes() + more > self.capacity_bytes {
            self.collect();
            if self.used_bytes() + more > self.capacity_bytes {
                return Err(io::ErrorKind::StorageFull.into());
            }
        }
        Ok(())
    }

    fn used_bytes(&self) -> u64 {
        self.inodes.values().map(|inode| charge(inode.len())).sum()
    }

    /// Frees every file that has no name, durable or not, and is not open.
    fn collect(&mut self) {
        let mut named: BTreeSet<InodeId> = self.names.values().copied().collect();
        named.extend(self.durable_names.values());
        named.extend(self.name_changes.iter().map(|(_, change)| change.inode()));
        self.inodes
            .retain(|id, inode| named.contains(id) || Rc::strong_count(&inode.opened) > 1);
    }

    fn inode(&self, inode: InodeId) -> &Inode {
        self.inodes.get(&inode).expect("an open file is kept")
    }

    fn inode_mut(&mut self, inode: InodeId) -> &mut Inode {
        self.inodes.get_mut(&inode).expect("an open file is kept")
    }
}

/// What a file of this length takes of the volume.
fn charge(len: u64) -> u64 {
    len.next_multiple_of(u64::try_from(SECTOR_BYTES).expect("a sector is small"))
}

fn not_found(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, path.display().to_string())
}

/// The path without `.` parts. Everything else than a name would leave the data directory.
fn relative(path: &Path) -> PathBuf {
    path.components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name),
            Component::CurDir => None,
            _ => panic!("{} leaves the data directory", path.display()),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume() -> Volume {
        let mut volume = Volume::new(1 << 20);
        let dir = volume.begin_create_dir(Path::new("d"));
        volume.complete(dir).unwrap();
        volume
    }

    fn write(volume: &mut Volume, inode: InodeId, byte: u8, durable: bool) -> io::Result<()> {
        let buf = AlignedBuf::copy_of(&[byte; SECTOR_BYTES]);
        let id = volume.begin_write(inode, 0, buf, durable);
        volume.complete_write(id, None).0
    }

    fn sync_dir(volume: &mut Volume) {
        let id = volume.begin_sync_dir(Path::new("d"));
        volume.complete(id).unwrap();
    }

    fn names(volume: &Volume) -> Vec<String> {
        let entries = volume.list(Path::new("d")).unwrap();
        entries.into_iter().map(|entry| entry.name).collect()
    }

    #[test]
    fn a_file_at_rest_can_lose_its_end_and_stays_without_it() {
        let mut volume = volume();
        let path = Path::new("d/f");
        let (inode, _open) = volume.create(path).unwrap();
        write(&mut volume, inode, 1, false).unwrap();
        assert!(!volume.cut(path, 7), "it is not at rest");
        write(&mut volume, inode, 1, true).unwrap();
        let sync = volume.begin_sync(inode);
        volume.complete(sync).unwrap();
        sync_dir(&mut volume);
        assert!(volume.cut(path, 7));
        assert!(!volume.cut(path, 7), "it is no longer");
        volume.cut_power(&mut Survivors::none());
        assert_eq!(volume.content(path), Some(vec![1; 7]));
    }

    #[test]
    fn a_created_name_is_lost_without_a_sync_of_its_directory() {
        for synced in [false, true] {
            let mut volume = volume();
            let (inode, _open) = volume.create(Path::new("d/f")).unwrap();
            write(&mut volume, inode, 1, true).unwrap();
            if synced {
                sync_dir(&mut volume);
            }
            volume.cut_power(&mut Survivors::none());
            assert_eq!(volume.open(Path::new("d/f")).is_ok(), synced);
        }
    }

    #[test]
    fn an_unsynced_rename_leaves_the_old_name_and_its_content() {
        let mut volume = volume();
        for (name, byte) in [("d/old", 1), ("d/new", 2)] {
            let (inode, _open) = volume.create(Path::new(name)).unwrap();
            write(&mut volume, inode, byte, true).unwrap();
        }
        sync_dir(&mut volume);
        let rename = volume.begin_rename(Path::new("d/new"), Path::new("d/old"));
        volume.complete(rename).unwrap();
        assert_eq!(names(&volume), ["old"]);
        volume.cut_power(&mut Survivors::none());
        assert_eq!(names(&volume), ["new", "old"]);
        let (old, _open) = volume.open(Path::new("d/old")).unwrap();
        let mut buf = [0; 1];
        volume.read(old, 0, &mut buf);
        assert_eq!(buf, [1]);
    }

    #[test]
    fn a_linked_file_lives_until_its_last_name_is_gone() {
        let mut volume = volume();
        let (inode, _) = volume.create(Path::new("d/a")).unwrap();
        write(&mut volume, inode, 7, true).unwrap();
        sync_dir(&mut volume);
        let link = volume.begin_link(Path::new("d/a"), Path::new("d/b"));
        volume.complete(link).unwrap();
        let again = volume.begin_link(Path::new("d/a"), Path::new("d/b"));
        let taken = volume.complete(again).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AlreadyExists);
        sync_dir(&mut volume);
        let remove = volume.begin_remove(Path::new("d/a"));
        volume.complete(remove).unwrap();
        sync_dir(&mut volume);
        volume.cut_power(&mut Survivors::none());
        assert_eq!(names(&volume), ["b"]);
        let (linked, _open) = volume.open(Path::new("d/b")).unwrap();
        let mut buf = [0; 1];
        volume.read(linked, 0, &mut buf);
        assert_eq!(buf, [7]);
    }

    #[test]
    fn a_directory_is_removed_only_when_it_is_empty() {
        let mut volume = volume();
        volume.create(Path::new("d/a")).unwrap();
        let full = volume.begin_remove_dir(Path::new("d"));
        let full = volume.complete(full).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::DirectoryNotEmpty);
        let remove = volume.begin_remove(Path::new("d/a"));
        volume.complete(remove).unwrap();
        let empty = volume.begin_remove_dir(Path::new("d"));
        volume.complete(empty).unwrap();
        volume.list(Path::new("d")).unwrap_err();
    }

    #[test]
    fn an_operation_in_flight_at_the_cut_may_have_happened() {
        for variant in [0, 1] {
            let mut volume = volume();
            let (inode, _open) = volume.create(Path::new("d/f")).unwrap();
            sync_dir(&mut volume);
            volume.begin_write(inode, 0, AlignedBuf::copy_of(&[9; 4096]), true);
            volume.cut_power(&mut Survivors::variant(0, variant));
            assert_eq!(volume.files()[0].1, 4096 * u64::from(variant));
        }
    }

    #[test]
    fn a_full_volume_refuses_to_grow_and_a_removed_file_frees_its_space() {
        let mut volume = volume();
        volume.set_capacity(8192);
        let (first, open) = volume.create(Path::new("d/a")).unwrap();
        write(&mut volume, first, 1, false).unwrap();
        let grow = volume.begin_resize(first, 12288, true);
        let full = volume.complete(grow).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        assert_eq!(volume.free_bytes(), 4096);
        sync_dir(&mut volume);
        let remove = volume.begin_remove(Path::new("d/a"));
        volume.complete(remove).unwrap();
        sync_dir(&mut volume);
        assert_eq!(volume.free_bytes(), 4096, "the file is still open");
        drop(open);
        assert_eq!(volume.free_bytes(), 8192);
    }

    #[test]
    fn writes_begun_after_a_sync_are_not_covered_by_it() {
        let mut volume = volume();
        let (inode, _open) = volume.create(Path::new("d/f")).unwrap();
        sync_dir(&mut volume);
        let sync = volume.begin_sync(inode);
        write(&mut volume, inode, 1, false).unwrap();
        volume.complete(sync).unwrap();
        assert!(!volume.is_settled());
        volume.cut_power(&mut Survivors::none());
        assert_eq!(volume.files()[0].1, 0);
    }
}
