//! Counts the answers of one request and says what may be told to the client. Pure.
//!
//! On the path: the coordinator makes one [`Tracker`] a request, tells it what each
//! node did, and answers as soon as the [`Verdict`] is no longer [`Verdict::Waiting`].
//!
//! Invariants: only distinct replicas of the request's range epoch count as acks; a hint counts only
//! when the caller allowed it, only on a node that is no replica of the key, and once for a node; a
//! request is *refused* only when it is known that nothing was applied anywhere.
//!
//! It does not know clocks, messages or keys.

use std::fmt;

use torc_env::mutation;

use crate::api::{Failure, FailureCode, Level};

/// The most replicas of a key: the width of the tracker's bit sets.
pub const REPLICAS_MAX: usize = 32;

/// So many of these replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Group {
    /// Bit i stands for the i-th replica of the preference list.
    members: u32,
    need: u32,
}

/// How many acks are needed, of which replicas. All groups must be satisfied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    first: Group,
    /// One for each further data centre under [`Level::EachQuorum`]; else empty and unallocated.
    rest: Vec<Group>,
}

impl Requirement {
    /// What `level` means for a key whose replicas stand in the data centres `datacenters` (an
    /// entry for each replica, in preference order), asked in data centre `local`.
    ///
    /// `members_n` is the keyspace's effective N. A count above it is refused, never clipped.
    pub fn of<D: PartialEq>(level: Level, datacenters: &[D], local: &D) -> Result<Self, Failure> {
        let n = u32::try_from(datacenters.len()).unwrap_or(u32::MAX);
        if datacenters.is_empty() || datacenters.len() > REPLICAS_MAX {
            return Err(Failure::refused(
                FailureCode::NotReady,
                format_args!("the key has {n} replicas"),
            ));
        }
        let all = mask_below(datacenters.len());
        let one_group = |need| Self {
            first: Group { members: all, need },
            rest: Vec::new(),
        };
        let quorum_of = |datacenter: &D| {
            let mut members = 0;
            for (index, other) in datacenters.iter().enumerate() {
                if other == datacenter {
                    members |= 1u32 << index;
                }
            }
            Group {
                members,
                need: members.count_ones() / 2 + 1,
            }
        };
        match level {
            Level::One => Ok(one_group(1)),
            Level::Quorum => Ok(one_group(n / 2 + 1)),
            Level::All => Ok(one_group(n)),
            Level::Count(count) if count == 0 || u32::from(count) > n => Err(Failure::refused(
                FailureCode::InvalidRequest,
                format_args!("{count} replicas asked of {n}"),
            )),
            Level::Count(count) => Ok(one_group(u32::from(count))),
            Level::LocalQuorum => {
                let first = quorum_of(local);
                if first.members == 0 {
                    return Err(Failure::refused(
                        FailureCode::InvalidRequest,
                        "local_quorum: no replica in this data centre",
                    ));
                }
                Ok(Self {
                    first,
                    rest: Vec::new(),
                })
            }
            Level::EachQuorum => {
                let first = quorum_of(&datacenters[0]);
                let mut seen = first.members;
                let mut rest = Vec::new();
                for (index, datacenter) in datacenters.iter().enumerate() {
                    if seen & (1 << index) == 0 {
                        let group = quorum_of(datacenter);
                        seen |= group.members;
                        rest.push(group);
                    }
                }
                Ok(Self { first, rest })
            }
        }
    }

    /// More than half of `n` replicas.
    pub fn quorum(n: usize) -> Self {
        let n = n.min(REPLICAS_MAX);
        Self {
            first: Group {
                members: mask_below(n),
                need: u32::try_from(n / 2 + 1).unwrap_or(u32::MAX),
            },
            rest: Vec::new(),
        }
    }

    /// Whether two requests of this strength always meet in a replica that answered both.
    pub fn is_strict(&self, n: usize) -> bool {
        let quorum = u32::try_from(n / 2 + 1).unwrap_or(u32::MAX);
        self.groups().map(|group| group.need).sum::<u32>() >= quorum
    }

    /// The whole number of acks that are needed.
    pub fn need(&self) -> u32 {
        self.groups().map(|group| group.need).sum()
    }

    /// Whether the replicas of `set` (bit i = i-th replica) are enough.
    pub fn is_met_by(&self, set: u32) -> bool {
        let few = |need: u32| match mutation::on("quorum_too_small_by_one") {
            true => need.max(2) - 1,
            false => need,
        };
        self.groups()
            .all(|group| (set & group.members).count_ones() >= few(group.need))
    }

