//! Failure detection: how unlikely a peer's silence is (phi accrual, Hayashibara et al. 2004).
//!
//! On the path: gossip reports heartbeats, the pulse of [`crate::membership`] asks for verdicts, the
//! coordinator routes by them. A verdict steers routing and nothing else: it removes no member and
//! moves no range.
//!
//! **Invariants.** Suspicion comes before conviction, and lasts [`DetectorOptions::suspicion`], in which
//! the peer is asked directly. An observer that was itself paused does not count its own absence as
//! the peer's silence. A convicted peer is up again only after several good probes.
//!
//! **Not here:** clocks and messages. Time comes in as an argument.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use torc_env::{Instant, NodeId};

use crate::membership::Health;

/// Settings of the detector.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DetectorOptions {
    /// Phi from which a peer is suspected: asked directly, and asked last by coordinators. 5 means
    /// that one silence of that length in 10^5 is innocent.
    pub phi_suspect: f64,
    /// Phi from which a suspected peer is convicted.
    pub phi_convict: f64,
    /// Least standard deviation that is believed: a quiet network must not make the detector
    /// nervous.
    pub deviation_floor: Duration,
    /// How long a peer is suspected before it can be convicted: time for several direct probes.
    pub suspicion: Duration,
    /// A gap between two looks at the clock that means that this node itself stood still.
    pub own_pause: Duration,
    /// Good probes that a convicted peer needs.
    pub probes_up: u32,
    /// Intervals that are remembered for each peer.
    pub window: usize,
}

impl Default for DetectorOptions {
    fn default() -> Self {
        DetectorOptions {
            phi_suspect: 5.0,
            phi_convict: 8.0,
            deviation_floor: Duration::from_millis(100),
            suspicion: Duration::from_millis(1_500),
            own_pause: Duration::from_millis(1_500),
            probes_up: 3,
            window: 100,
        }
    }
}

/// How a sign of life came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// The peer itself answered or asked.
    Direct,
    /// Somebody else has heard it.
    Hearsay,
}

/// A change of verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// On whom.
    pub node: NodeId,
    /// What it was.
    pub from: Health,
    /// What it is.
    pub to: Health,
}

/// The judge of all peers.
#[derive(Clone, Debug)]
pub struct Detector {
    options: DetectorOptions,
    /// The interval that is expected before there are samples.
    expected: Duration,
    looked: Option<Instant>,
    peers: BTreeMap<NodeId, Peer>,
}

#[derive(Clone, Debug)]
struct Peer {
    /// When it was heard last; shifted by this node's own pauses.
    heard: Option<Instant>,
    /// Recent intervals, in seconds.
    intervals: VecDeque<f64>,
    health: Health,
    suspected: Option<Instant>,
    good: u32,
    /// A direct contact failed and none has succeeded since: hearsay does not count.
    cut_off: bool,
}

impl Detector {
    /// A detector that expects a heartbeat of each peer every `expected`.
    pub fn new(options: DetectorOptions, expected: Duration) -> Self {
        Detector {
            options,
            expected,
            looked: None,
            peers: BTreeMap::new(),
        }
    }

    /// A member exists. One that was never heard is late from now on, not down: right after a start
    /// nobody has been heard yet, and writing everyone off would refuse every request that needs
    /// a second replica.
    pub fn expect(&mut self, node: NodeId, now: Instant) {
        self.peers.entry(node).or_insert_with(|| Peer {
            health: Health::Suspect,
            suspected: Some(now),
            ..Peer::new()
        });
    }

    /// A peer was heard: its heartbeat counter rose, or it answered.
    pub fn heard(&mut self, node: NodeId, evidence: Evidence, now: Instant) {
        self.look(now);
        let peer = self.peers.entry(node).or_insert_with(Peer::new);
        match evidence {
            Evidence::Direct => peer.cut_off = false,
            Evidence::Hearsay if peer.cut_off => return,
            Evidence::Hearsay => {}
        }
        let window = self.options.window.max(1);
        let newcomer = peer.heard.is_none();
        if let Some(before) = peer.heard.replace(now)
            && peer.health != Health::Down
        {
            // Silence that ended in a conviction says nothing about the normal rhythm.
            if peer.intervals.len() >= window {
                peer.intervals.pop_front();
            }
            peer.intervals.push_back(now.since(before).as_secs_f64());
        }
        peer.good = peer.good.saturating_add(1);
        match peer.health {
            Health::Up => {}
            Health::Suspect => peer.acquit(),
            Health::Down if newcomer || peer.good >= self.options.probes_up => peer.acquit(),
            Health::Down => {}
        }
    }

