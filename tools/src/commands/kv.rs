//! `torc get|put|delete|scan|batch`: the data interface from the command line, over any node's
//! HTTP endpoint.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::Args;
use serde_json::{Value, json};
use torc_cluster::api::TTL_SECONDS_MAX;
use torc_net::limits::{TIMEOUT_MS_DEFAULT, TIMEOUT_MS_MAX};

use crate::commands::whole;
use crate::endpoint::{Answer, Endpoint, Request, add_query, key_path};
use crate::failure::Failure;

/// The most keys that one scan request asks for.
const SCAN_PAGE_KEYS_MAX: u64 = 1000;
/// How much later than the deadline of a request its answer may come.
const LATE_AT_MOST: Duration = Duration::from_secs(2);

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
    #[arg(long, value_name = "MS", allow_hyphen_values = true, value_parser = |text: &str| whole(text, 1..=TIMEOUT_MS_MAX))]
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
        let timeout_ms = self.timeout_ms.unwrap_or(TIMEOUT_MS_DEFAULT);
        let patience = Duration::from_millis(timeout_ms) + LATE_AT_MOST;
        Ok(Endpoint::new(&self.endpoint)?.with_patience(patience))
    }

    fn key_path(&self, key: &[u8]) -> String {
        key_path(self.keyspace.as_deref(), key)
    }

    fn query(&self, levels: &[(&str, Option<&str>)]) -> String {
        let mut query = String::new();
        for (name, value) in levels {
            if let Some(value) = value {
                add_query(&mut query, name, value);
            }
        }
        if let Some(timeout_ms) = self.timeout_ms {
            add_query(&mut query, "timeout_ms", timeout_ms.to_string());
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

/// Which key a command is about.
#[derive(Args, Debug, Clone)]
pub struct Key {
    /// The key, of any bytes but NUL
    pub key: OsString,
    /// The key is given in base64, as a scan prints those that are no text
    #[arg(long)]
    pub key_base64: bool,
}

impl Key {
    fn bytes(&self) -> Result<Vec<u8>, Failure> {
        let given = self.key.as_bytes();
        if !self.key_base64 {
            return Ok(given.to_vec());
        }
        BASE64
            .decode(given)
            .map_err(|error| Failure::usage(format!("the key is not base64: {error}")))
    }
}

/// How many replicas take part in a write.
#[derive(Args, Debug, Clone)]
pub struct WriteLevel {
    /// Replicas that must have it: 1..N, one, quorum, all [default: quorum]
    #[arg(long)]
    pub w: Option<String>,
    /// Let stand-ins count for replicas that are down
    #[arg(long)]
    pub sloppy: bool,
}

impl WriteLevel {
    fn query(&self, common: &Common, r: Option<&str>) -> String {
        let sloppy = self.sloppy.then_some("true");
        common.query(&[("r", r), ("w", self.w.as_deref()), ("sloppy", sloppy)])
    }

    /// Whether it is to succeed where a quorum of the key's own replicas does not answer.
    fn is_below_quorum(&self) -> bool {
        let levels = ["quorum", "all", "local_quorum", "each_quorum"];
        self.sloppy || self.w.as_deref().is_some_and(|w| !levels.contains(&w))
    }
}

/// How a write is made.
#[derive(Args, Debug, Clone)]
pub struct WriteOptions {
    #[command(flatten)]
    level: WriteLevel,
    /// Replicas that must answer the read before it: 1..N, one, quorum, all [default: quorum; one when
    /// there is no quorum, and the write asks for less]
    #[arg(long)]
    pub r: Option<String>,
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
    /// What has been seen of the key: as given, or as the cluster says. `None` when it was never
    /// written.
    fn seen(
        &self,
        endpoint: &Endpoint,
        common: &Common,
        key: &[u8],
    ) -> Result<Option<String>, Failure> {
        if self.context.is_some() {
            return Ok(self.context.clone());
        }
        let read = |r: Option<&str>| {
            endpoint.send(Request {
                method: "GET",
                path: common.key_path(key) + &common.query(&[("r", r)]),
                headers: common.headers(),
                ..Request::default()
            })
        };
        let mut answer = read(self.r.as_deref())?;
        if matches!(answer.status, 503 | 504) && self.r.is_none() && self.level.is_below_quorum() {
            eprintln!(
                "no quorum has said what there is: one replica is asked, and the write may leave siblings"
            );
            answer = read(Some("one"))?;
        }
        match answer.status {
            // A deleted key answers 404 and still has a version to build on.
            200 | 300 | 404 => Ok(answer.version),
            status => Err(Failure::from_answer(status, &answer.body)),
        }
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
    #[command(flatten)]
    key: Key,
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
    let path = args.common.key_path(&args.key.bytes()?) + &query;
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
            None | Some("not_found") => Failure::not_found(&args.key.key.to_string_lossy()),
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
    #[command(flatten)]
    key: Key,
    /// The value; `-` reads it from standard input
    pub value: OsString,
    /// Seconds until the value expires
    #[arg(long, value_name = "SECONDS", allow_hyphen_values = true, value_parser = |text: &str| whole(text, 1..=TTL_SECONDS_MAX))]
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
    let key = args.key.bytes()?;
    let value = if args.value == "-" {
        let mut bytes = Vec::new();
        std::io::stdin().lock().read_to_end(&mut bytes)?;
        bytes
    } else {
        args.value.as_bytes().to_vec()
    };
    let mut body = value_json(&value);
    let conditional = args.if_absent || args.write.if_match.is_some();
    let context = match conditional {
        true => args.write.context.clone(),
        false => args.write.seen(&endpoint, &args.common, &key)?,
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
    let query = args.write.level.query(&args.common, None);
    let path = args.common.key_path(&key) + &query;
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
    #[command(flatten)]
    key: Key,
    #[command(flatten)]
    write: WriteOptions,
    #[command(flatten)]
    common: Common,
}

/// Deletes a key: everything that `--context`, or a read just before, has seen of it.
pub fn delete(args: &Delete) -> Result<(), Failure> {
    let endpoint = args.common.endpoint()?;
    let key = args.key.bytes()?;
    let context = match args.write.if_match.is_some() {
        true => args.write.context.clone(),
        false => args.write.seen(&endpoint, &args.common, &key)?,
    };
    let mut headers = args.write.headers(&args.common);
    if let Some(context) = context {
        headers.push(("X-Torc-Context", context));
    }
    let query = args.write.level.query(&args.common, None);
    let path = args.common.key_path(&key) + &query;
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
    pub prefix: Option<OsString>,
    /// Stop after this many keys
    #[arg(long, value_name = "KEYS", allow_hyphen_values = true, value_parser = |text: &str| whole(text, 1..=u64::MAX))]
    pub limit: Option<u64>,
    /// Go on from the cursor of an earlier scan
    #[arg(long)]
    pub cursor: Option<String>,
    /// Print values as well
    #[arg(long)]
    pub values: bool,
    /// Replicas that must answer: 1..N, one, quorum, all [default: quorum]
    #[arg(long)]
    pub r: Option<String>,
    #[command(flatten)]
    common: Common,
}

/// Lists keys in ring order: a line each (JSON strings, so that every byte can be told), or as one JSON
/// document in the form of a page, however many pages it took.
pub fn scan(args: &Scan) -> Result<(), Failure> {
    let endpoint = args.common.endpoint()?;
    let collection = match &args.common.keyspace {
        None => "/v1/keys".to_owned(),
        Some(_) => args.common.key_path(b"").trim_end_matches('/').to_owned(),
    };
    let as_json = args.common.json;
    let prefix = args.prefix.as_ref().map(|prefix| prefix.as_bytes());
    let mut cursor = args.cursor.clone();
    let mut left = args.limit.unwrap_or(u64::MAX);
    let mut out = std::io::stdout().lock();
    let mut printed = 0_u64;
    loop {
        let limit = left.min(SCAN_PAGE_KEYS_MAX).to_string();
        let values = args.values.then_some("true");
        let mut query = args.common.query(&[
            ("limit", Some(&limit)),
            ("cursor", cursor.as_deref()),
            ("r", args.r.as_deref()),
            ("values", values),
        ]);
        if let Some(prefix) = prefix {
            add_query(&mut query, "prefix", prefix);
        }
        let page = endpoint.get_json(&(collection.clone() + &query))?;
        let keys = page
            .get("keys")
            .and_then(Value::as_array)
            .map_or(&[][..], Vec::as_slice);
        for key in keys {
            match (as_json, printed) {
                (false, _) => writeln!(out, "{key}")?,
                (true, 0) => write!(out, "{{\"keys\":[{key}")?,
                (true, _) => write!(out, ",{key}")?,
            }
            printed += 1;
        }
        left = left.saturating_sub(u64::try_from(keys.len()).unwrap_or(u64::MAX));
        cursor = page
            .get("cursor")
            .and_then(Value::as_str)
            .map(str::to_owned);
        if cursor.is_none() || left == 0 {
            break;
        }
    }
    if as_json {
        let begin = if printed == 0 { "{\"keys\":[" } else { "" };
        writeln!(out, "{begin}],\"cursor\":{}}}", json!(cursor))?;
    } else if let Some(cursor) = cursor {
        eprintln!("more: --cursor {cursor}");
    }
    Ok(())
}

/// `torc batch`
#[derive(Args, Debug)]
pub struct Batch {
    /// File with the batch as JSON, as `POST /v1/batch` takes it; `-` reads standard input
    pub file: String,
    /// Replicas that must answer each read: 1..N, one, quorum, all [default: quorum]
    #[arg(long)]
    pub r: Option<String>,
    #[command(flatten)]
    level: WriteLevel,
    #[command(flatten)]
    common: Common,
}

/// Sends a batch and prints its answer: one outcome for each operation. Fails when one of them did.
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
        Some(_) => args.common.key_path(b"").replace("/keys/", "/batch"),
    } + &args.level.query(&args.common, args.r.as_deref());
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
    let answer = answer.json()?;
    println!("{answer}");
    all_done(&answer)
}

/// Fails when an operation of a batch did. That there is no such key is no failure.
fn all_done(answer: &Value) -> Result<(), Failure> {
    let results = answer.get("results").and_then(Value::as_array);
    let results = results.map_or(&[][..], Vec::as_slice);
    let code = |result: &Value| {
        let code = result.pointer("/error/code").and_then(Value::as_str);
        code.map(str::to_owned)
    };
    let failed = results.iter().filter_map(code);
    let failed: Vec<String> = failed.filter(|code| code != "not_found").collect();
    match failed.first() {
        None => Ok(()),
        Some(first) => Err(Failure::new(format!(
            "{} of {} operations failed ({first}): the results say why",
            failed.len(),
            results.len()
        ))),
    }
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
    fn a_batch_fails_with_any_of_its_operations() {
        let answer = |codes: &[Option<&str>]| {
            let results = codes.iter().map(|code| match code {
                None => json!({"status": 200}),
                Some(code) => json!({"status": 400, "error": {"code": code}}),
            });
            json!({ "results": results.collect::<Vec<_>>() })
        };
        assert!(all_done(&answer(&[])).is_ok());
        assert!(all_done(&answer(&[None, Some("not_found")])).is_ok());
        let failure = all_done(&answer(&[None, Some("unavailable"), Some("timeout")]));
        let text = failure.unwrap_err().to_string();
        assert!(
            text.contains("2 of 3 operations failed (unavailable)"),
            "{text}"
        );
    }

    #[test]
    fn only_a_write_that_asks_for_less_does_without_a_quorum() {
        let level = |w: Option<&str>, sloppy| WriteLevel {
            w: w.map(str::to_owned),
            sloppy,
        };
        assert!(level(Some("1"), false).is_below_quorum());
        assert!(level(None, true).is_below_quorum());
        for w in [None, Some("quorum"), Some("all"), Some("each_quorum")] {
            assert!(!level(w, false).is_below_quorum());
        }
    }

    #[test]
    fn keys_are_bytes() {
        let key = |key: &[u8], key_base64| {
            let key = std::ffi::OsStr::from_bytes(key).to_owned();
            Key { key, key_base64 }.bytes()
        };
        assert_eq!(key(&[0xff], false).unwrap(), [0xff]);
        assert_eq!(key(b"/wA=", true).unwrap(), [0xff, 0]);
        assert!(
            key(b"?", true)
                .unwrap_err()
                .to_string()
                .contains("not base64")
        );
    }

    #[test]
    fn values_survive_the_way_through_json() {
        for value in [&b"text"[..], &[0xff, 0x00, 0xfe], b""] {
            assert_eq!(value_bytes(&value_json(value)).unwrap(), value);
        }
    }
}
