//! Simulated clusters: the real engine and the real cluster code in a simulated world, under
//! clients and faults, judged by what was promised.
//!
//! A seed draws everything: nodes, keyspace, load, store settings, faults ([`config`]). [`run()`] founds the
//! cluster, lets clients and the nemesis loose, heals all faults, waits for convergence and checks
//! the history ([`check`]). The same seed gives the same run, event for event; a [`Report`] of a
//! violation says all that is needed to see it again.
//!
//! What it does not cover: sockets, protocols and real disks (tests of `net` and `tools` do).

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(missing_docs))]

pub mod ancestry;
pub mod check;
mod client;
mod cluster;
pub mod config;
pub mod history;
mod key_file;
pub mod nemesis;
mod record;
mod rot;
mod run;
pub mod story;
mod value;

pub use run::{Options, Report, run, run_config};
