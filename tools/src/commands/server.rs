//! `torc server`: one node in the foreground.

use std::path::PathBuf;

use clap::Args;

use crate::failure::Failure;

/// `torc server`
#[derive(Args, Debug)]
pub struct Server {
    /// Configuration file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Override a key of the configuration; may be given several times
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Stop when the process that started this one ends
    #[arg(long, hide = true)]
    pub with_parent: bool,
}

/// Runs a node until SIGTERM or SIGINT, then drains it.
pub fn server(args: &Server) -> Result<(), Failure> {
    drop(args.config.clone());
    Err(Failure::new("in construction"))
}
