//! Gossip: every node's newest heartbeat reaches every other without anyone in the middle.
//!
//! Each interval a node raises its own heartbeat and exchanges states with a few random members: it
//! sends digests (who, which generation and heartbeat), gets what the other knows better, and sends
//! what the other asked for. What spreads is liveness, load and the number of the newest epoch;
//! nothing that decides ownership.
//!
//! **Invariants.** A node's state is ordered by (generation, heartbeat): the higher one wins
//! everywhere, and only the node itself raises it. Only members of the topology have a state:
//! a removed node cannot come back through gossip.
//!
//! **Not here:** messages, time and verdicts ([`crate::membership`], [`crate::detector`]).

use std::cmp::Ordering;
use std::time::Duration;

use torc_env::NodeId;

use crate::membership::Load;
use crate::topology::Epoch;

/// Settings of gossip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GossipOptions {
    /// Time between two rounds.
    pub interval: Duration,
    /// Members that are talked to in a round. Three reach 1,000 nodes in about eight rounds.
    pub fanout: usize,
}

impl Default for GossipOptions {
    fn default() -> Self {
        GossipOptions {
            interval: Duration::from_millis(500),
            fanout: 3,
        }
    }
}

/// The age of a node's state. Higher is newer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Age {
    /// The node's starts.
    pub generation: u64,
    /// Rounds since its start.
    pub heartbeat: u64,
}

/// What a node says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeState {
    /// Who.
    pub node: NodeId,
    /// How new this is.
    pub age: Age,
    /// The newest epoch that it has stored.
    pub epoch: Epoch,
    /// Its load.
    pub load: Load,
}

/// A node's age as somebody knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest {
    /// Who.
    pub node: NodeId,
    /// How new the sender's knowledge is; zero when it has none.
    pub age: Age,
}

/// What the other side of an exchange has to say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// What it knows better.
    pub newer: Vec<NodeState>,
    /// Whom it wants to hear about.
    pub wanted: Vec<NodeId>,
}

/// One node's knowledge of all. Rows are sorted by node.
#[derive(Clone, Debug)]
pub struct Gossip {
    own: NodeId,
    rows: Vec<NodeState>,
}

impl Gossip {
    /// Knows nobody but this node.
    pub fn new(own: NodeId, generation: u64) -> Self {
        Gossip {
            own,
            rows: vec![NodeState {
                age: Age {
                    generation,
                    heartbeat: 0,
                },
                ..unknown(own)
            }],
        }
    }

    /// Sets the members: rows of others are dropped, missing ones start unknown. This node keeps its
    /// row whether it is a member or not.
    pub fn set_members(&mut self, members: impl IntoIterator<Item = NodeId>) {
        let mut nodes: Vec<NodeId> = members.into_iter().chain([self.own]).collect();
        nodes.sort_unstable();
        nodes.dedup();
        self.rows = nodes
            .into_iter()
            .map(|node| self.state(node).copied().unwrap_or(unknown(node)))
            .collect();
    }

    /// Begins a round: raises this node's heartbeat and refreshes what it says about itself.
    pub fn beat(&mut self, epoch: Epoch, load: Load) {
        let own = self.own;
        if let Some(row) = self.row_mut(own) {
            row.age.heartbeat += 1;
            row.epoch = epoch;
            row.load = load;
        }
    }

    /// What is known about `node`, if it is a member.
    pub fn state(&self, node: NodeId) -> Option<&NodeState> {
        let position = self.rows.binary_search_by_key(&node, |row| row.node).ok()?;
        Some(&self.rows[position])
    }

    /// Opens an exchange: the age of everything that is known, sorted by node.
    pub fn digests(&self) -> Vec<Digest> {
        let digest = |row: &NodeState| Digest {
            node: row.node,
            age: row.age,
        };
        self.rows.iter().map(digest).collect()
    }

    /// Answers an exchange that the other side opened with `digests` (sorted by node; an unsorted
    /// list costs it answers, nothing else).
    pub fn answer(&self, digests: &[Digest]) -> Reply {
        let mut reply = Reply::default();
        let mut theirs = digests.iter().peekable();
        for row in &self.rows {
            while theirs.next_if(|digest| digest.node < row.node).is_some() {}
            let age = match theirs.next_if(|digest| digest.node == row.node) {
                Some(digest) => digest.age,
                None => Age::default(),
            };
            match row.age.cmp(&age) {
                Ordering::Greater => reply.newer.push(*row),
                Ordering::Less if row.node != self.own => reply.wanted.push(row.node),
                Ordering::Less | Ordering::Equal => {}
            }
        }
        reply
    }

    /// The states that the other side asked for.
    pub fn states_of(&self, wanted: &[NodeId]) -> Vec<NodeState> {
        let known = wanted.iter().filter_map(|node| self.state(*node));
        known
            .filter(|state| state.age > Age::default())
            .copied()
            .collect()
    }

