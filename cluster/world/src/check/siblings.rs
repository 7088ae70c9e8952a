//! Siblings are exact: a read shows values that were written to that key and may have been written,
//! each once, and none that another of them replaced.
//!
//! One exception, which the product documents: a write that was sent again by its name may have got a
//! dot at each of two coordinators. Who replaced the one says so only of that one; a replica that has
//! the other, and has not met one that knows both, shows it still. In the end nobody does.

use super::Findings;
use super::durability::list;
use crate::ancestry::Ancestry;
use crate::history::{History, KeyId, Kind, Value};

pub(super) fn check(history: &History, ancestry: &Ancestry, findings: &mut Findings) {
    for read in &history.reads {
        if let Some(values) = &read.values {
            let view = View {
                whose: format!("client {}", read.client),
                key: read.key,
                until_ns: read.ended_ns,
                is_last: false,
                values,
            };
            view.check(history, ancestry, findings);
        }
    }
    for last in &history.finals {
        let holdings = last
            .replicas
            .iter()
            .map(|holding| (holding.node.clone(), &holding.values));
        let read = last
            .read
            .iter()
            .map(|read| ("the last read".to_owned(), read));
        for (whose, values) in holdings.chain(read) {
            let view = View {
                whose,
                key: last.key,
                until_ns: u64::MAX,
                is_last: true,
                values,
            };
            view.check(history, ancestry, findings);
        }
    }
}

/// The live values of a key as somebody saw them at some time.
struct View<'a> {
    whose: String,
    key: KeyId,
    until_ns: u64,
    /// All replicas have met.
    is_last: bool,
    values: &'a [Value],
}

impl View<'_> {
    fn check(&self, history: &History, ancestry: &Ancestry, findings: &mut Findings) {
        let mut add = |what: String| {
            let (whose, shown) = (&self.whose, list(self.values));
            findings.add(self.key, format!("{whose} sees {shown}: {what}"));
        };
        if history.is_ordered_by_time && self.values.len() > 1 {
            add("only one of them may stay".to_owned());
        }
        for (index, value) in self.values.iter().enumerate() {
            let Some(id) = value.write() else {
                add(format!("{value} was never written"));
                continue;
            };
            let Some(write) = history.writes.get(id.index()) else {
                add(format!("{id} was never issued"));
                continue;
            };
            if write.key != self.key || write.kind != Kind::Put {
                add(format!("{id} did not write it here"));
            }
            if write.begun_ns > self.until_ns {
                add(format!("{id} had not begun"));
            }
            if write.outcome.is_refused() {
                add(format!("{id} was refused"));
            }
            if self.values[..index].contains(value) {
                add(format!("{id} is there twice"));
            }
            if write.is_retried && !self.is_last {
                continue;
            }
            let others = self.values.iter().filter_map(Value::write);
            for other in others.filter(|other| ancestry.of_write(*other).contains(id)) {
                add(format!("{other} replaced {id}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::check::testing::{accepts, refuses};

    #[test]
    fn concurrent_values_are_siblings() {
        accepts("put \n put \n read shows 0,1");
        accepts("put \n put sees 0 \n put sees 0 \n read shows 1,2");
        accepts("put doubt \n read shows 0");
        accepts("put \n & read shows 0");
        accepts("read shows -");
    }

    #[test]
    fn a_retried_write_may_be_replaced_by_one_of_its_dots_until_the_replicas_meet() {
        accepts("put retried \n put sees 0 w 1 \n read shows 0,1 r 1");
        refuses(
            "siblings",
            "put retried \n put sees 0 \n final 0,1 | 0,1 | 0,1",
        );
    }

    #[test]
    fn where_the_last_write_wins_there_are_no_siblings() {
        accepts("lww \n put \n put \n read shows 1");
        refuses("siblings", "lww \n put \n put \n read shows 0,1");
    }

    #[test]
    fn what_cannot_be_a_sibling_is_found() {
        refuses("siblings", "put \n put sees 0 \n read shows 0,1");
        refuses(
            "siblings",
            "put \n put sees 0 doubt \n put sees 1 \n read shows 0,2",
        );
        refuses("siblings", "put refused \n read shows 0");
        refuses("siblings", "put \n read shows 0,0");
        refuses("siblings", "put \n read shows ?");
        refuses("siblings", "put \n delete \n read shows 1");
        refuses("siblings", "read shows 0 \n put");
        refuses("siblings", "put \n put sees 0 \n final 0,1 | 0,1 | 0,1");
    }
}
