//! Why too few replicas did as asked.

use std::fmt;

use crate::api::{Failure, FailureCode};

/// The most telling refusal of those that came in.
#[derive(Debug, Default)]
pub(super) struct Refusal(Option<Failure>);

impl Refusal {
    /// A replica refused, or could not be asked. The first cause counts; that one was out of reach
    /// says least.
    pub(super) fn note(&mut self, failure: Failure) {
        let tells_more = match &self.0 {
            None => true,
            Some(known) => known.code == FailureCode::QuorumNotMet,
        };
        if tells_more {
            self.0 = Some(failure);
        }
    }

    /// The failure of the whole request, of which `reached` says how far it came.
    pub(super) fn unmet(&self, reached: fmt::Arguments<'_>) -> Failure {
        match &self.0 {
            Some(refusal) if refusal.code != FailureCode::QuorumNotMet => {
                Failure::refused(refusal.code, format_args!("{reached}; {}", refusal.message))
            }
            _ => Failure::refused(
                FailureCode::QuorumNotMet,
                format_args!("{reached}, the others did not"),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_cause_is_told_and_being_out_of_reach_only_without_one() {
        let mut refusal = Refusal::default();
        let unmet = |refusal: &Refusal| {
            let failure = refusal.unmet(format_args!("1 replicas answered"));
            (failure.code, failure.message)
        };
        let out_of_reach = (
            FailureCode::QuorumNotMet,
            "1 replicas answered, the others did not".to_owned(),
        );
        assert_eq!(unmet(&refusal), out_of_reach);
        refusal.note(Failure::refused(FailureCode::QuorumNotMet, "no link"));
        assert_eq!(unmet(&refusal), out_of_reach);
        refusal.note(Failure::refused(FailureCode::DiskFull, "no space"));
        refusal.note(Failure::refused(FailureCode::Internal, "later"));
        let full = (
            FailureCode::DiskFull,
            "1 replicas answered; no space".to_owned(),
        );
        assert_eq!(unmet(&refusal), full);
    }
}
