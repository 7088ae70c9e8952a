//! `torc get|put|delete|scan|batch`: the data interface from the command line, over any node's
//! HTTP endpoint.

use std::io::{Read, Write};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::Args;
use serde_json::{Value, json};

use crate::endpoint::{Answer, Endpoint, Request, add_query, key_path};
use crate::failure::Failure;

/// The most keys that one scan request asks for.
const SCAN_PAGE_KEYS_MAX: u64 = 1000;

/// What every data command takes.
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
    /// Keyspace [default: default]
    #[arg(long, value_name = "NAME")]
    pub keyspace: Option<String>,
    /// Milliseconds that the cluster may take, 1 to 60000 [default: 5000]
    #[arg(long, value_name = "MS")]
    pub timeout_ms: Option<u64>,
    /// Session token of an earlier answer
    #[arg(long, value_name = "TOKEN")]
    pub session: Option<String>,
    /// Print the server's JSON
    #[arg(long)]
    pub json: bool,
}

impl Common {
    fn endpoint(&self) -> Result<Endpoint, Failure> {
        Endpoint::new(&self.endpoint)
    }

    fn query(&self, levels: &[(&str, Option<&str>)]) -> String {
        let mut query = String::new();
        for (name, value) in levels {
            if let Some(value) = value {
                add_query(&mut query, name, value);
            }
        }
        if let Some(timeout_ms) = self.timeout_ms {
            add_query(&mut query, "timeout_ms", &timeout_ms.to_string());
        }
        query
    }

    fn headers(&self) -> Vec<(&'static str, String)> {
        self.session
            .iter()
            .map(|token| ("X-Torc-Session", token.clone()))
            .collect()
    }
}

/// How a write is made.
#[derive(Args, Debug, Clone)]
pub struct WriteOptions {
    /// Replicas that must have it: 1..N, one, quorum, all [default: quorum]
    #[arg(long)]
    pub w: Option<String>,
    /// Let stand-ins count for replicas that are down
    #[arg(long)]
    pub sloppy: bool,
    /// What has been seen of the key; read first when not given
    #[arg(long, value_name = "VERSION")]
    pub context: Option<String>,
    /// Write only over this version
    #[arg(long, value_name = "VERSION")]
    pub if_match: Option<String>,
    /// Answer a retry with this key like the first try
    #[arg(long, value_name = "ID")]
    pub idempotency_key: Option<String>,
}

impl WriteOptions {
    fn query(&self, common: &Common) -> String {
        let sloppy = self.sloppy.then_some("true");
        common.query(&[("w", self.w.as_deref()), ("sloppy", sloppy)])
    }

    fn headers(&self, common: &Common) -> Vec<(&'static str, String)> {
        let mut headers = common.headers();
        if let Some(version) = &self.if_match {
            headers.push(("If-Match", version.clone()));
        }
        if let Some(id) = &self.idempotency_key {
            headers.push(("Idempotency-Key", id.clone()));
        }
        headers
    }
}

/// `torc get`
#[derive(Args, Debug)]
pub struct Get {
    /// The key
    pub key: String,
    /// Replicas that must answer: 1..N, one, quorum, all [default: quorum]
    #[arg(long)]
    pub r: Option<String>,
    #[command(flatten)]
    common: Common,
}

/// Prints the value as it is; several siblings are printed as JSON, a line each.
pub fn get(args: &Get) -> Result<(), Failure> {
    let endpoint = args.common.endpoint()?;
    let query = args.common.query(&[("r", args.r.as_deref())]);
    let path = key_path(args.common.keyspace.as_deref(), args.key.as_bytes()) + &query;
    let request = Request {
        method: "GET",
        path,
        headers: args.common.headers(),
        ..Request::default()
    };
    let answer = endpoint.expect(request, &[300, 404])?;
    if answer.status == 404 {
        // A 404 may also say that the keyspace does not exist.
        let code = answer.json().ok().and_then(|body| {
            body.pointer("/error/code")
                .and_then(Value::as_str)
                .map(str::to_owned)
        });
        return Err(match code.as_deref() {
            None | Some("not_found") => Failure::not_found(&args.key),
            Some(_) => Failure::from_answer(404, &answer.body),
        });
    }
    let body = answer.json()?;
    let mut out = std::io::stdout().lock();
    if args.common.json {
        writeln!(out, "{body}")?;
        return Ok(());
    }
    match body.get("siblings").and_then(Value::as_array) {
        Some(siblings) if answer.status == 300 => {
            eprintln!(
                "{} siblings, one a line; write with --context {} to replace them",
                siblings.len(),
                opaque(&body).unwrap_or_default()
            );
            for sibling in siblings {
                writeln!(out, "{sibling}")?;
            }
        }
        _ => {
            out.write_all(&value_bytes(&body)?)?;
            if std::io::IsTerminal::is_terminal(&std::io::stdout()) {
                writeln!(out)?;
            }
        }
    }
    Ok(())
}

