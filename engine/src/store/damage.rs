//! Damage in tables: noted where it is met, cut out when the caller says so.
//!
//! A block that cannot be read is an error to whoever asks for one of its keys, and to nobody else. It
//! is noted by reads, compactions and scrubs alike; trees with noted damage are not compacted, since
//! every attempt would fail at the same block. Cutting it out ([`Inner::quarantine`]) makes its keys
//! absent, so it is for a caller that then asks replicas for them: the manifest says what is *lost* in the
//! same edit, until [`super::Store::set_losses`].
//!
//! A value that cannot be read from its blob is damage of the table that refers to it, at its token alone.
//!
//! A file of which nothing is used any more stays on the disk under another name, for whoever wants to
//! look at it.

use std::cell::RefCell;

use torc_env::{Disk, Env, TokenRange, TreeId};

use super::Inner;
use super::tables::{DataFile, Opened, changes_of};
use crate::error::{ReadError, WriteError};
use crate::levels::Levels;
use crate::manifest::{Change, Loss};
use crate::table::table_id;

/// A part of a table that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The tree.
    pub tree: TreeId,
    /// The table's file.
    pub file_id: u64,
    /// The tokens whose records are lost in it.
    pub range: TokenRange,
}

/// Ranges of one table. With more of them, those that are the closest to each other are made one.
const RANGES_MAX: usize = 256;

/// What was noted and is still in use.
#[derive(Default)]
pub(super) struct Damages(RefCell<Vec<Damage>>);

impl Damages {
    pub(super) fn all(&self) -> Vec<Damage> {
        self.0.borrow().clone()
    }

    pub(super) fn is_in(&self, tree: TreeId) -> bool {
        self.0.borrow().iter().any(|damage| damage.tree == tree)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }

    /// Returns whether it was not known. Of one table are kept a bounded number of ranges: each of them is work for everybody
    /// who looks for what is damaged, and a blob that rots is damage at every token that has a value in it.
    fn note(&self, mut damage: Damage) -> bool {
        let mut noted = self.0.borrow_mut();
        let is_of_table =
            |known: &Damage| (known.tree, known.file_id) == (damage.tree, damage.file_id);
        let (mut of_table, mut kept): (Vec<Damage>, Vec<Damage>) =
            noted.iter().copied().partition(is_of_table);
        let covers = |known: &Damage| {
            known.range.first <= damage.range.first && damage.range.last <= known.range.last
        };
        if of_table.iter().any(covers) {
            return false;
        }
        of_table.retain(|known| {
            let is_apart = known.range.intersection(&damage.range).is_none();
            if !is_apart {
                damage.range = hull(known.range, damage.range);
            }
            is_apart
        });
        let at = of_table.partition_point(|known| known.range.first < damage.range.first);
        of_table.insert(at, damage);
        if of_table.len() > RANGES_MAX {
            let gap = |at: &usize| of_table[at + 1].range.first.0 - of_table[*at].range.last.0;
            let narrowest = (0..RANGES_MAX).min_by_key(gap).unwrap_or(0);
            let next = of_table.remove(narrowest + 1);
            of_table[narrowest].range = hull(of_table[narrowest].range, next.range);
        }
        kept.extend(of_table);
        *noted = kept;
        true
    }

    pub(super) fn keep(&self, is_kept: impl FnMut(&Damage) -> bool) {
        self.0.borrow_mut().retain(is_kept);
    }
}

impl<E: Env> Inner<E> {
    /// Notes corruption on its way to the caller.
    pub(super) fn count_corrupt<T>(&self, result: Result<T, ReadError>) -> Result<T, ReadError> {
        if let Err(error) = &result {
            self.note_corrupt(error);
        }
        result
    }

    /// Notes what a corrupt read says of a table, once.
    pub(super) fn note_corrupt(&self, error: &ReadError) {
        let Some(damage) = self.damage_of(error) else {
            return;
        };
        if self.damages.note(damage) {
            tracing::error!(%error, "a table is damaged");
            self.count(|counts| counts.corrupt_blocks += 1);
        }
    }

    /// What cannot be told any more; `None` when it is in no table that is in use: one that was compacted away
    /// meanwhile is nobody's trouble any more.
    fn damage_of(&self, error: &ReadError) -> Option<Damage> {
        let tables = self.tables.borrow();
        match error {
            ReadError::Corrupt { path, offset, .. } => {
                let name = path.file_name().and_then(|name| name.to_str());
                let file_id = name.and_then(table_id)?;
                let (tree, range) = tables.damaged_range(file_id, *offset)?;
                Some(Damage {
                    tree,
                    file_id,
                    range,
                })
            }
            ReadError::CorruptValue { table, token, .. } => Some(Damage {
                tree: tables.tree_of(*table)?,
                file_id: *table,
                range: TokenRange {
                    first: *token,
                    last: *token,
                },
            }),
            _ => None,
        }
    }

