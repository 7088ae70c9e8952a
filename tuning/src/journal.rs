//! What was about to be written and what stood there before, on disk before the first write.
//!
//! One file a transaction, `journal-0001` and up. A line is a hash of the rest, then JSON; the last
//! line may be torn by a crash and then never happened, a bad line before a good one is damage and
//! refused. Everything a rollback needs is in the first line.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::change::{Change, Disturbed, Target};

/// Layout of the lines.
pub const JOURNAL_SCHEMA: u32 = 1;

/// A journal that cannot be read or written.
#[derive(Debug, Error)]
pub enum JournalError {
    /// The file system refused.
    #[error("{path}: {source}")]
    Io {
        /// File or directory.
        path: PathBuf,
        /// Its answer.
        source: io::Error,
    },
    /// A line before the last one does not hold.
    #[error("{path}: line {line} is damaged; what was changed can no longer be told from it")]
    Damaged {
        /// File.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
    },
    /// Another `torc tune` is at work.
    #[error("{path} is locked: another `torc tune` is changing this host")]
    Busy {
        /// The lock.
        path: PathBuf,
    },
}

/// Contents of one file before the transaction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Which.
    pub target: Target,
    /// Spelling and path of what is restored, as bytes of text.
    pub before: Vec<u8>,
    /// How a value is cut out of `before` for writing.
    pub syntax: crate::change::Syntax,
}

impl Saved {
    /// A file that is disturbed by another's write.
    pub fn disturbed(disturbed: &Disturbed, before: Vec<u8>) -> Self {
        Self {
            target: Target::File(disturbed.path.clone()),
            before,
            syntax: disturbed.syntax,
        }
    }
}

/// A line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    /// Before any write.
    Begun {
        /// [`JOURNAL_SCHEMA`].
        schema: u32,
        /// The plan.
        plan: String,
        /// The boot: run-time settings do not outlive it.
        boot: String,
        /// What is to be written.
        changes: Vec<Change>,
        /// What stood there, in the order of the writes.
        saved: Vec<Saved>,
    },
    /// All writes are done and were read back.
    Applied {
        /// Seconds since 1970 at which it is undone unless confirmed.
        confirm_before_s: Option<u64>,
    },
    /// To stay.
    Confirmed,
    /// Every byte is back.
    RolledBack {
        /// Why.
        reason: String,
    },
}

/// One transaction.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    records: Vec<Record>,
}

impl Journal {
    /// The newest transaction that is not rolled back.
    pub fn newest(directory: &Path) -> Result<Option<Self>, JournalError> {
        for number in numbers(directory)?.into_iter().rev() {
            let journal = Self::open(&directory.join(name(number)))?;
            // Torn in its first line: nothing was written to the kernel.
            if !journal.records.is_empty() && !journal.is_rolled_back() {
                return Ok(Some(journal));
            }
        }
        Ok(None)
    }

    /// Why the newest transaction was undone; `None` when it was not, or there is none.
    pub fn last_undone(directory: &Path) -> Result<Option<String>, JournalError> {
        let Some(number) = numbers(directory)?.pop() else {
            return Ok(None);
        };
        let journal = Self::open(&directory.join(name(number)))?;
        Ok(journal.records.into_iter().find_map(|record| match record {
            Record::RolledBack { reason } => Some(reason),
            _ => None,
        }))
    }

    /// A new transaction; its first record is durable on return, and so is the file's name.
    pub fn begin(directory: &Path, first: Record) -> Result<Self, JournalError> {
        let number = numbers(directory)?.last().map_or(1, |last| last + 1);
        let path = directory.join(name(number));
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .append(true)
            .create_new(true)
            .open(&path)
            .map_err(|source| JournalError::Io {
                path: path.clone(),
                source,
            })?;
        let mut journal = Self {
            path,
            file,
            records: Vec::new(),
        };
        journal.append(first)?;
        let synced = File::open(directory).and_then(|directory| directory.sync_all());
        synced.map_err(|source| JournalError::Io {
            path: directory.to_owned(),
            source,
        })?;
        Ok(journal)
    }

    fn open(path: &Path) -> Result<Self, JournalError> {
        let io = |source| JournalError::Io {
            path: path.to_owned(),
            source,
        };
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .open(path)
            .map_err(io)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(io)?;
        let mut records = Vec::new();
        let mut whole = 0;
        let mut lines = bytes.split_inclusive(|byte| *byte == b'\n').peekable();
        while let Some(line) = lines.next() {
            match parse(line) {
                Some(record) => {
                    records.push(record);
                    whole += line.len() as u64;
                }
                None if lines.peek().is_none() => break,
                None => {
                    return Err(JournalError::Damaged {
                        path: path.to_owned(),
                        line: records.len() + 1,
                    });
                }
            }
        }
        // The torn line never happened: cut it off, or the next record would hang on to it.
        file.set_len(whole).map_err(io)?;
        file.seek(io::SeekFrom::End(0)).map_err(io)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            records,
        })
    }

    /// Adds a line; it is durable on return.
    pub fn append(&mut self, record: Record) -> Result<(), JournalError> {
        let written = line(&record).and_then(|line| {
            self.file.write_all(&line)?;
            self.file.sync_data()
        });
        written.map_err(|source| JournalError::Io {
            path: self.path.clone(),
            source,
        })?;
        self.records.push(record);
        Ok(())
    }

    /// Changes and what stood there before them.
    pub fn begun(&self) -> (&[Change], &[Saved]) {
        match self.records.first() {
            Some(Record::Begun { changes, saved, .. }) => (changes, saved),
            _ => (&[], &[]),
        }
    }

    /// The boot in which it was made.
    pub fn boot(&self) -> &str {
        match self.records.first() {
            Some(Record::Begun { boot, .. }) => boot,
            _ => "",
        }
    }

    /// The plan that it carries out.
    pub fn plan(&self) -> &str {
        match self.records.first() {
            Some(Record::Begun { plan, .. }) => plan,
            _ => "",
        }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn has(&self, wanted: impl Fn(&Record) -> bool) -> bool {
        self.records.iter().any(wanted)
    }

    /// Whether all writes were made.
    pub fn is_applied(&self) -> bool {
        self.has(|record| matches!(record, Record::Applied { .. }))
    }

    /// Whether it is to stay.
    pub fn is_confirmed(&self) -> bool {
        self.has(|record| matches!(record, Record::Confirmed))
    }

    /// Whether it was undone.
    pub fn is_rolled_back(&self) -> bool {
        self.has(|record| matches!(record, Record::RolledBack { .. }))
    }

    /// When it has to be confirmed, in seconds since 1970.
    pub fn confirm_before_s(&self) -> Option<u64> {
        self.records.iter().find_map(|record| match record {
            Record::Applied { confirm_before_s } => *confirm_before_s,
            _ => None,
        })
    }
}

