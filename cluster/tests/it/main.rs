//! Tests of the cluster through its public types.

#![expect(clippy::unwrap_used, reason = "in a test an error is a failure")]

mod history;
mod idempotency;
mod state_format;
mod version_laws;
