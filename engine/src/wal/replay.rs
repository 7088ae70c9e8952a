//! Reads the log back at open.
//!
//! Every listed segment is read to its end, sector by sector, because what lies behind a break
//! decides what the break means ([`super::chain`]). Files are synced before they are read: what
//! was only in a cache when the process died is either made durable now or not seen.

use std::io;
use std::path::Path;

use torc_env::{AlignedBuf, Disk, File, OpenMode, SECTOR_BYTES, mutation};

use super::chain::{Chain, End, Seen, Verdict};
use super::payload::{self, Logged};
use super::{FORMAT, SegmentId};
use crate::crypt::{FileUse, KeyId, Keys, Opener, Unopened, key_of};
use crate::error::{Newer, OpenError};
use crate::frame::{Damage, Header, Mark};
use crate::le::len64;

/// Bytes read at a time.
const WINDOW_BYTES: usize = 1 << 20;
const SECTOR: u64 = 4096;

/// What the log held.
#[derive(Debug)]
pub(crate) struct Replayed {
    /// How the chain ended.
    pub(crate) end: End,
    /// Length of each segment, in the order given.
    pub(crate) segment_bytes: Vec<u64>,
    /// Where the last valid frame of each segment ends; 0 when there is none.
    pub(crate) segment_ends: Vec<u64>,
    /// Last sequence found in each segment, if any frame was.
    pub(crate) segment_last: Vec<Option<u64>>,
    /// The master key of each segment's frames; `None` for one whose frames are in the clear, or that has
    /// none.
    pub(crate) segment_keys: Vec<Option<KeyId>>,
    /// Frames applied.
    pub(crate) frames: u64,
}

