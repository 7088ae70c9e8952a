//! What a write replaced does not come back: once it is acknowledged, no strict read and no replica
//! in the end shows what it had seen. For a delete that means: deleted data stays deleted.

use super::Findings;
use crate::ancestry::Ancestry;
use crate::history::{History, Value, WriteId};

pub(super) fn check(history: &History, ancestry: &Ancestry, findings: &mut Findings) {
    for (id, write) in history.numbered() {
        if !write.outcome.is_done() {
            continue;
        }
        let back = |values: &[Value]| -> Option<WriteId> {
            let mut shown = values.iter().filter_map(Value::write);
            shown.find(|value| ancestry.of_write(id).contains(*value))
        };
        for read in &history.reads {
            let strict = read.key == write.key
                && write.ended_ns < read.begun_ns
                && history.is_strict(read.r, write.outcome.replicas());
            if strict && let Some(old) = read.values.as_deref().and_then(back) {
                findings.add(
                    write.key,
                    format!(
                        "{old} came back to client {} after {id} had replaced it",
                        read.client
                    ),
                );
            }
        }
        for last in history.finals.iter().filter(|last| last.key == write.key) {
            let held = last.replicas.iter().filter(|_| history.is_repaired);
            for holding in held {
                if let Some(old) = back(&holding.values) {
                    findings.add(
                        write.key,
                        format!("{} holds {old}, which {id} had replaced", holding.node),
                    );
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::check::testing::{accepts, refuses};

    #[test]
    fn what_was_not_seen_may_stay() {
        accepts("put \n delete \n read shows 0");
        accepts("put \n delete sees 0 \n read shows -");
        accepts("put \n delete sees 0 doubt \n read shows 0");
        accepts("put \n & read shows 0 \n & delete sees 0");
        accepts("put \n delete sees 0 w 1 \n read r 2 shows 0");
        accepts("put \n delete sees 0 \n put \n final 2 | 2 | 2");
    }

    #[test]
    fn what_was_replaced_must_not_come_back() {
        refuses("resurrection", "put \n delete sees 0 \n read shows 0");
        refuses("resurrection", "put \n delete sees 0 \n final 0 | 0 | 0");
        refuses("resurrection", "put \n delete sees 0 \n final - | - | 0");
        refuses(
            "resurrection",
            "put \n delete sees 0 w 1 \n final 0 | 0 | 0",
        );
        refuses(
            "resurrection",
            "put \n put sees 0 \n delete sees 1 \n read shows 0",
        );
        refuses("resurrection", "put \n put sees 0 \n read shows 0,1");
    }
}
