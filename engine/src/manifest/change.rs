//! What the manifest says, and the changes that led there.

use std::collections::BTreeMap;

use torc_env::{Token, TokenRange, TreeId};

use crate::codec::Reader;
use crate::frame::Mark;
use crate::levels::TableKey;
use crate::wal::SegmentId;

/// A table's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) tree: TreeId,
    pub(crate) file_id: u64,
    pub(crate) level: u8,
    /// Tables of one run do not overlap; of two runs on a level, the higher number is newer.
    pub(crate) run: u64,
    /// The tokens for which it answers.
    pub(crate) extent: TokenRange,
    /// Length of the file.
    pub(crate) bytes: u64,
}

impl Listed {
    pub(crate) fn key(&self) -> TableKey {
        TableKey {
            file_id: self.file_id,
            first: self.extent.first,
        }
    }
}

/// Something that the store has acknowledged, or may have, and holds no more, because it was damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// The tree; `None` for every one: it was in the log.
    pub tree: Option<TreeId>,
    /// Where.
    pub range: TokenRange,
    /// Somebody has said that it may stay lost.
    pub is_accepted: bool,
}

/// One change. An edit is a list of them that takes force as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// A table, or a part of one, belongs to the store.
    AddTable(Listed),
    /// It no longer does. When no part of a file is left, it may be deleted once this is durable.
    RemoveTable(TableKey),
    /// A segment may hold frames from now on.
    AddSegment(SegmentId),
    /// All that a segment holds is in tables.
    RemoveSegment(SegmentId),
    /// Every frame up to here is in tables.
    Flushed(Mark),
    /// The records of a tree up to this sequence number are gone.
    DropTree { tree: TreeId, seqno: u64 },
    /// The log has passed the drop of this tree: nothing of it can come back.
    ForgetDrop { tree: TreeId },
    /// Acknowledged updates may be lost, and nobody has made up for it yet (or somebody has).
    Suspect(bool),
    /// No file, segment or record gets a lower number than these any more.
    Floors {
        file_id: u64,
        segment: u32,
        seqno: u64,
    },
    /// Damage has cost something.
    Lost(Loss),
    /// Nothing is lost any more.
    Found,
}

const ADD_TABLE: u8 = 1;
const REMOVE_TABLE: u8 = 2;
const ADD_SEGMENT: u8 = 3;
const REMOVE_SEGMENT: u8 = 4;
const FLUSHED: u8 = 5;
const DROP_TREE: u8 = 6;
const FORGET_DROP: u8 = 7;
const SUSPECT: u8 = 8;
const FLOORS: u8 = 9;
const LOST: u8 = 10;
const FOUND: u8 = 11;

/// Bits of a loss.
const LOST_OF_EVERY_TREE: u8 = 1;
const LOST_AND_ACCEPTED: u8 = 2;

