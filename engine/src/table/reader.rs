//! An open table: its footer, filters and fences in memory, its blocks on the device.

use std::borrow::Cow;
use std::cell::Cell;
use std::fmt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use bytes::Bytes;
use torc_env::{AlignedBuf, Disk, File, OpenMode, SECTOR_BYTES, Token, TokenRange};

use super::block::Block;
use super::fence::{Extent, Fences};
use super::filter::Filters;
use super::format::{
    FOOTER_BYTES, Footer, Mismatch, Section, Unreadable, checksum, footer_offset, open_section,
};
use super::iter::{ReadAhead, TableIter};
use super::{TableInfo, table_path};
use crate::blob::{BLOB_USE_BYTES, BlobRef, BlobUse};
use crate::cache::{BlockCache, BlockId};
use crate::crypt::{DataKey, Keys};
use crate::error::ReadError;
use crate::le;
use crate::record::{Record, ScanFrom};

/// An open table. Clones share it.
pub struct Table<D: Disk>(Rc<Inner<D::File>>);

struct Inner<F> {
    file: F,
    path: PathBuf,
    info: TableInfo,
    fences: Fences,
    filters: Option<Filters>,
    /// Boxed: most tables of most stores have none.
    key: Option<Box<DataKey>>,
    /// No longer part of a tree: nothing of it is cached any more.
    is_retired: Cell<bool>,
}

/// What a get found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Order of writing; see [`crate::Entry::seqno`].
    pub seqno: u64,
    /// What is stored; without its value when that stands in a blob.
    pub record: Record,
    /// Where the value is; `None` when the record has it.
    pub reference: Option<BlobRef>,
}

impl<D: Disk> Clone for Table<D> {
    fn clone(&self) -> Self {
        Table(self.0.clone())
    }
}

impl<D: Disk> fmt::Debug for Table<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Table").field(&self.0.info).finish()
    }
}

impl<D: Disk> Table<D> {
    /// Opens the table `file_id` of the directory `dir`. Three reads: the length, the footer, and
    /// what stands before it. A sealed table needs its master key among `keys`.
    pub async fn open(
        disk: &D,
        dir: &Path,
        file_id: u64,
        keys: &Keys,
    ) -> Result<Table<D>, ReadError> {
        Table::open_parts(disk, dir, file_id, keys, true).await
    }

    /// Opens a table without its filters: all that a scan needs. A get then always reads.
    pub(crate) async fn open_for_scan(
        disk: &D,
        dir: &Path,
        file_id: u64,
        keys: &Keys,
    ) -> Result<Table<D>, ReadError> {
        Table::open_parts(disk, dir, file_id, keys, false).await
    }

