//! An answer says truthfully how many hold the write: as many as were asked for, and hints only
//! where the caller let them count.

use super::Findings;
use crate::ancestry::Ancestry;
use crate::history::{History, Outcome};

pub(super) fn check(history: &History, _ancestry: &Ancestry, findings: &mut Findings) {
    for (id, write) in history.numbered() {
        let Outcome::Done { replicas, hints } = write.outcome else {
            continue;
        };
        let counted = if write.sloppy {
            replicas.saturating_add(hints)
        } else {
            replicas
        };
        if counted < write.w || replicas > history.n || replicas.saturating_add(hints) > history.n {
            findings.add(
                write.key,
                format!(
                    "{id} needs {} acks of {} and was acknowledged with {replicas} replicas and {hints} hints",
                    write.w, history.n
                ),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::check::testing::{accepts, refuses};

    #[test]
    fn enough_acks_are_enough() {
        accepts("put w 2 counts 2+0");
        accepts("put w 1 counts 3+0");
        accepts("put w 2 sloppy counts 1+1");
        accepts("put w 3 sloppy counts 0+3");
        accepts("put w 3 doubt");
    }

    #[test]
    fn too_few_or_too_many_are_not() {
        refuses("answers", "put w 2 counts 1+0");
        refuses("answers", "put w 2 counts 1+1");
        refuses("answers", "put w 3 sloppy counts 1+1");
        refuses("answers", "put w 2 counts 4+0");
        refuses("answers", "put w 2 sloppy counts 2+2");
    }
}
