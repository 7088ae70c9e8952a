//! `torc inspect`: what a file of a store holds, in words, and whether it is whole.

use std::path::{Path, PathBuf};

use clap::Args;
use torc_engine::Keys;
use torc_engine::inspect::{View, inspect};
use torc_env::Env;
use torc_runtime::{Runtime, RuntimeConfig};

use crate::failure::Failure;

/// `torc inspect`
#[derive(Args, Debug)]
pub struct Inspect {
    /// Tables (.table), log segments (.wal), manifest files (manifest.root, manifest-….log)
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
    /// Print every record too
    #[arg(long)]
    pub records: bool,
    /// File with the master keys of encrypted files. Without it, their checksums are verified and nothing
    /// of their content is shown
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
}

fn read_keys(path: &Path) -> Result<Keys, Failure> {
    let failed =
        |error: &dyn std::fmt::Display| Failure::new(format!("{}: {error}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| failed(&error))?;
    Keys::parse(&text).map_err(|error| failed(&error))
}

/// Prints each file, a line at a time, reading only. Fails when one is damaged or of no known kind.
pub fn run(args: &Inspect) -> Result<(), Failure> {
    let view = View {
        with_records: args.records,
        keys: match &args.key_file {
            Some(path) => read_keys(path)?,
            None => Keys::default(),
        },
    };
    let mut damaged = 0;
    for file in &args.files {
        println!("{}", file.display());
        damaged += one(file, &view, |line| println!("  {line}"))?;
    }
    match damaged {
        0 => Ok(()),
        1 => Err(Failure::new("1 part is damaged")),
        _ => Err(Failure::new(format!("{damaged} parts are damaged"))),
    }
}

/// Verifies one file and prints what it holds; returns how many of its parts are damaged.
///
/// # Errors
/// When it cannot be read or is of no known kind.
pub fn one(file: &Path, view: &View, print: fn(String)) -> Result<u64, Failure> {
    let failed =
        |error: &dyn std::fmt::Display| Failure::new(format!("{}: {error}", file.display()));
    let whole = file.canonicalize().map_err(|error| failed(&error))?;
    let (Some(dir), Some(name)) = (whole.parent(), whole.file_name()) else {
        return Err(failed(&"not a file"));
    };
    let name = PathBuf::from(name);
    let view = view.clone();
    Runtime::block_on(&RuntimeConfig::new(dir), move |handle| {
        let (env, name, view) = (handle.env().clone(), name.clone(), view.clone());
        async move { inspect(env.disk(), &name, &view, &mut { print }).await }
    })
    .map_err(|error| failed(&error))?
    .map_err(|error| failed(&describe(&error)))
}

/// An error and what led to it.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}
