//! Answers that wait to be sent on one connection.
//!
//! Small answers are written into one growing buffer; large bodies are kept as they are between the
//! buffers. [`Output::next_send`] hands out what one send takes: everything up to the next large
//! body, in order.
//!
//! Invariant: bytes leave in the order in which they were written.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

use crate::limits::COALESCE_BYTES_MAX;

/// The answers of one connection that are not sent yet.
#[derive(Debug, Default)]
pub struct Output {
    /// Complete pieces, before `tail`.
    pieces: VecDeque<Bytes>,
    tail: BytesMut,
    /// Bytes in `pieces`.
    piece_bytes: usize,
}

impl Output {
    /// Where small answers are written.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.tail
    }

    /// Appends `bytes`: copied when small, shared when large.
    pub fn append(&mut self, bytes: Bytes) {
        if bytes.len() <= COALESCE_BYTES_MAX {
            self.tail.extend_from_slice(&bytes);
            return;
        }
        self.seal();
        self.piece_bytes += bytes.len();
        self.pieces.push_back(bytes);
    }

    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.piece_bytes + self.tail.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes out what the next send carries; `None` when nothing waits.
    pub fn next_send(&mut self) -> Option<Bytes> {
        if let Some(piece) = self.pieces.pop_front() {
            self.piece_bytes -= piece.len();
            return Some(piece);
        }
        (!self.tail.is_empty()).then(|| self.tail.split().freeze())
    }

    /// Everything in one piece, for tests.
    #[cfg(test)]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut all = self.pieces.iter().flatten().copied().collect::<Vec<u8>>();
        all.extend_from_slice(&self.tail);
        all
    }

    fn seal(&mut self) {
        if !self.tail.is_empty() {
            self.piece_bytes += self.tail.len();
            self.pieces.push_back(self.tail.split().freeze());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_answers_leave_together_and_large_ones_uncopied_in_order() {
        let mut out = Output::default();
        let large = Bytes::from(vec![1; COALESCE_BYTES_MAX + 1]);
        out.append(Bytes::from_static(b"a"));
        out.buffer().extend_from_slice(b"b");
        out.append(large.clone());
        out.append(Bytes::from_static(b"c"));
        assert_eq!(out.len(), large.len() + 3);
        assert_eq!(out.next_send().as_deref(), Some(&b"ab"[..]));
        let sent = out.next_send().expect("the large one");
        assert_eq!(sent.as_ptr(), large.as_ptr(), "not copied");
        assert_eq!(out.next_send().as_deref(), Some(&b"c"[..]));
        assert_eq!(out.next_send(), None);
        assert!(out.is_empty());
    }
}
