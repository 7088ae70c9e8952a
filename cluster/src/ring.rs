//! The consistent-hash ring: which members hold a key.
//!
//! Stands on every request's path: the coordinator asks [`Ring::replicas`] for a token's
//! preference list. The lookup is one binary search over the sorted vnodes and borrows a
//! precomputed row; it allocates nothing.
//!
//! **Rule.** Walk clockwise from the key to the first vnode above it and on. Each pick takes, among
//! the members not picked yet, one in the datacenter picked least often; among those, in the zone
//! (of that datacenter) picked least often; among those, in the rack picked least often; among
//! those, the first on the walk. The rule does not know how many replicas are wanted, so the
//! list for N + 1 is the list for N and one more, and what follows the first N are the fallbacks.
//!
//! **Invariants.** A ring is a pure function of the members of one epoch: every node that holds the
//! epoch computes the same table. The members of a row are distinct. A vnode lies on a fixed grid of
//! 2^24 positions and no two share one.
//!
//! **Not here:** who is alive (see [`crate::membership::View`]), and how tokens are chosen
//! (see [`crate::ring::assign`]).

pub mod assign;

use std::collections::BTreeMap;
use std::fmt;

use torc_env::{ShardId, Token, TokenRange};

/// Positions of the grid on which vnodes lie.
pub const GRID_CELLS: u32 = 1 << GRID_BITS;

/// The grid takes the top bits of a token.
const GRID_BITS: u32 = 24;

/// How far a grid position is shifted to become a token.
const GRID_SHIFT: u32 = 128 - GRID_BITS;

/// A vnode's place: a position of the grid of [`GRID_CELLS`]. It ends the run of the ring that
/// begins at the vnode before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vnode(u32);

impl Vnode {
    /// The vnode at grid position `cell`; `None` beyond the grid.
    pub fn new(cell: u32) -> Option<Vnode> {
        (cell < GRID_CELLS).then_some(Vnode(cell))
    }

    /// The grid position.
    pub fn cell(self) -> u32 {
        self.0
    }

    /// The first token of this grid position.
    pub fn token(self) -> Token {
        Token(u128::from(self.0) << GRID_SHIFT)
    }

    /// The grid position in which a token lies.
    fn of(token: Token) -> Vnode {
        Vnode(u32::try_from(token.0 >> GRID_SHIFT).expect("the top 24 bits fit"))
    }
}

/// A member's position in [`Topology::members`](crate::topology::Topology::members) of one epoch.
/// It means nothing in another epoch; what lasts is the [`SlotId`](crate::topology::SlotId).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberIndex(pub u16);

impl MemberIndex {
    /// For indexing arrays that are parallel to the members.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl fmt::Display for MemberIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// Where a member stands. A zone is one of its datacenter, a rack one of its zone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place<'a> {
    /// Datacenter name.
    pub datacenter: &'a str,
    /// Availability zone name.
    pub zone: &'a str,
    /// Rack name.
    pub rack: &'a str,
}

/// A member as the ring sees it.
#[derive(Clone, Debug)]
pub struct RingMember<'a> {
    /// Its index among all members of the topology.
    pub index: MemberIndex,
    /// Where it stands.
    pub place: Place<'a>,
    /// Its vnodes; at least one, none of them another member's.
    pub vnodes: &'a [Vnode],
}

/// A replica range and who holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The positions: between two neighbouring cut points, inside one shard slice.
    pub range: TokenRange,
    /// The preference list, first choice first.
    pub replicas: &'a [MemberIndex],
}

/// The table of one epoch. Immutable.
#[derive(Clone, Debug)]
pub struct Ring {
    /// Sorted. Row `i` of `rows` is for keys below `vnodes[i]` and not below `vnodes[i - 1]`.
    vnodes: Vec<Vnode>,
    /// The owner of `vnodes[i]`, as a position in `seats`.
    owners: Vec<u16>,
    /// `width` entries for each vnode.
    rows: Vec<MemberIndex>,
    width: usize,
    seats: Vec<Seat>,
    levels: Levels,
}

