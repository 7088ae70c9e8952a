//! The `torc` binary as its users run it: real processes, sockets and files.

mod bad_input;
mod cluster;
mod dev;
mod durability;
