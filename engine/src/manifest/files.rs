//! The manifest's files: a root with two slots, and the log that the newer slot names.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use torc_env::{AlignedBuf, Disk, File, OpenMode, SECTOR_BYTES, mutation};

use super::change::{Change, State};
use crate::codec::{Reader, Writer};
use crate::crypt::{
    DataKey, FileUse, KeyId, Keys, Opener, SEAL_BYTES, Unopened, WriterSalt, key_of,
};
use crate::error::{Newer, OpenError, PUT_BACK};
use crate::frame::{Damage, Format, HEADER_BYTES, Header, Mark, frame_bytes};
use crate::layout::STORE_ROOT;

/// Frames of the manifest's log.
pub(crate) const LOG_FORMAT: Format = Format {
    magic: u32::from_le_bytes(*b"TMAN"),
    version: 1,
    sealed_version: Some(2),
};
/// Frames of the root.
pub(crate) const ROOT_FORMAT: Format = Format {
    magic: u32::from_le_bytes(*b"TROT"),
    version: 1,
    sealed_version: None,
};

/// Smallest size of a log's file, reserved when it is created: edits on a full disk go into what
/// was reserved.
const LOG_BYTES_MIN: u64 = 256 << 10;
const SECTOR: u64 = 4096;
const POINTER_BYTES: usize = 16;

/// What a root slot says: a log, and the hash of its first frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pointer {
    pub(crate) log: u64,
    pub(super) first_hash: u64,
}

/// Path of the root.
pub(super) fn root_path(dir: &Path) -> PathBuf {
    dir.join(STORE_ROOT)
}

/// Path of a log.
pub(super) fn log_path(dir: &Path, id: u64) -> PathBuf {
    dir.join(format!("manifest-{id:016x}.log"))
}

/// The id in the name of a log, if it is one.
pub(crate) fn log_id(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("manifest-")?.strip_suffix(".log")?;
    (digits.len() == 16).then(|| u64::from_str_radix(digits, 16).ok())?
}

/// Removes every log but `current`: what a crash between two steps of a rotation leaves.
pub(super) async fn remove_other_logs<D: Disk>(
    disk: &D,
    dir: &Path,
    current: u64,
) -> Result<(), OpenError> {
    let keep = log_path(dir, current);
    let entries = disk.list(dir).await.map_err(io_error(dir, "list"))?;
    for entry in entries {
        let is_log = entry.name.starts_with("manifest-") && entry.name.ends_with(".log");
        let path = dir.join(&entry.name);
        if is_log && path != keep {
            disk.remove(&path)
                .await
                .map_err(io_error(&path, "remove"))?;
        }
    }
    Ok(())
}

/// The root: generation g lies in slot g mod 2, so that the slot in force is never written.
pub(super) struct RootFile<F> {
    file: F,
    generation: u64,
}

impl<F: File> RootFile<F> {
    /// A root with two empty slots. What an interrupted creation left is replaced. The name is
    /// not yet durable.
    pub(super) async fn create<D: Disk<File = F>>(disk: &D, dir: &Path) -> io::Result<Self> {
        let path = root_path(dir);
        match disk.remove(&path).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = disk.open(&path, OpenMode::CreateNewDurable).await?;
        file.allocate(2 * SECTOR).await?;
        Ok(Self {
            file,
            generation: 0,
        })
    }

