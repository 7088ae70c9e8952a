//! What engine and cluster rely on from a [`Disk`], whichever it is: the shard's ring, a background
//! executor, the simulator. Generic, so that each of them runs the same checks.

use std::io::ErrorKind;
use std::path::Path;

use torc_env::{AlignedBuf, DirEntry, Disk, File, OpenMode, SECTOR_BYTES};

const SECTOR: u64 = SECTOR_BYTES as u64;

/// A buffer of whole sectors, each filled with the next of `bytes`.
fn sectors(bytes: &[u8]) -> AlignedBuf {
    let mut buffer = AlignedBuf::zeroed(bytes.len() * SECTOR_BYTES);
    for (sector, byte) in buffer.chunks_mut(SECTOR_BYTES).zip(bytes) {
        sector.fill(*byte);
    }
    buffer
}

async fn read<F: File>(file: &F, offset: u64, len: usize) -> Vec<u8> {
    let (read, buffer) = file.read_at(offset, AlignedBuf::zeroed(len)).await;
    buffer[..read.unwrap()].to_vec()
}

async fn write<F: File>(file: &F, offset: u64, bytes: &[u8]) {
    let (written, _) = file.write_at(offset, sectors(bytes)).await;
    written.unwrap();
}

/// Every check, in a directory of its own below the disk's root.
pub async fn all<D: Disk>(disk: &D) {
    what_was_written_is_read_back(disk).await;
    open_modes_are_kept(disk).await;
    reads_end_at_the_end_of_the_file(disk).await;
    lengths_are_set_and_zero_filled(disk).await;
    names_are_made_moved_listed_and_removed(disk).await;
    a_removed_file_lives_while_it_is_open(disk).await;
    a_link_is_a_second_name(disk).await;
    only_empty_directories_are_removed(disk).await;
    large_transfers_are_whole(disk).await;
    clones_share_a_file(disk).await;
    space_is_known(disk).await;
}

/// Content survives a close, and a rewrite replaces exactly its sectors.
pub async fn what_was_written_is_read_back<D: Disk>(disk: &D) {
    disk.create_dir(Path::new("content")).await.unwrap();
    let path = Path::new("content/file");
    let file = disk.open(path, OpenMode::CreateNew).await.unwrap();
    write(&file, 0, b"abc").await;
    write(&file, SECTOR, b"x").await;
    file.sync().await.unwrap();
    disk.sync_dir(Path::new("content")).await.unwrap();
    drop(file);
    let file = disk.open(path, OpenMode::Read).await.unwrap();
    assert_eq!(file.len().await.unwrap(), 3 * SECTOR);
    assert_eq!(read(&file, 0, 3 * SECTOR_BYTES).await, &sectors(b"axc")[..]);
    assert_eq!(
        read(&file, 2 * SECTOR, SECTOR_BYTES).await,
        &sectors(b"c")[..]
    );
}

/// Each mode creates, writes and refuses what it says.
pub async fn open_modes_are_kept<D: Disk>(disk: &D) {
    disk.create_dir(Path::new("modes")).await.unwrap();
    let path = Path::new("modes/file");
    for mode in [OpenMode::Read, OpenMode::Write, OpenMode::WriteDurable] {
        let missing = disk.open(path, mode).await.err().unwrap();
        assert_eq!(missing.kind(), ErrorKind::NotFound, "{mode:?}");
    }
    let file = disk.open(path, OpenMode::CreateNewDurable).await.unwrap();
    write(&file, 0, b"d").await;
    for mode in [OpenMode::CreateNew, OpenMode::CreateNewDurable] {
        let exists = disk.open(path, mode).await.err().unwrap();
        assert_eq!(exists.kind(), ErrorKind::AlreadyExists, "{mode:?}");
    }
    let file = disk.open(path, OpenMode::WriteDurable).await.unwrap();
    write(&file, SECTOR, b"e").await;
    let file = disk.open(path, OpenMode::Read).await.unwrap();
    assert_eq!(read(&file, 0, 2 * SECTOR_BYTES).await, &sectors(b"de")[..]);
    let (refused, back) = file.write_at(0, sectors(b"f")).await;
    assert!(refused.is_err(), "a file opened to read is not written");
    assert_eq!(&back[..], &sectors(b"f")[..], "the buffer comes back");
}

