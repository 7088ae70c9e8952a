//! `torc status|ring|keyspace|node|repair|compact|scrub|damage`: what an operator asks and orders.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use serde_json::Value;

use crate::endpoint::{Endpoint, Request, add_query};
use crate::failure::Failure;

/// What every admin command takes.
#[derive(Args, Debug, Clone)]
pub struct Common {
    /// HTTP endpoint of any node
    #[arg(
        long,
        env = "TORC_ENDPOINT",
        default_value = "http://127.0.0.1:7480",
        value_name = "URL"
    )]
    pub endpoint: String,
    /// Print the server's JSON
    #[arg(long)]
    pub json: bool,
}

/// `torc status`
pub fn status(args: &Common) -> Result<(), Failure> {
    let status = Endpoint::new(&args.endpoint)?.get_json("/admin/status")?;
    if args.json {
        println!("{status}");
        return Ok(());
    }
    let nodes = status
        .get("nodes")
        .and_then(Value::as_array)
        .map_or(&[][..], Vec::as_slice);
    let columns = ["name", "state", "shards", "rack", "internode", "http", "id"];
    print_table(&columns, nodes);
    for (name, value) in status.as_object().into_iter().flatten() {
        if !value.is_array() && !value.is_object() {
            println!("{name}: {}", plain(value));
        }
    }
    Ok(())
}

/// `torc ring`
#[derive(Args, Debug)]
pub struct Ring {
    /// Only the range and the replicas of this key
    #[arg(long)]
    pub key: Option<OsString>,
    /// Keyspace [default: default]
    #[arg(long, value_name = "NAME")]
    pub keyspace: Option<String>,
    #[command(flatten)]
    common: Common,
}

/// Prints who owns what share of the ring, or who holds one key.
pub fn ring(args: &Ring) -> Result<(), Failure> {
    let mut query = String::new();
    if let Some(key) = &args.key {
        add_query(&mut query, "key", key.as_bytes());
    }
    if let Some(keyspace) = &args.keyspace {
        add_query(&mut query, "keyspace", keyspace);
    }
    let ring = Endpoint::new(&args.common.endpoint)?.get_json(&format!("/admin/ring{query}"))?;
    if args.common.json {
        println!("{ring}");
        return Ok(());
    }
    for (name, value) in ring.as_object().into_iter().flatten() {
        match value {
            Value::Array(rows) if rows.iter().all(Value::is_object) && !rows.is_empty() => {
                println!("{name}:");
                let columns: Vec<&str> = rows[0]
                    .as_object()
                    .into_iter()
                    .flatten()
                    .map(|(name, _)| &**name)
                    .collect();
                print_table(&columns, rows);
            }
            other => println!("{name}: {}", plain(other)),
        }
    }
    Ok(())
}

/// `torc keyspace`
#[derive(Subcommand, Debug)]
pub enum Keyspace {
    /// List the keyspaces
    List {
        #[command(flatten)]
        common: Common,
    },
    /// Create a keyspace, or change the given settings of one
    Set {
        /// Its name
        name: String,
        /// Replicas of each key
        #[arg(long)]
        n: Option<u8>,
        /// `eventual` or `serial`
        #[arg(long)]
        mode: Option<String>,
        /// `siblings` or `lww`
        #[arg(long)]
        conflict: Option<String>,
        /// Time to live of values written without one; 0 is for ever
        #[arg(long, value_name = "SECONDS")]
        ttl_default: Option<u64>,
        /// `hybrid`, `leveled`, `size_tiered`, `fifo` or `time_window`
        #[arg(long, value_name = "STRATEGY")]
        compaction: Option<String>,
        /// Width of a window of `time_window`
        #[arg(long, value_name = "SECONDS")]
        compaction_window: Option<u32>,
        /// How long deletions are kept at least
        #[arg(long, value_name = "SECONDS")]
        tombstone_grace: Option<u64>,
        #[command(flatten)]
        common: Common,
    },
    /// Drop a keyspace and all its data
    Drop {
        /// Its name
        name: String,
        #[command(flatten)]
        common: Common,
    },
}