impl Change {
    /// Appends this change: a tag and its fields.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        match *self {
            Change::AddTable(table) => {
                out.push(ADD_TABLE);
                out.extend_from_slice(&table.tree.0.to_le_bytes());
                out.extend_from_slice(&table.file_id.to_le_bytes());
                out.push(table.level);
                out.extend_from_slice(&table.run.to_le_bytes());
                out.extend_from_slice(&table.extent.first.0.to_le_bytes());
                out.extend_from_slice(&table.extent.last.0.to_le_bytes());
                out.extend_from_slice(&table.bytes.to_le_bytes());
            }
            Change::RemoveTable(key) => {
                out.push(REMOVE_TABLE);
                out.extend_from_slice(&key.file_id.to_le_bytes());
                out.extend_from_slice(&key.first.0.to_le_bytes());
            }
            Change::AddSegment(id) => {
                out.push(ADD_SEGMENT);
                out.extend_from_slice(&id.0.to_le_bytes());
            }
            Change::RemoveSegment(id) => {
                out.push(REMOVE_SEGMENT);
                out.extend_from_slice(&id.0.to_le_bytes());
            }
            Change::Flushed(mark) => {
                out.push(FLUSHED);
                out.extend_from_slice(&mark.sequence.to_le_bytes());
                out.extend_from_slice(&mark.hash.to_le_bytes());
            }
            Change::DropTree { tree, seqno } => {
                out.push(DROP_TREE);
                out.extend_from_slice(&tree.0.to_le_bytes());
                out.extend_from_slice(&seqno.to_le_bytes());
            }
            Change::ForgetDrop { tree } => {
                out.push(FORGET_DROP);
                out.extend_from_slice(&tree.0.to_le_bytes());
            }
            Change::Suspect(suspect) => {
                out.push(SUSPECT);
                out.push(u8::from(suspect));
            }
            Change::Floors {
                file_id,
                segment,
                seqno,
            } => {
                out.push(FLOORS);
                out.extend_from_slice(&file_id.to_le_bytes());
                out.extend_from_slice(&segment.to_le_bytes());
                out.extend_from_slice(&seqno.to_le_bytes());
            }
            Change::Lost(loss) => {
                let every_tree = LOST_OF_EVERY_TREE * u8::from(loss.tree.is_none());
                out.push(LOST);
                out.push(every_tree | (LOST_AND_ACCEPTED * u8::from(loss.is_accepted)));
                out.extend_from_slice(&loss.tree.map_or(0, |tree| tree.0).to_le_bytes());
                out.extend_from_slice(&loss.range.first.0.to_le_bytes());
                out.extend_from_slice(&loss.range.last.0.to_le_bytes());
            }
            Change::Found => out.push(FOUND),
        }
    }

    /// Reads an edit; `None` when it is not exactly `count` well-formed changes.
    pub(crate) fn decode_edit(payload: &[u8], count: u32) -> Option<Vec<Change>> {
        let mut fields = Reader::new(payload);
        let mut changes = Vec::new();
        for _ in 0..count {
            changes.push(Self::decode(&mut fields)?);
        }
        fields.is_empty().then_some(changes)
    }

    fn decode(fields: &mut Reader<'_>) -> Option<Change> {
        Some(match fields.u8()? {
            ADD_TABLE => Change::AddTable(Listed {
                tree: TreeId(fields.u32()?),
                file_id: fields.u64()?,
                level: fields.u8()?,
                run: fields.u64()?,
                extent: TokenRange {
                    first: Token(fields.u128()?),
                    last: Token(fields.u128()?),
                },
                bytes: fields.u64()?,
            }),
            REMOVE_TABLE => Change::RemoveTable(TableKey {
                file_id: fields.u64()?,
                first: Token(fields.u128()?),
            }),
            ADD_SEGMENT => Change::AddSegment(SegmentId(fields.u64()?)),
            REMOVE_SEGMENT => Change::RemoveSegment(SegmentId(fields.u64()?)),
            FLUSHED => Change::Flushed(Mark {
                sequence: fields.u64()?,
                hash: fields.u64()?,
            }),
            DROP_TREE => Change::DropTree {
                tree: TreeId(fields.u32()?),
                seqno: fields.u64()?,
            },
            FORGET_DROP => Change::ForgetDrop {
                tree: TreeId(fields.u32()?),
            },
            SUSPECT => match fields.u8()? {
                0 => Change::Suspect(false),
                1 => Change::Suspect(true),
                _ => return None,
            },
            FLOORS => Change::Floors {
                file_id: fields.u64()?,
                segment: fields.u32()?,
                seqno: fields.u64()?,
            },
            LOST => Change::Lost(Self::decode_loss(fields)?),
            FOUND => Change::Found,
            _ => return None,
        })
    }

    fn decode_loss(fields: &mut Reader<'_>) -> Option<Loss> {
        let flags = fields.u8()?;
        let tree = TreeId(fields.u32()?);
        let every_tree = flags & LOST_OF_EVERY_TREE != 0;
        let loss = Loss {
            tree: (!every_tree).then_some(tree),
            range: TokenRange {
                first: Token(fields.u128()?),
                last: Token(fields.u128()?),
            },
            is_accepted: flags & LOST_AND_ACCEPTED != 0,
        };
        let is_valid = flags <= (LOST_OF_EVERY_TREE | LOST_AND_ACCEPTED)
            && (!every_tree || tree.0 == 0)
            && loss.range.first <= loss.range.last;
        is_valid.then_some(loss)
    }
}