/// Fewer bytes than asked for mean the end of the file, and nothing else.
pub async fn reads_end_at_the_end_of_the_file<D: Disk>(disk: &D) {
    disk.create_dir(Path::new("ends")).await.unwrap();
    let path = Path::new("ends/file");
    let file = disk.open(path, OpenMode::CreateNew).await.unwrap();
    assert_eq!(read(&file, 0, SECTOR_BYTES).await.len(), 0);
    write(&file, 0, b"ab").await;
    assert_eq!(
        read(&file, SECTOR, 4 * SECTOR_BYTES).await,
        &sectors(b"b")[..]
    );
    assert_eq!(read(&file, 2 * SECTOR, SECTOR_BYTES).await.len(), 0);
    assert_eq!(read(&file, 9 * SECTOR, SECTOR_BYTES).await.len(), 0);
    file.set_len(SECTOR + 10).await.unwrap();
    assert_eq!(
        read(&file, 0, 4 * SECTOR_BYTES).await.len(),
        SECTOR_BYTES + 10
    );
}

/// A file lives until its last name is gone, and a taken name is refused.
pub async fn a_link_is_a_second_name<D: Disk>(disk: &D) {
    disk.create_dir(Path::new("links")).await.unwrap();
    let (first, second) = (Path::new("links/first"), Path::new("links/second"));
    let file = disk.open(first, OpenMode::CreateNew).await.unwrap();
    write(&file, 0, b"l").await;
    drop(file);
    disk.hard_link(first, second).await.unwrap();
    let taken = disk.hard_link(first, second).await.unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::AlreadyExists);
    let missing = disk.hard_link(Path::new("links/none"), first).await;
    assert_eq!(missing.unwrap_err().kind(), ErrorKind::NotFound);
    disk.remove(first).await.unwrap();
    let file = disk.open(second, OpenMode::Read).await.unwrap();
    assert_eq!(read(&file, 0, SECTOR_BYTES).await, &sectors(b"l")[..]);
}

/// A directory goes when nothing is in it.
pub async fn only_empty_directories_are_removed<D: Disk>(disk: &D) {
    let (dir, file) = (Path::new("emptied"), Path::new("emptied/file"));
    disk.create_dir(dir).await.unwrap();
    drop(disk.open(file, OpenMode::CreateNew).await.unwrap());
    let full = disk.remove_dir(dir).await.unwrap_err();
    assert_eq!(full.kind(), ErrorKind::DirectoryNotEmpty);
    disk.remove(file).await.unwrap();
    disk.remove_dir(dir).await.unwrap();
    let missing = disk.remove_dir(dir).await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
}

/// Growing fills with zeroes, cutting forgets.
pub async fn lengths_are_set_and_zero_filled<D: Disk>(disk: &D) {
    disk.create_dir(Path::new("lengths")).await.unwrap();
    let path = Path::new("lengths/file");
    let file = disk.open(path, OpenMode::CreateNew).await.unwrap();
    file.allocate(4 * SECTOR).await.unwrap();
    assert_eq!(file.len().await.unwrap(), 4 * SECTOR);
    assert_eq!(
        read(&file, 0, 4 * SECTOR_BYTES).await,
        &sectors(&[0; 4])[..]
    );
    write(&file, 0, b"abcd").await;
    file.allocate(2 * SECTOR).await.unwrap();
    assert_eq!(
        file.len().await.unwrap(),
        4 * SECTOR,
        "allocating never cuts"
    );
    file.set_len(SECTOR).await.unwrap();
    file.set_len(3 * SECTOR).await.unwrap();
    assert_eq!(
        read(&file, 0, 4 * SECTOR_BYTES).await,
        &sectors(&[b'a', 0, 0])[..]
    );
    write(&file, 5 * SECTOR, b"z").await;
    assert_eq!(file.len().await.unwrap(), 6 * SECTOR, "writes extend");
    assert_eq!(
        read(&file, 3 * SECTOR, 3 * SECTOR_BYTES).await,
        &sectors(&[0, 0, b'z'])[..]
    );
}

