//! Writes a table: records in order into blocks, filters and fences along the way, the footer last.
//!
//! Stands at the end of a flush and of a compaction. Blocks are filled towards one device page
//! *after* compression, from the ratio that the blocks before reached; they lie one behind the
//! other, and a block begins at the next page when that loses little. Nothing of the file counts
//! before [`TableWriter::finish`] has synced it and its name.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use torc_env::{Disk, OpenMode, SECTOR_BYTES, Token, TreeId};

use super::TableInfo;
use super::block_builder::BlockBuilder;
use super::body::{self, Compressor};
use super::chunk::ChunkWriter;
use super::fence::FenceBuilder;
use super::filter::{FilterBits, FilterBuilder};
use super::format::{
    BLOCK_ALIGN, BLOCK_HEADER_BYTES, BLOCK_RAW_BYTES_MAX, CODEC_LZ4, FOOTER_BYTES, Footer,
    PAGE_BYTES, Section, checksum, seal_section,
};
use crate::blob::{BlobFile, BlobRef, BlobUse};
use crate::crypt::{DataKey, Sealing, TAG_BYTES};
use crate::error::JobError;
use crate::le;
use crate::record::{EntryRef, Kind};

/// The compression ratio is kept in 1/256.
const RATIO_ONE: u64 = 256;
/// A body is filled at most to this many pages: decompressing more costs a get more than the
/// smaller table saves.
const RATIO_MAX: u64 = 4 * RATIO_ONE;
/// What may be left of a page so that a block lies in one page and not in two.
const PADDING_BYTES_MAX: u64 = PAGE_BYTES / 8;

/// What a table is to be like.
#[derive(Clone, Copy, Debug)]
pub struct TableOptions {
    /// The tree whose records it holds.
    pub tree: TreeId,
    /// Largest body that a block is filled to before compression, in bytes; a record larger than
    /// that has a block of its own.
    pub block_bytes: usize,
    /// Width of the filters.
    pub filter: FilterBits,
}

/// A table in the making.
pub struct TableWriter<D: Disk> {
    disk: D,
    path: PathBuf,
    file_id: u64,
    key: Option<DataKey>,
    options: TableOptions,
    out: ChunkWriter<D::File>,
    pending: BlockBuilder,
    fences: FenceBuilder,
    filters: FilterBuilder,
    info: TableInfo,
    /// Last token of the block written last.
    last_written: Option<Token>,
    last_key: Vec<u8>,
    ratio: u64,
    body: Vec<u8>,
    compressor: Compressor,
    /// What it refers to: values of each blob, and what they take.
    references: BTreeMap<u64, (u64, u64)>,
    blobs: BTreeMap<u64, BlobFile>,
}

impl<D: Disk> TableWriter<D> {
    /// Creates the file, which must not exist. It is encrypted as `sealing` says.
    pub async fn create(
        disk: D,
        path: &Path,
        file_id: u64,
        options: TableOptions,
        sealing: &Sealing,
    ) -> Result<TableWriter<D>, JobError> {
        let key = sealing.table_key(file_id);
        let file = disk
            .open(path, OpenMode::CreateNew)
            .await
            .map_err(|source| write_error(path, source))?;
        Ok(TableWriter {
            disk,
            path: path.to_owned(),
            file_id,
            options,
            out: ChunkWriter::new(file),
            pending: BlockBuilder::new(options.tree),
            fences: FenceBuilder::default(),
            filters: FilterBuilder::new(options.filter),
            info: TableInfo {
                file_id,
                tree: options.tree,
                key: key.as_ref().map(DataKey::id),
                ..TableInfo::default()
            },
            key,
            last_written: None,
            last_key: Vec::new(),
            ratio: RATIO_ONE,
            body: Vec::new(),
            compressor: Compressor::default(),
            references: BTreeMap::new(),
            blobs: BTreeMap::new(),
        })
    }

    /// Adds a record, which must lie behind the one before it. One copy; gives way after a block.
    pub async fn add(&mut self, entry: &EntryRef<'_>) -> Result<(), JobError> {
        self.push(entry, false).await
    }

    /// As [`TableWriter::add`], of a record whose value is in a blob: that of `entry` does not count. What the
    /// blob is must be said ([`TableWriter::learn`]) before the table is finished.
    pub async fn add_separate(
        &mut self,
        entry: &EntryRef<'_>,
        reference: &BlobRef,
    ) -> Result<(), JobError> {
        let (values, bytes) = self.references.entry(reference.file_id).or_default();
        *values += 1;
        *bytes += reference.footprint();
        let entry = EntryRef {
            value: &reference.encode(),
            ..*entry
        };
        self.push(&entry, true).await
    }