/// Keeps every other `torc tune` from changing the host while it lives.
#[derive(Debug)]
pub struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing alone would not do: a process that another thread is just starting holds a copy of
        // the descriptor until it executes its program. Whatever fails here ends with the process.
        drop(self.0.unlock());
    }
}

impl Lock {
    /// Makes the directory when it is missing and locks it.
    pub fn take(directory: &Path) -> Result<Self, JournalError> {
        let path = directory.join("lock");
        let io = |source| JournalError::Io {
            path: path.clone(),
            source,
        };
        std::fs::create_dir_all(directory).map_err(io)?;
        let mut options = OpenOptions::new();
        let file = options
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(io)?;
        match file.try_lock() {
            Ok(()) => Ok(Self(file)),
            Err(std::fs::TryLockError::WouldBlock) => {
                Err(JournalError::Busy { path: path.clone() })
            }
            Err(std::fs::TryLockError::Error(source)) => Err(io(source)),
        }
    }
}

fn name(number: u32) -> String {
    format!("journal-{number:04}")
}

fn numbers(directory: &Path) -> Result<Vec<u32>, JournalError> {
    let io = |source| JournalError::Io {
        path: directory.to_owned(),
        source,
    };
    let mut numbers = Vec::new();
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(numbers),
        entries => entries.map_err(io)?,
    };
    for entry in entries {
        let file_name = entry.map_err(io)?.file_name();
        let number = file_name
            .to_str()
            .and_then(|name| name.strip_prefix("journal-"));
        numbers.extend(number.and_then(|number| number.parse::<u32>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn line(record: &Record) -> io::Result<Vec<u8>> {
    let json = serde_json::to_string(record)?;
    let hash = xxhash_rust::xxh3::xxh3_64(json.as_bytes());
    Ok(format!("{hash:016x} {json}\n").into_bytes())
}

fn parse(line: &[u8]) -> Option<Record> {
    let line = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let (hash, json) = line.split_once(' ')?;
    let hash = u64::from_str_radix(hash, 16).ok()?;
    if hash != xxhash_rust::xxh3::xxh3_64(json.as_bytes()) {
        return None;
    }
    serde_json::from_str(json).ok()
}

#[cfg(test)]
mod tests {
    use super::{Journal, JournalError, Lock, Record};

    fn first() -> Record {
        Record::Begun {
            schema: super::JOURNAL_SCHEMA,
            plan: "p".into(),
            boot: "b".into(),
            changes: Vec::new(),
            saved: Vec::new(),
        }
    }

    #[test]
    fn a_line_torn_anywhere_never_happened() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::begin(dir.path(), first()).unwrap();
        let head = std::fs::read(journal.path()).unwrap().len();
        journal
            .append(Record::Applied {
                confirm_before_s: Some(7),
            })
            .unwrap();
        let path = journal.path().to_owned();
        let bytes = std::fs::read(&path).unwrap();
        for length in 0..bytes.len() {
            std::fs::write(&path, &bytes[..length]).unwrap();
            let newest = Journal::newest(dir.path()).unwrap();
            assert_eq!(newest.is_some(), length >= head, "{length}");
            assert!(
                newest.is_none_or(|journal| !journal.is_applied()),
                "{length}"
            );
        }
        std::fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
        let mut journal = Journal::newest(dir.path()).unwrap().unwrap();
        journal.append(Record::Confirmed).unwrap();
        assert!(Journal::newest(dir.path()).unwrap().unwrap().is_confirmed());
    }

    #[test]
    fn damage_before_a_good_line_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::begin(dir.path(), first()).unwrap();
        journal.append(Record::Confirmed).unwrap();
        let path = journal.path().to_owned();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[20] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let refused = Journal::newest(dir.path()).unwrap_err();
        assert!(
            matches!(refused, JournalError::Damaged { line: 1, .. }),
            "{refused}"
        );
    }

    #[test]
    fn only_one_at_a_time_changes_a_host() {
        let dir = tempfile::tempdir().unwrap();
        let held = Lock::take(dir.path()).unwrap();
        assert!(matches!(
            Lock::take(dir.path()),
            Err(JournalError::Busy { .. })
        ));
        // As in a process that is being started.
        let copy = held.0.try_clone().unwrap();
        drop(held);
        assert!(Lock::take(dir.path()).is_ok());
        drop(copy);
    }
}
