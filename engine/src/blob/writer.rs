//! Writes a blob: values one after the other, the footer last.
//!
//! A value begins at a multiple of 64, and at the next page when that loses at most 1/16 of it, so that a
//! read of one takes as few pages as it must.

use std::io;
use std::path::{Path, PathBuf};

use torc_env::{Disk, OpenMode, SECTOR_BYTES, TreeId};

use super::format::BlobFooter;
use super::{BlobFile, BlobRef, blob_path};
use crate::crypt::{DataKey, Sealing, TAG_BYTES};
use crate::error::JobError;
use crate::le;
use crate::table::body::{self, Compressor};
use crate::table::chunk::ChunkWriter;
use crate::table::format::{BLOCK_ALIGN, BLOCK_HEADER_BYTES, CODEC_LZ4, FOOTER_BYTES};

/// A blob in the making.
pub struct BlobWriter<D: Disk> {
    disk: D,
    path: PathBuf,
    file_id: u64,
    tree: TreeId,
    key: Option<DataKey>,
    out: ChunkWriter<D::File>,
    compressor: Compressor,
    stored: Vec<u8>,
    values: u64,
    value_bytes: u64,
    raw_bytes: u64,
}

impl<D: Disk> BlobWriter<D> {
    /// Creates the file in `dir`, where it must not exist. It is encrypted as `sealing` says.
    pub async fn create(
        disk: D,
        dir: &Path,
        file_id: u64,
        tree: TreeId,
        sealing: &Sealing,
    ) -> Result<BlobWriter<D>, JobError> {
        let path = blob_path(dir, file_id);
        let file = disk
            .open(&path, OpenMode::CreateNew)
            .await
            .map_err(|source| write_error(&path, source))?;
        Ok(BlobWriter {
            disk,
            path,
            file_id,
            tree,
            key: sealing.blob_key(file_id),
            out: ChunkWriter::new(file),
            compressor: Compressor::default(),
            stored: Vec::new(),
            values: 0,
            value_bytes: 0,
            raw_bytes: 0,
        })
    }

    /// Appends a value of at most 1 GiB; says where it is. Two copies; gives way behind it.
    pub async fn add(&mut self, value: &[u8]) -> Result<BlobRef, JobError> {
        let codec = self.compressor.compress(value);
        self.stored.clear();
        self.stored.extend_from_slice(if codec == CODEC_LZ4 {
            &self.compressor.compressed
        } else {
            value
        });
        let placed = self.append(codec, value.len()).await;
        let reference = placed.map_err(|source| write_error(&self.path, source))?;
        self.values += 1;
        self.value_bytes += reference.footprint();
        self.raw_bytes += le::len64(value.len());
        self.disk.give_way().await;
        Ok(reference)
    }

    async fn append(&mut self, codec: u8, raw_len: usize) -> io::Result<BlobRef> {
        let tag_bytes = self.key.as_ref().map_or(0, |_| TAG_BYTES);
        let stored_len = BLOCK_HEADER_BYTES + self.stored.len() + tag_bytes;
        let to_page = self.out.to_page();
        if to_page < le::len64(stored_len) && to_page <= le::len64(stored_len) / 16 {
            self.out.pad_to(SECTOR_BYTES).await?;
        }
        let offset = self.out.offset();
        let place = (self.file_id, offset);
        let key = self.key.as_ref();
        let header = body::finish(place, codec, &mut self.stored, raw_len, 1, key);
        self.out.append(&header).await?;
        self.out.append(&self.stored).await?;
        let align = usize::try_from(BLOCK_ALIGN).expect("a small constant");
        self.out.pad_to(align).await?;
        let len32 = |len: usize| u32::try_from(len).expect("a value is below 1 GiB");
        Ok(BlobRef {
            file_id: self.file_id,
            offset,
            stored_len: len32(stored_len),
            raw_len: len32(raw_len),
        })
    }

    /// Bytes of the file so far.
    pub fn bytes(&self) -> u64 {
        self.out.offset()
    }

    /// Writes the footer. On return the blob and its name are durable.
    pub async fn finish(mut self) -> Result<BlobFile, JobError> {
        let data_end = self.out.offset();
        let result = self.write_footer(data_end).await;
        let file = result.map_err(|source| write_error(&self.path, source))?;
        let path = self.path;
        let durable = async {
            self.out.finish().await?;
            self.disk
                .sync_dir(path.parent().unwrap_or(Path::new("")))
                .await
        };
        durable.await.map_err(|source| write_error(&path, source))?;
        Ok(file)
    }

    async fn write_footer(&mut self, data_end: u64) -> io::Result<BlobFile> {
        self.out.pad_to(SECTOR_BYTES).await?;
        let file = BlobFile {
            file_id: self.file_id,
            bytes: self.out.offset() + le::len64(FOOTER_BYTES),
            value_bytes: self.value_bytes,
            key: self.key.as_ref().map(DataKey::reference),
        };
        let footer = BlobFooter {
            file,
            tree: self.tree,
            data_end,
            values: self.values,
            raw_bytes: self.raw_bytes,
        };
        self.out.append(&footer.encode(self.key.as_ref())).await?;
        Ok(file)
    }
}

fn write_error(path: &Path, source: io::Error) -> JobError {
    JobError::Write {
        path: path.to_owned(),
        source,
    }
}
