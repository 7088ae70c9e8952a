//! One module for each group of subcommands.

pub mod admin;
pub mod backup;
pub mod dev;
pub mod encryption;
pub mod inspect;
pub mod kv;
pub mod restore;
pub mod server;
pub mod sim;
pub mod tune;