    async fn open_parts(
        disk: &D,
        dir: &Path,
        file_id: u64,
        keys: &Keys,
        with_filters: bool,
    ) -> Result<Table<D>, ReadError> {
        let path = table_path(dir, file_id);
        let io_error = |source| ReadError::Io {
            path: path.clone(),
            offset: 0,
            source,
        };
        let file = disk.open(&path, OpenMode::Read).await.map_err(io_error)?;
        let file_bytes = file.len().await.map_err(io_error)?;
        let corrupt = |offset, mismatch| corrupt(&path, offset, mismatch);

        let footer_at = footer_offset(file_bytes);
        let sector = le::len64(SECTOR_BYTES);
        if file_bytes == 0 || !file_bytes.is_multiple_of(sector) {
            let found = format!("{file_bytes} bytes");
            let mismatch = Mismatch::new("a file of whole sectors", found);
            return Err(corrupt(file_bytes, mismatch));
        }
        let bytes = read(&file, &path, footer_at, FOOTER_BYTES).await?;
        let footer = Footer::decode(&bytes, file_id, file_bytes, keys);
        let (footer, key) =
            footer.map_err(|unreadable| footer_error(&path, footer_at, unreadable))?;

        // Filters come first; without them the read begins at the sector of the fences.
        let start = if with_filters {
            footer.data_end
        } else {
            footer.fences.offset / sector * sector
        };
        let tail_len = usize::try_from(footer_at - start).map_err(|_| {
            corrupt(
                start,
                Mismatch::new("sections that fit memory", "larger ones"),
            )
        })?;
        let tail = read(&file, &path, start, tail_len).await?;
        let section = |section: Section| -> Result<Cow<'_, [u8]>, ReadError> {
            // In bounds: the footer's layout was checked against the file.
            let from = usize::try_from(section.offset - start).expect("inside the tail");
            let len = usize::try_from(section.len).expect("inside the tail");
            let bytes = &tail[from..from + len];
            let found = checksum(file_id, section.offset, &[bytes]);
            if found != section.checksum {
                let mismatch = Mismatch::checksum(section.checksum, found);
                return Err(corrupt(section.offset, mismatch));
            }
            open_section(key.as_ref(), file_id, section.offset, bytes)
                .map_err(|mismatch| corrupt(section.offset, mismatch))
        };
        let malformed = |section: Section, expected: &str| {
            corrupt(section.offset, Mismatch::new(expected, "another section"))
        };
        let filters = if with_filters {
            let filters = Filters::decode(&section(footer.filters)?);
            Some(filters.map_err(|expected| malformed(footer.filters, expected))?)
        } else {
            None
        };
        let blocks = footer.info.blocks;
        let fences = Fences::decode(&section(footer.fences)?, blocks, footer.data_end)
            .map_err(|expected| malformed(footer.fences, expected))?;
        let mut info = footer.info;
        let bounds = section(footer.bounds)?;
        let expected = "two keys with their lengths, and the blobs";
        (info.first_key, info.last_key, info.blobs) = decode_bounds(&bounds, footer.has_blobs)
            .ok_or_else(|| malformed(footer.bounds, expected))?;
        Ok(Table(Rc::new(Inner {
            file,
            path,
            info,
            fences,
            filters,
            key: key.map(Box::new),
            is_retired: Cell::new(false),
        })))
    }

    /// What is known of the table.
    pub fn info(&self) -> &TableInfo {
        &self.0.info
    }

    /// The file, relative to the data directory.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Bytes in memory: fences, filters, bounds.
    pub fn memory_bytes(&self) -> usize {
        let inner = &self.0;
        size_of::<Inner<D::File>>()
            + inner.fences.memory_bytes()
            + inner.filters.as_ref().map_or(0, Filters::memory_bytes)
            + inner.key.as_ref().map_or(0, |_| size_of::<DataKey>())
            + inner.info.blobs.len() * size_of::<BlobUse>()
            + inner.info.first_key.len()
            + inner.info.last_key.len()
    }

    /// Whether the table may hold a key with this token. `false` is certain; `true` is wrong for
    /// about one absent key in 256 (bottom level) or 65,536.
    pub fn may_contain(&self, token: Token) -> bool {
        let inner = &self.0;
        let inside = inner.info.first_token <= token && token <= inner.info.last_token;
        inside
            && inner
                .filters
                .as_ref()
                .is_none_or(|filters| filters.may_contain(token))
    }

    /// The record of a key, whose token must be the one that it was written with. At most one
    /// device read, none when [`Table::may_contain`] says no. A value is copied out of its block
    /// unless it is most of it, so that caching one does not pin the other.
    pub async fn get(&self, token: Token, key: &[u8]) -> Result<Option<Found>, ReadError> {
        if !self.may_contain(token) {
            return Ok(None);
        }
        self.get_through(&BlockCache::none(), token, key, || ())
            .await
    }

    /// As [`Table::get`], of a token that the table [may contain](Table::may_contain): the caller has asked. Calls
    /// `reading` and reads the device only if the block is not cached. A block that turns out to refer to the value is
    /// cached then.
    pub(crate) async fn get_through(
        &self,
        blocks: &BlockCache,
        token: Token,
        key: &[u8],
        reading: impl FnOnce(),
    ) -> Result<Option<Found>, ReadError> {
        let Some(index) = self.0.fences.find(token) else {
            return Ok(None);
        };
        let cached = blocks.get(self.block_id(index));
        let is_cached = cached.is_some();
        let block = match cached {
            Some(block) => block,
            None => {
                reading();
                self.read_block(index).await?
            }
        };
        let extent = self.extent(index);
        let corrupt = |mismatch| corrupt(&self.0.path, extent.offset, mismatch);
        let Some(at) = block.find(token, key).map_err(corrupt)? else {
            return Ok(None);
        };
        let (mut record, reference) = block.record(at).map_err(corrupt)?;
        self.check_reference(reference.as_ref()).map_err(corrupt)?;
        if reference.is_some() && !is_cached {
            self.cache_block(blocks, index, &block);
        }
        if record.value.len() < block.body_bytes() / 2 {
            record.value = Bytes::copy_from_slice(&record.value);
        }
        Ok(Some(Found {
            seqno: block.seqno(at),
            record,
            reference,
        }))
    }

    /// The table is no longer part of a tree: from now on nothing of it gets into a cache.
    pub(crate) fn retire(&self) {
        self.0.is_retired.set(true);
    }

    pub(super) fn block_id(&self, index: usize) -> BlockId {
        BlockId {
            table: self.0.info.file_id,
            index,
        }
    }

    /// Puts a block that was read into a cache.
    pub(super) fn cache_block(&self, blocks: &BlockCache, index: usize, block: &Block) {
        if !self.0.is_retired.get() {
            blocks.insert(self.block_id(index), block);
        }
    }

    /// A record refers to nothing but what the table lists.
    pub(super) fn check_reference(&self, reference: Option<&BlobRef>) -> Result<(), Mismatch> {
        let Some(reference) = reference else {
            return Ok(());
        };
        if self.0.info.blob(reference.file_id).is_none() {
            let found = format!("one to {:016x}", reference.file_id);
            return Err(Mismatch::new("a reference to a blob of the table", found));
        }
        Ok(())
    }

    /// The tokens that cannot be told when what lies at `offset` is damaged: those of the block that
    /// begins there, or all of them.
    pub(crate) fn damaged_range(&self, offset: u64) -> TokenRange {
        let fences = &self.0.fences;
        let block = fences.block_at(offset);
        block.map_or(TokenRange::ALL, |index| fences.range(index))
    }

    /// The records from `from` on whose tokens lie in `range`.
    pub fn iter(&self, from: &ScanFrom, range: TokenRange, ahead: ReadAhead) -> TableIter<D> {
        TableIter::new(self.clone(), from, range, ahead)
    }

    pub(super) fn extent(&self, index: usize) -> Extent {
        self.0.fences.extent(index)
    }

    /// The block in which a record with `token` would be; the first one for lower tokens.
    pub(super) fn block_of(&self, token: Token) -> usize {
        self.0.fences.find(token).unwrap_or(0)
    }

    async fn read_block(&self, index: usize) -> Result<Block, ReadError> {
        let span = self.span(index, index + 1);
        let bytes = self.read_span(span, index).await?;
        self.decode_block(index, &bytes, span.offset)
    }

    /// The whole sectors around the blocks `from..to`.
    pub(super) fn span(&self, from: usize, to: usize) -> Extent {
        let sector = le::len64(SECTOR_BYTES);
        let last = self.extent(to - 1);
        let start = self.extent(from).offset / sector * sector;
        Extent {
            offset: start,
            len: (last.offset + last.len).next_multiple_of(sector) - start,
        }
    }

    /// Reads what [`Table::span`] says of the blocks from `first` on. What the file lacks is charged to that block: it begins
    /// somewhere in the span's first sector, in which others may begin too.
    pub(super) async fn read_span(&self, span: Extent, first: usize) -> Result<Bytes, ReadError> {
        let at = self.extent(first).offset;
        let len = usize::try_from(span.len).map_err(|_| {
            let mismatch = Mismatch::new("blocks that fit memory", format!("{} bytes", span.len));
            corrupt(&self.0.path, at, mismatch)
        })?;
        let read = read(&self.0.file, &self.0.path, span.offset, len).await;
        read.map_err(|error| match error {
            ReadError::Corrupt { path, detail, .. } => ReadError::Corrupt {
                path,
                offset: at,
                detail,
            },
            other => other,
        })
    }

    /// Decodes block `index` out of `bytes`, which were read at `start` and hold it whole.
    pub(super) fn decode_block(
        &self,
        index: usize,
        bytes: &Bytes,
        start: u64,
    ) -> Result<Block, ReadError> {
        let extent = self.extent(index);
        let from = usize::try_from(extent.offset - start).expect("inside what was read");
        let to = from + usize::try_from(extent.len).expect("inside what was read");
        let info = &self.0.info;
        Block::decode(
            &bytes.slice(from..to),
            (info.file_id, extent.offset),
            info.tree,
            self.0.key.as_deref(),
        )
        .map_err(|mismatch| corrupt(&self.0.path, extent.offset, mismatch))
    }

    pub(super) fn corrupt_block(&self, index: usize, mismatch: Mismatch) -> ReadError {
        corrupt(&self.0.path, self.extent(index).offset, mismatch)
    }
}