/// A ring member with its place boiled down to numbers.
#[derive(Clone, Copy, Debug)]
struct Seat {
    member: MemberIndex,
    /// Group numbers of its datacenter, zone and rack; numbers are unique over all levels.
    groups: [u16; 3],
}

/// The tree of datacenters, zones and racks, as numbered groups.
#[derive(Clone, Debug, Default)]
struct Levels {
    /// Seats in each group.
    sizes: Vec<u16>,
    /// Child groups of each group. The last entry holds the datacenters.
    children: Vec<Vec<u16>>,
    /// Whether there is more than one rack at all; otherwise the walk's order decides alone.
    spread: bool,
}

impl Ring {
    /// Builds the table. `width` is the longest preference list that will be asked for; it is cut
    /// to the number of members.
    ///
    /// Cost: for each vnode one walk, as long as it takes to find `width` members under the rule.
    ///
    /// # Panics
    /// When a vnode occurs twice or a member has none: [`Topology`](crate::topology::Topology)
    /// refuses both before they get here.
    pub fn new(members: &[RingMember<'_>], width: usize) -> Ring {
        let (seats, levels) = Levels::of(members);
        let mut placed: Vec<(Vnode, u16)> = Vec::new();
        for (seat, member) in members.iter().enumerate() {
            assert!(!member.vnodes.is_empty(), "a ring member without vnodes");
            let seat = u16::try_from(seat).expect("members are at most 65,535");
            placed.extend(member.vnodes.iter().map(|vnode| (*vnode, seat)));
        }
        placed.sort_unstable();
        for pair in placed.windows(2) {
            assert!(pair[0].0 < pair[1].0, "two vnodes at one position");
        }
        let mut ring = Ring {
            vnodes: placed.iter().map(|(vnode, _)| *vnode).collect(),
            owners: placed.iter().map(|(_, seat)| *seat).collect(),
            rows: Vec::new(),
            width: width.min(members.len()),
            seats,
            levels,
        };
        let mut rows = Vec::with_capacity(ring.vnodes.len() * ring.width);
        let mut walk = Walk::new(&ring);
        for start in 0..ring.vnodes.len() {
            walk.restart(start);
            rows.extend((&mut walk).take(ring.width));
        }
        drop(walk);
        ring.rows = rows;
        ring
    }

    /// The preference list of `token`: the `n` members that hold it, first choice first; all
    /// members when there are fewer, up to the width that the ring was built with.
    pub fn replicas(&self, token: Token, n: usize) -> &[MemberIndex] {
        self.row(self.vnode_above(token), n)
    }

    /// Whether `member` is among the first `n` of `token`.
    pub fn is_replica(&self, token: Token, n: usize, member: MemberIndex) -> bool {
        self.replicas(token, n).contains(&member)
    }

    /// The members that stand in for unreachable replicas of `token`, best first: the continuation
    /// of the preference list beyond the first `n`. Walks the ring lazily; allocates its scratch.
    pub fn fallbacks(&self, token: Token, n: usize) -> impl Iterator<Item = MemberIndex> + '_ {
        let mut walk = Walk::new(self);
        walk.restart(self.vnode_above(token));
        walk.skip(n)
    }

    /// All replica ranges in ring order, each with its first `n` members, cut at every vnode and at
    /// the slice borders of a node with `shard_count` shards.
    pub fn ranges(&self, n: usize, shard_count: u16) -> impl Iterator<Item = Piece<'_>> + '_ {
        let mut first = Token(0);
        let mut done = self.vnodes.is_empty();
        std::iter::from_fn(move || {
            if done {
                return None;
            }
            let row = self
                .vnodes
                .partition_point(|vnode| *vnode <= Vnode::of(first));
            let shard = first.shard(shard_count);
            let slice_last = TokenRange::of_shard(shard, shard_count).last;
            let vnode_last = match self.vnodes.get(row) {
                Some(vnode) => Token(vnode.token().0 - 1),
                None => Token::MAX,
            };
            let last = slice_last.min(vnode_last);
            let piece = Piece {
                range: TokenRange { first, last },
                replicas: self.row(row % self.vnodes.len(), n),
            };
            done = last == Token::MAX;
            first = Token(last.0.wrapping_add(1));
            Some(piece)
        })
    }

