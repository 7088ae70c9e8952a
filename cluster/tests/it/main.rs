//! Tests of the cluster through its public types.

mod history;
mod state_format;
mod version_laws;
