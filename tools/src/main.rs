//! `torc`: server, client, admin, load and simulation in one binary.
//!
//! This crate only turns command lines into calls and answers into text; what a subcommand means
//! is in the library crates.

#![forbid(unsafe_code)]

mod backup;
mod commands;
mod config;
mod endpoint;
mod failure;
mod load;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::{Parser, Subcommand};

use commands::{
    admin, backup as backups, dev, encryption, inspect, kv, restore, server, sim, tune,
};
use failure::Failure;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A distributed key-value store for bare-metal Linux and NVMe.
#[derive(Parser, Debug)]
#[command(name = "torc", version, propagate_version = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run one node in the foreground; SIGTERM drains and stops it
    Server(server::Server),
    /// Run a cluster on loopback: nothing to configure, Ctrl-C stops all of it
    Dev(dev::Dev),
    /// Read a key
    Get(kv::Get),
    /// Write a key
    Put(kv::Put),
    /// Delete a key
    Delete(kv::Delete),
    /// List keys
    Scan(kv::Scan),
    /// Read and write many keys in one request
    Batch(kv::Batch),
    /// Show the nodes of the cluster
    Status(admin::Common),
    /// Show the ring, or the replicas of one key
    Ring(admin::Ring),
    /// Create, change, list and drop keyspaces
    #[command(subcommand)]
    Keyspace(admin::Keyspace),
    /// Change the membership of nodes
    #[command(subcommand)]
    Node(admin::Node),
    /// Compare the endpoint's node with its peers and make them equal
    Repair(admin::Maintenance),
    /// Flush and compact the endpoint's node
    Compact(admin::Maintenance),
    /// Verify every checksum on the endpoint's node
    Scrub(admin::Maintenance),
    /// Show what damage has cost the endpoint's node and nobody has made good, and accept the loss
    Damage(admin::Damage),
    /// Show and change the keys that the endpoint's node encrypts its files with
    #[command(subcommand)]
    Encryption(encryption::Encryption),
    /// Copy the data of the endpoint's node into a directory, while it serves
    Backup(backups::Backup),
    /// Fill the empty data directory of a stopped node from a backup, as of its cut or of any later moment
    Restore(restore::Restore),
    /// Print what tables, log segments and manifest files hold, and verify them
    Inspect(inspect::Inspect),
    /// Put load on a cluster, measure it and verify what it answers
    Load(Box<load::Load>),
    /// Simulate a cluster under faults, reproducibly
    Sim(sim::Sim),
    /// Inspect, check and tune this host, and prove what it gains
    Tune(tune::Tune),
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    let outcome = end_with_the_reader(&command).and_then(|()| run(&command));
    match outcome {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("torc: {failure}");
            ExitCode::from(failure.exit())
        }
    }
}

/// A command whose output nobody reads any more (`torc scan | head`) ends there, quietly. Rust programs ignore
/// the signal for that. Nodes and loads have to, for the sake of their connections; a load measures and verifies to its
/// end, and `dev` looks after its nodes, whoever reads what they say.
fn end_with_the_reader(command: &Command) -> Result<(), Failure> {
    let outlives_reader = matches!(
        command,
        Command::Server(_) | Command::Dev(_) | Command::Load(_)
    );
    if !outlives_reader {
        let always = Arc::new(AtomicBool::new(true));
        signal_hook::flag::register_conditional_default(signal_hook::consts::SIGPIPE, always)?;
    }
    Ok(())
}

fn run(command: &Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Server(args) => server::server(args)?,
        Command::Dev(args) => return dev::dev(args),
        Command::Get(args) => kv::get(args)?,
        Command::Put(args) => kv::put(args)?,
        Command::Delete(args) => kv::delete(args)?,
        Command::Scan(args) => kv::scan(args)?,
        Command::Batch(args) => kv::batch(args)?,
        Command::Status(args) => admin::status(args)?,
        Command::Ring(args) => admin::ring(args)?,
        Command::Keyspace(command) => admin::keyspace(command)?,
        Command::Node(command) => admin::node(command)?,
        Command::Repair(args) => admin::maintenance("repair", args)?,
        Command::Compact(args) => admin::maintenance("compact", args)?,
        Command::Scrub(args) => admin::maintenance("scrub", args)?,
        Command::Damage(args) => admin::damage(args)?,
        Command::Encryption(command) => encryption::run(command)?,
        Command::Backup(args) => backups::backup(args)?,
        Command::Restore(args) => restore::restore(args)?,
        Command::Inspect(args) => inspect::run(args)?,
        Command::Load(args) => load::load(args)?,
        Command::Sim(args) => sim::sim(args)?,
        Command::Tune(args) => tune::tune(args)?,
    }
    Ok(ExitCode::SUCCESS)
}
