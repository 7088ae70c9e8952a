//! Prints the files of a store in words, and verifies them: tables, blobs, log segments, manifest.
//!
//! Not on a request's path: for whoever looks at a data directory, also that of a node that is down.
//! Reads only. A damaged part is a line that begins with `DAMAGED`, and whatever can be read is printed
//! all the same. Of what is encrypted with a key that is not given, the checksums are verified and the
//! rest is not shown. What it says about one file is not what an open of the store would conclude: that
//! looks at all of them together.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

use torc_env::{AlignedBuf, Disk, File, OpenMode, SECTOR_BYTES, Token, TokenRange};

use crate::blob::{BlobFooter, BlobRef, blob_id, blob_path};
use crate::crypt::{FileUse, Keys, Opener, Unopened, key_of};
use crate::error::{Newer, ReadError};
use crate::frame::{Damage, Format, Header};
use crate::layout::STORE_ROOT;
use crate::le::len64;
use crate::manifest::{self, Change};
use crate::record::ScanFrom;
use crate::table::{
    ReadAhead, Stored, Table, blob_checksums_of, checksums_of, footer_error, table_id,
};
use crate::wal::{self, FLAG_CLOSED, FLAG_UNSYNCED, SegmentId};

/// Why a file cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// Its name is not that of a table, blob, log segment or manifest file.
    #[error("{}: neither a table, a blob, a log segment nor a part of a manifest, by its name", .0.display())]
    Unknown(PathBuf),
    /// The device refused.
    #[error("{}: cannot read", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the device said.
        source: io::Error,
    },
    /// Written by a newer version of the program.
    #[error("{}: {newer}; look at it with a newer program", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// What is new.
        newer: Newer,
    },
}

/// A frame as it lies in a file.
struct Frame<'a> {
    at: usize,
    header: Header,
    /// From the header on, to the end of the file.
    bytes: &'a [u8],
    payload: &'a [u8],
    hash: u64,
}

/// How a file is looked at.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Print every record too.
    pub with_records: bool,
    /// What encrypted files need.
    pub keys: Keys,
}

/// Prints what the file at `path` holds, a line at a time. Returns the number of damaged parts.
///
/// # Errors
/// When the file is of no known kind, or cannot be read at all.
pub async fn inspect<D: Disk>(
    disk: &D,
    path: &Path,
    view: &View,
    print: &mut dyn FnMut(String),
) -> Result<u64, InspectError> {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.unwrap_or_default();
    if let Some(file_id) = table_id(name) {
        let dir = path.parent().unwrap_or(Path::new(""));
        return table(disk, dir, file_id, view, print).await;
    }
    if let Some(file_id) = blob_id(name) {
        let dir = path.parent().unwrap_or(Path::new(""));
        return blob(disk, dir, file_id, view, print).await;
    }
    if let Some(id) = SegmentId::from_name(name) {
        let bytes = content(disk, path).await?;
        return segment(&bytes, id, view, print).map_err(newer(path));
    }
    if let Some(id) = manifest::log_id(name) {
        let bytes = content(disk, path).await?;
        return manifest_log(&bytes, id, &view.keys, print).map_err(newer(path));
    }
    if name == STORE_ROOT {
        let bytes = content(disk, path).await?;
        return root(&bytes, print).map_err(newer(path));
    }
    Err(InspectError::Unknown(path.to_owned()))
}

fn newer(path: &Path) -> impl Fn(Newer) -> InspectError {
    move |newer| InspectError::Newer {
        path: path.to_owned(),
        newer,
    }
}

async fn content<D: Disk>(disk: &D, path: &Path) -> Result<AlignedBuf, InspectError> {
    let failed = |source| InspectError::Io {
        path: path.to_owned(),
        source,
    };
    let file = disk.open(path, OpenMode::Read).await.map_err(failed)?;
    let len = file.len().await.map_err(failed)?;
    let len = usize::try_from(len).map_err(|error| failed(io::Error::other(error)))?;
    let whole = AlignedBuf::zeroed(len.next_multiple_of(SECTOR_BYTES));
    let (result, mut bytes) = file.read_at(0, whole).await;
    bytes.set_len(result.map_err(failed)?);
    Ok(bytes)
}