/// `torc put`
#[derive(Args, Debug)]
pub struct Put {
    /// The key
    pub key: String,
    /// The value; `-` reads it from standard input
    pub value: String,
    /// Seconds until the value expires
    #[arg(long, value_name = "SECONDS")]
    pub ttl: Option<u64>,
    /// Write only if the key does not exist
    #[arg(long, conflicts_with = "if_match")]
    pub if_absent: bool,
    #[command(flatten)]
    write: WriteOptions,
    #[command(flatten)]
    common: Common,
}

/// Writes a value. Without a context it reads the key first, so that nothing is left as a sibling
/// unless somebody else writes at the same time.
pub fn put(args: &Put) -> Result<(), Failure> {
    let endpoint = args.common.endpoint()?;
    let value = if args.value == "-" {
        let mut bytes = Vec::new();
        std::io::stdin().lock().read_to_end(&mut bytes)?;
        bytes
    } else {
        args.value.clone().into_bytes()
    };
    let mut body = value_json(&value);
    let conditional = args.if_absent || args.write.if_match.is_some();
    let context = match &args.write.context {
        Some(context) => Some(context.clone()),
        None if conditional => None,
        None => seen(&endpoint, &args.common, &args.key)?,
    };
    if let Some(context) = context {
        body["context"] = Value::String(context);
    }
    if let Some(seconds) = args.ttl {
        body["ttl_seconds"] = json!(seconds);
    }
    let mut headers = args.write.headers(&args.common);
    headers.push(("Content-Type", "application/json".into()));
    if args.if_absent {
        headers.push(("If-None-Match", "*".into()));
    }
    let query = args.write.query(&args.common);
    let path = key_path(args.common.keyspace.as_deref(), args.key.as_bytes()) + &query;
    let request = Request {
        method: "PUT",
        path,
        headers,
        body: body.to_string().into_bytes(),
    };
    let answer = endpoint.expect(request, &[])?;
    report_write(&answer, args.common.json)
}

/// `torc delete`
#[derive(Args, Debug)]
pub struct Delete {
    /// The key
    pub key: String,
    #[command(flatten)]
    write: WriteOptions,
    #[command(flatten)]
    common: Common,
}

/// Deletes a key: everything that `--context`, or a read just before, has seen of it.
pub fn delete(args: &Delete) -> Result<(), Failure> {
    let endpoint = args.common.endpoint()?;
    let context = match &args.write.context {
        Some(context) => Some(context.clone()),
        None if args.write.if_match.is_some() => None,
        None => seen(&endpoint, &args.common, &args.key)?,
    };
    let mut headers = args.write.headers(&args.common);
    if let Some(context) = context {
        headers.push(("X-Torc-Context", context));
    }
    let query = args.write.query(&args.common);
    let path = key_path(args.common.keyspace.as_deref(), args.key.as_bytes()) + &query;
    let request = Request {
        method: "DELETE",
        path,
        headers,
        ..Request::default()
    };
    let answer = endpoint.expect(request, &[])?;
    report_write(&answer, args.common.json)
}

/// `torc scan`
#[derive(Args, Debug)]
pub struct Scan {
    /// Only keys that begin with this
    #[arg(long, value_name = "PREFIX")]
    pub prefix: Option<String>,
    /// Stop after this many keys
    #[arg(long, value_name = "KEYS")]
    pub limit: Option<u64>,
    /// Go on from the cursor of an earlier scan
    #[arg(long)]
    pub cursor: Option<String>,
    /// Print values as well
    #[arg(long)]
    pub values: bool,
    #[command(flatten)]
    common: Common,
}

