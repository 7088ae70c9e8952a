//! Single-decree consensus as pure state machines: one acceptor, one proposer's attempt.
//!
//! Each epoch of the topology is one instance. An attempt asks every voter for a promise, takes the
//! value of the highest ballot that a majority reports (or its own change when there is none),
//! and asks every voter to accept it (CASPaxos, Rystsov 2018, with a single decree a register).
//!
//! **Invariant.** At most one value of an instance is ever accepted by a majority under one ballot,
//! whatever is lost, delayed or restarted, as long as an acceptor answers only after its new state
//! is durable. A ballot needs not be unique over a proposer's restarts: a promise is given for a
//! ballot only once ([`Acceptor::prepare`] wants a strictly higher one), so two attempts cannot both
//! pass their first phase under it.
//!
//! **Not here:** messages, timing, disk. Those are `membership`'s and [`super::store`]'s.

use torc_env::NodeId;

use super::SlotId;

/// An attempt's rank: higher outbids lower.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ballot {
    /// Counts attempts. Zero is below every attempt.
    pub round: u64,
    /// Who attempts: breaks ties.
    pub node: NodeId,
}

/// The highest round that is believed: whoever makes a million attempts a second gets there in
/// 100,000 years. One beyond it would leave no numbers to outbid it.
const ROUND_MAX: u64 = u64::MAX >> 2;

impl Ballot {
    /// Whether anybody can have made so many attempts.
    pub fn is_possible(self) -> bool {
        self.round <= ROUND_MAX
    }

    /// A ballot of `node` above `self`.
    pub fn above(self, node: NodeId) -> Ballot {
        Ballot {
            round: self.round + 1,
            node,
        }
    }
}

/// A voter's memory of one instance. Must be durable before an answer leaves.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Acceptor<V> {
    promised: Ballot,
    accepted: Option<(Ballot, V)>,
}

impl<V> Default for Acceptor<V> {
    fn default() -> Self {
        Acceptor {
            promised: Ballot::default(),
            accepted: None,
        }
    }
}

/// The voter has promised a higher ballot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outbid {
    /// What it has promised.
    pub promised: Ballot,
}

impl<V: Clone> Acceptor<V> {
    /// Restores what was stored. `None` when no acceptor can have been in that state.
    pub fn restore(promised: Ballot, accepted: Option<(Ballot, V)>) -> Option<Self> {
        let is_below = |(ballot, _): &(Ballot, V)| *ballot <= promised;
        let possible = promised.is_possible() && accepted.as_ref().is_none_or(is_below);
        possible.then_some(Acceptor { promised, accepted })
    }

    /// The highest ballot promised.
    pub fn promised(&self) -> Ballot {
        self.promised
    }

    /// What was accepted last, under which ballot.
    pub fn accepted(&self) -> Option<&(Ballot, V)> {
        self.accepted.as_ref()
    }

    /// First phase: promises to take part in nothing below `ballot`, and says what was accepted.
    pub fn prepare(&mut self, ballot: Ballot) -> Result<Option<(Ballot, V)>, Outbid> {
        if ballot <= self.promised {
            return Err(Outbid {
                promised: self.promised,
            });
        }
        self.promised = ballot;
        Ok(self.accepted.clone())
    }

    /// Second phase: accepts `value` unless a higher ballot was promised.
    pub fn accept(&mut self, ballot: Ballot, value: V) -> Result<(), Outbid> {
        if ballot < self.promised || ballot == Ballot::default() {
            return Err(Outbid {
                promised: self.promised,
            });
        }
        self.promised = ballot;
        self.accepted = Some((ballot, value));
        Ok(())
    }
}

/// One attempt under one ballot.
#[derive(Clone, Debug)]
pub struct Attempt<V> {
    ballot: Ballot,
    voters: Vec<SlotId>,
    promised: Vec<SlotId>,
    highest: Option<(Ballot, V)>,
    accepted: Vec<SlotId>,
}