/// Directories, listings, renames and removals.
pub async fn names_are_made_moved_listed_and_removed<D: Disk>(disk: &D) {
    let dir = Path::new("names/in/depth");
    disk.create_dir(dir).await.unwrap();
    disk.create_dir(dir).await.unwrap();
    for name in ["b", "a", "c"] {
        let file = disk.open(&dir.join(name), OpenMode::CreateNew).await;
        write(&file.unwrap(), 0, name.as_bytes()).await;
    }
    disk.create_dir(&dir.join("sub")).await.unwrap();
    let entry = |name: &str, len, is_dir| DirEntry {
        name: name.into(),
        len,
        is_dir,
    };
    assert_eq!(
        disk.list(dir).await.unwrap(),
        [
            entry("a", SECTOR, false),
            entry("b", SECTOR, false),
            entry("c", SECTOR, false),
            entry("sub", 0, true)
        ]
    );
    disk.rename(&dir.join("a"), &dir.join("b")).await.unwrap();
    disk.remove(&dir.join("c")).await.unwrap();
    disk.sync_dir(dir).await.unwrap();
    let names: Vec<_> = disk.list(dir).await.unwrap();
    assert_eq!(names, [entry("b", SECTOR, false), entry("sub", 0, true)]);
    let file = disk.open(&dir.join("b"), OpenMode::Read).await.unwrap();
    assert_eq!(
        read(&file, 0, SECTOR_BYTES).await,
        &sectors(b"a")[..],
        "a rename replaces"
    );
    for missing in [
        disk.remove(&dir.join("c")).await,
        disk.rename(&dir.join("c"), &dir.join("d")).await,
        disk.list(&dir.join("none")).await.map(drop),
        disk.sync_dir(&dir.join("none")).await,
    ] {
        assert_eq!(missing.unwrap_err().kind(), ErrorKind::NotFound);
    }
}

/// Whoever reads a table that a compaction removes reads on.
pub async fn a_removed_file_lives_while_it_is_open<D: Disk>(disk: &D) {
    disk.create_dir(Path::new("removed")).await.unwrap();
    let path = Path::new("removed/file");
    let file = disk.open(path, OpenMode::CreateNew).await.unwrap();
    write(&file, 0, b"a").await;
    disk.remove(path).await.unwrap();
    assert_eq!(read(&file, 0, SECTOR_BYTES).await, &sectors(b"a")[..]);
    let again = disk.open(path, OpenMode::CreateNew).await.unwrap();
    assert_eq!(again.len().await.unwrap(), 0, "a new file by the old name");
}

/// Several megabytes at once arrive whole.
pub async fn large_transfers_are_whole<D: Disk>(disk: &D) {
    disk.create_dir(Path::new("large")).await.unwrap();
    let file = disk
        .open(Path::new("large/file"), OpenMode::CreateNew)
        .await
        .unwrap();
    let bytes: Vec<u8> = (0..=255).cycle().take(1025).collect();
    write(&file, 3 * SECTOR, &bytes).await;
    let back = read(&file, 3 * SECTOR, bytes.len() * SECTOR_BYTES).await;
    assert!(back == sectors(&bytes)[..], "every sector in its place");
}

/// The file stays open until its last clone has gone.
pub async fn clones_share_a_file<D: Disk>(disk: &D) {
    disk.create_dir(Path::new("clones")).await.unwrap();
    let path = Path::new("clones/file");
    let file = disk.open(path, OpenMode::CreateNew).await.unwrap();
    let clone = file.clone();
    write(&file, 0, b"q").await;
    drop(file);
    assert_eq!(read(&clone, 0, SECTOR_BYTES).await, &sectors(b"q")[..]);
    clone.sync().await.unwrap();
}

/// Free space is part of the whole.
pub async fn space_is_known<D: Disk>(disk: &D) {
    let space = disk.space().await.unwrap();
    assert!(space.total_bytes > 0);
    assert!(space.free_bytes <= space.total_bytes);
}