    /// Takes in what the other side knows better, and returns who was news.
    pub fn learn(&mut self, states: &[NodeState]) -> Vec<NodeId> {
        let mut news = Vec::new();
        for state in states {
            if state.node == self.own {
                continue;
            }
            if let Some(row) = self.row_mut(state.node)
                && state.age > row.age
            {
                *row = *state;
                news.push(state.node);
            }
        }
        news
    }

    /// Partners of this round: up to `fanout` distinct ones of `up`, and now and then one of
    /// `down`, so that two halves of a healed network find each other. `random` yields uniform numbers.
    pub fn partners(
        &self,
        fanout: usize,
        up: &[NodeId],
        down: &[NodeId],
        mut random: impl FnMut() -> u64,
    ) -> Vec<NodeId> {
        let mut pool = up.to_vec();
        let mut partners = Vec::with_capacity(fanout + 1);
        while partners.len() < fanout && !pool.is_empty() {
            partners.push(pool.swap_remove(below(random(), pool.len())));
        }
        // With d of n down, each is asked about once in n / d rounds by someone; a lone node asks
        // every round.
        if !down.is_empty() && below(random(), up.len() + down.len()) < down.len().max(1) {
            partners.push(down[below(random(), down.len())]);
        }
        partners
    }

    fn row_mut(&mut self, node: NodeId) -> Option<&mut NodeState> {
        let position = self.rows.binary_search_by_key(&node, |row| row.node).ok()?;
        Some(&mut self.rows[position])
    }
}

/// A number below `bound` from a uniform one; the bias is 2^-64 × bound.
fn below(random: u64, bound: usize) -> usize {
    let wide = u128::from(random) * u128::try_from(bound).unwrap_or(u128::MAX);
    usize::try_from(wide >> 64).unwrap_or(0)
}

fn unknown(node: NodeId) -> NodeState {
    NodeState {
        node,
        age: Age::default(),
        epoch: Epoch::default(),
        load: Load::default(),
    }
}

#[cfg(test)]
mod tests {
    use torc_env::Instant;

    use super::*;
    use crate::detector::{Detector, DetectorOptions, Evidence};
    use crate::membership::Health;

    /// Nodes that gossip in lockstep: a round is everyone's turn once.
    struct Crowd {
        nodes: Vec<Gossip>,
        alive: Vec<bool>,
        random: u64,
    }

    impl Crowd {
        fn new(count: u32) -> Crowd {
            let ids = || (1..=count).map(|id| NodeId(u128::from(id)));
            let nodes = ids().map(|id| {
                let mut gossip = Gossip::new(id, 1);
                gossip.set_members(ids());
                gossip
            });
            let nodes: Vec<Gossip> = nodes.collect();
            Crowd {
                alive: vec![true; nodes.len()],
                nodes,
                random: 0x2545_f491_4f6c_dd1d,
            }
        }

        fn draw(random: &mut u64) -> u64 {
            *random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            *random ^ (*random >> 29)
        }

        fn round(&mut self, epoch_of: impl Fn(usize) -> Epoch) {
            for turn in 0..self.nodes.len() {
                if !self.alive[turn] {
                    continue;
                }
                self.nodes[turn].beat(epoch_of(turn), Load::default());
                let own = self.nodes[turn].own;
                let others: Vec<NodeId> = self
                    .nodes
                    .iter()
                    .map(|node| node.own)
                    .filter(|node| *node != own)
                    .collect();
                let random = &mut self.random;
                let fanout = GossipOptions::default().fanout;
                let partners =
                    self.nodes[turn].partners(fanout, &others, &[], || Self::draw(random));
                for partner in partners {
                    let other = self
                        .nodes
                        .iter()
                        .position(|node| node.own == partner)
                        .unwrap();
                    if self.alive[other] {
                        self.exchange(turn, other);
                    }
                }
            }
        }

        fn exchange(&mut self, from: usize, to: usize) {
            let digests = self.nodes[from].digests();
            let reply = self.nodes[to].answer(&digests);
            self.nodes[from].learn(&reply.newer);
            let states = self.nodes[from].states_of(&reply.wanted);
            self.nodes[to].learn(&states);
        }

        /// Rounds until everyone alive knows that node 0 holds epoch 9.
        fn rounds_to_spread(&mut self) -> u32 {
            for round in 1..=100 {
                self.round(|turn| Epoch(if turn == 0 { 9 } else { 1 }));
                let first = self.nodes[0].own;
                let knows = |node: &Gossip| node.state(first).unwrap().epoch == Epoch(9);
                let all = self
                    .nodes
                    .iter()
                    .zip(&self.alive)
                    .all(|(node, alive)| !alive || knows(node));
                if all {
                    return round;
                }
            }
            panic!("no convergence in 100 rounds");
        }
    }

    /// The service level is 30 s; at the default interval that is 60 rounds.
    fn rounds_in_30_seconds() -> u32 {
        let interval = GossipOptions::default().interval;
        u32::try_from(Duration::from_secs(30).as_nanos() / interval.as_nanos()).unwrap()
    }

    #[test]
    fn a_change_reaches_a_hundred_nodes_far_below_30_seconds() {
        let rounds = Crowd::new(100).rounds_to_spread();
        assert!(
            rounds <= 10 && rounds < rounds_in_30_seconds(),
            "{rounds} rounds"
        );
    }

