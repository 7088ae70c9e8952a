//! The `torc` binary as its users run it: real processes, sockets and files.

#![expect(clippy::unwrap_used, reason = "in a test an error is a failure")]

mod backup;
mod bad_input;
mod cluster;
mod commands;
mod damage;
mod dev;
mod durability;
mod encryption;
mod load;
mod load_troubles;
mod memcached;
mod pages;
mod point_in_time;
mod power;
mod redistribute;
mod sim;
mod tune;
