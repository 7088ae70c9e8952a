//! The requests of a trace in a temporary file, and their way back in order.
//!
//! A row has a fixed length. Each worker has a thread that reads its rows ahead, so that no disk holds it
//! up and none waits for another; how far ahead is bounded. The file is gone with the program.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender};

use torc_measure::mix::Operation;

use crate::load::world::Nanos;

/// Bytes of a row in the file: moment, key, bytes, time to live, operation.
pub const ROW_BYTES: usize = 8 + 8 + 4 + 4 + 1;
/// Rows that are read at a time.
const BATCH_ROWS: usize = 4096;
/// Batches that a worker has at most beside the one that it takes rows from.
const BATCHES_AHEAD: usize = 4;

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// When it is due, in nanoseconds from the first.
    pub at: Nanos,
    /// Number of its key.
    pub key: u64,
    /// Bytes of its value, for writes.
    pub value_bytes: u32,
    /// Seconds that the value lives; 0 = for ever.
    pub ttl_seconds: u32,
    /// What it does.
    pub operation: Operation,
}

impl Row {
    fn encode(&self) -> [u8; ROW_BYTES] {
        let mut bytes = [0; ROW_BYTES];
        bytes[..8].copy_from_slice(&self.at.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.key.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.value_bytes.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.ttl_seconds.to_le_bytes());
        let number = Operation::ALL.iter().position(|one| *one == self.operation);
        bytes[24] = number
            .and_then(|number| u8::try_from(number).ok())
            .expect("one of all");
        bytes
    }

    fn decode(bytes: &[u8; ROW_BYTES]) -> io::Result<Self> {
        let long =
            |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let short =
            |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let operation = Operation::ALL.get(usize::from(bytes[24])).copied();
        Ok(Self {
            at: long(0),
            key: long(8),
            value_bytes: short(16),
            ttl_seconds: short(20),
            operation: operation.ok_or(io::ErrorKind::InvalidData)?,
        })
    }
}

/// Writes rows in order.
pub struct Writer {
    file: BufWriter<File>,
    count: u64,
}

/// Rows that were written.
pub struct Spool {
    file: Arc<File>,
}

impl Writer {
    /// To a file that nobody else sees.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            file: BufWriter::with_capacity(1 << 18, tempfile::tempfile()?),
            count: 0,
        })
    }

    /// The next row.
    pub fn add(&mut self, row: &Row) -> io::Result<()> {
        self.count += 1;
        self.file.write_all(&row.encode())
    }

    /// All rows, and their number.
    pub fn end(self) -> io::Result<(Spool, u64)> {
        let file = Arc::new(
            self.file
                .into_inner()
                .map_err(io::IntoInnerError::into_error)?,
        );
        Ok((Spool { file }, self.count))
    }
}

impl Spool {
    /// Every `step`th row from `first` on.
    pub fn ahead(&self, first: usize, step: usize) -> Ahead {
        let (send, batches) = batches();
        let mut place = self.place(first);
        // Nobody may be there any more who wants a batch.
        std::thread::spawn(move || place.read_ahead(step, |batch| send.send(batch).is_ok()));
        let mut ahead = Ahead {
            batches,
            batch: Vec::new().into_iter(),
            next: None,
            failed: None,
        };
        ahead.step();
        ahead
    }

    fn place(&self, first: usize) -> Place {
        Place {
            file: self.file.clone(),
            offset: 0,
            left_out: first,
        }
    }
}

type Batch = io::Result<Vec<Row>>;

/// What takes batches from the thread that reads to the worker, and holds that thread up when it is full.
fn batches() -> (SyncSender<Batch>, Receiver<Batch>) {
    mpsc::sync_channel(BATCHES_AHEAD)
}

/// Where the rows of one worker are read.
struct Place {
    file: Arc<File>,
    offset: u64,
    /// Rows until the next one that is the worker's.
    left_out: usize,
}

impl Place {
    /// Hands every batch over until the last, which is an empty one or an error, or until one is not taken.
    fn read_ahead(&mut self, step: usize, mut hand_over: impl FnMut(Batch) -> bool) {
        loop {
            let batch = self.batch(step);
            let last = !batch.as_ref().is_ok_and(|rows| !rows.is_empty());
            if !hand_over(batch) || last {
                break;
            }
        }
    }