    /// Whether an answer of replica `index` can help beyond what `set` has.
    pub fn wants(&self, index: usize, set: u32) -> bool {
        let bit = 1u32 << index;
        self.groups().any(|group| {
            group.members & bit != 0 && (set & group.members).count_ones() < group.need
        })
    }

    fn groups(&self) -> impl Iterator<Item = &Group> {
        std::iter::once(&self.first).chain(&self.rest)
    }
}

/// What is known of one replica's part in a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// Nothing was sent to it.
    Idle,
    /// It was asked and has not answered.
    Pending,
    /// It holds the write durably, or answered the read.
    Acked,
    /// It has certainly not applied it.
    Refused,
    /// It may have applied it.
    Lost,
}

/// Whether the request can be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Go on.
    Waiting,
    /// Enough acks.
    Done,
    /// Can no longer be met.
    Unmet {
        /// Whether it may have been applied somewhere.
        in_doubt: bool,
    },
}

/// Names a node within one request: distinct for distinct nodes.
pub trait Peer: Copy + PartialEq + fmt::Debug {}

impl<P: Copy + PartialEq + fmt::Debug> Peer for P {}

/// The state of one request.
#[derive(Clone, Debug)]
pub struct Tracker<P: Peer> {
    requirement: Requirement,
    parts: Vec<(P, Part)>,
    /// Bit i: a hint for the i-th replica is durable on some other node.
    hinted: u32,
    /// Bit i: a hint for the i-th replica is on its way.
    hinting: u32,
    /// Nodes that took, or may have taken, a hint, with whether they certainly did.
    holders: Vec<(P, Part)>,
    sloppy: bool,
}

impl<P: Peer> Tracker<P> {
    /// For a request to `replicas` (distinct, in preference order). `sloppy`: whether hints count.
    ///
    /// # Panics
    /// When there are more than [`REPLICAS_MAX`] replicas, or one twice: the ring never says so.
    pub fn new(
        replicas: impl IntoIterator<Item = P>,
        requirement: Requirement,
        sloppy: bool,
    ) -> Self {
        let parts: Vec<(P, Part)> = replicas
            .into_iter()
            .map(|node| (node, Part::Idle))
            .collect();
        assert!(parts.len() <= REPLICAS_MAX, "{} replicas", parts.len());
        for (index, (node, _)) in parts.iter().enumerate() {
            assert!(
                parts[..index].iter().all(|(other, _)| other != node),
                "replica {node:?} twice"
            );
        }
        Self {
            requirement,
            parts,
            hinted: 0,
            hinting: 0,
            holders: Vec::new(),
            sloppy,
        }
    }

    /// The request was sent to a replica. Sent to another node, it changes nothing.
    pub fn sent(&mut self, node: P) {
        self.set(node, Part::Pending);
    }

    /// A replica of the request's range epoch did it. An ack of a node that is not a replica, or a
    /// second one of the same node, counts for nothing.
    pub fn acked(&mut self, node: P) {
        self.set(node, Part::Acked);
    }

    /// A replica has certainly not done it, and will not.
    pub fn refused(&mut self, node: P) {
        self.set(node, Part::Refused);
    }

    /// It is not known what a replica did.
    pub fn lost(&mut self, node: P) {
        self.set(node, Part::Lost);
    }

    /// A hint for the replica `target` was sent to `holder`. Returns whether it will count when
    /// acked: only under `sloppy`, on a node that is no replica and holds no other hint of this
    /// request.
    pub fn hint_sent(&mut self, holder: P, target: P) -> bool {
        let Some(index) = self.index(target) else {
            return false;
        };
        if !self.sloppy
            || self.index(holder).is_some()
            || self.holders.iter().any(|(node, _)| *node == holder)
        {
            return false;
        }
        self.hinting |= 1 << index;
        self.holders.push((holder, Part::Pending));
        true
    }

    /// The hint for `target` on `holder` is durable. Counts only after a [`Tracker::hint_sent`] that
    /// returned true.
    pub fn hint_acked(&mut self, holder: P, target: P) {
        if self.settle_hint(holder, target, Part::Acked)
            && let Some(index) = self.index(target)
        {
            if mutation::on("hint_counts_as_replica") {
                return self.acked(target);
            }
            self.hinted |= 1 << index;
        }
    }