    /// A direct contact failed for certain (nothing listens there). From now on hearsay does not
    /// count, and the peer is suspected at once.
    pub fn failed(&mut self, node: NodeId, now: Instant) {
        self.look(now);
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.cut_off = true;
            peer.good = 0;
            match peer.health {
                Health::Up => {
                    peer.health = Health::Suspect;
                    peer.suspected = Some(now);
                }
                // It has given no reason yet to believe that it is there.
                Health::Suspect if peer.heard.is_none() => peer.health = Health::Down,
                Health::Suspect | Health::Down => {}
            }
        }
    }

    /// Looks at everyone and returns what has changed since the last look, in order of node. Call it
    /// once a gossip interval.
    pub fn judge(&mut self, now: Instant) -> Vec<Verdict> {
        self.look(now);
        let mut changes = Vec::new();
        for (node, peer) in &mut self.peers {
            let from = peer.health;
            let phi = peer.phi(now, self.expected, &self.options);
            match peer.health {
                Health::Up if phi >= self.options.phi_suspect => {
                    peer.health = Health::Suspect;
                    peer.suspected = Some(now);
                    peer.good = 0;
                }
                Health::Suspect => {
                    let since = peer.suspected.map_or(Duration::ZERO, |at| now.since(at));
                    let convicted = phi >= self.options.phi_convict;
                    if convicted && since >= self.options.suspicion {
                        peer.health = Health::Down;
                        peer.good = 0;
                    }
                }
                Health::Down if phi >= self.options.phi_suspect => peer.good = 0,
                Health::Up | Health::Down => {}
            }
            if from != peer.health {
                changes.push(Verdict {
                    node: *node,
                    from,
                    to: peer.health,
                });
            }
        }
        changes
    }

    /// The verdict on `node`: down when it is not expected and was never heard.
    pub fn health(&self, node: NodeId) -> Health {
        self.peers
            .get(&node)
            .map_or(Health::Down, |peer| peer.health)
    }

    /// How unlikely the silence of `node` is, as the negative decimal logarithm; [`PHI_MAX`] before
    /// it was ever heard.
    pub fn phi(&self, node: NodeId, now: Instant) -> f64 {
        self.peers
            .get(&node)
            .map_or(PHI_MAX, |peer| peer.phi(now, self.expected, &self.options))
    }

    /// Those under suspicion: ask them directly.
    pub fn suspects(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.peers
            .iter()
            .filter(|(_, peer)| peer.health == Health::Suspect)
            .map(|(node, _)| *node)
    }

    /// Forgets everyone for whom `keep` is false: former members.
    pub fn retain(&mut self, keep: impl Fn(NodeId) -> bool) {
        self.peers.retain(|node, _| keep(*node));
    }

    /// Notices this node's own pauses: whoever was silent meanwhile may have talked to a wall.
    fn look(&mut self, now: Instant) {
        let Some(before) = self.looked.replace(now) else {
            return;
        };
        let gap = now.since(before);
        if gap < self.options.own_pause {
            return;
        }
        for peer in self.peers.values_mut() {
            peer.heard = peer.heard.map(|heard| heard + gap);
            peer.suspected = peer.suspected.map(|suspected| suspected + gap);
        }
    }
}

/// Above this, phi means nothing more.
pub const PHI_MAX: f64 = 100.0;

impl Peer {
    fn new() -> Self {
        Peer {
            heard: None,
            intervals: VecDeque::new(),
            health: Health::Down,
            suspected: None,
            good: 0,
            cut_off: false,
        }
    }

    fn acquit(&mut self) {
        self.health = Health::Up;
        self.suspected = None;
        self.good = 0;
    }

