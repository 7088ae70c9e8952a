//! `/health`, `/ready`, `/metrics` and `/admin/…`: what operators and their tools ask and order.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use torc_cluster::keyspace::{Compaction, Conflict, Keyspace, Mode};
use torc_cluster::membership::{ChangeError, Standing, View};
use torc_cluster::ring::MemberIndex;
use torc_cluster::topology::{Epoch, Member};
use torc_env::{Class, Env, Token, TreeId};

use crate::gather::{on_every_shard, or_ended};
use crate::http::json as body;
use crate::http::query::Query;
use crate::http::request::{Method, Request};
use crate::http::response::{ContentType, Problem, Response};
use crate::http::route::{Admin, check_key};
use crate::keys;
use crate::metrics::Snapshot;
use crate::service::Service;
use crate::{archive, damage, snapshot};

/// How long an answer about a keyspace waits until every shard of this node knows the change.
const SPREAD_TIMEOUT: Duration = Duration::from_secs(5);
/// How often it looks.
const SPREAD_INTERVAL: Duration = Duration::from_millis(5);

/// How fast a scrub reads on each shard: slow enough for the disk to serve requests meanwhile.
const SCRUB_BYTES_PER_S: u64 = 64 << 20;

/// `/health`: 200 while every shard can write.
///
/// # Errors
/// 503 once one cannot, until the process is started again: a write or sync of its log failed, and that is final.
pub async fn health(service: &Service) -> Result<Response, Problem> {
    match write_failure(service).await {
        None => Ok(Response::json(200, r#"{"status":"ok"}"#)),
        Some(why) => Err(Problem::failed(why)),
    }
}

/// Which shards of this node write nothing any more, and why.
async fn write_failure(service: &Service) -> Option<String> {
    let shards = on_every_shard(&service.handle, |service: Rc<Service>| async move {
        let cause = service.store.failure()?;
        Some(format!(
            "shard {} writes nothing more until this process is started again: {cause}",
            service.env.shard()
        ))
    });
    let failures: Vec<_> = shards.await.into_iter().flatten().flatten().collect();
    (!failures.is_empty()).then(|| failures.join("; "))
}

/// `/ready`: 200 once every shard of this node is in the ring and serves.
///
/// # Errors
/// 503 until then, while it stops, and when one of them cannot write any more.
pub async fn ready(service: &Service) -> Result<Response, Problem> {
    if service.stop.is_raised() {
        return Err(Problem::not_ready("this node is stopping"));
    }
    if let Some(why) = write_failure(service).await {
        return Err(Problem::failed(why));
    }
    // Shards learn of an epoch one after the other, and any of them may get the next request.
    let shards = on_every_shard(&service.handle, |service: Rc<Service>| async move {
        service.node.ready()
    });
    if shards.await.into_iter().all(|ready| ready == Some(true)) {
        return Ok(Response::json(200, r#"{"ready":true}"#));
    }
    let membership = service.node.membership();
    let trouble = membership.trouble();
    Err(Problem::not_ready(trouble.unwrap_or_else(|| {
        format!("this node is {}", membership.standing().name())
    })))
}

/// `/metrics`: the numbers of all shards, added up.
///
/// # Errors
/// None.
pub async fn metrics(service: &Rc<Service>) -> Result<Response, Problem> {
    let shards = on_every_shard(&service.handle, |service: Rc<Service>| async move {
        service.snapshot()
    });
    let mut all = Snapshot::default();
    for shard in shards.await.into_iter().flatten() {
        all.add(shard);
    }
    let mut greatest = all.greatest.iter();
    let is_poisoned = greatest.any(|(name, value)| name == "store_poisoned" && *value > 0);
    let ready = service.node.ready() && !service.stop.is_raised() && !is_poisoned;
    all.greatest.extend([
        ("ready".into(), u64::from(ready)),
        ("shards".into(), u64::from(service.env.shard_count())),
    ]);
    if let Some(view) = service.view() {
        let members = view.topology.indexed();
        let up = members.filter(|(index, _)| view.state_name(*index) == "up");
        all.greatest.extend([
            ("epoch".into(), view.topology.epoch.0),
            ("members".into(), view.topology.members.len() as u64),
            ("members_up".into(), up.count() as u64),
        ]);
    }
    Ok(Response::with_body(
        200,
        ContentType::Metrics,
        all.to_text(),
    ))
}

/// Answers a request below `/admin/`.
///
/// # Errors
/// What the client is told instead of a good answer.
pub async fn handle(
    service: Rc<Service>,
    request: Request,
    order: Admin,
) -> Result<Response, Problem> {
    let query = Query::parse(&request.query)?;
    match order {
        Admin::Status => {
            only(&request, &[Method::Get, Method::Head], "GET, HEAD")?;
            let mut status = status(&service);
            if let Some(why) = write_failure(&service).await {
                status["ready"] = json!(false);
                status["trouble"] = json!(why);
            }
            status["damage_waiting"] = json!(damage::waiting(&service).await);
            Ok(answer(&status))
        }
        Admin::Ring => {
            only(&request, &[Method::Get, Method::Head], "GET, HEAD")?;
            ring(&service, &query).map(|ring| answer(&ring))
        }
        Admin::Keyspaces => {
            only(&request, &[Method::Get, Method::Head], "GET, HEAD")?;
            let view = in_cluster(&service)?;
            let keyspaces = view.topology.keyspaces.iter();
            let list: Vec<Value> = keyspaces.map(|one| keyspace_json(&view, one)).collect();
            Ok(answer(&json!({ "keyspaces": list })))
        }
        Admin::Keyspace(name) => keyspace(&service, request, &name).await,
        Admin::Compact => {
            only(&request, &[Method::Post], "POST")?;
            let detach = query.boolean("detach")?.unwrap_or(false);
            run(&service, detach, compact(Rc::clone(&service))).await
        }
        Admin::Repair => {
            only(&request, &[Method::Post], "POST")?;
            let detach = query.boolean("detach")?.unwrap_or(false);
            run(&service, detach, repair(Rc::clone(&service))).await
        }
        Admin::Scrub => {
            only(&request, &[Method::Post], "POST")?;
            let detach = query.boolean("detach")?.unwrap_or(false);
            run(&service, detach, scrub(Rc::clone(&service))).await
        }
        Admin::Damage => match request.method {
            Method::Get | Method::Head => damage::describe(&service).await.map(|all| answer(&all)),
            Method::Post => damage::accept_loss(&service)
                .await
                .map(|done| answer(&done)),
            _ => Err(Problem::method_not_allowed("GET, HEAD, POST")),
        },
        Admin::Encryption => {
            only(&request, &[Method::Get, Method::Head], "GET, HEAD")?;
            keys::describe(&service).await.map(|found| answer(&found))
        }
        Admin::EncryptionReload => {
            only(&request, &[Method::Post], "POST")?;
            keys::reload(&service).await.map(|found| answer(&found))
        }
        Admin::Archive => match request.method {
            Method::Get | Method::Head => archive::describe(&service).await.map(|all| answer(&all)),
            Method::Post => archive::now(&service).await.map(|done| answer(&done)),
            _ => Err(Problem::method_not_allowed("GET, HEAD, POST")),
        },
        Admin::Snapshots => match request.method {
            Method::Get | Method::Head => {
                let list = snapshot::list(&service).await?;
                Ok(answer(&json!({ "snapshots": list })))
            }
            Method::Post => {
                let made = snapshot::create(&service, reads(&query)?).await;
                made.map(|made| answer(&made))
            }
            _ => Err(Problem::method_not_allowed("GET, HEAD, POST")),
        },
        Admin::Snapshot(id) => {
            let id = String::from_utf8_lossy(&id);
            match request.method {
                Method::Get | Method::Head => {
                    let found = snapshot::describe(&service, &id, reads(&query)?).await;
                    found.map(|found| answer(&found))
                }
                Method::Delete => {
                    snapshot::remove(&service, &id).await?;
                    Ok(Response::empty(204))
                }
                _ => Err(Problem::method_not_allowed("GET, HEAD, DELETE")),
            }
        }
        Admin::SnapshotFile(id, path) => {
            only(&request, &[Method::Get], "GET")?;
            let (id, path) = (String::from_utf8_lossy(&id), String::from_utf8_lossy(&path));
            let offset = query.number("offset", 0, u64::MAX)?.unwrap_or(0);
            let most = snapshot::PIECE_BYTES_MAX;
            let length = query.number("length", 1, most)?.unwrap_or(most);
            let piece = snapshot::read(&service, &id, &path, offset, length).await?;
            Ok(Response::with_body(200, ContentType::Octets, piece))
        }
        Admin::Decommission(_) => {
            only(&request, &[Method::Post], "POST")?;
            Err(Problem::new(
                501,
                "unsupported",
                "this build does not carry out that order",
            ))
        }
    }
}

/// The newest version of a snapshot's description that the client understands.
fn reads(query: &Query) -> Result<u64, Problem> {
    let reads = query.number("reads", snapshot::VERSION_WITHOUT_BLOBS, u64::MAX)?;
    Ok(reads.unwrap_or(snapshot::VERSION_WITHOUT_BLOBS))
}

fn only(request: &Request, methods: &[Method], allow: &'static str) -> Result<(), Problem> {
    if methods.contains(&request.method) {
        return Ok(());
    }
    Err(Problem::method_not_allowed(allow))
}

fn answer(value: &Value) -> Response {
    Response::json(200, value.to_string())
}

fn in_cluster(service: &Service) -> Result<Rc<View>, Problem> {
    service
        .view()
        .ok_or_else(|| Problem::not_ready("this node is in no cluster yet"))
}

/// Carries an order out, or starts it and says so.
async fn run(
    service: &Service,
    detach: bool,
    order: impl Future<Output = Result<Value, Problem>> + 'static,
) -> Result<Response, Problem> {
    if !detach {
        return order.await.map(|done| answer(&done));
    }
    service.env.spawn(Class::Control, async move {
        if let Err(problem) = order.await {
            tracing::warn!("a detached order failed: {}", problem.message);
        }
    });
    Ok(Response::json(202, r#"{"started":true}"#))
}

/// Flushes and compacts every shard of this node.
async fn compact(service: Rc<Service>) -> Result<Value, Problem> {
    let outcomes = on_every_shard(&service.handle, |service: Rc<Service>| async move {
        service
            .store
            .flush()
            .await
            .map_err(|error| error.to_string())?;
        service
            .store
            .compact()
            .await
            .map_err(|error| error.to_string())?;
        let stats = service.store.stats();
        let files = [stats.tables as u64, stats.blobs as u64];
        Ok::<_, String>((files, [stats.table_bytes, stats.blob_bytes]))
    });
    let (mut tables, mut table_bytes, mut blobs, mut blob_bytes) = (0, 0, 0, 0);
    for (files, bytes) in of_all(outcomes.await, "compaction")? {
        tables += files[0];
        blobs += files[1];
        table_bytes += bytes[0];
        blob_bytes += bytes[1];
    }
    Ok(json!({
        "tables": tables,
        "table_bytes": table_bytes,
        "blobs": blobs,
        "blob_bytes": blob_bytes,
    }))
}

/// Reads every table and blob of this node through; `table_bytes` are of both. What is damaged is then fetched from the replicas,
/// or waits for an operator.
async fn scrub(service: Rc<Service>) -> Result<Value, Problem> {
    let outcomes = on_every_shard(&service.handle, |service: Rc<Service>| async move {
        let report = service.store.scrub(SCRUB_BYTES_PER_S).await;
        report.map_err(|error| error.to_string())
    });
    let (mut tables, mut blobs, mut records, mut bytes, mut damaged) = (0, 0, 0, 0, 0);
    for report in of_all(outcomes.await, "scrub")? {
        tables += report.tables;
        blobs += report.blobs;
        records += report.records;
        bytes += report.bytes;
        damaged += report.damaged;
    }
    Ok(json!({
        "tables": tables,
        "blobs": blobs,
        "records": records,
        "table_bytes": bytes,
        "damaged": damaged,
    }))
}

/// What an order came to on every shard; it has failed when it has on one.
fn of_all<T>(outcomes: Vec<Option<Result<T, String>>>, order: &str) -> Result<Vec<T>, Problem> {
    let outcomes = or_ended(outcomes).map(|outcome| {
        outcome.map_err(|error| Problem {
            retryable: true,
            ..Problem::new(500, "internal", format!("{order} failed: {error}"))
        })
    });
    outcomes.collect()
}

/// Compares everything that this node holds with its other replicas.
async fn repair(service: Rc<Service>) -> Result<Value, Problem> {
    let report = service.node.repair().await?;
    Ok(json!({
        "ranges_repaired": report.ranges_repaired,
        "ranges_failed": report.ranges_failed,
        "records_received": report.records_received,
        "records_sent": report.records_sent,
    }))
}

fn status(service: &Service) -> Value {
    let membership = service.node.membership();
    let config = &service.config;
    let mut status = json!({
        "ready": service.node.ready() && !service.stop.is_raised(),
        "node": service.env.node().to_string(),
        "name": config.node.name,
        "state": membership.standing().name(),
        "cluster_name": config.cluster.name,
        "epoch": 0,
        "cluster": Value::Null,
        "trouble": membership.trouble(),
        "version": env!("CARGO_PKG_VERSION"),
    });
    let Some(view) = service.view() else {
        status["nodes"] = json!([{
            "name": config.node.name,
            "id": service.env.node().to_string(),
            "state": Standing::Outside.name(),
            "shards": service.env.shard_count(),
            "rack": config.node.rack,
            "zone": config.node.zone,
            "datacenter": config.node.datacenter,
            "internode": config.listen.internode.to_string(),
            "http": config.listen.http.to_string(),
        }]);
        return status;
    };
    let topology = &view.topology;
    status["epoch"] = json!(topology.epoch.0);
    status["cluster"] = json!(format!("{:032x}", topology.cluster.0));
    let mut nodes: Vec<Value> = topology
        .indexed()
        .map(|(index, member)| member_json(&view, index, member))
        .collect();
    nodes.extend(topology.removed.iter().map(|removed| {
        json!({
            "name": removed.name,
            "id": removed.node.to_string(),
            "state": Standing::Left.name(),
        })
    }));
    status["nodes"] = Value::Array(nodes);
    status
}

fn member_json(view: &View, index: MemberIndex, member: &Member) -> Value {
    let own = &member.description;
    json!({
        "name": own.name,
        "id": member.node.map(|node| node.to_string()),
        // The slot of a founder that has not shown up yet has no node that could be up.
        "state": if member.node.is_some() { view.state_name(index) } else { "down" },
        "shards": own.shards,
        "rack": own.rack,
        "zone": own.zone,
        "datacenter": own.datacenter,
        "internode": own.internode.to_string(),
        "http": own.http.to_string(),
        "client": own.client.to_string(),
        "resp": own.resp.to_string(),
        "vnodes": member.vnodes.len(),
    })
}

fn ring(service: &Service, query: &Query) -> Result<Value, Problem> {
    let view = in_cluster(service)?;
    let topology = &view.topology;
    let default = torc_cluster::keyspace::DEFAULT_NAME.as_bytes();
    let name = query.bytes("keyspace").map_or(default, |name| &name[..]);
    let keyspace = find_keyspace(&view, name)?;
    let n = topology.effective_n(keyspace);
    let copies = usize::from(n);
    let names = |replicas: &[MemberIndex]| -> Vec<&str> {
        let members = replicas.iter().map(|index| topology.member(*index));
        members.map(|member| &*member.description.name).collect()
    };
    let mut answer = json!({
        "epoch": topology.epoch.0,
        "keyspace": keyspace.name,
        "n": n,
    });
    if let Some(key) = query.bytes("key") {
        check_key(key)?;
        let token = Token::of(keyspace.id, key);
        answer["token"] = json!(token.to_string());
        answer["replicas"] = json!(names(view.ring.replicas(token, copies)));
        return Ok(answer);
    }
    let shares = view.ring.shares(copies).into_iter().map(|(index, share)| {
        json!({
            "name": topology.member(index).description.name,
            "vnodes": topology.member(index).vnodes.len(),
            "share": share,
        })
    });
    answer["nodes"] = Value::Array(shares.collect());
    let ranges = view.ring.ranges(copies, 1).map(|piece| {
        json!({
            "first": piece.range.first.to_string(),
            "last": piece.range.last.to_string(),
            "replicas": names(piece.replicas),
        })
    });
    answer["ranges"] = Value::Array(ranges.collect());
    Ok(answer)
}

fn find_keyspace<'a>(view: &'a View, name: &[u8]) -> Result<&'a Keyspace, Problem> {
    let keyspace = std::str::from_utf8(name)
        .ok()
        .and_then(|name| view.topology.keyspace(name));
    keyspace.ok_or_else(|| Problem::new(404, "unknown_keyspace", "there is no such keyspace"))
}

fn keyspace_json(view: &View, keyspace: &Keyspace) -> Value {
    let mut settings = json!({
        "name": keyspace.name,
        "id": keyspace.id.0,
        "n": keyspace.n,
        "effective_n": view.topology.effective_n(keyspace),
        "mode": match keyspace.mode {
            Mode::Eventual => "eventual",
            Mode::Serial => "serial",
        },
        "conflict": match keyspace.conflict {
            Conflict::Siblings => "siblings",
            Conflict::Lww => "lww",
        },
        "ttl_default_seconds": keyspace.ttl_default_seconds,
        "compaction": keyspace.compaction.name(),
        "tombstone_grace_seconds": keyspace.tombstone_grace_seconds,
    });
    if let Compaction::TimeWindow { seconds } = keyspace.compaction {
        settings["compaction_window_seconds"] = json!(seconds);
    }
    settings
}

async fn keyspace(
    service: &Rc<Service>,
    mut request: Request,
    name: &Bytes,
) -> Result<Response, Problem> {
    let view = in_cluster(service)?;
    match request.method {
        Method::Get | Method::Head => {
            find_keyspace(&view, name).map(|found| answer(&keyspace_json(&view, found)))
        }
        Method::Put => {
            let base = find_keyspace(&view, name).cloned();
            let base = base.unwrap_or_else(|_| Keyspace {
                id: TreeId(0),
                name: String::from_utf8_lossy(name).into_owned(),
                ..Keyspace::default_keyspace()
            });
            let wanted = read_keyspace(std::mem::take(&mut request.body), base)?;
            wanted
                .validate()
                .map_err(|error| Problem::bad_request(error.to_string()))?;
            let epoch = service.node.membership().put_keyspace(wanted).await;
            let epoch = epoch.map_err(change_problem)?;
            spread(service, epoch).await;
            let view = in_cluster(service)?;
            find_keyspace(&view, name).map(|found| answer(&keyspace_json(&view, found)))
        }
        Method::Delete => {
            let found = find_keyspace(&view, name)?;
            let epoch = service.node.membership().drop_keyspace(&found.name).await;
            spread(service, epoch.map_err(change_problem)?).await;
            Ok(Response::empty(204))
        }
        Method::Post | Method::Other => Err(Problem::method_not_allowed("GET, HEAD, PUT, DELETE")),
    }
}

/// A keyspace as the body wants it, on top of what it is.
fn read_keyspace(bytes: bytes::BytesMut, mut keyspace: Keyspace) -> Result<Keyspace, Problem> {
    if bytes.is_empty() {
        return Ok(keyspace);
    }
    let unknown = |what: &str, values: &str| body::JsonError(format!("{what} must be {values}"));
    let (mut compaction, mut window_seconds) = (None, None);
    let (keyspace, _) = body::parse(bytes, |root| {
        for (name, node) in root.members("the body")? {
            match name {
                "n" => {
                    let n = node.unsigned("n")?;
                    // Whatever does not fit is out of range as well.
                    keyspace.n = u8::try_from(n).unwrap_or(u8::MAX);
                }
                "mode" => {
                    keyspace.mode = match node.string("mode")? {
                        "eventual" => Mode::Eventual,
                        "serial" => Mode::Serial,
                        _ => return Err(unknown("mode", "eventual or serial")),
                    };
                }
                "conflict" => {
                    keyspace.conflict = match node.string("conflict")? {
                        "siblings" => Conflict::Siblings,
                        "lww" => Conflict::Lww,
                        _ => return Err(unknown("conflict", "siblings or lww")),
                    };
                }
                "ttl_default_seconds" => {
                    keyspace.ttl_default_seconds = node.unsigned("ttl_default_seconds")?;
                }
                "tombstone_grace_seconds" => {
                    let seconds = node.unsigned("tombstone_grace_seconds")?;
                    keyspace.tombstone_grace_seconds = seconds;
                }
                "compaction" => compaction = Some(node.string("compaction")?.to_owned()),
                "compaction_window_seconds" => {
                    let seconds = node.unsigned("compaction_window_seconds")?;
                    window_seconds = Some(u32::try_from(seconds).unwrap_or(u32::MAX));
                }
                "name" | "id" | "effective_n" => {}
                other => {
                    return Err(body::JsonError(format!(
                        "a keyspace has no setting {other:?} (n, mode, conflict, \
                         ttl_default_seconds, compaction, compaction_window_seconds, \
                         tombstone_grace_seconds)"
                    )));
                }
            }
        }
        keyspace.compaction = read_compaction(keyspace.compaction, compaction, window_seconds)?;
        Ok(keyspace)
    })
    .map_err(|error| Problem::bad_request(error.to_string()))?;
    Ok(keyspace)
}

/// The strategy named, or else the one there was; with the window given, or else the one there was.
fn read_compaction(
    before: Compaction,
    name: Option<String>,
    window_seconds: Option<u32>,
) -> Result<Compaction, body::JsonError> {
    let known = match name {
        None => before,
        Some(name) => Compaction::from_name(&name).ok_or_else(|| {
            let names = Compaction::NAMES.join(", ");
            body::JsonError(format!("compaction must be one of {names}"))
        })?,
    };
    match (known, before, window_seconds) {
        (Compaction::TimeWindow { .. }, _, Some(seconds))
        | (Compaction::TimeWindow { .. }, Compaction::TimeWindow { seconds }, None) => {
            Ok(Compaction::TimeWindow { seconds })
        }
        (known, _, None) => Ok(known),
        (_, _, Some(_)) => Err(body::JsonError(
            "compaction_window_seconds is a setting of compaction \"time_window\"".into(),
        )),
    }
}

fn change_problem(error: ChangeError) -> Problem {
    match &error {
        ChangeError::Refused { .. } => Problem::new(409, "refused", error.to_string()),
        ChangeError::Outside => Problem::not_ready(error.to_string()),
        ChangeError::NoMajority { in_doubt } => Problem {
            status: 503,
            code: "no_majority",
            retryable: true,
            in_doubt: *in_doubt,
            retry_after_ms: torc_cluster::api::RETRY_AFTER_MS,
            ..Problem::new(503, "no_majority", error.to_string())
        },
        ChangeError::Disk { .. } => Problem {
            retryable: true,
            ..Problem::new(500, "internal", error.to_string())
        },
    }
}

/// Waits until every shard of this node knows `epoch`, so that the next request here finds what the
/// answer to this one says. Other nodes hear of it by themselves.
async fn spread(service: &Rc<Service>, epoch: Epoch) {
    let waited = on_every_shard(&service.handle, move |service: Rc<Service>| async move {
        let until = service.env.now() + SPREAD_TIMEOUT;
        let knows = || {
            service
                .view()
                .is_some_and(|view| view.topology.epoch >= epoch)
        };
        while !knows() && service.env.now() < until {
            service.env.sleep(SPREAD_INTERVAL).await;
        }
    });
    drop(waited.await);
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;

    use super::*;

    #[test]
    fn no_bytes_make_the_settings_of_a_keyspace_panic() {
        let valid = [
            r#"{"n":3,"mode":"eventual","conflict":"lww","ttl_default_seconds":60}"#,
            r#"{"name":"k","compaction":"time_window","compaction_window_seconds":3600,
                "tombstone_grace_seconds":864000}"#,
        ];
        let valid = valid.map(|text| text.as_bytes().to_vec());
        crate::fuzz::parser("JSON body of a keyspace", &valid).fuzz(|bytes| {
            let wanted = read_keyspace(BytesMut::from(bytes), Keyspace::default_keyspace());
            if let Ok(wanted) = wanted
                && wanted.validate().is_ok()
            {
                wanted.compaction.strategy();
            }
        });
    }
}
