//! A session never sees older data than it knows: a read that was told what its session has seen
//! covers all of that, or fails.

use super::Findings;
use super::durability::list;
use crate::ancestry::Ancestry;
use crate::history::{History, Kind, Value};

pub(super) fn check(history: &History, ancestry: &Ancestry, findings: &mut Findings) {
    for read in &history.reads {
        let (Some(values), Some(at_least)) = (&read.values, &read.at_least) else {
            continue;
        };
        let shown = ancestry.shown(values, read.ended_ns);
        for id in at_least {
            let is_put = history.write(*id).kind == Kind::Put;
            if is_put && !shown.accounts_for(*id) {
                findings.add(
                    read.key,
                    format!(
                        "client {} knows {id} and is shown {}",
                        read.client,
                        list(values)
                    ),
                );
            }
            let replaced = ancestry.of_write(*id);
            let mut writes = values.iter().filter_map(Value::write);
            if let Some(old) = writes.find(|value| replaced.contains(*value)) {
                findings.add(
                    read.key,
                    format!(
                        "client {} knows that {id} replaced {old} and is shown it",
                        read.client
                    ),
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::check::testing::{accepts, refuses};

    #[test]
    fn a_session_that_goes_on_is_accepted() {
        accepts("put w 1 \n read r 1 at_least 0 shows 0");
        accepts("put w 1 \n read r 1 at_least 0 fails");
        accepts("put w 1 \n put w 1 sees 0 \n read r 1 at_least 0 shows 1");
        accepts("put w 1 \n read r 1 shows -");
        accepts("put w 1 \n delete w 1 sees 0 \n read r 1 at_least 1 shows -");
    }

    #[test]
    fn a_session_that_goes_back_is_found() {
        refuses("session", "put w 1 \n read r 1 at_least 0 shows -");
        refuses("session", "put w 1 doubt \n read r 1 at_least 0 shows -");
        refuses(
            "session",
            "put w 1 \n put w 1 sees 0 \n read r 1 at_least 1 shows 0",
        );
        refuses(
            "session",
            "put w 1 \n put w 1 \n read r 1 at_least 0,1 shows 0",
        );
        refuses(
            "session",
            "put w 1 \n delete w 1 sees 0 \n read r 1 at_least 1 shows 0",
        );
    }
}