/// All that the manifest says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) tables: BTreeMap<TableKey, Listed>,
    /// In the order of their listing, which is the order of their frames.
    pub(crate) segments: Vec<SegmentId>,
    pub(crate) flushed: Mark,
    pub(crate) dropped: BTreeMap<TreeId, u64>,
    pub(crate) suspect: bool,
    pub(crate) losses: Vec<Loss>,
    pub(crate) file_id_floor: u64,
    pub(crate) segment_floor: u32,
    pub(crate) seqno_floor: u64,
}

impl State {
    /// Makes one change; the error says what does not fit.
    pub(crate) fn apply(&mut self, change: &Change) -> Result<(), String> {
        match *change {
            Change::AddTable(table) => {
                let Some(next) = table.file_id.checked_add(1) else {
                    return Err("a table has the last file id there is".to_owned());
                };
                self.file_id_floor = self.file_id_floor.max(next);
                if self.tables.insert(table.key(), table).is_some() {
                    return Err(format!("table {:016x} is added twice", table.file_id));
                }
            }
            Change::RemoveTable(key) => {
                if self.tables.remove(&key).is_none() {
                    return Err(format!("{key:?} is removed but not listed"));
                }
            }
            Change::AddSegment(id) => {
                if self.segments.contains(&id) {
                    return Err(format!("segment {id} is added twice"));
                }
                self.segment_floor = self.segment_floor.max(id.number().saturating_add(1));
                self.segments.push(id);
            }
            Change::RemoveSegment(id) => {
                let Some(at) = self.segments.iter().position(|listed| *listed == id) else {
                    return Err(format!("segment {id} is removed but not listed"));
                };
                self.segments.remove(at);
            }
            Change::Flushed(mark) => {
                if mark.sequence < self.flushed.sequence {
                    return Err(format!("flushed mark goes back to {}", mark.sequence));
                }
                self.flushed = mark;
            }
            Change::DropTree { tree, seqno } => {
                self.dropped.insert(tree, seqno);
                self.seqno_floor = self.seqno_floor.max(seqno);
                self.tables.retain(|_, table| table.tree != tree);
                self.losses.retain(|loss| loss.tree != Some(tree));
            }
            Change::ForgetDrop { tree } => {
                self.dropped.remove(&tree);
            }
            Change::Suspect(suspect) => self.suspect = suspect,
            Change::Floors {
                file_id,
                segment,
                seqno,
            } => {
                self.file_id_floor = self.file_id_floor.max(file_id);
                self.segment_floor = self.segment_floor.max(segment);
                self.seqno_floor = self.seqno_floor.max(seqno);
            }
            Change::Lost(loss) => {
                if !self.losses.contains(&loss) {
                    self.losses.push(loss);
                }
            }
            Change::Found => self.losses.clear(),
        }
        Ok(())
    }