    /// Phi under a normal distribution of the intervals, by the logistic approximation of its tail
    /// (error below 2 % of phi; Bowling et al. 2009), computed in logarithms so that it neither
    /// overflows nor jumps.
    fn phi(&self, now: Instant, expected: Duration, options: &DetectorOptions) -> f64 {
        let Some(heard) = self.heard else {
            return PHI_MAX;
        };
        let silence = now.since(heard).as_secs_f64();
        let expected = expected.as_secs_f64();
        // Two imagined samples, so that the first real ones do not decide alone.
        let prior = [expected * 0.75, expected * 1.25];
        let count = (self.intervals.len() + prior.len()) as f64;
        let samples = || self.intervals.iter().chain(&prior);
        let mean = samples().sum::<f64>() / count;
        let variance = samples().map(|sample| (sample - mean).powi(2)).sum::<f64>() / count;
        let deviation = variance.sqrt().max(options.deviation_floor.as_secs_f64());
        let y = (silence - mean) / deviation;
        let exponent = y * (1.5976 + 0.070_566 * y * y);
        let phi = if exponent > 0.0 {
            exponent / std::f64::consts::LN_10 + (-exponent).exp().ln_1p() / std::f64::consts::LN_10
        } else {
            exponent.exp().ln_1p() / std::f64::consts::LN_10
        };
        phi.min(PHI_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: NodeId = NodeId(7);
    const BEAT: Duration = Duration::from_millis(500);

    /// A detector and a clock that moves in steps.
    struct Scene {
        detector: Detector,
        now: Instant,
        told: Vec<(Health, Health)>,
    }

    impl Scene {
        fn new() -> Scene {
            Scene {
                detector: Detector::new(DetectorOptions::default(), BEAT),
                now: Instant(0) + Duration::from_secs(100),
                told: Vec::new(),
            }
        }

        /// One gossip interval, in which the peer is heard or not.
        fn beat(&mut self, heard: bool) {
            self.now = self.now + BEAT;
            if heard {
                self.detector.heard(PEER, Evidence::Direct, self.now);
            }
            let verdicts = self.detector.judge(self.now);
            self.told
                .extend(verdicts.iter().map(|verdict| (verdict.from, verdict.to)));
        }

        fn beats(&mut self, count: usize, heard: bool) {
            (0..count).for_each(|_| self.beat(heard));
        }

        fn health(&self) -> Health {
            self.detector.health(PEER)
        }
    }

    #[test]
    fn an_unheard_peer_is_down_and_up_from_its_first_sign() {
        let mut scene = Scene::new();
        assert_eq!(scene.health(), Health::Down);
        scene.beat(true);
        assert_eq!(scene.health(), Health::Up);
    }

    #[test]
    fn silence_leads_to_suspicion_and_only_then_to_conviction() {
        let mut scene = Scene::new();
        scene.beats(20, true);
        scene.beats(20, false);
        assert_eq!(
            scene.told,
            [
                (Health::Up, Health::Suspect),
                (Health::Suspect, Health::Down)
            ]
        );
        assert!(scene.detector.phi(PEER, scene.now) >= 8.0);
    }

    #[test]
    fn one_lost_heartbeat_is_no_verdict_and_one_answer_clears_a_suspect() {
        let mut scene = Scene::new();
        scene.beats(20, true);
        scene.beats(2, false);
        assert_eq!(scene.health(), Health::Suspect);
        scene.beat(true);
        assert_eq!(scene.health(), Health::Up);
        assert!(scene.told.iter().all(|(_, to)| *to != Health::Down));
    }

    #[test]
    fn a_convict_needs_several_good_probes_in_a_row() {
        let mut scene = Scene::new();
        scene.beats(20, true);
        scene.beats(20, false);
        scene.beats(2, true);
        scene.beats(6, false);
        scene.beats(2, true);
        assert_eq!(
            scene.health(),
            Health::Down,
            "two probes, silence, two probes"
        );
        scene.beat(true);
        assert_eq!(scene.health(), Health::Up);
    }

    #[test]
    fn a_paused_observer_accuses_nobody() {
        let mut scene = Scene::new();
        scene.beats(20, true);
        scene.now = scene.now + Duration::from_secs(60);
        scene.beat(false);
        assert_eq!(scene.health(), Health::Up);
        assert!(scene.detector.phi(PEER, scene.now) < 5.0);
        scene.beats(20, false);
        assert_eq!(
            scene.health(),
            Health::Down,
            "real silence afterwards still counts"
        );
    }

    #[test]
    fn hearsay_does_not_clear_a_peer_that_cannot_be_reached() {
        let mut scene = Scene::new();
        scene.beats(20, true);
        scene.detector.failed(PEER, scene.now);
        assert_eq!(scene.health(), Health::Suspect);
        for _ in 0..20 {
            scene.now = scene.now + BEAT;
            scene.detector.heard(PEER, Evidence::Hearsay, scene.now);
            scene.detector.judge(scene.now);
        }
        assert_eq!(scene.health(), Health::Down);
        scene.beats(3, true);
        assert_eq!(scene.health(), Health::Up);
    }

    #[test]
    fn phi_rises_with_silence_and_is_never_wild() {
        let mut scene = Scene::new();
        scene.beats(20, true);
        let mut last = 0.0;
        for step in 0..10_000u64 {
            let phi = scene
                .detector
                .phi(PEER, scene.now + Duration::from_millis(step));
            assert!(phi >= last && phi <= PHI_MAX, "{phi} after {last}");
            last = phi;
        }
        assert!(last > 8.0);
        assert!(scene.detector.phi(PEER, scene.now + BEAT) < 1.0);
    }
}
