//! The topology on disk: the decided epoch and this voter's memory of the next one.
//!
//! Two files of one frame format (`docs/formats/topology.md`): `node/topology` holds the newest
//! epoch known to be decided, `node/topology.vote` the acceptor's state of the instance after it.
//! Each is replaced whole: written beside, synced, renamed over, directory synced. A crash leaves
//! the old one or the new one.
//!
//! **Invariants.** When [`Store::save_vote`] returns, the vote is durable: only then may the answer
//! leave. After a failed write the store refuses everything until the restart reads back what the
//! disk really has. A damaged file is an error, never "no vote yet": a voter that has forgotten must
//! not vote.

use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use crc_fast::{CrcAlgorithm, checksum};
use torc_env::{AlignedBuf, Disk, File, NodeId, OpenMode, SECTOR_BYTES};

use super::paxos::{Acceptor, Ballot};
use super::{DecodeError, Epoch, Topology};

const DIR: &str = "node";
const MAGIC: [u8; 8] = *b"TORCTOPO";
const VERSION: u16 = 1;
/// Magic, version, kind, payload length, checksum.
const HEADER_BYTES: usize = 8 + 2 + 2 + 4 + 4;
/// Bounds what a damaged length can make this allocate. A topology of 4,096 members is 2 MiB.
const PAYLOAD_BYTES_MAX: usize = 64 << 20;

/// The two files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Decided,
    Vote,
}

impl Kind {
    fn number(self) -> u16 {
        match self {
            Kind::Decided => 1,
            Kind::Vote => 2,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Decided => "topology",
            Kind::Vote => "topology.vote",
        }
    }
}

/// Why the topology cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not what was written. It holds votes or the decided topology, so starting over
    /// without it could decide an epoch twice.
    #[error("{} is damaged ({reason}); restore it or replace this node", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A later version of the program wrote the file.
    #[error(
        "{}: format version {found}, this program reads up to {VERSION}; start a newer program: nothing was changed",
        path.display()
    )]
    Newer {
        /// Which file.
        path: PathBuf,
        /// The version in it.
        found: u16,
    },
    /// The file holds no valid topology.
    #[error("{}: {source}", path.display())]
    Decode {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        source: DecodeError,
    },
    /// An earlier write failed; what the disk has is unknown until the next start.
    #[error("an earlier write of the topology failed; restart the node")]
    Poisoned,
}

impl StoreError {
    fn is_for_want_of_space(&self) -> bool {
        matches!(self, StoreError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull)
    }
}

/// Why bytes are none of the two files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unreadable {
    Damaged(&'static str),
    Newer(u16),
}

impl From<&'static str> for Unreadable {
    fn from(reason: &'static str) -> Self {
        Unreadable::Damaged(reason)
    }
}

impl Unreadable {
    /// As the trouble of the file at `path`.
    fn at(self, path: &Path) -> StoreError {
        let path = path.to_owned();
        match self {
            Unreadable::Damaged(reason) => StoreError::Damaged { path, reason },
            Unreadable::Newer(found) => StoreError::Newer { path, found },
        }
    }
}

/// A voter's memory of one instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vote {
    /// The epoch that the instance decides.
    pub instance: Epoch,
    /// What was promised and accepted; values are encoded topologies.
    pub acceptor: Acceptor<Bytes>,
}

/// What a start finds.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// The decided topology.
    pub decided: Option<Topology>,
    /// The vote, unless it is about an epoch that is decided already.
    pub vote: Option<Vote>,
}

/// The topology in a copy of the file `node/topology`.
///
/// # Errors
/// When the bytes are not what was written, or hold no valid topology.
pub fn read_copy(bytes: &[u8]) -> Result<Topology, StoreError> {
    let path = path(Kind::Decided);
    let payload = unframe(Kind::Decided, bytes).map_err(|unreadable| unreadable.at(&path))?;
    Topology::decode(payload).map_err(|source| StoreError::Decode { path, source })
}

/// The content of `node/topology.vote` of a node that has never voted: so that one which is missing is a lost one.
pub fn no_vote() -> Vec<u8> {
    let vote = Vote {
        instance: Epoch::default(),
        acceptor: Acceptor::default(),
    };
    frame(Kind::Vote, &encode_vote(&vote)).to_vec()
}

/// Reads and replaces the two files. One user at a time: the caller holds it exclusively.
#[derive(Debug)]
pub struct Store<D> {
    disk: D,
    poisoned: bool,
}