/// Lists, creates, changes or drops keyspaces.
pub fn keyspace(command: &Keyspace) -> Result<(), Failure> {
    match command {
        Keyspace::List { common } => {
            let document = Endpoint::new(&common.endpoint)?.get_json("/admin/keyspaces")?;
            if common.json {
                println!("{document}");
                return Ok(());
            }
            let rows = document.get("keyspaces").and_then(Value::as_array);
            let columns = [
                "name",
                "n",
                "mode",
                "conflict",
                "ttl_default_seconds",
                "compaction",
                "compaction_window_seconds",
                "tombstone_grace_seconds",
            ];
            print_table(&columns, rows.map_or(&[][..], Vec::as_slice));
            Ok(())
        }
        Keyspace::Set {
            name,
            n,
            mode,
            conflict,
            ttl_default,
            compaction,
            compaction_window,
            tombstone_grace,
            common,
        } => {
            let given = [
                ("n", n.map(Value::from)),
                ("mode", mode.clone().map(Value::from)),
                ("conflict", conflict.clone().map(Value::from)),
                ("ttl_default_seconds", ttl_default.map(Value::from)),
                ("compaction", compaction.clone().map(Value::from)),
                (
                    "compaction_window_seconds",
                    compaction_window.map(Value::from),
                ),
                ("tombstone_grace_seconds", tombstone_grace.map(Value::from)),
            ];
            let given = given
                .into_iter()
                .filter_map(|(name, value)| Some((name, value?)));
            let body = Value::from_iter(given);
            let path = format!("/admin/keyspaces/{name}");
            order(common, "PUT", &path, Some(body)).map(drop)
        }
        Keyspace::Drop { name, common } => {
            let path = format!("/admin/keyspaces/{name}");
            order(common, "DELETE", &path, None).map(drop)
        }
    }
}

/// `torc node`
#[derive(Subcommand, Debug)]
pub enum Node {
    /// Take a node out of the ring
    Decommission {
        /// Name of the node
        name: String,
        #[command(flatten)]
        common: Common,
    },
}

/// Orders about the membership of nodes.
pub fn node(command: &Node) -> Result<(), Failure> {
    let Node::Decommission { name, common } = command;
    let path = format!("/admin/nodes/{name}/decommission");
    order(common, "POST", &path, None).map(drop)
}

/// `torc repair|compact|scrub`
#[derive(Args, Debug)]
pub struct Maintenance {
    /// Return at once instead of when it is done
    #[arg(long)]
    pub detach: bool,
    #[command(flatten)]
    common: Common,
}

/// How long a repair is tried again while ranges fail: nodes may not know yet that one of them is back.
const REPAIR_PATIENCE: Duration = Duration::from_secs(20);
/// Between two tries.
const REPAIR_INTERVAL: Duration = Duration::from_millis(500);

/// Orders `action` (`repair`, `compact` or `scrub`) on the endpoint's node. Fails when it was not done
/// everywhere.
pub fn maintenance(action: &str, args: &Maintenance) -> Result<(), Failure> {
    let detach = if args.detach { "?detach=true" } else { "" };
    let path = format!("/admin/{action}{detach}");
    let begun = Instant::now();
    loop {
        let done = ask(&args.common, "POST", &path, None)?;
        let verdict = done.as_ref().map_or(Ok(()), verdict);
        if verdict.is_ok() || begun.elapsed() >= REPAIR_PATIENCE {
            print_done(&args.common, done.as_ref());
            return verdict;
        }
        std::thread::sleep(REPAIR_INTERVAL);
    }
}

/// Whether an order was done everywhere.
fn verdict(done: &Value) -> Result<(), Failure> {
    let count = |name| done.get(name).and_then(Value::as_u64).unwrap_or(0);
    if count("ranges_failed") == 0 {
        return Ok(());
    }
    Err(Failure::new(format!(
        "{} of {} ranges are not repaired: a replica is down or did not answer in time (`torc status`); \
         repair again once it is up",
        count("ranges_failed"),
        count("ranges_failed") + count("ranges_repaired")
    )))
}

/// `torc damage`
#[derive(Args, Debug)]
pub struct Damage {
    /// Do without what is listed: keys that no other node that is up has are absent from then on
    #[arg(long)]
    pub accept_loss: bool,
    #[command(flatten)]
    common: Common,
}

