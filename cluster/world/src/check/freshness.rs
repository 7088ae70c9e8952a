//! A strict read is fresh: it shows every write that was acknowledged before it began, or what
//! replaced it. Strict is what meets one of the replicas that the answer counted: hints do not show.
//! And strict reads do not go back: what one showed, the next shows or replaces.

use super::Findings;
use super::durability::list;
use crate::ancestry::{Ancestry, Shown};
use crate::history::{History, Kind, Read, Value, WriteId};

pub(super) fn check(history: &History, ancestry: &Ancestry, findings: &mut Findings) {
    for read in &history.reads {
        let Some(values) = &read.values else { continue };
        let shown = ancestry.shown(values, read.ended_ns);
        for (id, write) in history.numbered() {
            let must_be_there = write.key == read.key
                && write.kind == Kind::Put
                && write.outcome.is_done()
                && write.ended_ns < read.begun_ns
                && history.is_strict(read.r, write.outcome.replicas());
            if must_be_there && !shown.accounts_for(id) {
                findings.add(
                    read.key,
                    format!(
                        "a read of client {} at r={} began after {} replicas had {id} and shows {}",
                        read.client,
                        read.r,
                        write.outcome.replicas(),
                        list(values)
                    ),
                );
            }
        }
        let earlier = history.reads.iter().filter(|earlier| {
            earlier.key == read.key
                && earlier.ended_ns < read.begun_ns
                && history.is_strict(read.r, earlier.r)
        });
        for earlier in earlier {
            let Some(gone) = first_missing(earlier, &shown) else {
                continue;
            };
            findings.add(
                read.key,
                format!(
                    "a read of client {} went back: {gone} was shown to client {} before, now {}",
                    read.client,
                    earlier.client,
                    list(values)
                ),
            );
        }
    }
}

fn first_missing(earlier: &Read, shown: &Shown<'_>) -> Option<WriteId> {
    let values = earlier.values.iter().flatten();
    let mut writes = values.filter_map(Value::write);
    writes.find(|id| !shown.accounts_for(*id))
}

#[cfg(test)]
mod tests {
    use crate::check::testing::{accepts, refuses};

    #[test]
    fn a_fresh_read_is_accepted() {
        accepts("put \n read shows 0");
        accepts("put \n put sees 0 \n read shows 1");
        accepts("put \n & read shows -");
        accepts("put w 1 \n read r 2 shows -");
        accepts("put w 2 sloppy counts 1+1 \n read r 2 shows -");
        accepts("put \n delete sees 0 doubt \n read shows -");
        accepts("put doubt \n read r 1 shows 0 \n read r 1 shows -");
        accepts("put \n read fails");
    }

    #[test]
    fn a_stale_read_is_found() {
        refuses("freshness", "put \n read shows -");
        refuses("freshness", "put \n put \n read shows 1");
        refuses("freshness", "put \n put sees 0 \n read shows 0");
        refuses("freshness", "put w 3 \n read r 1 shows -");
        refuses("freshness", "put w 1 \n read r 3 shows -");
        refuses("freshness", "put w 2 sloppy counts 1+1 \n read r 3 shows -");
        refuses("freshness", "put w 1 sloppy counts 2+0 \n read r 2 shows -");
        refuses("freshness", "put doubt \n read shows 0 \n read shows -");
        refuses("freshness", "put \n delete sees 0 refused \n read shows -");
    }
}