    /// The root and the newer of its valid slots; `None` when there is none.
    pub(super) async fn read<D: Disk<File = F>>(
        disk: &D,
        dir: &Path,
    ) -> Result<Option<(Self, Pointer)>, OpenError> {
        let path = root_path(dir);
        let file = match disk.open(&path, OpenMode::WriteDurable).await {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error(&path, "open")(error)),
        };
        file.sync().await.map_err(io_error(&path, "sync"))?;
        let buffer = AlignedBuf::zeroed(2 * SECTOR_BYTES);
        let (result, mut buffer) = file.read_at(0, buffer).await;
        let len = result.map_err(io_error(&path, "read"))?;
        buffer.set_len(len);
        let mut newest: Option<(u64, Pointer)> = None;
        for slot in buffer.chunks(SECTOR_BYTES) {
            match parse_slot(slot) {
                Ok(found) => newest = newest.max_by_generation(found),
                Err(Damage::Version { found, .. }) => {
                    return Err(OpenError::Newer {
                        path,
                        newer: Newer::Version {
                            found,
                            known: ROOT_FORMAT.newest(),
                        },
                    });
                }
                Err(_) => {}
            }
        }
        Ok(newest.map(|(generation, pointer)| (Self { file, generation }, pointer)))
    }

    /// Makes `pointer` the one in force. Durable on return. After a failure either may be in force.
    pub(super) async fn point_to(&mut self, pointer: Pointer) -> io::Result<()> {
        let generation = self.generation + 1;
        let header = Header {
            sealed: false,
            flags: 0,
            log: 0,
            sequence: generation,
            previous: 0,
            durable_through: self.generation,
            payload_len: 16,
            record_count: 1,
            first_seqno: 0,
        };
        let mut frame = AlignedBuf::zeroed(header.frame_bytes());
        Writer::new(&mut frame[HEADER_BYTES..])
            .u64(pointer.log)
            .u64(pointer.first_hash);
        header.finish(ROOT_FORMAT, &mut frame, None);
        let (result, _) = self.file.write_at(generation % 2 * SECTOR, frame).await;
        result?;
        self.generation = generation;
        Ok(())
    }
}

trait MaxByGeneration {
    fn max_by_generation(self, other: (u64, Pointer)) -> Self;
}

impl MaxByGeneration for Option<(u64, Pointer)> {
    fn max_by_generation(self, other: (u64, Pointer)) -> Self {
        match self {
            Some(current) if current.0 >= other.0 => Some(current),
            _ => Some(other),
        }
    }
}

/// The generation of a root's slot, and what it says.
pub(crate) fn parse_slot(slot: &[u8]) -> Result<(u64, Pointer), Damage> {
    let header = Header::parse(ROOT_FORMAT, slot)?;
    let (payload, _) = header.verify(slot)?;
    let mut fields = Reader::new(payload);
    let pointer = fields.u64().zip(fields.u64());
    let (log, first_hash) = pointer
        .filter(|_| payload.len() == POINTER_BYTES)
        .ok_or(Damage::Body)?;
    Ok((header.sequence, Pointer { log, first_hash }))
}

/// A log: a snapshot, then edits.
pub(super) struct LogFile<F> {
    pub(super) id: u64,
    file: F,
    first_hash: u64,
    last: Mark,
    offset: u64,
    reserved: u64,
    /// Of what this process appends; an earlier one used another.
    key: Option<DataKey>,
    /// The master keys of all its frames, `None` among them when some are in the clear.
    key_ids: BTreeSet<Option<KeyId>>,
}

impl<F: File> LogFile<F> {
    /// A log that begins with `snapshot`. Durable on return, name included. On failure nothing
    /// stays behind, as far as the disk allows.
    pub(super) async fn create<D: Disk<File = F>>(
        disk: &D,
        dir: &Path,
        id: u64,
        snapshot: &[Change],
        key: Option<DataKey>,
    ) -> io::Result<Self> {
        let path = log_path(dir, id);
        let created = Self::create_at(disk, dir, &path, id, snapshot, key).await;
        if created.is_err()
            && let Err(error) = disk.remove(&path).await
        {
            tracing::debug!(%error, "a failed manifest log stays until the next start");
        }
        created
    }

