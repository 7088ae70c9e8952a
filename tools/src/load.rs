//! `torc load`: the load generator.

mod keys;
mod ledger;
mod protocol;
mod recorder;
mod report;
mod value;
