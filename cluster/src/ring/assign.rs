//! Choosing a new member's vnodes.
//!
//! A pure function of the vnodes that exist and the newcomer's salt, so that a retry proposes the
//! same. A newcomer takes its fair share of the ring from the members that have most above theirs,
//! in as many small pieces as it has vnodes.
//!
//! **Invariant.** What is returned lies on the grid, is sorted, and clashes with nothing.

use std::collections::BTreeMap;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{GRID_CELLS, Vnode};

/// Vnodes of a member of weight 1.
pub const VNODES_DEFAULT: u16 = 128;

/// Places that are looked at for each vnode. More of them even out the ring; past sixteen little
/// is gained.
const CANDIDATES: u64 = 16;

/// There is no room, or what exists is not a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AssignError {
    /// Two members claim one position.
    #[error("two members have a vnode at grid position {}", vnode.cell())]
    Clash {
        /// The position.
        vnode: Vnode,
    },
    /// More vnodes than a ring can be expected to place.
    #[error("{wanted} vnodes beside {existing} are more than the ring takes")]
    Full {
        /// Vnodes asked for.
        wanted: usize,
        /// Vnodes that exist.
        existing: usize,
    },
}

/// The vnodes on the ring by position, with how much of the ring each member has above its share.
#[derive(Clone, Debug, Default)]
pub struct Positions {
    /// Grid position → member (in order of [`Positions::add`]).
    owners: BTreeMap<u32, usize>,
    /// By member: vnodes.
    counts: Vec<usize>,
}

impl Positions {
    /// Collects the vnodes of all members and refuses a clash.
    pub fn of<'a>(members: impl IntoIterator<Item = &'a [Vnode]>) -> Result<Self, AssignError> {
        let mut positions = Positions::default();
        for vnodes in members {
            positions.add(vnodes)?;
        }
        Ok(positions)
    }

    /// Adds one more member.
    pub fn add(&mut self, vnodes: &[Vnode]) -> Result<(), AssignError> {
        let owner = self.counts.len();
        for vnode in vnodes {
            if self.owners.insert(vnode.cell(), owner).is_some() {
                return Err(AssignError::Clash { vnode: *vnode });
            }
        }
        self.counts.push(vnodes.len());
        Ok(())
    }

    /// Chooses `count` vnodes for one more member; `salt` names the newcomer (cluster and slot).
    pub fn choose(&self, count: u16, salt: u64) -> Result<Vec<Vnode>, AssignError> {
        let existing = self.owners.len();
        let wanted = usize::from(count);
        if existing + wanted > usize::try_from(GRID_CELLS / 4).unwrap_or(usize::MAX) {
            return Err(AssignError::Full { wanted, existing });
        }
        let mut plan = Plan::new(self, wanted);
        for number in 0..u64::from(count) {
            plan.place(number, salt);
        }
        let mut chosen = plan.chosen;
        chosen.sort_unstable();
        Ok(chosen)
    }
}

/// A newcomer's vnodes in the making.
struct Plan {
    owners: BTreeMap<u32, usize>,
    /// By member, the newcomer last: cells owned, and cells that would be fair.
    held: Vec<f64>,
    fair: Vec<f64>,
    wanted: usize,
    chosen: Vec<Vnode>,
}

/// The run of cells that a candidate would cut: `before` (excluded) to `after` (included).
#[derive(Clone, Copy)]
struct Gap {
    before: u32,
    after: u32,
    owner: usize,
}

impl Gap {
    fn cells(self) -> u32 {
        match self.after.wrapping_sub(self.before) % GRID_CELLS {
            0 => GRID_CELLS,
            cells => cells,
        }
    }
}