    async fn create_at<D: Disk<File = F>>(
        disk: &D,
        dir: &Path,
        path: &Path,
        id: u64,
        snapshot: &[Change],
        key: Option<DataKey>,
    ) -> io::Result<Self> {
        let file = disk.open(path, OpenMode::CreateNewDurable).await?;
        let payload = encode(snapshot);
        let first_bytes = u64::try_from(frame_bytes(payload.len())).unwrap_or(u64::MAX);
        let reserved = LOG_BYTES_MIN.max(first_bytes.saturating_mul(4));
        file.allocate(reserved).await?;
        let mut log = Self {
            id,
            file,
            first_hash: 0,
            last: Mark::default(),
            offset: 0,
            reserved,
            key,
            key_ids: BTreeSet::new(),
        };
        log.append_payload(&payload, snapshot.len()).await?;
        log.first_hash = log.last.hash;
        // The length and the reserved blocks are metadata: a durable write need not cover them.
        log.file.sync().await?;
        if !mutation::on("forget_directory_sync") {
            disk.sync_dir(dir).await?;
        }
        Ok(log)
    }

    /// Reads the log that the root names, through its last whole edit.
    pub(super) async fn read<D: Disk<File = F>>(
        disk: &D,
        dir: &Path,
        pointer: Pointer,
        keys: &Keys,
        salt: impl FnOnce() -> WriterSalt,
    ) -> Result<(Self, State), OpenError> {
        let path = log_path(dir, pointer.log);
        let opened = disk.open(&path, OpenMode::WriteDurable).await;
        let file = match opened {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let detail = format!("the root names this log, but it is missing: {PUT_BACK}");
                return Err(corrupt(&path, 0, &detail));
            }
            opened => opened.map_err(io_error(&path, "open the log that the root names"))?,
        };
        file.sync().await.map_err(io_error(&path, "sync"))?;
        let reserved = file.len().await.map_err(io_error(&path, "measure"))?;
        let len = usize::try_from(reserved - reserved % SECTOR)
            .map_err(|_| corrupt(&path, 0, "too long"))?;
        let (result, mut bytes) = file.read_at(0, AlignedBuf::zeroed(len)).await;
        let read = result.map_err(io_error(&path, "read"))?;
        bytes.set_len(read);

        let mut state = State::default();
        let mut last = Mark::default();
        let mut at = 0;
        let file_use = FileUse::Manifest(pointer.log);
        let mut opener = Opener::new(keys, file_use);
        let mut key_ids = BTreeSet::new();
        while let Some((header, payload, hash)) = next_edit(&path, &bytes, at, pointer, last)? {
            key_ids.insert(key_of(&header, payload));
            let opened = opener.open(&header, &bytes[at..], payload);
            let opened = opened.map_err(|unopened| match unopened {
                Unopened::Missing(source) => OpenError::Key {
                    path: path.clone(),
                    source,
                },
                Unopened::Forged => corrupt(&path, at, Unopened::FORGED),
            })?;
            let edit = Change::decode_edit(&opened, header.record_count)
                .ok_or_else(|| corrupt(&path, at, "a whole edit with malformed changes"))?;
            for change in &edit {
                state
                    .apply(change)
                    .map_err(|detail| corrupt(&path, at, &detail))?;
            }
            last = Mark {
                sequence: header.sequence,
                hash,
            };
            at += header.frame_bytes();
        }
        if last.sequence == 0 {
            return Err(corrupt(&path, 0, "the snapshot is damaged"));
        }
        reject_later_edits(&path, &bytes, at, pointer, last)?;
        let log = Self {
            id: pointer.log,
            file,
            first_hash: pointer.first_hash,
            last,
            offset: u64::try_from(at).expect("a length in memory fits 64 bits"),
            reserved,
            key: keys.begin(salt, file_use),
            key_ids,
        };
        Ok((log, state))
    }

    /// What the root says to name this log.
    pub(super) fn pointer(&self) -> Pointer {
        Pointer {
            log: self.id,
            first_hash: self.first_hash,
        }
    }

    /// Whether it is time for a new log: a quarter of what was reserved is kept for the edits that
    /// come before one can be created.
    pub(super) fn is_used_up(&self) -> bool {
        self.offset > self.reserved / 4 * 3
    }

    /// The master keys of its frames; `None` stands for frames in the clear.
    pub(super) fn key_ids(&self) -> &BTreeSet<Option<KeyId>> {
        &self.key_ids
    }

    /// Appends an edit. Durable on return. After a failure it may be there or not, and may only be
    /// followed by an attempt to write the same edit.
    pub(super) async fn append(&mut self, changes: &[Change]) -> io::Result<()> {
        let payload = encode(changes);
        self.append_payload(&payload, changes.len()).await
    }

    async fn append_payload(&mut self, payload: &[u8], count: usize) -> io::Result<()> {
        let stored_len = match self.key {
            Some(_) => payload.len() + SEAL_BYTES,
            None => payload.len(),
        };
        let header = Header {
            sealed: self.key.is_some(),
            flags: 0,
            log: self.id,
            sequence: self.last.sequence + 1,
            previous: self.last.hash,
            durable_through: self.last.sequence,
            payload_len: u32::try_from(stored_len).expect("a manifest stays below 4 GiB"),
            record_count: u32::try_from(count).expect("a manifest stays below 4 G changes"),
            first_seqno: 0,
        };
        let mut frame = AlignedBuf::zeroed(header.frame_bytes());
        frame[HEADER_BYTES..HEADER_BYTES + payload.len()].copy_from_slice(payload);
        let hash = header.finish(LOG_FORMAT, &mut frame, self.key.as_ref());
        let (result, frame) = self.file.write_at(self.offset, frame).await;
        result?;
        self.offset += u64::try_from(frame.len()).expect("a length in memory fits 64 bits");
        self.last = Mark {
            sequence: header.sequence,
            hash,
        };
        self.key_ids.insert(self.key.as_ref().map(DataKey::id));
        Ok(())
    }
}

