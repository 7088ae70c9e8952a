//! A plan as text: layout, old → new with reason, risk and undo, boot arguments, notes.
//!
//! A large host has hundreds of changes, most of them one for each queue or CPU. Changes with one
//! reason stand together, and a run of them that differs only by a number is one line.

use super::{Table, counted, line};
use crate::change::{Change, Risk, Syntax};
use crate::cpuset::CpuSet;
use crate::plan::Plan;

/// A plan. `all` shows every change on a line of its own.
pub fn plan(plan: &Plan, all: bool) -> String {
    let mut out = String::new();
    let layout = &plan.layout;
    line(
        &mut out,
        format_args!(
            "plan {} for {}: {}, {}",
            plan.id,
            plan.profile.name(),
            counted(layout.shards.len(), "shard"),
            counted(plan.changes.len(), "change"),
        ),
    );
    let mut table = Table::new(2, &[]);
    for (name, cpus) in [
        ("shards", layout.shard_cpus()),
        ("housekeeping", layout.housekeeping.clone()),
        ("spare", layout.spare.clone()),
    ] {
        table.row([name.to_owned(), or_none(&cpus)]);
    }
    table.draw(&mut out);
    let mut groups: Vec<Vec<&Change>> = Vec::new();
    for change in &plan.changes {
        let alike = |group: &&mut Vec<&Change>| {
            group[0].reason == change.reason && group[0].risk == change.risk
        };
        match groups.iter_mut().find(alike) {
            Some(group) => group.push(change),
            None => groups.push(vec![change]),
        }
    }
    for group in groups {
        let risk = match group[0].risk {
            Risk::Low => "low",
            Risk::Power => "costs power",
            Risk::Others => "others feel it",
        };
        line(
            &mut out,
            format_args!("\n{} (risk: {risk})", group[0].reason),
        );
        let mut table = Table::new(2, &[]);
        for run in group.chunk_by(|a, b| !all && continues(a, b)) {
            table.row(row(run));
        }
        table.draw(&mut out);
    }
    if !plan.changes.is_empty() {
        out.push_str("\nundo of every line: `torc tune rollback` writes the old bytes back\n");
    }
    for advice in &plan.boot {
        line(
            &mut out,
            format_args!(
                "boot  {}: {} (printed, never set)",
                advice.argument, advice.reason
            ),
        );
    }
    for note in &plan.notes {
        line(&mut out, format_args!("note  {note}"));
    }
    out
}

fn or_none(cpus: &CpuSet) -> String {
    if cpus.is_empty() {
        "none".into()
    } else {
        cpus.to_string()
    }
}

/// A value as people read it: masks as lists of CPUs.
fn shown(change: &Change, value: &str) -> String {
    match change.syntax {
        Syntax::Mask => {
            CpuSet::parse_mask(value).map_or_else(|_| value.to_owned(), |cpus| or_none(&cpus))
        }
        Syntax::List | Syntax::Word | Syntax::Number | Syntax::Bracketed => value.to_owned(),
    }
}

fn row(run: &[&Change]) -> [String; 4] {
    let (first, last) = (run[0], run[run.len() - 1]);
    let want = if run.iter().all(|change| change.want == first.want) {
        shown(first, &first.want)
    } else {
        let cpus = run.iter().filter_map(|change| wanted_cpus(change));
        let all = cpus.fold(CpuSet::new(), |all, cpus| all.or(&cpus));
        match all.len() / run.len() {
            1 => format!("{all}, one each"),
            count => format!("{all}, {count} each"),
        }
    };
    [
        series(&first.knob, &last.knob),
        shown(first, &first.now),
        "->".into(),
        want,
    ]
}

/// `eth0 rx-0…7` for the first and the last of a series; the first alone when they are none.
pub(super) fn series(first: &str, last: &str) -> String {
    match differing_number(first, last) {
        Some((before, from, to, behind)) => format!("{before}{from}…{to}{behind}"),
        None => first.to_owned(),
    }
}

/// Whether a single line can say both: numbered one up, from one value to one value, or to as many CPUs
/// each.
fn continues(a: &Change, b: &Change) -> bool {
    let numbered = differing_number(&a.knob, &b.knob).is_some_and(|(_, a, b, _)| b == a + 1);
    let same_kind = a.syntax == b.syntax && a.now == b.now && a.at_most == b.at_most;
    let as_many_each = || match (wanted_cpus(a), wanted_cpus(b)) {
        (Some(a), Some(b)) => a.len() == b.len() && a.and(&b).is_empty(),
        _ => false,
    };
    numbered && same_kind && (a.want == b.want || as_many_each())
}

fn wanted_cpus(change: &Change) -> Option<CpuSet> {
    match change.syntax {
        Syntax::Mask => CpuSet::parse_mask(&change.want).ok(),
        Syntax::List => CpuSet::parse_list(&change.want).ok(),
        Syntax::Word | Syntax::Number | Syntax::Bracketed => None,
    }
}

/// For names that differ in one number only: what stands before it, both numbers, and what stands
/// behind.
fn differing_number<'a>(a: &'a str, b: &str) -> Option<(&'a str, u64, u64, &'a str)> {
    let common = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    // Back to where the number begins.
    let digits = a[..common]
        .bytes()
        .rev()
        .take_while(u8::is_ascii_digit)
        .count();
    let from = common - digits;
    let number = |text: &str| text[from..].bytes().take_while(u8::is_ascii_digit).count();
    let (end_a, end_b) = (from + number(a), from + number(b));
    if a[end_a..] != b[end_b..] {
        return None;
    }
    let (from_a, from_b) = (a[from..end_a].parse().ok()?, b[from..end_b].parse().ok()?);
    (from_a != from_b).then_some((&a[..from], from_a, from_b, &a[end_a..]))
}

#[cfg(test)]
mod tests {
    use super::differing_number;

    #[test]
    fn names_that_differ_in_one_number_are_a_series() {
        assert_eq!(
            differing_number("irq mlx5_comp9@pci:0000", "irq mlx5_comp10@pci:0000"),
            Some(("irq mlx5_comp", 9, 10, "@pci:0000"))
        );
        assert_eq!(
            differing_number("cpu1 governor", "cpu12 governor"),
            Some(("cpu", 1, 12, " governor"))
        );
        for (a, b) in [
            ("eth0 rx-1 steering", "eth1 rx-2 steering"),
            ("vda a", "vda b"),
            ("x1", "x1"),
        ] {
            assert_eq!(differing_number(a, b), None, "{a} {b}");
        }
    }
}
