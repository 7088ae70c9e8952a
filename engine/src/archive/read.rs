//! Reads the records of archived segments, in the order in which they were written.
//!
//! Every frame is held against the chain: what does not follow the frame before is passed over as at a start, and
//! whether anything is missing is known at the end of each segment.

use std::borrow::Cow;

use torc_env::{SECTOR_BYTES, TreeId};

use super::trailer::Trailer;
use crate::crypt::{FileUse, Keys, MissingKey, Opener, Unopened};
use crate::frame::{Damage, Header, Mark};
use crate::record::EntryRef;
use crate::wal::{FORMAT, decode};

/// Why a segment cannot be replayed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// A key that is not given.
    #[error(transparent)]
    Key(#[from] MissingKey),
    /// A frame cannot be used though its checksums fit.
    #[error("at offset {offset}: {detail}")]
    Corrupt {
        /// Where the frame begins.
        offset: usize,
        /// What is wrong.
        detail: String,
    },
    /// The frames end before the trailer says.
    #[error(
        "its frames do not continue the log behind frame {found}, though its trailer says they go on to {expected}"
    )]
    Broken {
        /// The last frame that follows.
        found: u64,
        /// The last frame as the trailer says.
        expected: u64,
    },
}

/// A store's log, read segment by segment.
#[derive(Clone, Copy, Debug)]
pub struct Replay {
    last: Mark,
}

impl Replay {
    /// A replay of what follows `mark`.
    pub fn new(mark: Mark) -> Self {
        Self { last: mark }
    }

    /// The frames of the next segment, which is verified (see [`Trailer::open`]).
    pub fn segment<'a>(
        &'a mut self,
        trailer: &'a Trailer,
        body: &'a [u8],
        keys: &Keys,
    ) -> Frames<'a> {
        Frames {
            replay: self,
            opener: Opener::new(keys, FileUse::Segment(trailer.segment.0)),
            trailer,
            body,
            offset: 0,
        }
    }
}

/// The frames of one segment that are part of the log.
pub struct Frames<'a> {
    replay: &'a mut Replay,
    opener: Opener,
    trailer: &'a Trailer,
    body: &'a [u8],
    offset: usize,
}

impl<'a> Frames<'a> {
    /// The next frame with what was not there before it; `None` at the end of the segment.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub fn next_frame(&mut self) -> Result<Option<Frame<'a>>, ReadError> {
        while self.offset < self.body.len() {
            let offset = self.offset;
            let Some((header, payload, hash)) = self.frame_at(offset)? else {
                self.offset += SECTOR_BYTES;
                continue;
            };
            self.offset += header.frame_bytes();
            let last = self.replay.last;
            if header.sequence != last.sequence + 1 || header.previous != last.hash {
                continue;
            }
            self.replay.last = Mark {
                sequence: header.sequence,
                hash,
            };
            return self.open(offset, header, payload).map(Some);
        }
        let found = self.replay.last.sequence;
        if found < self.trailer.last {
            return Err(ReadError::Broken {
                found,
                expected: self.trailer.last,
            });
        }
        Ok(None)
    }

    /// The whole frame at `offset`, if there is one.
    fn frame_at(&self, offset: usize) -> Result<Option<Stored<'a>>, ReadError> {
        let bytes = &self.body[offset..];
        match Header::parse(FORMAT, bytes) {
            Ok(header) if header.log == self.trailer.segment.0 => {
                let verified = header.verify(bytes).ok();
                Ok(verified.map(|(payload, hash)| (header, payload, hash)))
            }
            Err(Damage::Version { found, log }) if log == self.trailer.segment.0 => {
                Err(ReadError::Corrupt {
                    offset,
                    detail: format!("a frame of version {found}, which this build does not read"),
                })
            }
            Ok(_) | Err(_) => Ok(None),
        }
    }

    fn open(
        &mut self,
        offset: usize,
        header: Header,
        payload: &'a [u8],
    ) -> Result<Frame<'a>, ReadError> {
        let bytes = &self.body[offset..];
        let corrupt = |detail: String| ReadError::Corrupt { offset, detail };
        let opened = self.opener.open(&header, bytes, payload);
        let payload = opened.map_err(|unopened| match unopened {
            Unopened::Missing(key) => ReadError::Key(key),
            Unopened::Forged => corrupt(Unopened::FORGED.to_owned()),
        })?;
        if decode(&payload, header.record_count).is_none() {
            return Err(corrupt("a whole frame with malformed records".to_owned()));
        }
        Ok(Frame { header, payload })
    }
}

/// A frame as it is stored: header, payload, hash.
type Stored<'a> = (Header, &'a [u8], u64);

/// Records that were written together.
pub struct Frame<'a> {
    header: Header,
    payload: Cow<'a, [u8]>,
}

impl Frame<'_> {
    /// Its records with their trees, in order.
    pub fn records(&self) -> impl Iterator<Item = (TreeId, EntryRef<'_>)> {
        let records = decode(&self.payload, self.header.record_count).unwrap_or_default();
        (self.header.first_seqno..)
            .zip(records)
            .map(|(seqno, logged)| (logged.tree, logged.entry(seqno)))
    }
}