/// Replays `segments` (in the order of their listing) behind `flushed`: gives `apply` the sequence
/// number and content of each record, in the order of writing.
pub(crate) async fn replay<D: Disk>(
    disk: &D,
    dir: &Path,
    segments: &[SegmentId],
    flushed: Mark,
    keys: &Keys,
    mut apply: impl FnMut(u64, &Logged<'_>),
) -> Result<Replayed, OpenError> {
    let mut chain = Chain::new(flushed);
    let mut segment_bytes = Vec::with_capacity(segments.len());
    let mut segment_ends = Vec::with_capacity(segments.len());
    let mut segment_last = Vec::with_capacity(segments.len());
    let mut segment_keys = Vec::with_capacity(segments.len());
    let mut frames = 0;
    for (index, id) in segments.iter().enumerate() {
        let mut reader = Reader::open(disk, dir, *id, keys).await?;
        let mut last = None;
        let mut key = None;
        let mut offset = 0;
        let mut end = 0;
        while offset < reader.len {
            let Some((header, hash, key_id)) = reader.frame_at(offset).await? else {
                offset += SECTOR;
                disk.give_way().await;
                continue;
            };
            let verdict = chain.offer(Seen {
                sequence: header.sequence,
                previous: header.previous,
                hash,
                durable_through: header.durable_through,
                flags: header.flags,
                file: index,
                offset,
            });
            if verdict == Verdict::Apply && !(frames >= 8 && mutation::on("recovery_stops_early")) {
                frames += 1;
                reader.apply(offset, &header, &mut apply)?;
            }
            last = last.max(Some(header.sequence));
            key = key_id;
            offset += u64::try_from(header.frame_bytes()).expect("a frame fits 64 bits");
            end = offset;
            disk.give_way().await;
        }
        segment_bytes.push(reader.len);
        segment_ends.push(end);
        segment_last.push(last);
        segment_keys.push(key);
    }
    let end = chain.finish();
    if let Some(gap) = &end.gap {
        tracing::error!(
            missing_from = gap.missing_from,
            readable_behind = gap.resume.len(),
            "the write-ahead log is damaged: acknowledged updates are lost here"
        );
        for seen in &gap.resume {
            let mut reader = Reader::open(disk, dir, segments[seen.file], keys).await?;
            if let Some((header, _, _)) = reader.frame_at(seen.offset).await? {
                frames += 1;
                reader.apply(seen.offset, &header, &mut apply)?;
            }
        }
    }
    Ok(Replayed {
        end,
        segment_bytes,
        segment_ends,
        segment_last,
        segment_keys,
        frames,
    })
}

fn failed(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> OpenError + use<> {
    let path = path.to_owned();
    move |source| OpenError::Io {
        path,
        doing,
        source,
    }
}

/// A segment read through a window.
pub(crate) struct Reader<'a, F> {
    dir: &'a Path,
    id: SegmentId,
    file: F,
    len: u64,
    window: AlignedBuf,
    window_start: u64,
    opener: Opener,
}

/// A frame found: header, hash, and the master key that it names.
pub(crate) type Frame = (Header, u64, Option<KeyId>);

impl<'a, F: File> Reader<'a, F> {
    async fn open<D: Disk<File = F>>(
        disk: &D,
        dir: &'a Path,
        id: SegmentId,
        keys: &Keys,
    ) -> Result<Self, OpenError> {
        let path = id.path(dir);
        let io = |doing| failed(&path, doing);
        let opened = disk.open(&path, OpenMode::Write).await;
        let file = opened.map_err(io("open a listed segment"))?;
        file.sync().await.map_err(io("sync"))?;
        let len = file.len().await.map_err(io("measure"))?;
        Ok(Self::over(dir, id, (file, len), keys))
    }

    /// Reads a segment that nobody writes any more, as it is stored: its records are not opened.
    pub(crate) async fn of_full<D: Disk<File = F>>(
        disk: &D,
        dir: &'a Path,
        id: SegmentId,
    ) -> Result<Self, OpenError> {
        let path = id.path(dir);
        let io = |doing| failed(&path, doing);
        let opened = disk.open(&path, OpenMode::Read).await;
        let file = opened.map_err(io("open a full segment"))?;
        let len = file.len().await.map_err(io("measure"))?;
        Ok(Self::over(dir, id, (file, len), &Keys::default()))
    }

    fn over(dir: &'a Path, id: SegmentId, (file, len): (F, u64), keys: &Keys) -> Self {
        Self {
            dir,
            id,
            file,
            // A partial sector at the end cannot hold a frame.
            len: len - len % SECTOR,
            window: AlignedBuf::default(),
            window_start: 0,
            opener: Opener::new(keys, FileUse::Segment(id.0)),
        }
    }

    /// Its length in whole sectors.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// `len` bytes at `offset` as they are stored; fewer at the end.
    pub(crate) async fn stored(&mut self, offset: u64, len: usize) -> Result<&[u8], OpenError> {
        self.fill(offset, len).await?;
        let bytes = self.bytes_from(offset);
        Ok(bytes.get(..len).unwrap_or(bytes))
    }

    /// The valid frame at `offset`, if there is one.
    pub(crate) async fn frame_at(&mut self, offset: u64) -> Result<Option<Frame>, OpenError> {
        self.fill(offset, SECTOR_BYTES).await?;
        let header = match Header::parse(FORMAT, self.bytes_from(offset)) {
            Ok(header) if header.log == self.id.0 => header,
            Err(Damage::Version { found, log }) if log == self.id.0 => {
                return Err(OpenError::Newer {
                    path: self.id.path(self.dir),
                    newer: Newer::Version {
                        found,
                        known: FORMAT.newest(),
                    },
                });
            }
            Ok(_) | Err(_) => return Ok(None),
        };
        let frame_bytes = u64::try_from(header.frame_bytes()).expect("a frame fits 64 bits");
        if frame_bytes > self.len - offset {
            return Ok(None);
        }
        self.fill(offset, header.frame_bytes()).await?;
        match header.verify(self.bytes_from(offset)) {
            Ok((payload, hash)) => {
                let key = key_of(&header, payload);
                Ok(Some((header, hash, key)))
            }
            Err(_) => Ok(None),
        }
    }

    /// Gives the records of the frame at `offset`, which is in the window, to `apply`.
    fn apply(
        &mut self,
        offset: u64,
        header: &Header,
        apply: &mut impl FnMut(u64, &Logged<'_>),
    ) -> Result<(), OpenError> {
        let path = self.id.path(self.dir);
        let corrupt = |detail: String| OpenError::Corrupt {
            path: path.clone(),
            offset,
            detail,
        };
        let frame = bytes_from(&self.window, self.window_start, offset);
        let (payload, _) = header
            .verify(frame)
            .map_err(|damage| corrupt(damage.to_string()))?;
        let payload = self.opener.open(header, frame, payload);
        let payload = payload.map_err(|unopened| match unopened {
            Unopened::Missing(source) => OpenError::Key {
                path: path.clone(),
                source,
            },
            Unopened::Forged => corrupt(Unopened::FORGED.to_owned()),
        })?;
        let records = payload::decode(&payload, header.record_count)
            .ok_or_else(|| corrupt("a whole frame with malformed records".to_owned()))?;
        for (seqno, record) in (header.first_seqno..).zip(&records) {
            apply(seqno, record);
        }
        Ok(())
    }

    /// Brings `offset..offset + len`, or what the file has of it, into the window.
    async fn fill(&mut self, offset: u64, len: usize) -> Result<(), OpenError> {
        let window_end = self.window_start + len64(self.window.len());
        if offset >= self.window_start && offset + len64(len) <= window_end {
            return Ok(());
        }
        let want = len.max(WINDOW_BYTES).next_multiple_of(SECTOR_BYTES);
        let left = usize::try_from(self.len - offset).unwrap_or(usize::MAX);
        let buffer = AlignedBuf::zeroed(want.min(left));
        let (result, mut buffer) = self.file.read_at(offset, buffer).await;
        let read = result.map_err(|source| OpenError::Io {
            path: self.id.path(self.dir),
            doing: "read",
            source,
        })?;
        buffer.set_len(read);
        self.window = buffer;
        self.window_start = offset;
        Ok(())
    }

    fn bytes_from(&self, offset: u64) -> &[u8] {
        bytes_from(&self.window, self.window_start, offset)
    }
}

fn bytes_from(window: &[u8], start: u64, offset: u64) -> &[u8] {
    let at = usize::try_from(offset - start).expect("within the window");
    window.get(at..).unwrap_or(&[])
}