    /// The hint for `target` on `holder` was refused (`in_doubt` false) or may have been stored.
    pub fn hint_failed(&mut self, holder: P, target: P, in_doubt: bool) {
        let part = if in_doubt { Part::Lost } else { Part::Refused };
        self.settle_hint(holder, target, part);
    }

    /// What can be told now.
    pub fn verdict(&self) -> Verdict {
        let done = self.mask(|part| part == Part::Acked) | self.hinted;
        if self.requirement.is_met_by(done) {
            return Verdict::Done;
        }
        let hopeful = self.mask(|part| matches!(part, Part::Idle | Part::Pending));
        if self.requirement.is_met_by(done | hopeful | self.hinting) {
            return Verdict::Waiting;
        }
        Verdict::Unmet {
            in_doubt: self.may_be_applied(),
        }
    }

    /// What can be told when nobody waits any longer: never [`Verdict::Waiting`].
    pub fn verdict_at_deadline(&self) -> Verdict {
        match self.verdict() {
            Verdict::Waiting => Verdict::Unmet {
                in_doubt: self.may_be_applied(),
            },
            settled => settled,
        }
    }

    /// Whether any node has done it, or may have, or may still.
    pub fn may_be_applied(&self) -> bool {
        let anywhere = |part: Part| matches!(part, Part::Pending | Part::Acked | Part::Lost);
        self.parts.iter().any(|(_, part)| anywhere(*part))
            || self.holders.iter().any(|(_, part)| anywhere(*part))
    }

    /// Replicas that acked.
    pub fn replicas(&self) -> u8 {
        count(self.mask(|part| part == Part::Acked))
    }

    /// Hints that count: those for replicas that have not acked themselves.
    pub fn hints(&self) -> u8 {
        count(self.hinted & !self.mask(|part| part == Part::Acked))
    }

    /// Whether this replica acked.
    pub fn has_acked(&self, node: P) -> bool {
        self.index(node)
            .is_some_and(|index| self.parts[index].1 == Part::Acked)
    }

    /// Whether this replica was asked and has not answered.
    pub fn is_pending(&self, node: P) -> bool {
        self.index(node)
            .is_some_and(|index| self.parts[index].1 == Part::Pending)
    }

    /// Replicas that have not acked, in preference order: those that need a hint or a repair.
    pub fn missed(&self) -> impl Iterator<Item = P> + '_ {
        self.parts
            .iter()
            .filter(|(_, part)| *part != Part::Acked)
            .map(|(node, _)| *node)
    }

    /// The next replica that was not asked yet and whose answer would help.
    pub fn next_idle(&self) -> Option<P> {
        let busy = self.mask(|part| matches!(part, Part::Acked | Part::Pending));
        self.parts
            .iter()
            .enumerate()
            .find(|(index, (_, part))| *part == Part::Idle && self.requirement.wants(*index, busy))
            .map(|(_, (node, _))| *node)
    }

    /// The next replica that was not asked yet, whether or not the pending ones would be enough.
    pub fn next_spare(&self) -> Option<P> {
        let acked = self.mask(|part| part == Part::Acked);
        self.parts
            .iter()
            .enumerate()
            .find(|(index, (_, part))| *part == Part::Idle && self.requirement.wants(*index, acked))
            .map(|(_, (node, _))| *node)
    }

    fn settle_hint(&mut self, holder: P, target: P, part: Part) -> bool {
        let Some(index) = self.index(target) else {
            return false;
        };
        let Some(entry) = self
            .holders
            .iter_mut()
            .find(|(node, old)| *node == holder && *old == Part::Pending)
        else {
            return false;
        };
        entry.1 = part;
        self.hinting &= !(1 << index);
        true
    }

    fn set(&mut self, node: P, part: Part) {
        if let Some(index) = self.index(node) {
            let old = &mut self.parts[index].1;
            // An ack is a promise on disk: nothing that arrives later takes it back.
            if *old != Part::Acked {
                *old = part;
            }
        }
    }

    fn index(&self, node: P) -> Option<usize> {
        self.parts.iter().position(|(other, _)| *other == node)
    }

    fn mask(&self, holds: impl Fn(Part) -> bool) -> u32 {
        let mut mask = 0;
        for (index, (_, part)) in self.parts.iter().enumerate() {
            if holds(*part) {
                mask |= 1u32 << index;
            }
        }
        mask
    }
}