impl<V: Clone> Attempt<V> {
    /// An attempt among `voters`, which are distinct and at least one.
    pub fn new(ballot: Ballot, voters: Vec<SlotId>) -> Self {
        assert!(!voters.is_empty(), "an instance without voters");
        Attempt {
            ballot,
            voters,
            promised: Vec::new(),
            highest: None,
            accepted: Vec::new(),
        }
    }

    /// The ballot.
    pub fn ballot(&self) -> Ballot {
        self.ballot
    }

    /// Counts a promise.
    pub fn promise(&mut self, voter: SlotId, accepted: Option<(Ballot, V)>) {
        if !Self::count(&self.voters, &mut self.promised, voter) {
            return;
        }
        if let Some((ballot, value)) = accepted {
            let higher = self
                .highest
                .as_ref()
                .is_none_or(|(known, _)| ballot > *known);
            if higher {
                self.highest = Some((ballot, value));
            }
        }
    }

    /// Whether a majority has promised: the second phase may start.
    pub fn may_propose(&self) -> bool {
        self.majority(&self.promised)
    }

    /// How many have promised.
    pub fn promise_count(&self) -> usize {
        self.promised.len()
    }

    /// The value that must be proposed because it may have been decided; `None` leaves the choice.
    ///
    /// # Panics
    /// Before a majority has promised.
    pub fn bound_to(&self) -> Option<&V> {
        assert!(
            self.may_propose(),
            "the second phase before a majority promised"
        );
        self.highest.as_ref().map(|(_, value)| value)
    }

    /// Counts an acceptance.
    pub fn accept(&mut self, voter: SlotId) {
        Self::count(&self.voters, &mut self.accepted, voter);
    }

    /// Whether a majority has accepted: the value is decided.
    pub fn decided(&self) -> bool {
        self.majority(&self.accepted)
    }

    fn majority(&self, said_yes: &[SlotId]) -> bool {
        said_yes.len() > self.voters.len() / 2
    }

