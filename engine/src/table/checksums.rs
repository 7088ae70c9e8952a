//! Verifies the checksums of a table without the key that it is sealed with, and without decoding it.
//!
//! For backups and inspection on a host that has no key. Fences are encrypted, so blocks are found by
//! walking: each says how long it is. Behind a damaged one nothing more is found.

use std::path::Path;

use torc_env::{AlignedBuf, Disk, File, OpenMode, SECTOR_BYTES};

use super::format::{
    BLOCK_ALIGN, BLOCK_HEADER_BYTES, FOOTER_BYTES, Mismatch, Outline, PAGE_BYTES, checksum,
    footer_offset,
};
use super::reader::{corrupt, read};
use super::table_path;
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
    let io_error = |source| ReadError::Io {
        path: path.clone(),
        offset: 0,
        source,
    };
    let file = disk.open(&path, OpenMode::Read).await.map_err(io_error)?;
    let file_bytes = file.len().await.map_err(io_error)?;
    let sector = le::len64(SECTOR_BYTES);
    if file_bytes == 0 || !file_bytes.is_multiple_of(sector) {
        let found = Mismatch::new("a file of whole sectors", format!("{file_bytes} bytes"));
        return Err(corrupt(&path, file_bytes, found));
    }
    let footer_at = footer_offset(file_bytes);
    let footer = read(&file, &path, footer_at, FOOTER_BYTES).await?;
    let outline = Outline::decode(&footer, file_id, file_bytes)
        .map_err(|mismatch| corrupt(&path, footer_at, mismatch))?;
    let mut walk = Walk {
        file: &file,
        path: &path,
        window: AlignedBuf::default(),
        start: 0,
        end: footer_at,
    };
    for section in [outline.filters, outline.fences, outline.bounds] {
        let bytes = walk.bytes(section.offset, section.len).await?;
        let found = checksum(file_id, section.offset, &[bytes]);
        if found != section.checksum {
            let mismatch = Mismatch::checksum(section.checksum, found);
            return Err(corrupt(&path, section.offset, mismatch));
        }
    }
    walk.end = outline.data_end;
    let mut blocks = 0;
    let mut at = 0;
    while at < outline.data_end {
        match walk.block(file_id, at).await? {
            Some(end) => {
                blocks += 1;
                at = end.next_multiple_of(BLOCK_ALIGN);
            }
            None => at = (at + 1).next_multiple_of(PAGE_BYTES),
        }
        disk.give_way().await;
    }
    Ok(blocks)
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

impl<F: File> Walk<'_, F> {
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
