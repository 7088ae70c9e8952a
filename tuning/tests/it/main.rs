//! The tuner against modelled machines and a kernel that misbehaves.

#![expect(clippy::unwrap_used, reason = "a test that finds no value fails there")]

mod fake_kernel;
mod irqproof;
mod machines;
mod plans;
mod this_machine;
mod transactions;