    /// The replica ranges that `member` holds when each key has `n` replicas, cut as
    /// [`Ring::ranges`] cuts them.
    pub fn ranges_of(
        &self,
        member: MemberIndex,
        n: usize,
        shard_count: u16,
    ) -> impl Iterator<Item = Piece<'_>> + '_ {
        self.ranges(n, shard_count)
            .filter(move |piece| piece.replicas.contains(&member))
    }

    /// The replica ranges of `shard` alone that `member` holds.
    pub fn ranges_of_shard(
        &self,
        member: MemberIndex,
        n: usize,
        shard: ShardId,
        shard_count: u16,
    ) -> impl Iterator<Item = Piece<'_>> + '_ {
        self.ranges_of(member, n, shard_count)
            .filter(move |piece| piece.range.first.shard(shard_count) == shard)
    }

    /// The replica range of `token` on a node with `shard_count` shards.
    pub fn range_at(&self, token: Token, shard_count: u16) -> TokenRange {
        let slice = TokenRange::of_shard(token.shard(shard_count), shard_count);
        let above = self
            .vnodes
            .partition_point(|vnode| *vnode <= Vnode::of(token));
        let vnode_first = match above.checked_sub(1) {
            Some(below) => self.vnodes[below].token(),
            None => Token(0),
        };
        let vnode_last = match self.vnodes.get(above) {
            Some(vnode) => Token(vnode.token().0 - 1),
            None => Token::MAX,
        };
        TokenRange {
            first: slice.first.max(vnode_first),
            last: slice.last.min(vnode_last),
        }
    }

    /// Ring members, alive or not. The effective N of a keyspace is never above this.
    pub fn member_count(&self) -> usize {
        self.seats.len()
    }

    /// The share of the ring that each member holds under `n` replicas, as (member, fraction of
    /// all `n` copies' tokens), in member order. For status pages; walks the whole table.
    pub fn shares(&self, n: usize) -> Vec<(MemberIndex, f64)> {
        let mut cells: BTreeMap<MemberIndex, u64> =
            self.seats.iter().map(|seat| (seat.member, 0)).collect();
        let mut before = self.vnodes.last().map_or(0, |vnode| vnode.0);
        for (row, vnode) in self.vnodes.iter().enumerate() {
            let width = vnode.0.wrapping_sub(before) & (GRID_CELLS - 1);
            let width = if self.vnodes.len() == 1 {
                GRID_CELLS
            } else {
                width
            };
            for member in self.row(row, n) {
                *cells.entry(*member).or_default() += u64::from(width);
            }
            before = vnode.0;
        }
        let total: u64 = cells.values().sum();
        cells
            .into_iter()
            .map(|(member, held)| (member, held as f64 / total.max(1) as f64))
            .collect()
    }

    fn row(&self, vnode: usize, n: usize) -> &[MemberIndex] {
        let start = vnode * self.width;
        self.rows
            .get(start..start + n.min(self.width))
            .unwrap_or_default()
    }

    /// Position of the first vnode above `token`, clockwise.
    fn vnode_above(&self, token: Token) -> usize {
        let cell = Vnode::of(token);
        let above = self.vnodes.partition_point(|vnode| *vnode <= cell);
        if above == self.vnodes.len() { 0 } else { above }
    }
}

