//! The output side of a table file: appended bytes leave in large aligned writes, into space that
//! was allocated before.

use std::io;

use torc_env::{AlignedBuf, File, SECTOR_BYTES};

use super::format::PAGE_BYTES;
use crate::le;

/// Bytes of one write. Larger ones gain nothing on any device that we know.
const CHUNK_BYTES: usize = 1 << 20;
/// Space is allocated ahead in steps of this, or less while the file is small.
const ALLOCATE_BYTES_MAX: u64 = 16 << 20;
const ALLOCATE_BYTES_MIN: u64 = 1 << 20;

/// Appends to a file from offset 0.
pub(crate) struct ChunkWriter<F> {
    file: F,
    chunk: AlignedBuf,
    /// Bytes in `chunk`.
    filled: usize,
    /// Bytes handed to the file: where `chunk` begins.
    written: u64,
    allocated: u64,
}

impl<F: File> ChunkWriter<F> {
    pub(crate) fn new(file: F) -> ChunkWriter<F> {
        ChunkWriter {
            file,
            chunk: AlignedBuf::zeroed(CHUNK_BYTES),
            filled: 0,
            written: 0,
            allocated: 0,
        }
    }

    /// Offset of the next byte.
    pub(crate) fn offset(&self) -> u64 {
        self.written + le::len64(self.filled)
    }

    /// Bytes up to the next page.
    pub(crate) fn to_page(&self) -> u64 {
        PAGE_BYTES - self.offset() % PAGE_BYTES
    }

    pub(crate) async fn append(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let take = bytes.len().min(CHUNK_BYTES - self.filled);
            self.chunk[self.filled..self.filled + take].copy_from_slice(&bytes[..take]);
            self.filled += take;
            bytes = &bytes[take..];
            if self.filled == CHUNK_BYTES {
                self.write(CHUNK_BYTES).await?;
            }
        }
        Ok(())
    }

    /// Appends zeros up to a multiple of `align`, which divides the chunk.
    pub(crate) async fn pad_to(&mut self, align: usize) -> io::Result<()> {
        let padded = self.filled.next_multiple_of(align);
        self.chunk[self.filled..padded].fill(0);
        self.filled = padded;
        if self.filled == CHUNK_BYTES {
            self.write(CHUNK_BYTES).await?;
        }
        Ok(())
    }

    /// Writes what is left, cuts the file to its length and makes it durable. The length must be a
    /// whole number of sectors.
    pub(crate) async fn finish(mut self) -> io::Result<()> {
        assert_eq!(self.filled % SECTOR_BYTES, 0, "a table is whole sectors");
        if self.filled > 0 {
            self.write(self.filled).await?;
        }
        self.file.set_len(self.written).await?;
        self.file.sync().await
    }

    async fn write(&mut self, len: usize) -> io::Result<()> {
        let end = self.written + le::len64(len);
        if end > self.allocated {
            self.allocate(end).await?;
        }
        let mut chunk = std::mem::take(&mut self.chunk);
        chunk.set_len(len);
        let (result, mut chunk) = self.file.write_at(self.written, chunk).await;
        chunk.set_len(CHUNK_BYTES);
        self.chunk = chunk;
        self.filled = 0;
        result?;
        self.written = end;
        Ok(())
    }

    /// Allocates up to `end` and a step beyond it; on a nearly full disk just up to `end`.
    async fn allocate(&mut self, end: u64) -> io::Result<()> {
        let step = self.allocated.clamp(ALLOCATE_BYTES_MIN, ALLOCATE_BYTES_MAX);
        let ahead = end.max(self.allocated + step);
        self.allocated = match self.file.allocate(ahead).await {
            Ok(()) => ahead,
            Err(error) if error.kind() == io::ErrorKind::StorageFull && ahead > end => {
                self.file.allocate(end).await?;
                end
            }
            Err(error) => return Err(error),
        };
        Ok(())
    }
}