fn encode(changes: &[Change]) -> Vec<u8> {
    let mut payload = Vec::new();
    for change in changes {
        change.encode(&mut payload);
    }
    payload
}

/// A frame that holds an edit: header, payload, hash.
type EditFrame<'a> = (Header, &'a [u8], u64);

/// The edit at `at` if it continues the chain; `None` where the chain ends.
fn next_edit<'a>(
    path: &Path,
    bytes: &'a [u8],
    at: usize,
    pointer: Pointer,
    last: Mark,
) -> Result<Option<EditFrame<'a>>, OpenError> {
    let rest = bytes.get(at..).unwrap_or(&[]);
    let header = match Header::parse(LOG_FORMAT, rest) {
        Ok(header) => header,
        Err(Damage::Version { found, log }) if log == pointer.log => {
            return Err(OpenError::Newer {
                path: path.to_owned(),
                newer: Newer::Version {
                    found,
                    known: LOG_FORMAT.newest(),
                },
            });
        }
        Err(_) => return Ok(None),
    };
    let Ok((payload, hash)) = header.verify(rest) else {
        return Ok(None);
    };
    let continues = header.log == pointer.log
        && header.sequence == last.sequence + 1
        && header.previous == last.hash
        && (last.sequence > 0 || hash == pointer.first_hash);
    Ok(continues.then_some((header, payload, hash)))
}

/// Edits are written one at a time, so a whole one behind the end of the chain proves that the
/// chain was broken after it was written.
fn reject_later_edits(
    path: &Path,
    bytes: &[u8],
    end: usize,
    pointer: Pointer,
    last: Mark,
) -> Result<(), OpenError> {
    for at in (end..bytes.len()).step_by(SECTOR_BYTES) {
        let rest = &bytes[at..];
        let Ok(header) = Header::parse(LOG_FORMAT, rest) else {
            continue;
        };
        let is_later = header.log == pointer.log && header.durable_through > last.sequence;
        if is_later && header.verify(rest).is_ok() {
            let detail = format!(
                "edit {} is damaged, but edit {} follows",
                last.sequence + 1,
                header.sequence
            );
            return Err(corrupt(path, end, &detail));
        }
    }
    Ok(())
}

fn corrupt(path: &Path, offset: usize, detail: &str) -> OpenError {
    OpenError::Corrupt {
        path: path.to_owned(),
        offset: u64::try_from(offset).expect("a length in memory fits 64 bits"),
        detail: detail.to_owned(),
    }
}

fn io_error(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| OpenError::Io {
        path,
        doing,
        source,
    }
}
