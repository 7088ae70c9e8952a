//! No acknowledged write is lost: in the end each replica of its key holds it, or a write that
//! replaced it.

use super::Findings;
use crate::ancestry::Ancestry;
use crate::history::{History, Kind, Value};

pub(super) fn check(history: &History, ancestry: &Ancestry, findings: &mut Findings) {
    for last in &history.finals {
        let read = last.read.iter().map(|values| ("a read of all", values));
        let holdings = last
            .replicas
            .iter()
            .map(|holding| (holding.node.as_str(), &holding.values));
        for (whose, values) in holdings.chain(read) {
            let present = ancestry.closure(values);
            for (id, write) in history.numbered() {
                let promised =
                    write.key == last.key && write.kind == Kind::Put && write.outcome.is_done();
                if promised && !present.contains(id) && !ancestry.may_be_deleted(id) {
                    let shown = list(values);
                    findings.add(
                        last.key,
                        format!("acknowledged {id} is lost: {whose} holds {shown}"),
                    );
                }
            }
        }
    }
}

/// Values for people.
pub(super) fn list(values: &[Value]) -> String {
    if values.is_empty() {
        return "nothing".to_owned();
    }
    let names: Vec<String> = values.iter().map(Value::to_string).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use crate::check::testing::{accepts, refuses};

    #[test]
    fn a_write_that_is_there_or_was_replaced_is_not_lost() {
        accepts("put \n final 0 | 0 | 0");
        accepts("put \n put sees 0 \n final 1 | 1 | 1");
        accepts("put \n put \n final 0,1 | 0,1 | 0,1");
        accepts("put \n delete sees 0 \n final - | - | -");
        accepts("put \n put sees 0 doubt \n put sees 1 \n final 2 | 2 | 2");
        accepts("put \n delete sees 0 doubt \n final - | - | -");
        accepts("put doubt \n final - | - | -");
        accepts("put refused \n final - | - | -");
    }

    #[test]
    fn a_write_that_nothing_replaced_is_lost() {
        refuses("durability", "put \n final - | - | -");
        refuses("durability", "put \n final 0 | - | 0");
        refuses("durability", "put \n put \n final 1 | 1 | 1");
        refuses("durability", "put \n delete \n final - | - | -");
        refuses(
            "durability",
            "put \n delete sees 0 refused \n final - | - | -",
        );
        refuses("durability", "put \n put sees 0 \n final - | - | -");
        refuses("durability", "put \n final 0 | 0 | 0 read -");
        refuses(
            "durability",
            "put doubt \n put \n put sees 0 \n final 2 | 2 | 2",
        );
    }
}