    /// The changes that make this state out of nothing.
    pub(crate) fn snapshot(&self) -> Vec<Change> {
        let mut changes = vec![
            Change::Floors {
                file_id: self.file_id_floor,
                segment: self.segment_floor,
                seqno: self.seqno_floor,
            },
            Change::Flushed(self.flushed),
            Change::Suspect(self.suspect),
        ];
        let drops = self.dropped.iter();
        changes.extend(drops.map(|(tree, seqno)| Change::DropTree {
            tree: *tree,
            seqno: *seqno,
        }));
        changes.extend(self.losses.iter().copied().map(Change::Lost));
        changes.extend(self.segments.iter().copied().map(Change::AddSegment));
        changes.extend(self.tables.values().copied().map(Change::AddTable));
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_change() -> Vec<Change> {
        vec![
            Change::AddTable(Listed {
                tree: TreeId(1),
                file_id: 2,
                level: 3,
                run: 4,
                extent: TokenRange {
                    first: Token(20),
                    last: Token(21),
                },
                bytes: 5,
            }),
            Change::RemoveTable(TableKey {
                file_id: 2,
                first: Token(20),
            }),
            Change::AddSegment(SegmentId(6)),
            Change::RemoveSegment(SegmentId(6)),
            Change::Flushed(Mark {
                sequence: 7,
                hash: 8,
            }),
            Change::DropTree {
                tree: TreeId(9),
                seqno: 10,
            },
            Change::ForgetDrop { tree: TreeId(9) },
            Change::Suspect(true),
            Change::Floors {
                file_id: 11,
                segment: 12,
                seqno: 13,
            },
            Change::Lost(loss(Some(14))),
            Change::Lost(Loss {
                is_accepted: true,
                ..loss(None)
            }),
            Change::Found,
        ]
    }

    fn loss(tree: Option<u32>) -> Loss {
        Loss {
            tree: tree.map(TreeId),
            range: TokenRange {
                first: Token(15),
                last: Token(16),
            },
            is_accepted: false,
        }
    }

    #[test]
    fn every_change_comes_back_and_every_truncation_is_refused() {
        let changes = every_change();
        let mut payload = Vec::new();
        for change in &changes {
            change.encode(&mut payload);
        }
        let count = u32::try_from(changes.len()).unwrap();
        assert_eq!(Change::decode_edit(&payload, count), Some(changes));
        for len in 0..payload.len() {
            assert_eq!(Change::decode_edit(&payload[..len], count), None);
        }
    }

    #[test]
    fn a_snapshot_makes_the_same_state() {
        let mut state = State::default();
        for change in [
            Change::AddSegment(SegmentId::new(3, 77)),
            Change::AddSegment(SegmentId::new(4, 78)),
            Change::DropTree {
                tree: TreeId(9),
                seqno: 10,
            },
            every_change()[0],
            Change::Suspect(true),
            Change::Lost(loss(None)),
            Change::Lost(loss(Some(1))),
        ] {
            state.apply(&change).unwrap();
        }
        let mut copy = State::default();
        for change in state.snapshot() {
            copy.apply(&change).unwrap();
        }
        assert_eq!(copy, state);
    }

    #[test]
    fn changes_that_do_not_fit_are_refused() {
        let mut state = State::default();
        for change in [every_change()[1], Change::RemoveSegment(SegmentId(1))] {
            state.apply(&change).unwrap_err();
        }
        state.apply(&every_change()[0]).unwrap();
        state.apply(&every_change()[0]).unwrap_err();
    }

    #[test]
    fn what_is_lost_stays_so_until_it_is_found() {
        let mut state = State::default();
        for _ in 0..2 {
            state.apply(&Change::Lost(loss(Some(1)))).unwrap();
        }
        assert_eq!(state.losses, [loss(Some(1))]);
        state.apply(&Change::Found).unwrap();
        assert_eq!(state, State::default());
    }

    #[test]
    fn a_file_id_that_none_can_follow_is_refused() {
        let Change::AddTable(mut table) = every_change()[0] else {
            panic!("the first adds a table");
        };
        table.file_id = u64::MAX;
        let mut state = State::default();
        state.apply(&Change::AddTable(table)).unwrap_err();
    }

    #[test]
    fn dropping_a_tree_takes_its_tables_along() {
        let mut state = State::default();
        state.apply(&every_change()[0]).unwrap();
        for tree in [Some(1), Some(2), None] {
            state.apply(&Change::Lost(loss(tree))).unwrap();
        }
        let drop = Change::DropTree {
            tree: TreeId(1),
            seqno: 5,
        };
        state.apply(&drop).unwrap();
        assert!(state.tables.is_empty());
        assert_eq!(state.losses, [loss(Some(2)), loss(None)]);
        assert_eq!(state.dropped[&TreeId(1)], 5);
    }

    #[test]
    fn no_bytes_make_an_edit_or_what_it_does_panic() {
        let changes = every_change();
        let mut payload = Vec::new();
        for change in &changes {
            change.encode(&mut payload);
        }
        let count = u32::try_from(changes.len()).unwrap();
        torc_sim::fuzz::fuzz("edit", &[payload], |input| {
            for count in [1, count, u32::MAX] {
                let mut state = State::default();
                for change in Change::decode_edit(input, count).iter().flatten() {
                    drop(state.apply(change));
                }
            }
        });
    }
}
