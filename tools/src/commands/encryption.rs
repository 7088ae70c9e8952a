//! `torc encryption`: the master keys of a node.

use std::fs::File;
use std::io::Read;

use clap::Subcommand;
use serde_json::Value;
use torc_engine::Keys;

use crate::commands::admin::{Common, print_table};
use crate::endpoint::{Endpoint, Request};
use crate::failure::Failure;

/// Bytes of a master key.
const KEY_BYTES: usize = torc_engine::crypt::MASTER_KEY_BYTES;

/// `torc encryption`
#[derive(Subcommand, Debug)]
pub enum Encryption {
    /// How many files of the node need which key
    Status {
        #[command(flatten)]
        common: Common,
    },
    /// Have the node read its key file, or run its key command, anew
    Reload {
        #[command(flatten)]
        common: Common,
    },
    /// Print a new key, as a line for the end of a key file
    NewKey,
}

/// Carries the command out.
pub fn run(command: &Encryption) -> Result<(), Failure> {
    match command {
        Encryption::Status { common } => {
            let document = Endpoint::new(&common.endpoint)?.get_json("/admin/encryption")?;
            print(common, &document);
        }
        Encryption::Reload { common } => {
            let request = Request {
                method: "POST",
                path: "/admin/encryption/reload".into(),
                ..Request::default()
            };
            let answer = Endpoint::new(&common.endpoint)?.expect_long(request)?;
            print(common, &answer.json()?);
        }
        Encryption::NewKey => new_key()?,
    }
    Ok(())
}

fn print(common: &Common, document: &Value) {
    if common.json {
        println!("{document}");
        return;
    }
    let keys = document.get("keys").and_then(Value::as_array);
    let rows: Vec<Value> = keys.map_or(&[][..], Vec::as_slice).to_vec();
    let rows: Vec<Value> = rows.into_iter().map(name_plain).collect();
    print_table(&["key", "files", "active"], &rows);
}

/// Files in the clear have no key.
fn name_plain(mut row: Value) -> Value {
    if row.get("key").is_some_and(Value::is_null) {
        row["key"] = "(plain)".into();
    }
    row
}

fn new_key() -> Result<(), Failure> {
    let mut key = [0; KEY_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut key)?;
    let line: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let keys = Keys::parse(&line).map_err(|error| Failure::new(error.to_string()))?;
    if let Some(id) = keys.active() {
        println!("# key {id}");
    }
    println!("{line}");
    Ok(())
}
