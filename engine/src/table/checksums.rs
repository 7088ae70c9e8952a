//! Verifies the checksums of a table without the key that it is sealed with, and without decoding it.
//!
//! For backups and inspection on a host that has no key. Fences are encrypted, so blocks are found by
//! walking: each says how long it is. Behind a damaged one nothing more is found. Blobs are walked over in the
//! same way.

use std::path::Path;

use bytes::Bytes;
use torc_env::{AlignedBuf, Disk, File, OpenMode, SECTOR_BYTES};

use super::format::{
    BLOCK_ALIGN, BLOCK_HEADER_BYTES, FOOTER_BYTES, Mismatch, Outline, PAGE_BYTES, checksum,
    footer_offset,
};
use super::reader::{corrupt, footer_error, read};
use super::table_path;
use crate::blob::{BlobFooter, blob_path};
use crate::crypt::Keys;
use crate::error::ReadError;
use crate::le;

/// Bytes read at a time.
const WINDOW_BYTES: u64 = 1 << 20;

/// Reads the table `file_id` of `dir` through; returns its blocks. Filters, fences and bounds are held in
/// memory one at a time.
///
/// # Errors
/// At the first damage.
pub(crate) async fn checksums_of<D: Disk>(
    disk: &D,
    dir: &Path,
    file_id: u64,
) -> Result<u64, ReadError> {
    let path = table_path(dir, file_id);
    let opened = Opened::open(disk, &path).await?;
    let outline = Outline::decode(&opened.footer, file_id, opened.bytes)
        .map_err(|unreadable| footer_error(&path, opened.footer_at, unreadable))?;
    let mut walk = Walk::new(&opened, &path);
    for section in [outline.filters, outline.fences, outline.bounds] {
        let bytes = walk.bytes(section.offset, section.len).await?;
        let found = checksum(file_id, section.offset, &[bytes]);
        if found != section.checksum {
            let mismatch = Mismatch::checksum(section.checksum, found);
            return Err(corrupt(&path, section.offset, mismatch));
        }
    }
    walk.bodies(disk, file_id, outline.data_end).await
}

/// Reads the blob `file_id` of `dir` through; returns its values.
///
/// # Errors
/// At the first damage.
pub(crate) async fn blob_checksums_of<D: Disk>(
    disk: &D,
    dir: &Path,
    file_id: u64,
) -> Result<u64, ReadError> {
    let path = blob_path(dir, file_id);
    let opened = Opened::open(disk, &path).await?;
    let footer = BlobFooter::decode(&opened.footer, file_id, opened.bytes, &Keys::default())
        .map_err(|unreadable| footer_error(&path, opened.footer_at, unreadable))?;
    let mut walk = Walk::new(&opened, &path);
    walk.bodies(disk, file_id, footer.data_end).await
}

/// A file with a footer.
struct Opened<F> {
    file: F,
    bytes: u64,
    footer_at: u64,
    footer: Bytes,
}

impl<F: File> Opened<F> {
    async fn open<D: Disk<File = F>>(disk: &D, path: &Path) -> Result<Self, ReadError> {
        let io_error = |source| ReadError::Io {
            path: path.to_owned(),
            offset: 0,
            source,
        };
        let file = disk.open(path, OpenMode::Read).await.map_err(io_error)?;
        let file_bytes = file.len().await.map_err(io_error)?;
        let sector = le::len64(SECTOR_BYTES);
        if file_bytes == 0 || !file_bytes.is_multiple_of(sector) {
            let found = Mismatch::new("a file of whole sectors", format!("{file_bytes} bytes"));
            return Err(corrupt(path, file_bytes, found));
        }
        let footer_at = footer_offset(file_bytes);
        let footer = read(&file, path, footer_at, FOOTER_BYTES).await?;
        Ok(Self {
            bytes: file_bytes,
            footer_at,
            footer,
            file,
        })
    }
}

/// A file read through a window.
struct Walk<'a, F> {
    file: &'a F,
    path: &'a Path,
    window: AlignedBuf,
    start: u64,
    /// Where it ends: whole sectors.
    end: u64,
}

impl<'a, F: File> Walk<'a, F> {
    fn new(opened: &'a Opened<F>, path: &'a Path) -> Self {
        Walk {
            file: &opened.file,
            path,
            window: AlignedBuf::default(),
            start: 0,
            end: opened.footer_at,
        }
    }

    /// Verifies all bodies before `data_end`; returns how many there are.
    async fn bodies<D: Disk>(
        &mut self,
        disk: &D,
        file_id: u64,
        data_end: u64,
    ) -> Result<u64, ReadError> {
        self.end = data_end;
        let mut count = 0;
        let mut at = 0;
        while at < data_end {
            match self.block(file_id, at).await? {
                Some(end) => {
                    count += 1;
                    at = end.next_multiple_of(BLOCK_ALIGN);
                }
                None => at = (at + 1).next_multiple_of(PAGE_BYTES),
            }
            disk.give_way().await;
        }
        Ok(count)
    }

    /// Where the block at `at` ends; `None` for padding.
    async fn block(&mut self, file_id: u64, at: u64) -> Result<Option<u64>, ReadError> {
        let header_len = le::len64(BLOCK_HEADER_BYTES);
        let header = self.bytes(at, header_len).await?;
        if header.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let len = header_len + u64::from(le::u32_at(header, 8));
        let block = self.bytes(at, len).await?;
        let expected = le::u32_at(block, 0);
        let found = checksum(file_id, at, &[&block[4..]]);
        if expected != found {
            return Err(corrupt(self.path, at, Mismatch::checksum(expected, found)));
        }
        Ok(Some(at + len))
    }

    async fn bytes(&mut self, at: u64, len: u64) -> Result<&[u8], ReadError> {
        let outside = |_| {
            let found = format!("{len} bytes at {at} of {}", self.end);
            corrupt(self.path, at, Mismatch::new("bytes inside the file", found))
        };
        let end = at.saturating_add(len);
        if end > self.end {
            return Err(outside(()));
        }
        let sector = le::len64(SECTOR_BYTES);
        if at < self.start || end > self.start + le::len64(self.window.len()) {
            self.start = at / sector * sector;
            let wanted = end.max(self.start + WINDOW_BYTES).next_multiple_of(sector);
            let upto = wanted.min(self.end.next_multiple_of(sector));
            let size = usize::try_from(upto - self.start).map_err(|_| outside(()))?;
            let (result, mut window) = self
                .file
                .read_at(self.start, AlignedBuf::zeroed(size))
                .await;
            let found = result.map_err(|source| ReadError::Io {
                path: self.path.to_owned(),
                offset: self.start,
                source,
            })?;
            window.set_len(found);
            self.window = window;
        }
        let from = usize::try_from(at - self.start).map_err(|_| outside(()))?;
        let to = usize::try_from(end - self.start).map_err(|_| outside(()))?;
        self.window.get(from..to).ok_or_else(|| outside(()))
    }
}