/// Reads `len` bytes, whole sectors, or fails.
pub(crate) async fn read<F: File>(
    file: &F,
    path: &Path,
    offset: u64,
    len: usize,
) -> Result<Bytes, ReadError> {
    let (result, buf) = file.read_at(offset, AlignedBuf::zeroed(len)).await;
    match result {
        Ok(found) if found == len => Ok(buf.into_bytes()),
        Ok(found) => {
            let mismatch = Mismatch::new(format!("{len} bytes"), format!("{found}"));
            Err(corrupt(path, offset, mismatch))
        }
        Err(source) => Err(ReadError::Io {
            path: path.to_owned(),
            offset,
            source,
        }),
    }
}

pub(crate) fn corrupt(path: &Path, offset: u64, mismatch: Mismatch) -> ReadError {
    ReadError::Corrupt {
        path: path.to_owned(),
        offset,
        detail: format!("expected {}, found {}", mismatch.expected, mismatch.found),
    }
}

/// Why the footer at `offset` cannot be read.
pub(crate) fn footer_error(path: &Path, offset: u64, unreadable: Unreadable) -> ReadError {
    let path = path.to_owned();
    match unreadable {
        Unreadable::Mismatch(mismatch) => corrupt(&path, offset, mismatch),
        Unreadable::Newer(newer) => ReadError::Newer { path, newer },
        Unreadable::Key(source) => ReadError::Key { path, source },
    }
}

/// The bounds section: two lengths, two keys, and the blobs if there are any.
pub(super) fn decode_bounds(bytes: &[u8], has_blobs: bool) -> Option<(Bytes, Bytes, Vec<BlobUse>)> {
    let rest = bytes.get(16..)?;
    let first_len = usize::try_from(le::u64_at(bytes, 0)).ok()?;
    let last_len = usize::try_from(le::u64_at(bytes, 8)).ok()?;
    let (first, rest) = rest.split_at_checked(first_len)?;
    let (last, blobs) = rest.split_at_checked(last_len)?;
    let blobs_fit = has_blobs == (blobs.len() >= BLOB_USE_BYTES);
    let blobs = BlobUse::decode_all(blobs).filter(|_| blobs_fit)?;
    Some((
        Bytes::copy_from_slice(first),
        Bytes::copy_from_slice(last),
        blobs,
    ))
}