impl Levels {
    fn of(members: &[RingMember<'_>]) -> (Vec<Seat>, Levels) {
        let mut numbers: BTreeMap<(&str, Option<&str>, Option<&str>), u16> = BTreeMap::new();
        let mut levels = Levels::default();
        let mut datacenters = Vec::new();
        let mut seats = Vec::with_capacity(members.len());
        for member in members {
            let Place {
                datacenter,
                zone,
                rack,
            } = member.place;
            let mut parent: Option<u16> = None;
            let mut groups = [0; 3];
            let path = [
                (datacenter, None, None),
                (datacenter, Some(zone), None),
                (datacenter, Some(zone), Some(rack)),
            ];
            for (group, name) in groups.iter_mut().zip(path) {
                *group = *numbers.entry(name).or_insert_with(|| {
                    let number = u16::try_from(levels.sizes.len()).expect("few groups");
                    levels.sizes.push(0);
                    levels.children.push(Vec::new());
                    match parent {
                        Some(parent) => levels.children[usize::from(parent)].push(number),
                        None => datacenters.push(number),
                    }
                    number
                });
                levels.sizes[usize::from(*group)] += 1;
                parent = Some(*group);
            }
            seats.push(Seat {
                member: member.index,
                groups,
            });
        }
        levels.spread = levels.sizes.len() > 3;
        levels.children.push(datacenters);
        (seats, levels)
    }
}

/// The walk from one vnode: yields members by the ring's rule until none is left.
struct Walk<'a> {
    ring: &'a Ring,
    /// Next vnode to look at, and how many are left to look at.
    next: usize,
    left: usize,
    /// Seats met on the walk and not picked yet, in order.
    met: Vec<u16>,
    /// By seat: whether the walk has met it.
    seen: Vec<bool>,
    /// By group: how many of its seats were picked.
    picked: Vec<u16>,
}

impl<'a> Walk<'a> {
    fn new(ring: &'a Ring) -> Self {
        Walk {
            ring,
            next: 0,
            left: 0,
            met: Vec::new(),
            seen: vec![false; ring.seats.len()],
            picked: vec![0; ring.levels.sizes.len()],
        }
    }

    fn restart(&mut self, vnode: usize) {
        self.next = vnode;
        self.left = self.ring.vnodes.len();
        self.met.clear();
        self.seen.fill(false);
        self.picked.fill(0);
    }

    /// Advances to the next seat that was not met before.
    fn meet(&mut self) -> Option<u16> {
        while self.left > 0 {
            let seat = self.ring.owners[self.next];
            self.next += 1;
            if self.next == self.ring.vnodes.len() {
                self.next = 0;
            }
            self.left -= 1;
            if !std::mem::replace(&mut self.seen[usize::from(seat)], true) {
                return Some(seat);
            }
        }
        None
    }

    /// Whether the rule allows `seat` as the next pick.
    fn eligible(&self, seat: u16) -> bool {
        let levels = &self.ring.levels;
        let mut siblings = &levels.children[levels.children.len() - 1];
        for group in self.ring.seats[usize::from(seat)].groups {
            let least = siblings
                .iter()
                .map(|sibling| usize::from(*sibling))
                .filter(|sibling| self.picked[*sibling] < levels.sizes[*sibling])
                .map(|sibling| self.picked[sibling])
                .min();
            if least != Some(self.picked[usize::from(group)]) {
                return false;
            }
            siblings = &levels.children[usize::from(group)];
        }
        true
    }
}

impl Iterator for Walk<'_> {
    type Item = MemberIndex;

    fn next(&mut self) -> Option<MemberIndex> {
        let waiting = self.met.iter().position(|seat| self.eligible(*seat));
        let seat = match waiting {
            Some(position) => self.met.remove(position),
            None => loop {
                let seat = self.meet()?;
                if !self.ring.levels.spread || self.eligible(seat) {
                    break seat;
                }
                self.met.push(seat);
            },
        };
        let seat = self.ring.seats[usize::from(seat)];
        for group in seat.groups {
            self.picked[usize::from(group)] += 1;
        }
        Some(seat.member)
    }
}

#[cfg(test)]
mod tests;
