//! The tuner against modelled machines and a kernel that misbehaves.

mod fake_kernel;
mod machines;
mod plans;
mod transactions;