impl<D: Disk> Store<D> {
    /// Opens the directory and reads what is there.
    pub async fn open(disk: D) -> Result<(Self, Found), StoreError> {
        let dir = Path::new(DIR);
        disk.create_dir(dir).await.map_err(at(dir))?;
        let store = Store {
            disk,
            poisoned: false,
        };
        let mut found = Found::default();
        if let Some(payload) = store.read(Kind::Decided).await? {
            let decided = Topology::decode(&payload).map_err(|source| StoreError::Decode {
                path: path(Kind::Decided),
                source,
            })?;
            found.decided = Some(decided);
        }
        let known = found
            .decided
            .as_ref()
            .map_or(Epoch::default(), |decided| decided.epoch);
        if let Some(payload) = store.read(Kind::Vote).await? {
            let vote = decode_vote(&payload).ok_or(StoreError::Damaged {
                path: path(Kind::Vote),
                reason: "not a vote",
            })?;
            found.vote = (vote.instance > known).then_some(vote);
        }
        Ok((store, found))
    }

    /// Replaces the decided topology. Durable on return.
    pub async fn save_decided(&mut self, encoded: &[u8]) -> Result<(), StoreError> {
        self.replace(Kind::Decided, encoded).await
    }

    /// Replaces the vote. Durable on return.
    pub async fn save_vote(&mut self, vote: &Vote) -> Result<(), StoreError> {
        self.replace(Kind::Vote, &encode_vote(vote)).await
    }

    async fn replace(&mut self, kind: Kind, payload: &[u8]) -> Result<(), StoreError> {
        if self.poisoned {
            return Err(StoreError::Poisoned);
        }
        // Stays set when the write fails, or when the caller gives up midway.
        self.poisoned = true;
        let fresh = match self.write_beside(kind, payload).await {
            // What is in force is untouched, and there may be room for another file later.
            Err(error) if error.is_for_want_of_space() => {
                self.poisoned = false;
                return Err(error);
            }
            beside => beside?,
        };
        self.put_in_force(&fresh, &path(kind)).await?;
        self.poisoned = false;
        Ok(())
    }

    /// Writes beside what is in force, and syncs. What an earlier attempt left there is removed first.
    async fn write_beside(&self, kind: Kind, payload: &[u8]) -> Result<PathBuf, StoreError> {
        let fresh = Path::new(DIR).join(format!("{}.new", kind.name()));
        match self.disk.remove(&fresh).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(at(&fresh)(error)),
            _ => {}
        }
        let file = self
            .disk
            .open(&fresh, OpenMode::CreateNew)
            .await
            .map_err(at(&fresh))?;
        let (written, _) = file.write_at(0, frame(kind, payload)).await;
        written.map_err(at(&fresh))?;
        file.sync().await.map_err(at(&fresh))?;
        Ok(fresh)
    }

    async fn put_in_force(&self, fresh: &Path, target: &Path) -> Result<(), StoreError> {
        self.disk.rename(fresh, target).await.map_err(at(target))?;
        self.disk
            .sync_dir(Path::new(DIR))
            .await
            .map_err(at(Path::new(DIR)))
    }

    async fn read(&self, kind: Kind) -> Result<Option<Vec<u8>>, StoreError> {
        let path = path(kind);
        let file = match self.disk.open(&path, OpenMode::Read).await {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(at(&path)(error)),
        };
        let damaged = |reason| Unreadable::Damaged(reason).at(&path);
        let len = file.len().await.map_err(at(&path))?;
        let len = usize::try_from(len).map_err(|_| damaged("too long"))?;
        if len > PAYLOAD_BYTES_MAX + SECTOR_BYTES {
            return Err(damaged("too long"));
        }
        let buf = AlignedBuf::zeroed(len.next_multiple_of(SECTOR_BYTES));
        let (read, buf) = file.read_at(0, buf).await;
        let read = read.map_err(at(&path))?;
        let payload = unframe(kind, buf.get(..read).unwrap_or_default())
            .map_err(|unreadable| unreadable.at(&path))?;
        Ok(Some(payload.to_vec()))
    }
}

fn path(kind: Kind) -> PathBuf {
    Path::new(DIR).join(kind.name())
}

fn at(path: &Path) -> impl Fn(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io {
        path: path.clone(),
        source,
    }
}

/// Header and payload, padded with zeros to whole sectors. The checksum covers the header before it
/// and the payload.
fn frame(kind: Kind, payload: &[u8]) -> AlignedBuf {
    let len = u32::try_from(payload.len()).expect("topologies are bounded");
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&kind.number().to_le_bytes());
    bytes.extend_from_slice(&len.to_le_bytes());
    let crc = crc_of(&bytes, payload);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes.resize(bytes.len().next_multiple_of(SECTOR_BYTES), 0);
    AlignedBuf::copy_of(&bytes)
}