    #[test]
    fn a_change_reaches_a_thousand_nodes_though_a_third_is_dead() {
        let mut crowd = Crowd::new(1_000);
        for dead in (1..1_000).step_by(3) {
            crowd.alive[dead] = false;
        }
        let rounds = crowd.rounds_to_spread();
        assert!(
            rounds <= 15 && rounds < rounds_in_30_seconds(),
            "{rounds} rounds"
        );
    }

    /// Detectors beside the gossip of a crowd; returns (suspicions, convictions) over `rounds`.
    fn judge_crowd(count: u32, rounds: u32, dead: &[usize]) -> (usize, usize) {
        let mut crowd = Crowd::new(count);
        let interval = GossipOptions::default().interval;
        let new = |_| Detector::new(DetectorOptions::default(), interval);
        let mut detectors: Vec<Detector> = (0..count).map(new).collect();
        let mut verdicts = (0, 0);
        for round in 0..rounds {
            if round == rounds / 2 {
                dead.iter().for_each(|dead| crowd.alive[*dead] = false);
            }
            let before = crowd.nodes.clone();
            crowd.round(|_| Epoch(1));
            for (index, detector) in detectors.iter_mut().enumerate() {
                if !crowd.alive[index] {
                    continue;
                }
                // News arrives somewhere within the round.
                let jitter =
                    interval / 100 * u32::try_from(Crowd::draw(&mut crowd.random) % 100).unwrap();
                let now = Instant(0) + interval * round + jitter;
                for (old, new) in before[index].rows.iter().zip(&crowd.nodes[index].rows) {
                    if new.age > old.age && new.node != crowd.nodes[index].own {
                        detector.heard(new.node, Evidence::Hearsay, now);
                    }
                }
                let probed: Vec<NodeId> = detector.suspects().collect();
                for node in probed {
                    let target = crowd
                        .nodes
                        .iter()
                        .position(|other| other.own == node)
                        .unwrap();
                    if crowd.alive[target] {
                        detector.heard(node, Evidence::Direct, now);
                    }
                }
                for verdict in detector.judge(Instant(0) + interval * (round + 1)) {
                    verdicts.0 += usize::from(verdict.to == Health::Suspect);
                    verdicts.1 += usize::from(verdict.to == Health::Down);
                }
            }
        }
        verdicts
    }

    #[test]
    fn a_calm_crowd_suspects_rarely_and_convicts_nobody() {
        for count in [3, 30, 200] {
            let rounds = 120;
            let (suspicions, convictions) = judge_crowd(count, rounds, &[]);
            assert_eq!(convictions, 0, "{count} nodes");
            let judgements = (count * (count - 1) * rounds) as f64;
            let rate = suspicions as f64 / judgements;
            assert!(rate < 0.001, "{count} nodes: {rate}");
        }
    }

    #[test]
    fn everyone_convicts_the_dead_and_nobody_else() {
        let (_, convictions) = judge_crowd(100, 120, &[7, 70]);
        assert_eq!(convictions, 98 * 2);
    }

    #[test]
    fn a_restarted_node_is_news_and_its_old_self_is_not() {
        let mut crowd = Crowd::new(3);
        for _ in 0..20 {
            crowd.round(|_| Epoch(1));
        }
        let old = *crowd.nodes[1].state(NodeId(1)).unwrap();
        let mut restarted = Gossip::new(NodeId(1), 2);
        restarted.set_members([NodeId(2), NodeId(3)]);
        crowd.nodes[0] = restarted;
        crowd.exchange(0, 1);
        let new = *crowd.nodes[1].state(NodeId(1)).unwrap();
        assert_eq!(new.age.generation, 2);
        assert!(new.age > old.age && new.age.heartbeat < old.age.heartbeat);
        assert_eq!(crowd.nodes[1].learn(&[old]), []);
    }

    #[test]
    fn a_removed_node_does_not_come_back() {
        let mut gossip = Gossip::new(NodeId(1), 1);
        gossip.set_members([NodeId(1), NodeId(2)]);
        let ghost = NodeState {
            age: Age {
                generation: 9,
                heartbeat: 9,
            },
            ..unknown(NodeId(3))
        };
        assert_eq!(gossip.learn(&[ghost]), []);
        assert!(gossip.state(NodeId(3)).is_none());
    }

    #[test]
    fn nobody_else_raises_a_nodes_own_state() {
        let mut gossip = Gossip::new(NodeId(1), 1);
        let impostor = NodeState {
            age: Age {
                generation: 5,
                heartbeat: 0,
            },
            ..unknown(NodeId(1))
        };
        assert_eq!(gossip.learn(&[impostor]), []);
        assert_eq!(gossip.state(NodeId(1)).unwrap().age.generation, 1);
    }

    #[test]
    fn a_lone_survivor_keeps_asking_the_dead() {
        let gossip = Gossip::new(NodeId(1), 1);
        let partners = gossip.partners(3, &[], &[NodeId(2)], || u64::MAX);
        assert_eq!(partners, [NodeId(2)]);
    }
}