impl Plan {
    fn new(positions: &Positions, wanted: usize) -> Plan {
        let newcomer = positions.counts.len();
        let total = (positions.owners.len() + wanted) as f64;
        let share = |count: usize| f64::from(GRID_CELLS) * count as f64 / total;
        let mut fair: Vec<f64> = positions.counts.iter().map(|count| share(*count)).collect();
        fair.push(share(wanted));
        let mut held = vec![0.0; newcomer + 1];
        let mut before = positions.owners.keys().next_back().copied();
        for (cell, owner) in &positions.owners {
            let gap = Gap {
                before: before.unwrap_or(*cell),
                after: *cell,
                owner: *owner,
            };
            held[*owner] += f64::from(gap.cells());
            before = Some(*cell);
        }
        Plan {
            owners: positions.owners.clone(),
            held,
            fair,
            wanted,
            chosen: Vec::with_capacity(wanted),
        }
    }

    fn newcomer(&self) -> usize {
        self.fair.len() - 1
    }

    /// Places one vnode: among the candidates' gaps, in the one whose owner has most too much,
    /// cutting off as much as the newcomer still lacks for each vnode to come.
    fn place(&mut self, number: u64, salt: u64) {
        let newcomer = self.newcomer();
        let left = self.wanted - self.chosen.len();
        let lacking = (self.fair[newcomer] - self.held[newcomer]) / left as f64;
        let best = (0..CANDIDATES)
            .filter_map(|candidate| self.gap(draw(salt, number, candidate)))
            .filter(|gap| gap.cells() > 1)
            .max_by(|a, b| self.merit(*a, lacking).total_cmp(&self.merit(*b, lacking)));
        let cell = match best {
            Some(gap) => {
                let cut = if gap.owner == newcomer {
                    gap.cells() / 2
                } else {
                    cut_cells(lacking.min(f64::from(gap.cells()) * CUT_MAX))
                };
                (gap.before + cut.min(gap.cells() - 1)) % GRID_CELLS
            }
            None => self.free_from(draw(salt, number, 0)),
        };
        if let Some(gap) = self.gap(cell) {
            let cut = f64::from(cell.wrapping_sub(gap.before) % GRID_CELLS);
            self.held[gap.owner] -= cut;
            self.held[newcomer] += cut;
        } else {
            self.held[newcomer] += f64::from(GRID_CELLS);
        }
        self.owners.insert(cell, newcomer);
        self.chosen.push(Vnode(cell));
    }

    /// What speaks for cutting this gap: how far its owner is above its share, as long as the gap
    /// is wide enough to give what is lacking; the newcomer's own gaps come last.
    fn merit(&self, gap: Gap, lacking: f64) -> f64 {
        let wide = (f64::from(gap.cells()) * CUT_MAX / lacking).min(1.0);
        if gap.owner == self.newcomer() {
            return f64::from(gap.cells()) - 2.0 * f64::from(GRID_CELLS);
        }
        let above = self.held[gap.owner] / self.fair[gap.owner];
        above * wide
    }

    /// The gap that a new vnode at `cell` would cut; `None` when the ring is empty.
    fn gap(&self, cell: u32) -> Option<Gap> {
        let first = self.owners.iter().next()?;
        let last = self.owners.keys().next_back()?;
        let before = self
            .owners
            .range(..cell)
            .next_back()
            .map_or(*last, |(at, _)| *at);
        let (after, owner) = self.owners.range(cell..).next().unwrap_or(first);
        Some(Gap {
            before,
            after: *after,
            owner: *owner,
        })
    }

    fn free_from(&self, start: u32) -> u32 {
        (0..GRID_CELLS)
            .map(|step| (start + step) % GRID_CELLS)
            .find(|cell| !self.owners.contains_key(cell))
            .expect("at most a quarter of the grid is taken")
    }
}

/// Most of a gap that a newcomer takes in one cut, so that ranges do not degenerate.
const CUT_MAX: f64 = 0.9;

/// A positive cell count from a float within the grid.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped to 1..=2^24, where f64 is exact"
)]
fn cut_cells(cells: f64) -> u32 {
    cells.clamp(1.0, f64::from(GRID_CELLS - 1)) as u32
}

fn draw(salt: u64, number: u64, candidate: u64) -> u32 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes[8..].copy_from_slice(&candidate.to_le_bytes());
    let cell = xxh3_64_with_seed(&bytes, salt) % u64::from(GRID_CELLS);
    u32::try_from(cell).expect("below the grid size")
}