async fn table<D: Disk>(
    disk: &D,
    dir: &Path,
    file_id: u64,
    view: &View,
    print: &mut dyn FnMut(String),
) -> Result<u64, InspectError> {
    let table = match Table::open(disk, dir, file_id, &view.keys).await {
        Ok(table) => table,
        Err(ReadError::Io { path, source, .. }) => return Err(InspectError::Io { path, source }),
        Err(ReadError::Newer { path, newer }) => return Err(InspectError::Newer { path, newer }),
        Err(ReadError::Key { source, .. }) => {
            print(format!("table {file_id:016x}: {source}"));
            return checksums(disk, dir, file_id, print).await;
        }
        Err(error) => {
            print(format!("DAMAGED: {error}"));
            return Ok(1);
        }
    };
    let info = table.info();
    print(format!(
        "table {file_id:016x} of tree {}, {} bytes",
        info.tree.0, info.bytes
    ));
    if let Some(key) = info.key {
        print(format!("encrypted with master key {key}"));
    }
    print(format!(
        "{} records in {} blocks: {} tombstones, {} with an expiry; {} bytes of keys, {} of values",
        info.entries, info.blocks, info.tombstones, info.expiring, info.key_bytes, info.value_bytes
    ));
    print(format!(
        "seqnos {} to {}, stamps {} to {}, expiries {} to {} ms, purgeable stamps {} to {}",
        info.seqnos.min,
        info.seqnos.max,
        info.stamps.min,
        info.stamps.max,
        info.expiries_ms.min,
        info.expiries_ms.max,
        info.purgeable_stamps.min,
        info.purgeable_stamps.max,
    ));
    print(format!(
        "tokens {:032x} to {:032x}, keys \"{}\" to \"{}\"",
        info.first_token.0,
        info.last_token.0,
        info.first_key.escape_ascii(),
        info.last_key.escape_ascii(),
    ));
    for used in &info.blobs {
        print(format!(
            "{} values in blob {:016x}: {} of {} bytes",
            used.values, used.file.file_id, used.bytes, used.file.value_bytes
        ));
    }
    let (records, damaged) = blocks(&table, view.with_records, print).await?;
    print(format!(
        "{records} records verified, {damaged} damaged blocks"
    ));
    if damaged == 0 && records != info.entries {
        print(format!("DAMAGED: the footer says {} records", info.entries));
        return Ok(1);
    }
    Ok(damaged)
}

async fn blob<D: Disk>(
    disk: &D,
    dir: &Path,
    file_id: u64,
    view: &View,
    print: &mut dyn FnMut(String),
) -> Result<u64, InspectError> {
    let path = blob_path(dir, file_id);
    let failed = |source| InspectError::Io {
        path: path.clone(),
        source,
    };
    let file = disk.open(&path, OpenMode::Read).await.map_err(failed)?;
    let len = file.len().await.map_err(failed)?;
    let sector = len64(SECTOR_BYTES);
    if len == 0 || !len.is_multiple_of(sector) {
        print(format!("DAMAGED: {len} bytes are no blob"));
        return Ok(1);
    }
    let footer_at = len - sector;
    let (result, footer) = file
        .read_at(footer_at, AlignedBuf::zeroed(SECTOR_BYTES))
        .await;
    result.map_err(failed)?;
    match BlobFooter::decode(&footer, file_id, len, &view.keys) {
        Ok(footer) => {
            let (tree, file) = (footer.tree.0, footer.file);
            let bytes = file.bytes;
            print(format!("blob {file_id:016x} of tree {tree}, {bytes} bytes"));
            if let Some(key) = file.key() {
                print(format!("encrypted with master key {key}"));
            }
            print(format!(
                "{} values of {} bytes",
                footer.values, footer.raw_bytes
            ));
        }
        Err(unreadable) => {
            let error = Err(footer_error(&path, footer_at, unreadable));
            return tell(error, print, |_| String::new());
        }
    }
    let verified = blob_checksums_of(disk, dir, file_id).await;
    tell(verified, print, |values| {
        format!("{values} values have the checksums that they should")
    })
}

/// Verifies the checksums of a sealed table without its key.
async fn checksums<D: Disk>(
    disk: &D,
    dir: &Path,
    file_id: u64,
    print: &mut dyn FnMut(String),
) -> Result<u64, InspectError> {
    let verified = checksums_of(disk, dir, file_id).await;
    tell(verified, print, |blocks| {
        format!(
            "{blocks} blocks and all sections have the checksums that they should; nothing was decrypted"
        )
    })
}