/// Lists keys, a line each (JSON strings, so that every byte can be told), in ring order.
pub fn scan(args: &Scan) -> Result<(), Failure> {
    let endpoint = args.common.endpoint()?;
    let collection = match &args.common.keyspace {
        None => "/v1/keys".to_owned(),
        Some(_) => key_path(args.common.keyspace.as_deref(), b"")
            .trim_end_matches('/')
            .to_owned(),
    };
    let mut cursor = args.cursor.clone();
    let mut left = args.limit.unwrap_or(u64::MAX);
    let mut out = std::io::stdout().lock();
    while left > 0 {
        let limit = left.min(SCAN_PAGE_KEYS_MAX).to_string();
        let values = args.values.then_some("true");
        let query = args.common.query(&[
            ("limit", Some(&limit)),
            ("cursor", cursor.as_deref()),
            ("prefix", args.prefix.as_deref()),
            ("values", values),
        ]);
        let page = endpoint.get_json(&(collection.clone() + &query))?;
        let keys = page
            .get("keys")
            .and_then(Value::as_array)
            .map_or(&[][..], Vec::as_slice);
        for key in keys {
            writeln!(out, "{key}")?;
        }
        left = left.saturating_sub(u64::try_from(keys.len()).unwrap_or(u64::MAX));
        cursor = page
            .get("cursor")
            .and_then(Value::as_str)
            .map(str::to_owned);
        if cursor.is_none() {
            return Ok(());
        }
    }
    if let Some(cursor) = cursor {
        eprintln!("more: --cursor {cursor}");
    }
    Ok(())
}

/// `torc batch`
#[derive(Args, Debug)]
pub struct Batch {
    /// File with the batch as JSON, as `POST /v1/batch` takes it; `-` reads standard input
    pub file: String,
    #[command(flatten)]
    common: Common,
}

/// Sends a batch and prints its answer: one outcome for each operation.
pub fn batch(args: &Batch) -> Result<(), Failure> {
    let body = if args.file == "-" {
        let mut bytes = Vec::new();
        std::io::stdin().lock().read_to_end(&mut bytes)?;
        bytes
    } else {
        std::fs::read(&args.file)
            .map_err(|error| Failure::new(format!("cannot read {}: {error}", args.file)))?
    };
    let path = match &args.common.keyspace {
        None => "/v1/batch".to_owned(),
        Some(_) => key_path(args.common.keyspace.as_deref(), b"").replace("/keys/", "/batch"),
    } + &args.common.query(&[]);
    let mut headers = args.common.headers();
    headers.push(("Content-Type", "application/json".into()));
    let answer = args.common.endpoint()?.expect(
        Request {
            method: "POST",
            path,
            headers,
            body,
        },
        &[],
    )?;
    println!("{}", answer.json()?);
    Ok(())
}

/// The context of everything that a quorum knows of the key; `None` when it was never written.
fn seen(endpoint: &Endpoint, common: &Common, key: &str) -> Result<Option<String>, Failure> {
    let path = key_path(common.keyspace.as_deref(), key.as_bytes()) + &common.query(&[]);
    let request = Request {
        method: "GET",
        path,
        headers: common.headers(),
        ..Request::default()
    };
    let answer = endpoint.expect(request, &[300, 404])?;
    // A deleted key answers 404 and still has a version to build on.
    Ok(answer.version)
}

fn report_write(answer: &Answer, as_json: bool) -> Result<(), Failure> {
    if as_json {
        if answer.body.is_empty() {
            println!("{}", json!({"version": {"context": answer.version}}));
        } else {
            println!("{}", answer.json()?);
        }
    } else if let Some(version) = &answer.version {
        println!("{version}");
    }
    Ok(())
}

fn opaque(body: &Value) -> Option<String> {
    body.pointer("/version/context")
        .and_then(Value::as_str)
        .map(str::to_owned)
}

fn value_json(value: &[u8]) -> Value {
    match std::str::from_utf8(value) {
        Ok(text) => json!({ "value": text }),
        Err(_) => json!({ "value": BASE64.encode(value), "encoding": "base64" }),
    }
}

fn value_bytes(body: &Value) -> Result<Vec<u8>, Failure> {
    let text = body
        .get("value")
        .and_then(Value::as_str)
        .unwrap_or_default();
    match body.get("encoding").and_then(Value::as_str) {
        Some("base64") => BASE64
            .decode(text)
            .map_err(|error| Failure::new(format!("the value is not base64: {error}"))),
        _ => Ok(text.as_bytes().to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_survive_the_way_through_json() {
        for value in [&b"text"[..], &[0xff, 0x00, 0xfe], b""] {
            assert_eq!(value_bytes(&value_json(value)).unwrap(), value);
        }
    }
}
