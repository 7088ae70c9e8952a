//! Planted bugs: named switches by which the simulator proves that it would find them.
//!
//! A switch is one line at the place that it breaks: `if mutation::on("ack_before_sync") { … }`.
//! Without `--cfg mutations` [`on`] is the constant `false` and the line compiles to nothing; a
//! build that anybody runs never contains a planted bug. With it, at most one bug is selected at a
//! time, for the thread that runs the simulation.

#[cfg(mutations)]
thread_local! {
    static SELECTED: std::cell::Cell<Option<&'static str>> = const { std::cell::Cell::new(None) };
}

/// Whether the planted bug `name` is selected on this thread.
#[cfg(mutations)]
pub fn on(name: &str) -> bool {
    SELECTED.with(|selected| selected.get() == Some(name))
}

/// Whether the planted bug `name` is selected: never in this build.
#[cfg(not(mutations))]
#[inline(always)]
pub const fn on(_name: &str) -> bool {
    false
}

/// Selects the planted bug of this thread, or none.
#[cfg(mutations)]
pub fn select(name: Option<&'static str>) {
    SELECTED.with(|selected| selected.set(name));
}

#[cfg(test)]
mod tests {
    #[test]
    fn no_planted_bug_is_on_by_itself() {
        assert!(!super::on("ack_before_sync"));
    }
}
