//! Group commit: gathers records into frames, and tells writers when theirs is durable.
//!
//! Stands between `update`, which puts a decided record into the frame that is being gathered, and
//! the log, which the commit task alone writes. While frames are being written the next one fills: no timer.
//!
//! Invariants: records are numbered, gathered and completed in one order; a batch has one fate.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use torc_env::{AlignedBuf, TreeId};

use crate::error::WriteError;
use crate::frame::HEADER_BYTES;
use crate::memtable::Packed;
use crate::signal::Signal;
use crate::wal;

/// First size of a gathering buffer, in bytes.
const BUFFER_BYTES: usize = 64 << 10;
/// Buffers kept for reuse: two being written, one being gathered.
const SPARE_BUFFERS: usize = 3;
/// A larger buffer, grown for a large record, is not kept.
const SPARE_BUFFER_BYTES_MAX: usize = 4 << 20;

/// What became of a batch.
#[derive(Default)]
pub(crate) struct Fate {
    outcome: RefCell<Option<Result<(), WriteError>>>,
    sequence: Cell<u64>,
    decided: Signal,
}

impl Fate {
    /// Decides it: acknowledged as frame `sequence`, or failed.
    pub(crate) fn decide(&self, outcome: Result<u64, WriteError>) {
        if let Ok(sequence) = outcome {
            self.sequence.set(sequence);
        }
        let before = self.outcome.replace(Some(outcome.map(|_| ())));
        assert!(before.is_none(), "a batch has one fate");
        self.decided.ring();
    }

    /// Completes when it is decided, with the frame's sequence.
    pub(crate) async fn wait(&self) -> Result<u64, WriteError> {
        self.decided
            .until(|| self.outcome.borrow().clone())
            .await
            .map(|()| self.sequence.get())
    }
}

/// Records that share a frame.
pub(crate) struct Batch {
    frame: AlignedBuf,
    payload_len: usize,
    pub(crate) first_seqno: u64,
    pub(crate) entries: Vec<(TreeId, Packed)>,
    pub(crate) fate: Rc<Fate>,
}

impl Batch {
    fn new(frame: AlignedBuf, first_seqno: u64) -> Self {
        Self {
            frame,
            payload_len: 0,
            first_seqno,
            entries: Vec::new(),
            fate: Rc::default(),
        }
    }

    /// Bytes of records.
    pub(crate) fn payload_len(&self) -> usize {
        self.payload_len
    }

    /// Takes the buffer out, as long as the frame is to be.
    pub(crate) fn take_frame(&mut self, len: usize) -> AlignedBuf {
        let mut frame = std::mem::take(&mut self.frame);
        resize(&mut frame, len);
        frame
    }

    fn push(&mut self, tree: TreeId, packed: Packed, bytes: usize) {
        let at = HEADER_BYTES + self.payload_len;
        ensure(&mut self.frame, at + bytes);
        wal::encode(&mut self.frame[at..], tree, &packed);
        self.payload_len += bytes;
        self.entries.push((tree, packed));
    }
}

/// Makes a frame `len` bytes long, keeping what is there.
pub(crate) fn resize(frame: &mut AlignedBuf, len: usize) {
    ensure(frame, len);
    frame.set_len(len);
}

/// Makes room for `len` bytes, keeping what is there.
fn ensure(buffer: &mut AlignedBuf, len: usize) {
    if len > buffer.capacity() {
        let mut larger = AlignedBuf::zeroed(len.max(buffer.capacity() * 2).max(BUFFER_BYTES));
        larger[..buffer.len()].copy_from_slice(buffer);
        *buffer = larger;
    }
    if buffer.len() < buffer.capacity() {
        buffer.set_len(buffer.capacity());
    }
}

/// Batches not yet handed to the log, oldest first.
#[derive(Default)]
pub(crate) struct Gather {
    batches: VecDeque<Batch>,
    bytes: usize,
    buffers: Vec<AlignedBuf>,
}

impl Gather {
    /// Puts a record into the youngest batch, or into a new one if it would take that one above
    /// `batch_bytes_max`.
    pub(crate) fn push(
        &mut self,
        tree: TreeId,
        packed: Packed,
        batch_bytes_max: usize,
    ) -> Rc<Fate> {
        let bytes = wal::encoded_bytes(&packed);
        self.bytes += bytes;
        let has_room = self
            .batches
            .back()
            .is_some_and(|batch| batch.payload_len + bytes <= batch_bytes_max);
        if !has_room {
            let frame = self.buffers.pop().unwrap_or_default();
            self.batches.push_back(Batch::new(frame, packed.seqno));
        }
        let batch = self
            .batches
            .back_mut()
            .expect("pushed above if there was none");
        batch.push(tree, packed, bytes);
        Rc::clone(&batch.fate)
    }

    /// The oldest batch.
    pub(crate) fn pop(&mut self) -> Option<Batch> {
        let batch = self.batches.pop_front()?;
        self.bytes -= batch.payload_len;
        Some(batch)
    }

    /// Bytes of records of the oldest batch; `None` when nothing waits.
    pub(crate) fn next_payload_len(&self) -> Option<usize> {
        self.batches.front().map(Batch::payload_len)
    }

    /// Bytes of records that wait.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes back the buffer of a written frame.
    pub(crate) fn recycle(&mut self, buffer: AlignedBuf) {
        if self.buffers.len() < SPARE_BUFFERS && buffer.capacity() <= SPARE_BUFFER_BYTES_MAX {
            self.buffers.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use torc_env::Token;

    use super::*;
    use crate::frame::frame_bytes;
    use crate::memtable::Arena;
    use crate::record::{Kind, Record};

    fn packed(seqno: u64, value_len: usize) -> Packed {
        let record = Record {
            kind: Kind::Value,
            stamp: 0,
            expires_at_ms: 0,
            value: Bytes::from(vec![1; value_len]),
        };
        Arena::default().pack(&record.at(Token(1), b"key", seqno))
    }

    #[test]
    fn records_share_a_batch_up_to_its_limit() {
        let mut gather = Gather::default();
        for seqno in 1..=5 {
            gather.push(TreeId(1), packed(seqno, 1000), 2500);
        }
        let sizes: Vec<_> = std::iter::from_fn(|| gather.pop())
            .map(|batch| (batch.first_seqno, batch.entries.len()))
            .collect();
        assert_eq!(sizes, [(1, 2), (3, 2), (5, 1)]);
        assert_eq!((gather.bytes(), gather.next_payload_len()), (0, None));
    }

    #[test]
    fn a_record_above_the_limit_gets_a_batch_of_its_own() {
        let mut gather = Gather::default();
        gather.push(TreeId(1), packed(1, 10), 1 << 20);
        gather.push(TreeId(1), packed(2, 3 << 20), 1 << 20);
        assert_eq!(gather.pop().unwrap().entries.len(), 1);
        let mut large = gather.pop().unwrap();
        let bytes = frame_bytes(large.payload_len());
        let frame = large.take_frame(bytes);
        assert_eq!(frame.len(), bytes);
        assert!(frame.ends_with(&[1; 64]) || frame.ends_with(&[0; 64]));
    }
}
