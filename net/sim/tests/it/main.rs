//! The simulated world from outside, through `Env` and the harness's handle.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests, outside of test functions"
)]

mod disk;
mod hosts;
mod network;
mod replay;