    /// The next rows; none at the end.
    fn batch(&mut self, step: usize) -> Batch {
        let mut rows = Vec::with_capacity(BATCH_ROWS);
        let mut bytes = vec![0; BATCH_ROWS * ROW_BYTES];
        while rows.len() < BATCH_ROWS {
            let read = self.read(&mut bytes)?;
            let (whole, _) = bytes[..read].as_chunks::<ROW_BYTES>();
            if whole.is_empty() {
                break;
            }
            let mut taken = whole.len();
            for (number, row) in whole.iter().enumerate() {
                if self.left_out > 0 {
                    self.left_out -= 1;
                    continue;
                }
                if rows.len() == BATCH_ROWS {
                    taken = number;
                    break;
                }
                rows.push(Row::decode(row)?);
                self.left_out = step - 1;
            }
            self.offset += u64::try_from(taken * ROW_BYTES).expect("a length fits 64 bits");
        }
        Ok(rows)
    }

    /// Reads until `bytes` are full or the file ends.
    fn read(&self, bytes: &mut [u8]) -> io::Result<usize> {
        let mut read = 0;
        while read < bytes.len() {
            let offset = self.offset + u64::try_from(read).expect("a length fits 64 bits");
            match self.file.read_at(&mut bytes[read..], offset) {
                Ok(0) => break,
                Ok(count) => read += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(read)
    }
}

/// A worker's rows in order, the next one at hand.
pub struct Ahead {
    batches: Receiver<Batch>,
    batch: std::vec::IntoIter<Row>,
    next: Option<Row>,
    failed: Option<io::Error>,
}

impl Ahead {
    /// The next row; `None` after the last.
    pub fn peek(&self) -> Option<&Row> {
        self.next.as_ref()
    }

    /// Why rows are missing, where the file could not be read to its end.
    pub fn failed(&mut self) -> Option<io::Error> {
        self.failed.take()
    }

    fn step(&mut self) {
        self.next = self.batch.next();
        if self.next.is_some() {
            return;
        }
        match self.batches.recv() {
            Ok(Ok(rows)) => {
                self.batch = rows.into_iter();
                self.next = self.batch.next();
            }
            Ok(Err(error)) => self.failed = Some(error),
            // The thread has ended: an empty batch was its last.
            Err(_) => {}
        }
    }
}

impl Iterator for Ahead {
    type Item = Row;

    fn next(&mut self) -> Option<Row> {
        let row = self.next?;
        self.step();
        Some(row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(number: u64) -> Row {
        let small = u32::try_from(number).unwrap();
        Row {
            at: number * 1_000_000_007,
            key: u64::MAX - number,
            value_bytes: small,
            ttl_seconds: u32::MAX - small,
            operation: Operation::ALL[usize::try_from(number % 7).unwrap()],
        }
    }

    fn spool(count: u64) -> Spool {
        let mut writer = Writer::new().unwrap();
        (0..count).for_each(|number| writer.add(&row(number)).unwrap());
        writer.end().unwrap().0
    }

    #[test]
    fn workers_share_the_rows_out_and_each_has_its_own_in_order() {
        let batch = u64::try_from(BATCH_ROWS).unwrap();
        for count in [0, 1, 5, batch, batch + 1, 3 * batch * 7 + 1] {
            let spool = spool(count);
            for workers in [1, 3] {
                for first in 0..workers {
                    let mut ahead = spool.ahead(first, workers);
                    let (first, step) = (u64::try_from(first).unwrap(), workers);
                    let mine = (first..count).step_by(step).map(row);
                    assert!(
                        ahead.by_ref().eq(mine),
                        "{first} of {workers}, {count} rows"
                    );
                    assert!(ahead.peek().is_none() && ahead.failed().is_none());
                }
            }
        }
    }

    #[test]
    fn only_so_much_is_read_ahead() {
        let spool = spool(u64::try_from(20 * BATCH_ROWS).unwrap());
        let (send, _batches) = batches();
        let mut place = spool.place(0);
        // Where the thread would be held up.
        place.read_ahead(1, |batch| send.try_send(batch).is_ok());
        let read = u64::try_from((BATCHES_AHEAD + 1) * BATCH_ROWS * ROW_BYTES).unwrap();
        assert_eq!(place.offset, read, "one beside those that wait");
    }

    #[test]
    fn rows_that_cannot_be_read_are_a_failure_and_no_end() {
        let spool = spool(10);
        spool.file.write_all_at(&[99], 5 * 25 + 24).unwrap();
        let mut ahead = spool.ahead(0, 1);
        assert_eq!(ahead.by_ref().count(), 0);
        assert!(ahead.failed().is_some());
    }
}