/// Lists what damage has cost the endpoint's node, or accepts that it stays lost.
pub fn damage(args: &Damage) -> Result<(), Failure> {
    let endpoint = Endpoint::new(&args.common.endpoint)?;
    let document = if args.accept_loss {
        let request = Request {
            method: "POST",
            path: "/admin/damage".into(),
            ..Request::default()
        };
        endpoint.expect_long(request)?.json()?
    } else {
        endpoint.get_json("/admin/damage")?
    };
    if args.common.json {
        println!("{document}");
        return Ok(());
    }
    let parts = document.get("damage").and_then(Value::as_array);
    let parts = parts.map_or(&[][..], Vec::as_slice).iter();
    let rows: Vec<Value> = parts.cloned().map(name_missing).collect();
    if !rows.is_empty() {
        let columns = ["shard", "keyspace", "state", "first", "last", "file", "why"];
        print_table(&columns, &rows);
    }
    for name in ["waiting", "accepted"] {
        if let Some(count) = document.get(name) {
            println!("{name}: {}", plain(count));
        }
    }
    Ok(())
}

/// What was in the log was of every keyspace, and what is cut out is in no file.
fn name_missing(mut row: Value) -> Value {
    for (name, missing) in [("keyspace", "(all)"), ("file", "(cut out)")] {
        if row.get(name).is_some_and(Value::is_null) {
            row[name] = missing.into();
        }
    }
    row
}

/// Orders something, however long it takes, and prints what it came to.
pub(crate) fn order(
    common: &Common,
    method: &'static str,
    path: &str,
    body: Option<Value>,
) -> Result<Option<Value>, Failure> {
    let done = ask(common, method, path, body)?;
    print_done(common, done.as_ref());
    Ok(done)
}

/// Orders something, however long it takes.
fn ask(
    common: &Common,
    method: &'static str,
    path: &str,
    body: Option<Value>,
) -> Result<Option<Value>, Failure> {
    let request = Request {
        method,
        path: path.into(),
        headers: vec![("Content-Type", "application/json".into())],
        body: body
            .map(|body| body.to_string().into_bytes())
            .unwrap_or_default(),
    };
    let answer = Endpoint::new(&common.endpoint)?.expect_long(request)?;
    if answer.body.is_empty() {
        return Ok(None);
    }
    answer.json().map(Some)
}

fn print_done(common: &Common, done: Option<&Value>) {
    let Some(document) = done else { return };
    if common.json {
        println!("{document}");
        return;
    }
    for (name, value) in document.as_object().into_iter().flatten() {
        println!("{name}: {}", plain(value));
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Prints the given fields of each row, aligned. Fields that no row has are left out.
pub(crate) fn print_table(columns: &[&str], rows: &[Value]) {
    let columns: Vec<&str> = columns
        .iter()
        .copied()
        .filter(|column| rows.iter().any(|row| row.get(*column).is_some()))
        .collect();
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            columns
                .iter()
                .map(|column| row.get(*column).map_or_else(String::new, plain))
                .collect()
        })
        .collect();
    let width = |index: usize| {
        let longest = cells
            .iter()
            .map(|row| row[index].chars().count())
            .max()
            .unwrap_or(0);
        longest.max(columns[index].len())
    };
    let print = |row: &mut dyn Iterator<Item = &str>| {
        let line: Vec<String> = row
            .enumerate()
            .map(|(index, cell)| format!("{cell:<0$}", width(index)))
            .collect();
        println!("{}", line.join("  ").trim_end());
    };
    print(&mut columns.iter().copied());
    for row in &cells {
        print(&mut row.iter().map(String::as_str));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_order_that_was_not_done_everywhere_has_failed() {
        let good = [
            json!({"ranges_repaired": 4, "ranges_failed": 0}),
            json!({"tables": 1, "damaged": 2}),
            json!({"started": true}),
        ];
        for done in good {
            assert!(verdict(&done).is_ok(), "{done}");
        }
        let failed = json!({"ranges_repaired": 1, "ranges_failed": 3});
        let told = verdict(&failed).unwrap_err().to_string();
        assert!(told.contains("3 of 4 ranges"), "{told}");
    }
}
