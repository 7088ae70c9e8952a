//! An open blob: nothing of it in memory but its key.

use std::fmt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use bytes::Bytes;
use torc_env::{Disk, File, OpenMode, SECTOR_BYTES};

use super::{BlobFile, BlobFooter, BlobRef, blob_path};
use crate::crypt::{DataKey, FileUse, Keys};
use crate::error::ReadError;
use crate::le;
use crate::table::body;
use crate::table::format::{FOOTER_BYTES, Mismatch, Unreadable, footer_offset};
use crate::table::{corrupt, footer_error, read};

/// An open blob. Clones share it.
pub struct Blob<D: Disk>(Rc<Inner<D::File>>);

struct Inner<F> {
    opened: F,
    path: PathBuf,
    file: BlobFile,
    /// Boxed: most blobs of most stores have none.
    key: Option<Box<DataKey>>,
}

impl<D: Disk> Clone for Blob<D> {
    fn clone(&self) -> Self {
        Blob(self.0.clone())
    }
}

impl<D: Disk> fmt::Debug for Blob<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Blob").field(&self.0.file).finish()
    }
}

impl<D: Disk> Blob<D> {
    /// Opens a blob of the directory `dir`, of which a table says what it is. Reads nothing but the
    /// file's length, which must be the one that the table knows.
    pub async fn open(
        disk: &D,
        dir: &Path,
        file: &BlobFile,
        keys: &Keys,
    ) -> Result<Blob<D>, ReadError> {
        let path = blob_path(dir, file.file_id);
        let io_error = |source| ReadError::Io {
            path: path.clone(),
            offset: 0,
            source,
        };
        let key = match file.key {
            Some(reference) => {
                let key = keys.find(reference, FileUse::Blob(file.file_id));
                Some(Box::new(key.map_err(|source| ReadError::Key {
                    path: path.clone(),
                    source,
                })?))
            }
            None => None,
        };
        let opened = disk.open(&path, OpenMode::Read).await.map_err(io_error)?;
        let bytes = opened.len().await.map_err(io_error)?;
        if bytes != file.bytes {
            let expected = format!("a file of {} bytes", file.bytes);
            let mismatch = Mismatch::new(expected, format!("{bytes} bytes"));
            return Err(corrupt(&path, bytes, mismatch));
        }
        Ok(Blob(Rc::new(Inner {
            opened,
            path,
            file: *file,
            key,
        })))
    }

    /// Refuses a blob that a newer program has written. One device read. A footer that cannot be read is passed over, since
    /// no value needs it: a scrub finds it.
    pub(crate) async fn check_version(&self) -> Result<(), ReadError> {
        let inner = &self.0;
        let BlobFile { file_id, bytes, .. } = inner.file;
        let at = footer_offset(bytes);
        let Ok(footer) = read(&inner.opened, &inner.path, at, FOOTER_BYTES).await else {
            return Ok(());
        };
        match BlobFooter::decode(&footer, file_id, bytes, &Keys::default()) {
            Err(newer @ Unreadable::Newer(_)) => Err(footer_error(&inner.path, at, newer)),
            _ => Ok(()),
        }
    }

    /// What the tables know of it.
    pub fn file(&self) -> &BlobFile {
        &self.0.file
    }

    /// Bytes in memory.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Inner<D::File>>() + self.0.key.as_ref().map_or(0, |_| size_of::<DataKey>())
    }

    /// A value. One device read of the pages that hold it.
    ///
    /// # Errors
    /// When it is not what was written there.
    pub async fn get(&self, reference: &BlobRef) -> Result<Bytes, ReadError> {
        let inner = &self.0;
        let corrupt = |mismatch| corrupt(&inner.path, reference.offset, mismatch);
        let sector = le::len64(SECTOR_BYTES);
        let end = reference
            .offset
            .checked_add(u64::from(reference.stored_len))
            .filter(|end| *end <= inner.file.bytes);
        let Some(end) = end else {
            let found = format!("{} bytes", reference.stored_len);
            return Err(corrupt(Mismatch::new("a value inside the file", found)));
        };
        let start = reference.offset / sector * sector;
        let len = |bytes: u64| {
            let fits = usize::try_from(bytes);
            fits.map_err(|_| corrupt(Mismatch::new("a value that fits memory", "a larger one")))
        };
        let span = len(end.next_multiple_of(sector) - start)?;
        let bytes = read(&inner.opened, &inner.path, start, span).await?;
        let stored = bytes.slice(len(reference.offset - start)?..len(end - start)?);
        let place = (inner.file.file_id, reference.offset);
        let (value, _) = body::open(&stored, place, inner.key.as_deref()).map_err(corrupt)?;
        if le::len64(value.len()) != u64::from(reference.raw_len) {
            let expected = format!("a value of {} bytes", reference.raw_len);
            let found = format!("{} bytes", value.len());
            return Err(corrupt(Mismatch::new(expected, found)));
        }
        Ok(value)
    }
}