/// What the checksum does not vouch for is no version.
fn unframe(kind: Kind, bytes: &[u8]) -> Result<&[u8], Unreadable> {
    let (header, rest) = bytes
        .split_first_chunk::<HEADER_BYTES>()
        .ok_or("too short")?;
    let field = |start: usize, len: usize| &header[start..start + len];
    if field(0, 8) != MAGIC {
        return Err("no magic".into());
    }
    let number = |start: usize| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(field(start, 4));
        u32::from_le_bytes(bytes)
    };
    let len = usize::try_from(number(12)).map_err(|_| "too long")?;
    let payload = rest.get(..len).ok_or("shorter than its length says")?;
    if rest[len..].len() >= SECTOR_BYTES || rest[len..].iter().any(|byte| *byte != 0) {
        return Err("data after its end".into());
    }
    if number(16) != crc_of(&header[..16], payload) {
        return Err("wrong checksum".into());
    }
    let version = u16::from_le_bytes([header[8], header[9]]);
    if version != VERSION {
        return Err(Unreadable::Newer(version));
    }
    if field(10, 2) != kind.number().to_le_bytes() {
        return Err("another kind of file".into());
    }
    Ok(payload)
}

fn crc_of(header: &[u8], payload: &[u8]) -> u32 {
    let mut covered = Vec::with_capacity(header.len() + payload.len());
    covered.extend_from_slice(header);
    covered.extend_from_slice(payload);
    let crc = checksum(CrcAlgorithm::Crc32Iscsi, &covered);
    u32::try_from(crc).expect("a CRC-32 has 32 bits")
}

fn encode_vote(vote: &Vote) -> Vec<u8> {
    let promised = vote.acceptor.promised();
    let mut out = Vec::with_capacity(64);
    out.extend_from_slice(&vote.instance.0.to_le_bytes());
    out.extend_from_slice(&promised.round.to_le_bytes());
    out.extend_from_slice(&promised.node.0.to_le_bytes());
    if let Some((ballot, value)) = vote.acceptor.accepted() {
        out.extend_from_slice(&ballot.round.to_le_bytes());
        out.extend_from_slice(&ballot.node.0.to_le_bytes());
        out.extend_from_slice(value);
    }
    out
}

fn decode_vote(bytes: &[u8]) -> Option<Vote> {
    let (instance, rest) = bytes.split_first_chunk::<8>()?;
    let (promised, rest) = decode_ballot(rest)?;
    let accepted = if rest.is_empty() {
        None
    } else {
        let (ballot, value) = decode_ballot(rest)?;
        Some((ballot, Bytes::copy_from_slice(value)))
    };
    Some(Vote {
        instance: Epoch(u64::from_le_bytes(*instance)),
        acceptor: Acceptor::restore(promised, accepted)?,
    })
}

fn decode_ballot(bytes: &[u8]) -> Option<(Ballot, &[u8])> {
    let (round, rest) = bytes.split_first_chunk::<8>()?;
    let (node, rest) = rest.split_first_chunk::<16>()?;
    let ballot = Ballot {
        round: u64::from_le_bytes(*round),
        node: NodeId(u128::from_le_bytes(*node)),
    };
    Some((ballot, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_version_is_named_and_one_without_a_fitting_checksum_is_damage() {
        let mut bytes = frame(Kind::Decided, b"topology").to_vec();
        bytes[8] = 2;
        let damaged = unframe(Kind::Decided, &bytes);
        assert_eq!(damaged, Err(Unreadable::Damaged("wrong checksum")));
        let crc = crc_of(&bytes[..16], b"topology");
        bytes[16..20].copy_from_slice(&crc.to_le_bytes());
        let refused = read_copy(&bytes).unwrap_err();
        assert!(matches!(refused, StoreError::Newer { found: 2, .. }));
        let what = refused.to_string();
        assert!(what.contains("node/topology") && what.contains("start a newer program"));
    }

    #[test]
    fn no_bytes_make_a_file_panic() {
        let ballot = |round| Ballot {
            round,
            node: NodeId(1),
        };
        let accepted = Some((ballot(1), Bytes::from_static(b"topology")));
        let acceptor = Acceptor::restore(ballot(2), accepted).expect("a possible one");
        let vote = encode_vote(&Vote {
            instance: Epoch(3),
            acceptor,
        });
        let valid = [vote.clone(), frame(Kind::Vote, &vote)[..64].to_vec()];
        crate::fuzz::parser("file of a topology", &valid).fuzz(|bytes| {
            for kind in [Kind::Decided, Kind::Vote] {
                let _unread = unframe(kind, bytes);
            }
            if let Some(vote) = decode_vote(bytes) {
                assert_eq!(encode_vote(&vote), bytes, "one vote, one form");
            }
        });
    }
}
