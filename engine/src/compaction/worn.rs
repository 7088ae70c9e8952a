//! Emptying blobs: which tables to write again so that a blob with little left in it can go, and which
//! blobs a compaction takes values out of.
//!
//! A blob goes when no table refers to it, and all tables may refer to all blobs: tokens are spread evenly. So
//! values are taken out wherever a compaction meets them, and tables are written again for that alone only when it
//! pays: when what becomes free is at least what is written besides the values.

use std::collections::{BTreeMap, BTreeSet};

use super::Plan;
use crate::levels::{Levels, TableRef};
use crate::pacing::mul_div;
use crate::table::TableInfo;

/// A blob that is to be emptied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Worn {
    /// Bytes to which tables refer.
    pub live: u64,
    /// Bytes to which none refers any more.
    pub dead: u64,
    /// It is emptied at any price.
    pub is_urgent: bool,
}

impl Worn {
    /// What becomes free with `bytes` of its live ones, when those of other tables are taken out too.
    fn freed_with(&self, bytes: u64) -> u64 {
        if self.is_urgent {
            return u64::MAX;
        }
        mul_div(self.dead, bytes, self.live.max(1))
    }
}

/// A compaction that writes a table again, as it is and where it is, to take values out of blobs in `worn`: the one
/// with which most becomes free. With `must_pay`, none that writes more than that besides the values.
pub fn pick_worn(levels: &Levels, worn: &BTreeMap<u64, Worn>, must_pay: bool) -> Option<Plan> {
    if worn.is_empty() {
        return None;
    }
    let runs = levels.runs().iter();
    let tables = runs.flat_map(|run| run.tables.iter().map(move |table| (run, table)));
    let mut best = None;
    for (run, table) in tables {
        let freed = freed_with(&table.info, worn);
        let Some(freed) = freed.filter(|freed| !must_pay || *freed >= table.info.bytes) else {
            continue;
        };
        if best.is_none_or(|(most, _, _)| freed > most) {
            best = Some((freed, run, table));
        }
    }
    best.map(|(_, run, table)| Plan::of_table(levels, run, table))
}

/// `None` when the table refers to none of them.
fn freed_with(info: &TableInfo, worn: &BTreeMap<u64, Worn>) -> Option<u64> {
    let used = info.blobs.iter();
    let freed = used.filter_map(|used| {
        let worn = worn.get(&used.file.file_id)?;
        Some(worn.freed_with(used.bytes))
    });
    freed.reduce(u64::saturating_add)
}

/// Blobs that a compaction takes values out of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Emptied {
    /// Their ids.
    pub blobs: BTreeSet<u64>,
    /// Bytes of the values, about.
    pub bytes: u64,
}

/// What a compaction by `plan` is to empty of `worn`: first what has least left, up to `bytes_max` of values, and
/// at least one.
pub fn emptied(plan: &Plan, worn: &BTreeMap<u64, Worn>, bytes_max: u64) -> Emptied {
    let mut bytes: BTreeMap<u64, u64> = BTreeMap::new();
    for table in plan.inputs.iter().flat_map(|input| &input.tables) {
        for used in &table.info.blobs {
            if worn.contains_key(&used.file.file_id) {
                *bytes.entry(used.file.file_id).or_default() += part(table, plan, used.bytes);
            }
        }
    }
    let mut by_worth: Vec<(u64, u64)> = bytes.into_iter().collect();
    let left = |id: u64| {
        let of = &worn[&id];
        let share = mul_div(of.live, 1 << 20, of.live.saturating_add(of.dead).max(1));
        (!of.is_urgent, share)
    };
    by_worth.sort_by_key(|(id, _)| left(*id));
    let mut chosen = Emptied::default();
    for (id, bytes) in by_worth {
        if !chosen.blobs.is_empty() && chosen.bytes.saturating_add(bytes) > bytes_max {
            break;
        }
        chosen.blobs.insert(id);
        chosen.bytes = chosen.bytes.saturating_add(bytes);
    }
    chosen
}

/// The part of `bytes` that lies in the plan's range, from the even spread of tokens.
fn part(table: &TableRef, plan: &Plan, bytes: u64) -> u64 {
    mul_div(bytes, table.bytes_in(&plan.range), table.info.bytes.max(1))
}

#[cfg(test)]
mod tests {
    use torc_env::{Token, TokenRange};

    use super::*;
    use crate::blob::{BlobFile, BlobUse};

    /// A table of `bytes` that has so many bytes of each blob.
    fn table(file_id: u64, bytes: u64, blobs: &[(u64, u64)]) -> TableInfo {
        let blobs = blobs.iter().map(|(file_id, bytes)| BlobUse {
            file: BlobFile {
                file_id: *file_id,
                bytes: 1 << 20,
                value_bytes: 1 << 20,
                key: None,
            },
            values: 1,
            bytes: *bytes,
        });
        TableInfo {
            file_id,
            bytes,
            first_token: Token(0),
            last_token: Token::MAX,
            blobs: blobs.collect(),
            ..TableInfo::default()
        }
    }

    fn levels(tables: &[TableInfo]) -> Levels {
        let mut levels = Levels::new();
        for info in tables {
            levels.insert(crate::levels::whole(info, 0, info.file_id));
        }
        levels
    }

    fn worn(live: u64, dead: u64) -> Worn {
        Worn {
            live,
            dead,
            is_urgent: false,
        }
    }

    fn picked(plan: &Option<Plan>) -> Option<u64> {
        let plan = plan.as_ref()?;
        Some(plan.inputs[0].tables[0].info.file_id)
    }

    #[test]
    fn the_table_that_frees_most_is_written_again_and_only_when_that_pays() {
        let levels = levels(&[
            table(1, 5000, &[(11, 100), (12, 300)]),
            table(2, 5000, &[(11, 300)]),
            table(3, 100, &[(13, 900)]),
        ]);
        let all = BTreeMap::from([(11, worn(400, 800)), (12, worn(300, 600))]);
        assert_eq!(picked(&pick_worn(&levels, &all, true)), None);
        assert_eq!(picked(&pick_worn(&levels, &all, false)), Some(1));
        let more = BTreeMap::from([(11, worn(400, 8000))]);
        assert_eq!(picked(&pick_worn(&levels, &more, true)), Some(2));
        let urgent = Worn {
            is_urgent: true,
            ..worn(900, 0)
        };
        let damaged = BTreeMap::from([(13, urgent)]);
        assert_eq!(picked(&pick_worn(&levels, &damaged, true)), Some(3));
        assert_eq!(picked(&pick_worn(&levels, &BTreeMap::new(), false)), None);
    }

    #[test]
    fn what_has_least_left_is_emptied_first_within_the_bound_and_one_in_any_case() {
        let levels = levels(&[table(1, 5000, &[(11, 400), (12, 100), (13, 500)])]);
        let all = BTreeMap::from([
            (11, worn(400, 500)),
            (12, worn(100, 900)),
            (13, worn(500, 600)),
        ]);
        let plan = pick_worn(&levels, &all, false).unwrap();
        assert_eq!(plan.range, TokenRange::ALL);
        let blobs = |bytes_max| {
            let emptied = emptied(&plan, &all, bytes_max);
            (emptied.blobs.into_iter().collect::<Vec<_>>(), emptied.bytes)
        };
        assert_eq!(blobs(0), (vec![12], 100));
        assert_eq!(blobs(500), (vec![11, 12], 500));
        assert_eq!(blobs(1000), (vec![11, 12, 13], 1000));
    }
}
