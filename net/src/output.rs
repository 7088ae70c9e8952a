//! Answers that wait to be sent on one connection.
//!
//! Small answers are written into one growing buffer; large bodies are kept as they are between the
//! buffers. [`Output::take`] hands out everything, for one send.
//!
//! Invariant: bytes leave in the order in which they were written.

use bytes::{Bytes, BytesMut};
use torc_runtime::TcpStream;

use crate::limits::COALESCE_BYTES_MAX;

/// The largest buffer that a connection keeps between sends.
const OUTPUT_BUFFER_KEPT_BYTES: usize = 64 << 10;

/// What one send carries.
#[derive(Debug)]
pub enum Sending {
    /// Small answers, copied together.
    Buffer(BytesMut),
    /// Small and large ones, in order.
    Runs(Vec<Bytes>),
}

impl Sending {
    /// Sends everything; gives the buffer back when there was one.
    pub async fn send(self, stream: &TcpStream) -> std::io::Result<Option<BytesMut>> {
        match self {
            Sending::Buffer(buffer) => {
                let (sent, buffer) = stream.send_buffer(buffer).await;
                sent.map(|()| Some(buffer))
            }
            Sending::Runs(runs) => stream.send(runs).await.map(|()| None),
        }
    }
}

/// The answers of one connection that are not sent yet.
#[derive(Debug, Default)]
pub struct Output {
    /// Complete pieces, before `tail`.
    pieces: Vec<Bytes>,
    tail: BytesMut,
    /// Bytes in `pieces`.
    piece_bytes: usize,
    /// Bytes that [`Output::take`] took out and that are not sent yet.
    taken_bytes: usize,
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
        self.pieces.push(bytes);
    }

    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.piece_bytes + self.tail.len()
    }

    /// Bytes that wait, or that are being sent.
    pub fn held_bytes(&self) -> usize {
        self.len() + self.taken_bytes
    }

    /// What was taken is sent.
    pub fn sent(&mut self) {
        self.taken_bytes = 0;
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes out everything that waits, for one send.
    pub fn take(&mut self) -> Sending {
        self.taken_bytes = self.len();
        if self.pieces.is_empty() {
            return Sending::Buffer(std::mem::take(&mut self.tail));
        }
        self.seal();
        self.piece_bytes = 0;
        Sending::Runs(self.pieces.drain(..).collect())
    }

    /// Gives a buffer back that [`Output::take`] took and that is sent, so that the next answers
    /// need no allocation.
    pub fn recycle(&mut self, buffer: BytesMut) {
        if self.tail.capacity() == 0 && buffer.capacity() <= OUTPUT_BUFFER_KEPT_BYTES {
            self.tail = buffer;
            self.tail.clear();
        }
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
            self.pieces.push(self.tail.split().freeze());
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
        let Sending::Runs(runs) = out.take() else {
            panic!("one large answer asks for runs")
        };
        assert_eq!(runs, [&b"ab"[..], &large, b"c"]);
        assert_eq!(runs[1].as_ptr(), large.as_ptr(), "not copied");
        assert!(out.is_empty());
        assert_eq!(out.held_bytes(), large.len() + 3);
        out.sent();
        assert_eq!(out.held_bytes(), 0);
        out.append(Bytes::from_static(b"d"));
        assert!(matches!(out.take(), Sending::Buffer(buffer) if &buffer[..] == b"d"));
    }
}