/// Prints what was verified, or the damage; returns the number of damaged parts.
fn tell(
    verified: Result<u64, ReadError>,
    print: &mut dyn FnMut(String),
    line: impl FnOnce(u64) -> String,
) -> Result<u64, InspectError> {
    match verified {
        Ok(count) => {
            print(line(count));
            Ok(0)
        }
        Err(ReadError::Io { path, source, .. }) => Err(InspectError::Io { path, source }),
        Err(ReadError::Newer { path, newer }) => Err(InspectError::Newer { path, newer }),
        Err(error) => {
            print(format!("DAMAGED: {error}"));
            Ok(1)
        }
    }
}

/// Reads every block; returns the records read and the blocks that cannot be.
async fn blocks<D: Disk>(
    table: &Table<D>,
    with_records: bool,
    print: &mut dyn FnMut(String),
) -> Result<(u64, u64), InspectError> {
    let (mut records, mut damaged) = (0, 0);
    let from = ScanFrom::Token(Token(0));
    let mut iter = table.iter(&from, TokenRange::ALL, ReadAhead::background(1));
    loop {
        match iter.next().await {
            Ok(None) => break,
            Ok(Some(stored)) => {
                records += 1;
                if with_records {
                    print(entry_line(&stored));
                }
            }
            Err(ReadError::Io { path, source, .. }) => {
                return Err(InspectError::Io { path, source });
            }
            Err(error) => {
                damaged += 1;
                print(format!("DAMAGED: {error}"));
                iter.skip_block();
            }
        }
    }
    Ok((records, damaged))
}

fn entry_line(stored: &Stored) -> String {
    let entry = &stored.entry;
    let place = stored.separate.map(|separate| {
        let BlobRef {
            file_id, offset, ..
        } = separate.reference;
        format!(" in blob {file_id:016x} at {offset}")
    });
    format!(
        "  {:032x} \"{}\" {:?}, seqno {}, stamp {}, expires {}, {} bytes{}",
        entry.token.0,
        entry.key.escape_ascii(),
        entry.record.kind,
        entry.seqno,
        entry.record.stamp,
        entry.record.expires_at_ms,
        stored.value_len(),
        place.unwrap_or_default(),
    )
}

fn segment(
    bytes: &[u8],
    id: SegmentId,
    view: &View,
    print: &mut dyn FnMut(String),
) -> Result<u64, Newer> {
    let mut opener = Opener::new(&view.keys, FileUse::Segment(id.0));
    print(format!("log segment {id}, {} bytes", bytes.len()));
    let frames = frames(bytes, wal::FORMAT, id.0)?;
    let mut damaged = chain_damage(&frames, print);
    for frame in &frames {
        let header = &frame.header;
        let mut line = frame_line(frame, "records");
        line.push_str(&format!(
            ", seqnos from {}, durable through {}",
            header.first_seqno, header.durable_through
        ));
        for (flag, word) in [(FLAG_UNSYNCED, ", unsynced"), (FLAG_CLOSED, ", closed")] {
            if header.flags & flag != 0 {
                line.push_str(word);
            }
        }
        print(line);
        let Some(payload) = open(frame, &mut opener, &mut damaged, print) else {
            continue;
        };
        match wal::decode(&payload, header.record_count) {
            None => {
                damaged += 1;
                print(format!("DAMAGED: malformed records at offset {}", frame.at));
            }
            Some(records) if view.with_records => {
                for record in records {
                    print(format!(
                        "  tree {} \"{}\" {:?}, stamp {}, expires {}, {} bytes",
                        record.tree.0,
                        record.key.escape_ascii(),
                        record.kind,
                        record.stamp,
                        record.expires_at_ms,
                        record.value.len(),
                    ));
                }
            }
            Some(_) => {}
        }
    }
    Ok(damaged)
}

/// The payload of a frame, in the clear; `None`, and a line about it, when it cannot be had.
fn open<'a>(
    frame: &Frame<'a>,
    opener: &mut Opener,
    damaged: &mut u64,
    print: &mut dyn FnMut(String),
) -> Option<Cow<'a, [u8]>> {
    match opener.open(&frame.header, frame.bytes, frame.payload) {
        Ok(payload) => Some(payload),
        Err(Unopened::Missing(missing)) => {
            print(format!("  not shown: {missing}"));
            None
        }
        Err(Unopened::Forged) => {
            *damaged += 1;
            print(format!(
                "DAMAGED: at offset {}: {}",
                frame.at,
                Unopened::FORGED
            ));
            None
        }
    }
}