    /// See [`super::Store::quarantine`].
    pub(super) async fn quarantine(&self, listed: &[Damage]) -> Result<Vec<Loss>, WriteError> {
        self.check_open()?;
        // A compaction may hold what is damaged; none begins before this is over.
        let _turn = self.compacting.take().await;
        self.check_open()?;
        let mut damages = self.damages.all();
        damages.retain(|damage| listed.contains(damage));
        let mut trees: Vec<TreeId> = damages.iter().map(|damage| damage.tree).collect();
        trees.sort_unstable();
        trees.dedup();
        let mut lost = Vec::new();
        for tree in trees {
            let mut planned = None;
            self.edit_with(|_| {
                let Some(levels) = self.tables.borrow().tree(tree) else {
                    return Vec::new();
                };
                let edit = levels
                    .levels
                    .edit_to(&without(&levels.levels, tree, &damages));
                let mut changes = changes_of(tree, &edit);
                let losses: Vec<Loss> = losses(&levels.levels, tree, &damages).collect();
                changes.extend(losses.iter().copied().map(Change::Lost));
                lost.extend(losses);
                planned = Some(edit);
                changes
            })
            .await?;
            // Flushes only add; a drop of the tree takes everything, before or after.
            if self.tables.borrow().tree(tree).is_some()
                && let Some(edit) = planned
            {
                let gone = self.tables.borrow_mut().apply(tree, &edit, Opened::none());
                self.tables.borrow_mut().begin_generation();
                self.cache.clear();
                self.forget_blocks(&gone).await;
                self.set_aside(&gone).await;
            }
        }
        self.damages.keep(|damage| !damages.contains(damage));
        self.compaction.ring();
        Ok(lost)
    }

    /// Takes files out of use for good, and keeps them.
    pub(super) async fn set_aside(&self, files: &[DataFile]) {
        let disk = self.env.disk();
        for file in files {
            let path = file.path(&self.tables_dir);
            let aside = path.with_extension("damaged");
            if let Err(error) = disk.rename(&path, &aside).await {
                tracing::warn!(%error, path = %path.display(), "a damaged file is not set aside");
            }
        }
    }
}

fn hull(one: TokenRange, other: TokenRange) -> TokenRange {
    TokenRange {
        first: one.first.min(other.first),
        last: one.last.max(other.last),
    }
}

/// What cutting the damage of `tree` out of `levels` costs.
fn losses(levels: &Levels, tree: TreeId, damages: &[Damage]) -> impl Iterator<Item = Loss> {
    let of_tree = damages.iter().filter(move |damage| damage.tree == tree);
    of_tree.flat_map(move |damage| {
        let tables = levels.tables();
        let of_file = tables.filter(|table| table.info.file_id == damage.file_id);
        of_file.filter_map(move |table| {
            Some(Loss {
                tree: Some(tree),
                range: table.extent.intersection(&damage.range)?,
                is_accepted: false,
            })
        })
    })
}

/// `levels` with all damage of `tree` cut out.
pub(super) fn without(levels: &Levels, tree: TreeId, damages: &[Damage]) -> Levels {
    let mut left = levels.clone();
    for damage in damages.iter().filter(|damage| damage.tree == tree) {
        left.cut(damage.file_id, damage.range);
    }
    left
}

#[cfg(test)]
mod tests {
    use torc_env::Token;

    use super::*;

    fn damage(file_id: u64, first: u128, last: u128) -> Damage {
        Damage {
            tree: TreeId(1),
            file_id,
            range: TokenRange {
                first: Token(first),
                last: Token(last),
            },
        }
    }

    #[test]
    fn damage_that_meets_is_one_and_what_is_known_is_not_noted_again() {
        let damages = Damages::default();
        for one in [damage(1, 10, 19), damage(1, 30, 39), damage(2, 15, 35)] {
            assert!(damages.note(one));
            assert!(!damages.note(one));
        }
        assert!(!damages.note(damage(1, 12, 13)));
        assert_eq!(damages.all().len(), 3);
        assert!(damages.note(damage(1, 19, 30)));
        assert_eq!(damages.all(), [damage(2, 15, 35), damage(1, 10, 39)]);
    }

    #[test]
    fn of_one_table_a_bounded_number_of_ranges_is_kept_that_covers_all_that_was_noted() {
        let damages = Damages::default();
        let tokens: Vec<u128> = (0..2_000u128)
            .map(|at| at * at * 7_919 % 1_000_003)
            .collect();
        for token in &tokens {
            damages.note(damage(1, *token, *token));
        }
        let all = damages.all();
        assert_eq!(all.len(), RANGES_MAX);
        for token in tokens {
            assert!(all.iter().any(|one| one.range.contains(Token(token))));
            assert!(!damages.note(damage(1, token, token)));
        }
        // What lies apart stays so.
        let widest = all
            .iter()
            .map(|one| one.range.last.0 - one.range.first.0)
            .max();
        assert!(widest < Some(100_000), "{widest:?}");
    }
}
