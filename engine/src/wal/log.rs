//! Appends frames. Owned by the commit task alone.

use std::io;

use torc_env::{AlignedBuf, File};

use super::segment::Prewrite;
use super::{FORMAT, Segment};
use crate::crypt::{KeyId, SEAL_BYTES};
use crate::frame::{Header, Mark, frame_bytes};
use crate::le::len64;

/// The end of the log that is written.
pub(crate) struct Log<F> {
    /// `None` before the first frame since the open.
    segment: Option<Segment<F>>,
    offset: u64,
    /// How much of the segment says only what life it is of.
    signed: u64,
    last: Mark,
}

/// What a frame says besides its place in the chain.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FrameMeta {
    pub(crate) flags: u16,
    pub(crate) durable_through: u64,
    /// Bytes of records.
    pub(crate) payload_len: usize,
    pub(crate) record_count: u32,
    pub(crate) first_seqno: u64,
}

/// A frame that has its place in the log, to be written there.
pub(crate) struct Writing<F> {
    file: F,
    offset: u64,
    frame: AlignedBuf,
    mark: Mark,
}

impl<F: File> Writing<F> {
    /// Writes it, and gives its buffer back. Durable on return if the segment was opened so.
    pub(crate) async fn run(self) -> (io::Result<Mark>, AlignedBuf) {
        let (result, frame) = self.file.write_at(self.offset, self.frame).await;
        (result.map(|()| self.mark), frame)
    }
}

impl<F: File> Log<F> {
    /// A log that goes on behind `last`, in a segment yet to be given.
    pub(crate) fn new(last: Mark) -> Self {
        Self {
            segment: None,
            offset: 0,
            signed: 0,
            last,
        }
    }

    /// The master key of the current segment's frames; `None` when they are in the clear, or there is no
    /// segment.
    pub(crate) fn key_id(&self) -> Option<KeyId> {
        self.segment.as_ref()?.key_id()
    }

    /// Size of a frame with `payload_len` bytes of records in the current segment.
    pub(crate) fn frame_bytes(&self, payload_len: usize) -> usize {
        frame_bytes(self.stored_len(payload_len))
    }

    fn stored_len(&self, payload_len: usize) -> usize {
        match self.key_id() {
            Some(_) => payload_len + SEAL_BYTES,
            None => payload_len,
        }
    }

    /// Whether a frame with `payload_len` bytes of records goes into the current segment. One that is
    /// larger than any segment goes into an empty one, which it extends.
    pub(crate) fn fits(&self, payload_len: usize) -> bool {
        let end = self.end_of(payload_len);
        self.segment
            .as_ref()
            .is_some_and(|segment| self.offset == self.signed || end <= segment.len)
    }

    /// Goes on in another, empty segment.
    pub(crate) fn switch(&mut self, segment: Segment<F>) {
        self.segment = Some(segment);
        self.offset = 0;
        self.signed = 0;
    }

    /// Takes the frame that begins the segment for no reason to leave it: another one may still extend it.
    pub(crate) fn sign(&mut self) {
        self.signed = self.offset;
    }

    /// The file that is written, if any was.
    pub(crate) fn file(&self) -> Option<&F> {
        self.segment.as_ref().map(|segment| &segment.file)
    }

    /// The last frame begun.
    pub(crate) fn last(&self) -> Mark {
        self.last
    }

    /// How much of the segment is used.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Length of the segment.
    pub(crate) fn segment_bytes(&self) -> u64 {
        self.segment.as_ref().map_or(0, |segment| segment.len)
    }

    /// Zeros to be written beside the next frames, if it is time.
    pub(crate) fn prewrite_due(&self) -> Option<Prewrite<F>> {
        self.segment.as_ref()?.prewrite_due(self.offset)
    }

    /// Whether a frame with `payload_len` bytes of records would meet zeros still being written.
    pub(crate) fn must_wait(&self, payload_len: usize) -> bool {
        let end = self.end_of(payload_len);
        self.segment
            .as_ref()
            .is_some_and(|segment| segment.must_wait(end))
    }

    /// Whether a frame with `payload_len` bytes of records can be begun now.
    pub(crate) fn has_place(&self, payload_len: usize) -> bool {
        self.fits(payload_len) && !self.must_wait(payload_len)
    }

    /// Finishes a frame whose records are in place in `frame`, which is as long as [`Log::frame_bytes`]
    /// says, and gives it its place. Several may be on their way at once. After one that failed the log must not be used
    /// again: whether the frame is on disk is unknown.
    pub(crate) fn begin(&mut self, mut frame: AlignedBuf, meta: FrameMeta) -> Writing<F> {
        assert!(self.fits(meta.payload_len), "frame beyond the segment");
        let stored_len = self.stored_len(meta.payload_len);
        let end = self.end_of(meta.payload_len);
        let segment = self.segment.as_ref().expect("frames fit only a segment");
        assert!(
            meta.durable_through <= self.last.sequence,
            "a mark beyond the log"
        );
        let header = Header {
            sealed: segment.key.is_some(),
            flags: meta.flags,
            log: segment.id.0,
            sequence: self.last.sequence + 1,
            previous: self.last.hash,
            durable_through: meta.durable_through,
            payload_len: u32::try_from(stored_len).expect("records are bounded"),
            record_count: meta.record_count,
            first_seqno: meta.first_seqno,
        };
        let hash = header.finish(FORMAT, &mut frame, segment.key.as_ref());
        segment.claim(end);
        let offset = std::mem::replace(&mut self.offset, end);
        self.last = Mark {
            sequence: header.sequence,
            hash,
        };
        Writing {
            file: segment.file.clone(),
            offset,
            frame,
            mark: self.last,
        }
    }

    /// Where a frame with `payload_len` bytes of records would end.
    fn end_of(&self, payload_len: usize) -> u64 {
        self.offset + len64(self.frame_bytes(payload_len))
    }
}