    fn count(voters: &[SlotId], counted: &mut Vec<SlotId>, voter: SlotId) -> bool {
        let counts = voters.contains(&voter) && !counted.contains(&voter);
        if counts {
            counted.push(voter);
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const VOTERS: usize = 3;

    fn ballot(round: u64) -> Ballot {
        Ballot {
            round,
            node: NodeId(0),
        }
    }

    fn slot(voter: usize) -> SlotId {
        SlotId(u32::try_from(voter).unwrap())
    }

    /// One attempt in the exhaustive walk: what each voter was asked, and whether its answer
    /// reached the proposer.
    #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
    struct Course {
        prepared: [bool; VOTERS],
        promised: [Option<Option<(Ballot, u8)>>; VOTERS],
        proposes: Option<u8>,
        asked_to_accept: [bool; VOTERS],
        accepted: [bool; VOTERS],
    }

    #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
    struct World {
        voters: [Acceptor<u8>; VOTERS],
        courses: Vec<Course>,
    }

    impl World {
        fn new(attempts: usize) -> World {
            let course = Course {
                prepared: [false; VOTERS],
                promised: [None; VOTERS],
                proposes: None,
                asked_to_accept: [false; VOTERS],
                accepted: [false; VOTERS],
            };
            World {
                voters: std::array::from_fn(|_| Acceptor::default()),
                courses: vec![course; attempts],
            }
        }

        fn attempt(&self, number: usize) -> Attempt<u8> {
            let mut attempt =
                Attempt::new(ballot(number as u64 + 1), (0..VOTERS).map(slot).collect());
            for (voter, promise) in self.courses[number].promised.iter().enumerate() {
                if let Some(accepted) = promise {
                    attempt.promise(slot(voter), *accepted);
                }
            }
            attempt
        }

        /// Every next state: any message of any attempt arrives now; its answer arrives or is lost.
        fn next(&self) -> Vec<World> {
            let mut all = Vec::new();
            for number in 0..self.courses.len() {
                let attempt = self.attempt(number);
                let course = &self.courses[number];
                for voter in 0..VOTERS {
                    if !course.prepared[voter] {
                        let mut next = self.clone();
                        next.courses[number].prepared[voter] = true;
                        let answer = next.voters[voter].prepare(attempt.ballot());
                        all.push(next.clone());
                        if let Ok(accepted) = answer
                            && course.proposes.is_none()
                        {
                            next.courses[number].promised[voter] = Some(accepted);
                            all.push(next);
                        }
                    }
                    if let Some(value) = course.proposes
                        && !course.asked_to_accept[voter]
                    {
                        let mut next = self.clone();
                        next.courses[number].asked_to_accept[voter] = true;
                        let answer = next.voters[voter].accept(attempt.ballot(), value);
                        next.courses[number].accepted[voter] = answer.is_ok();
                        all.push(next);
                    }
                }
                if course.proposes.is_none() && attempt.may_propose() {
                    let mut next = self.clone();
                    let own = u8::try_from(number).unwrap();
                    next.courses[number].proposes =
                        Some(attempt.bound_to().copied().unwrap_or(own));
                    all.push(next);
                }
            }
            all
        }

        /// Values that a majority accepted under one ballot, at any time.
        fn decided(&self) -> BTreeSet<u8> {
            let majority =
                |course: &&Course| course.accepted.iter().filter(|yes| **yes).count() > 1;
            self.courses
                .iter()
                .filter(majority)
                .filter_map(|course| course.proposes)
                .collect()
        }
    }

    #[test]
    fn no_interleaving_of_two_attempts_decides_two_values() {
        let mut seen = BTreeSet::new();
        let mut open = vec![World::new(2)];
        let mut decisions = BTreeSet::new();
        while let Some(world) = open.pop() {
            if !seen.insert(world.clone()) {
                continue;
            }
            let decided = world.decided();
            assert!(decided.len() <= 1, "two values in {world:#?}");
            decisions.extend(decided);
            open.extend(world.next());
        }
        assert_eq!(decisions, BTreeSet::from([0, 1]), "either attempt can win");
    }

    #[test]
    fn random_interleavings_of_five_attempts_decide_one_value() {
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut both = 0;
        for _ in 0..5_000 {
            let mut world = World::new(5);
            for _ in 0..60 {
                let mut next = world.next();
                if next.is_empty() {
                    break;
                }
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let pick = usize::try_from(random % next.len() as u64).unwrap();
                world = next.swap_remove(pick);
            }
            let decided = world.decided();
            assert!(decided.len() <= 1, "two values in {world:#?}");
            both += decided.len();
        }
        assert!(both > 500, "most walks decide nothing: {both}");
    }

    #[test]
    fn a_promise_is_given_once_a_ballot() {
        let mut voter: Acceptor<u8> = Acceptor::default();
        assert_eq!(voter.prepare(ballot(1)), Ok(None));
        assert_eq!(
            voter.prepare(ballot(1)),
            Err(Outbid {
                promised: ballot(1)
            })
        );
        assert_eq!(voter.accept(ballot(1), 7), Ok(()));
        assert_eq!(voter.prepare(ballot(2)), Ok(Some((ballot(1), 7))));
        assert_eq!(
            voter.accept(ballot(1), 8),
            Err(Outbid {
                promised: ballot(2)
            })
        );
    }

    #[test]
    fn answers_of_strangers_and_repeats_do_not_count() {
        let mut attempt: Attempt<u8> = Attempt::new(ballot(1), vec![slot(0), slot(1), slot(2)]);
        attempt.promise(slot(0), None);
        attempt.promise(slot(0), None);
        attempt.promise(slot(9), Some((ballot(8), 9)));
        assert!(!attempt.may_propose());
        attempt.promise(slot(1), Some((ballot(8), 4)));
        assert_eq!(attempt.bound_to(), Some(&4));
        attempt.accept(slot(2));
        attempt.accept(slot(2));
        assert!(!attempt.decided());
    }
}