    /// The blobs to which it refers so far.
    pub fn referred(&self) -> Vec<u64> {
        self.references.keys().copied().collect()
    }

    /// Says what a blob is to which the table may refer. It is durable.
    pub fn learn(&mut self, file: BlobFile) {
        self.blobs.insert(file.file_id, file);
    }

    async fn push(&mut self, entry: &EntryRef<'_>, is_separate: bool) -> Result<(), JobError> {
        let place = (entry.token, entry.key);
        let is_first = self.info.entries == 0 && self.pending.is_empty();
        assert!(
            is_first || (self.info.last_token, &self.last_key[..]) < place,
            "records of a table ascend"
        );
        while !self.pending.is_empty() && self.pending.bytes_with(entry) > self.body_bytes_target()
        {
            let Some(count) = self.pending.cut(entry.token) else {
                break;
            };
            self.write_block(count).await?;
        }
        if is_first {
            self.info.first_token = entry.token;
            self.info.first_key = Bytes::copy_from_slice(entry.key);
        }
        self.info.last_token = entry.token;
        self.last_key.clear();
        self.last_key.extend_from_slice(entry.key);
        self.pending.push(entry, is_separate);
        Ok(())
    }

    /// Bytes of the file so far, without what is still in memory.
    pub fn bytes(&self) -> u64 {
        self.out.offset()
    }

    /// Token of the record added last.
    pub fn last_token(&self) -> Option<Token> {
        (self.info.entries > 0 || !self.pending.is_empty()).then_some(self.info.last_token)
    }

    /// Writes filters, fences, bounds and footer. On return the table and its name are durable.
    ///
    /// # Panics
    /// When no record was added, or it refers to a blob that nothing is known of.
    pub async fn finish(mut self) -> Result<TableInfo, JobError> {
        assert!(!self.pending.is_empty(), "a table has at least one record");
        let uses = self.references.iter().map(|(file_id, (values, bytes))| {
            let file = self.blobs.get(file_id);
            BlobUse {
                file: *file.expect("a table refers to finished blobs"),
                values: *values,
                bytes: *bytes,
            }
        });
        self.info.blobs = uses.collect();
        self.write_block(self.pending.len()).await?;
        let result = self.write_tail().await;
        let (info, out) = match result {
            Ok(()) => (self.info, self.out),
            Err(source) => return Err(write_error(&self.path, source)),
        };
        let path = self.path;
        out.finish()
            .await
            .map_err(|source| write_error(&path, source))?;
        let dir = path.parent().unwrap_or(Path::new(""));
        self.disk
            .sync_dir(dir)
            .await
            .map_err(|source| write_error(&path, source))?;
        Ok(info)
    }

    /// Gives up and removes the file.
    pub async fn abandon(self) -> Result<(), JobError> {
        drop(self.out);
        self.disk
            .remove(&self.path)
            .await
            .map_err(|source| write_error(&self.path, source))
    }

    /// Body size at which the stored block should just fill the page that it begins in, or the next
    /// one when less than half of that is left.
    fn body_bytes_target(&self) -> usize {
        let room = match self.out.to_page() {
            0..=PADDING_BYTES_MAX => PAGE_BYTES,
            rest if rest < PAGE_BYTES / 2 => rest + PAGE_BYTES,
            rest => rest,
        };
        let body = room - le::len64(BLOCK_HEADER_BYTES + self.tag_bytes());
        // The ratio wavers; aiming a little short keeps most blocks inside their page.
        let margin = if self.ratio > RATIO_ONE { body / 32 } else { 0 };
        let target = (body - margin) * self.ratio / RATIO_ONE;
        usize::try_from(target).map_or(self.options.block_bytes, |target| {
            target.min(self.options.block_bytes)
        })
    }

    /// What encryption adds to each block and section.
    fn tag_bytes(&self) -> usize {
        self.key.as_ref().map_or(0, |_| TAG_BYTES)
    }

