//! The Redis protocol, for the commands that map onto a key-value store.

pub mod command;
pub mod reply;
pub mod request;