fn manifest_log(
    bytes: &[u8],
    id: u64,
    keys: &Keys,
    print: &mut dyn FnMut(String),
) -> Result<u64, Newer> {
    let mut opener = Opener::new(keys, FileUse::Manifest(id));
    print(format!("manifest log {id:016x}, {} bytes", bytes.len()));
    let frames = frames(bytes, manifest::LOG_FORMAT, id)?;
    let mut damaged = chain_damage(&frames, print);
    if frames.first().is_none_or(|first| first.at > 0) {
        damaged += 1;
        print("DAMAGED: there is no snapshot at the beginning".to_owned());
    }
    for frame in &frames {
        print(frame_line(frame, "changes"));
        let Some(payload) = open(frame, &mut opener, &mut damaged, print) else {
            continue;
        };
        match Change::decode_edit(&payload, frame.header.record_count) {
            None => {
                damaged += 1;
                print(format!("DAMAGED: malformed changes at offset {}", frame.at));
            }
            Some(changes) => {
                for change in changes {
                    print(format!("  {change:?}"));
                }
            }
        }
    }
    Ok(damaged)
}

fn root(bytes: &[u8], print: &mut dyn FnMut(String)) -> Result<u64, Newer> {
    print("manifest root".to_owned());
    let mut valid = 0;
    for (slot, bytes) in bytes.chunks(SECTOR_BYTES).enumerate() {
        match manifest::parse_slot(bytes) {
            Ok((generation, pointer)) => {
                valid += 1;
                let at = slot * SECTOR_BYTES;
                let log = pointer.log;
                print(format!(
                    "slot at {at}: generation {generation}, log {log:016x}"
                ));
            }
            Err(Damage::Version { found, .. }) => {
                let known = manifest::ROOT_FORMAT.newest();
                return Err(Newer::Version { found, known });
            }
            Err(_) => {}
        }
    }
    if valid == 0 {
        print("DAMAGED: no valid slot".to_owned());
        return Ok(1);
    }
    Ok(0)
}

fn frame_line(frame: &Frame<'_>, what: &str) -> String {
    let header = &frame.header;
    let key = key_of(header, frame.payload).map(|key| format!(", encrypted with master key {key}"));
    format!(
        "frame {} at {}: {} {what}, {} bytes{}",
        header.sequence,
        frame.at,
        header.record_count,
        header.payload_len,
        key.unwrap_or_default(),
    )
}

/// The valid frames of a log's file.
fn frames(bytes: &[u8], format: Format, log: u64) -> Result<Vec<Frame<'_>>, Newer> {
    let mut frames = Vec::new();
    let mut at = 0;
    while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
        let parsed = match Header::parse(format, rest) {
            Err(Damage::Version { found, log: of }) if of == log => {
                let known = format.newest();
                return Err(Newer::Version { found, known });
            }
            parsed => parsed.ok(),
        };
        let header = parsed.filter(|header| header.log == log);
        let verified = header.and_then(|header| {
            let (payload, hash) = header.verify(rest).ok()?;
            Some((header, payload, hash))
        });
        match verified {
            Some((header, payload, hash)) => {
                frames.push(Frame {
                    at,
                    header,
                    bytes: rest,
                    payload,
                    hash,
                });
                at += header.frame_bytes();
            }
            None => at += SECTOR_BYTES,
        }
    }
    Ok(frames)
}

/// Reports frames that do not continue the one before: something between them is gone.
fn chain_damage(frames: &[Frame<'_>], print: &mut dyn FnMut(String)) -> u64 {
    let mut damaged = 0;
    for pair in frames.windows(2) {
        let (before, after) = (&pair[0], &pair[1]);
        let continues = after.header.sequence == before.header.sequence + 1
            && after.header.previous == before.hash;
        if !continues {
            damaged += 1;
            print(format!(
                "DAMAGED: frame {} at {} does not continue frame {}",
                after.header.sequence, after.at, before.header.sequence
            ));
        }
    }
    damaged
}