    /// Writes the first `count` pending records as a block.
    async fn write_block(&mut self, count: usize) -> Result<(), JobError> {
        self.body.clear();
        self.pending.encode(count, &mut self.body);
        if self.body.len() > BLOCK_RAW_BYTES_MAX {
            let source = io::Error::other("records of one token beyond the size of a block");
            return Err(write_error(&self.path, source));
        }
        let codec = self.compressor.compress(&self.body);
        let raw_len = self.body.len();
        let tag_bytes = self.tag_bytes();
        let stored = if codec == CODEC_LZ4 {
            &mut self.compressor.compressed
        } else {
            &mut self.body
        };
        self.ratio = next_ratio(self.ratio, raw_len, stored.len());

        let result = async {
            let len = le::len64(BLOCK_HEADER_BYTES + stored.len() + tag_bytes);
            let rest = self.out.to_page();
            if rest < len && rest <= PADDING_BYTES_MAX {
                self.out.pad_to(SECTOR_BYTES).await?;
            }
            let offset = self.out.offset();
            let place = (self.file_id, offset);
            let header = body::finish(place, codec, stored, raw_len, count, self.key.as_ref());
            self.out.append(&header).await?;
            self.out.append(stored).await?;
            let align = usize::try_from(BLOCK_ALIGN).expect("a small constant");
            self.out.pad_to(align).await?;
            Ok(offset)
        };
        let offset = result
            .await
            .map_err(|source| write_error(&self.path, source))?;
        self.account(count, offset);
        self.disk.give_way().await;
        Ok(())
    }

    /// Takes the first `count` pending records, now at `offset`, into fences, filters and
    /// statistics.
    fn account(&mut self, count: usize, offset: u64) {
        let tokens = self.pending.tokens().take(count);
        let mut is_first = true;
        for token in tokens {
            if is_first {
                self.fences.push(self.last_written, token, offset);
                is_first = false;
            }
            self.filters.push(token);
            self.last_written = Some(token);
        }
        let info = &mut self.info;
        for row in self.pending.stats(count) {
            let first = info.entries == 0;
            info.seqnos.include(row.seqno, first);
            info.stamps.include(row.stamp, first);
            let is_tombstone = row.kind == Kind::Tombstone;
            if is_tombstone || row.expires_at_ms != 0 {
                let none_yet = info.tombstones + info.expiring == 0;
                info.purgeable_stamps.include(row.stamp, none_yet);
            }
            if row.expires_at_ms != 0 && !is_tombstone {
                info.expiries_ms
                    .include(row.expires_at_ms, info.expiring == 0);
                info.expiring += 1;
            }
            info.tombstones += u64::from(is_tombstone);
            info.entries += 1;
        }
        let (key_bytes, value_bytes) = self.pending.lens(count);
        info.key_bytes += le::len64(key_bytes);
        info.value_bytes += le::len64(value_bytes);
        info.blocks += 1;
        self.pending.drain(count);
    }

    /// Filters, fences, bounds, footer, in this order.
    async fn write_tail(&mut self) -> io::Result<()> {
        self.info.last_key = Bytes::from(std::mem::take(&mut self.last_key));
        self.out.pad_to(SECTOR_BYTES).await?;
        let data_end = self.out.offset();
        let filters = std::mem::replace(&mut self.filters, FilterBuilder::new(self.options.filter));
        let filters = self.append_section(filters.encode()).await?;
        self.disk.give_way().await;
        let fences = std::mem::take(&mut self.fences).encode();
        let fences = self.append_section(fences).await?;
        let mut bounds = Vec::new();
        for key in [&self.info.first_key, &self.info.last_key] {
            bounds.extend_from_slice(&le::len64(key.len()).to_le_bytes());
        }
        bounds.extend_from_slice(&self.info.first_key);
        bounds.extend_from_slice(&self.info.last_key);
        for blob in &self.info.blobs {
            blob.encode(&mut bounds);
        }
        let bounds = self.append_section(bounds).await?;
        self.out.pad_to(SECTOR_BYTES).await?;
        self.info.bytes = self.out.offset() + le::len64(FOOTER_BYTES);
        let footer = Footer {
            info: self.info.clone(),
            has_blobs: !self.info.blobs.is_empty(),
            data_end,
            filters,
            fences,
            bounds,
        };
        self.out.append(&footer.encode(self.key.as_ref())).await
    }

    async fn append_section(&mut self, mut bytes: Vec<u8>) -> io::Result<Section> {
        let offset = self.out.offset();
        seal_section(self.key.as_ref(), self.file_id, offset, &mut bytes);
        self.out.append(&bytes).await?;
        Ok(Section {
            offset,
            len: le::len64(bytes.len()),
            checksum: checksum(self.file_id, offset, &[&bytes]),
        })
    }
}

/// A moving average with weight 1/4.
fn next_ratio(ratio: u64, raw_len: usize, stored_len: usize) -> u64 {
    let now = le::len64(raw_len) * RATIO_ONE / le::len64(stored_len).max(1);
    ((3 * ratio + now) / 4).clamp(RATIO_ONE, RATIO_MAX)
}

fn write_error(path: &Path, source: io::Error) -> JobError {
    JobError::Write {
        path: path.to_owned(),
        source,
    }
}