fn mask_below(count: usize) -> u32 {
    u32::MAX
        .checked_shr(u32::try_from(REPLICAS_MAX - count).unwrap_or(u32::MAX))
        .unwrap_or(0)
}

fn count(mask: u32) -> u8 {
    u8::try_from(mask.count_ones()).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use torc_env::NodeId;

    const A: NodeId = NodeId(1);
    const B: NodeId = NodeId(2);
    const C: NodeId = NodeId(3);
    const D: NodeId = NodeId(4);
    const E: NodeId = NodeId(5);

    fn strict(need: u8) -> Tracker<NodeId> {
        tracker(need, false)
    }

    fn tracker(need: u8, sloppy: bool) -> Tracker<NodeId> {
        let requirement = Requirement::of(Level::Count(need), &[(), (), ()], &()).unwrap();
        Tracker::new([A, B, C], requirement, sloppy)
    }

    /// Plays a story of one step a line: `who what [for whom]`, and returns the verdict after
    /// each line.
    fn play(tracker: &mut Tracker<NodeId>, story: &str) -> Vec<Verdict> {
        let node = |name: &str| match name {
            "a" => A,
            "b" => B,
            "c" => C,
            "d" => D,
            _ => E,
        };
        let mut verdicts = Vec::new();
        for line in story.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                [who, "sent"] => tracker.sent(node(who)),
                [who, "acks"] => tracker.acked(node(who)),
                [who, "refuses"] => tracker.refused(node(who)),
                [who, "is_lost"] => tracker.lost(node(who)),
                [who, "is_given_hint_for", target] => {
                    tracker.hint_sent(node(who), node(target));
                }
                [who, "holds_hint_for", target] => tracker.hint_acked(node(who), node(target)),
                [who, "refuses_hint_for", target] => {
                    tracker.hint_failed(node(who), node(target), false);
                }
                ref other => panic!("not a step: {other:?}"),
            }
            verdicts.push(tracker.verdict());
        }
        verdicts
    }

    #[test]
    fn two_of_three_acks_answer_a_quorum_write() {
        let mut tracker = strict(2);
        let verdicts = play(
            &mut tracker,
            "a sent
             b sent
             c sent
             a acks
             b acks",
        );
        assert_eq!(verdicts[3], Verdict::Waiting);
        assert_eq!(verdicts[4], Verdict::Done);
        assert_eq!((tracker.replicas(), tracker.hints()), (2, 0));
        assert_eq!(tracker.missed().collect::<Vec<_>>(), [C]);
    }

    #[test]
    fn a_second_ack_of_one_node_and_an_ack_of_a_stranger_count_for_nothing() {
        let mut tracker = strict(2);
        let verdicts = play(
            &mut tracker,
            "a sent
             a acks
             a acks
             d acks",
        );
        assert!(verdicts.iter().all(|verdict| *verdict == Verdict::Waiting));
        assert_eq!(tracker.replicas(), 1);
    }

    #[test]
    fn refusals_everywhere_leave_no_doubt() {
        let mut tracker = strict(2);
        let verdicts = play(
            &mut tracker,
            "a sent
             b sent
             c sent
             a refuses
             b refuses
             c refuses",
        );
        assert_eq!(verdicts[3], Verdict::Waiting);
        assert_eq!(
            verdicts[4],
            Verdict::Unmet { in_doubt: true },
            "c may still do it"
        );
        assert_eq!(verdicts[5], Verdict::Unmet { in_doubt: false });
    }

    #[test]
    fn one_ack_or_one_lost_answer_leaves_doubt() {
        for second in ["a acks", "a is_lost"] {
            let mut tracker = strict(2);
            let story = format!("a sent\n{second}\nb refuses\nc refuses");
            let verdicts = play(&mut tracker, &story);
            assert_eq!(verdicts[3], Verdict::Unmet { in_doubt: true }, "{second}");
        }
    }

    #[test]
    fn at_the_deadline_a_pending_replica_leaves_doubt_and_an_idle_one_does_not() {
        let mut tracker = strict(2);
        play(&mut tracker, "b refuses");
        assert_eq!(tracker.verdict(), Verdict::Waiting);
        assert_eq!(
            tracker.verdict_at_deadline(),
            Verdict::Unmet { in_doubt: false }
        );
        play(&mut tracker, "a sent");
        assert_eq!(
            tracker.verdict_at_deadline(),
            Verdict::Unmet { in_doubt: true }
        );
    }

    #[test]
    fn an_ack_is_not_taken_back_by_a_later_loss() {
        let mut tracker = strict(1);
        play(
            &mut tracker,
            "a acks
             a is_lost",
        );
        assert_eq!(tracker.verdict(), Verdict::Done);
    }

    #[test]
    fn hints_count_only_when_sloppy() {
        let story = "a sent
             a acks
             b refuses
             c refuses
             d is_given_hint_for b
             d holds_hint_for b";
        let mut sloppy = tracker(2, true);
        assert_eq!(*play(&mut sloppy, story).last().unwrap(), Verdict::Done);
        assert_eq!((sloppy.replicas(), sloppy.hints()), (1, 1));
        let mut strict = strict(2);
        assert_eq!(
            *play(&mut strict, story).last().unwrap(),
            Verdict::Unmet { in_doubt: true }
        );
        assert_eq!(strict.hints(), 0);
    }

    #[test]
    fn a_hint_on_a_replica_or_a_second_hint_on_one_node_counts_for_nothing() {
        let mut tracker = tracker(3, true);
        assert!(!tracker.hint_sent(C, B), "c is a replica itself");
        assert!(tracker.hint_sent(D, B));
        assert!(
            !tracker.hint_sent(D, C),
            "two copies on one host are one copy"
        );
        tracker.hint_acked(D, B);
        tracker.hint_acked(D, C);
        tracker.hint_acked(C, B);
        assert_eq!(tracker.hints(), 1);
    }

    #[test]
    fn a_hint_that_was_never_sent_does_not_count() {
        let mut tracker = tracker(1, true);
        tracker.hint_acked(D, B);
        assert_eq!(tracker.verdict(), Verdict::Waiting);
    }

    #[test]
    fn a_refused_hint_makes_way_for_the_next_node() {
        let mut tracker = tracker(2, true);
        let verdicts = play(
            &mut tracker,
            "a sent
             a acks
             b refuses
             c refuses
             d is_given_hint_for b
             d refuses_hint_for b
             e is_given_hint_for b
             e holds_hint_for b",
        );
        assert_eq!(verdicts[4], Verdict::Waiting);
        assert_eq!(verdicts[5], Verdict::Unmet { in_doubt: true });
        assert_eq!(verdicts[7], Verdict::Done);
    }

    #[test]
    fn a_replica_that_acks_late_takes_the_place_of_its_hint() {
        let mut tracker = tracker(2, true);
        play(
            &mut tracker,
            "a acks
             b is_lost
             d is_given_hint_for b
             d holds_hint_for b
             b acks",
        );
        assert_eq!((tracker.replicas(), tracker.hints()), (2, 0));
    }

    #[test]
    fn levels_name_counts_of_the_effective_n() {
        let three = ["x"; 3];
        let need = |level| Requirement::of(level, &three, &"x").map(|needed| needed.need());
        assert_eq!(need(Level::One), Ok(1));
        assert_eq!(need(Level::Quorum), Ok(2));
        assert_eq!(need(Level::All), Ok(3));
        assert_eq!(need(Level::Count(3)), Ok(3));
        assert!(need(Level::Count(4)).is_err(), "refused, never clipped");
        assert!(need(Level::Count(0)).is_err());
        assert_eq!(Requirement::quorum(5).need(), 3);
    }

    #[test]
    fn each_quorum_needs_a_majority_in_every_data_centre() {
        let places = ["x", "x", "x", "y", "y", "y"];
        let each = Requirement::of(Level::EachQuorum, &places, &"x").unwrap();
        assert!(!each.is_met_by(0b000_111), "all of x and none of y");
        assert!(each.is_met_by(0b011_110));
        let local = Requirement::of(Level::LocalQuorum, &places, &"y").unwrap();
        assert!(local.is_met_by(0b011_000));
        assert!(!local.is_met_by(0b001_111));
        assert!(!local.is_strict(6));
        assert!(each.is_strict(6));
    }

    #[test]
    fn the_next_replica_is_one_whose_answer_helps() {
        let mut tracker = strict(2);
        assert_eq!(tracker.next_idle(), Some(A));
        tracker.sent(A);
        assert_eq!(tracker.next_idle(), Some(B));
        tracker.sent(B);
        assert_eq!(tracker.next_idle(), None, "two are enough");
        assert_eq!(tracker.next_spare(), Some(C), "for a hedge");
        tracker.refused(B);
        assert_eq!(tracker.next_idle(), Some(C));
    }
}
