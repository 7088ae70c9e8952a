//! What damage has cost this node and nobody has made good yet, and the order to do without it.
//!
//! Not on a request's path: `GET` and `POST /admin/damage`. Whether others can make something good is the
//! cluster's to say; here all shards of the node are asked, and files get their names.

use std::rc::Rc;

use serde_json::{Value, json};
use torc_cluster::api::{DamagedPart, Outlook};
use torc_engine::table::table_path;
use torc_env::{Env, ShardId};

use crate::gather::{on_every_shard, or_ended};
use crate::http::response::Problem;
use crate::service::Service;

/// Every damaged part of this node: `GET /admin/damage`.
///
/// # Errors
/// When a shard has ended.
pub async fn describe(service: &Service) -> Result<Value, Problem> {
    let shards = on_every_shard(&service.handle, |service: Rc<Service>| async move {
        Ok::<_, String>((service.env.shard(), service.node.damaged_parts()))
    });
    let mut parts = Vec::new();
    for shard in or_ended(shards.await) {
        let (shard, of_shard) = shard.map_err(Problem::not_ready)?;
        parts.extend(of_shard.into_iter().map(|part| (shard, part)));
    }
    Ok(document(service, &parts, None))
}

/// Accepts that what is listed now stays lost: `POST /admin/damage`. Durable on return.
///
/// # Errors
/// When a shard's store cannot be written. Other shards may have accepted theirs.
pub async fn accept_loss(service: &Service) -> Result<Value, Problem> {
    let shards = on_every_shard(&service.handle, |service: Rc<Service>| async move {
        let accepted = service.node.accept_loss().await;
        let accepted = accepted.map_err(|failure| failure.to_string())?;
        let left = service.node.damaged_parts();
        Ok::<_, String>((service.env.shard(), accepted.len() as u64, left))
    });
    let mut parts = Vec::new();
    let mut accepted = 0;
    for shard in or_ended(shards.await) {
        let (shard, of_shard, left) = shard.map_err(|error| Problem {
            retryable: true,
            ..Problem::new(500, "internal", format!("not accepted everywhere: {error}"))
        })?;
        accepted += of_shard;
        parts.extend(left.into_iter().map(|part| (shard, part)));
    }
    Ok(document(service, &parts, Some(accepted)))
}

/// Parts of all shards that wait for somebody to accept that they are lost, for the status.
pub async fn waiting(service: &Service) -> u64 {
    let shards = on_every_shard(&service.handle, |service: Rc<Service>| async move {
        service.node.gauges().damage_waiting
    });
    shards.await.into_iter().flatten().sum()
}

fn document(service: &Service, parts: &[(ShardId, DamagedPart)], accepted: Option<u64>) -> Value {
    let lost = parts.iter();
    let waiting = lost
        .filter(|(_, part)| part.outlook == Outlook::Lost)
        .count();
    let parts: Vec<Value> = parts
        .iter()
        .map(|(shard, part)| {
            let layout = service.identity.layout();
            let file = |id| table_path(&layout.dir(*shard).join("tables"), id);
            json!({
                "shard": shard.0,
                "keyspace": part.keyspace,
                "first": part.range.first.to_string(),
                "last": part.range.last.to_string(),
                "file": part.file_id.map(file),
                "state": part.outlook.name(),
                "why": part.why,
            })
        })
        .collect();
    let mut document = json!({ "damage": parts, "waiting": waiting });
    if let Some(accepted) = accepted {
        document["accepted"] = json!(accepted);
    }
    document
}
