//! What an operator orders while the node is loaded, and what must be there of it after a power cut.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;

/// Keyspaces and snapshots that are kept besides the newest.
const KEPT_MAX: usize = 2;

/// Orders one thing after the other. What was ordered and not answered is in doubt, and not listed here.
#[derive(Default)]
pub struct Operator {
    /// Orders that were answered.
    pub ordered: usize,
    /// Snapshots among them.
    pub snapshots_taken: usize,
    /// Oldest first, and so below.
    keyspaces: Vec<String>,
    dropped: Vec<String>,
    /// With the files of each.
    snapshots: BTreeMap<String, Vec<(String, u64)>>,
}

impl Operator {
    /// Orders until the node is gone or `stop` is set.
    pub fn work(&mut self, endpoint: &str, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) && self.order(endpoint).is_some() {
            self.ordered += 1;
        }
    }

    /// The next order; `None` when it was not answered.
    fn order(&mut self, endpoint: &str) -> Option<()> {
        match self.ordered % 5 {
            0 => {
                let name = format!("keyspace-{}", self.ordered);
                let path = format!("/admin/keyspaces/{name}");
                if call(endpoint, "PUT", &path)?.0 == 200 {
                    self.keyspaces.push(name);
                }
            }
            1 if self.keyspaces.len() > KEPT_MAX => {
                let name = self.keyspaces.remove(0);
                let path = format!("/admin/keyspaces/{name}");
                if call(endpoint, "DELETE", &path)?.0 == 204 {
                    self.dropped.push(name);
                }
            }
            // The shards may be too busy to come to one cut in time.
            2 => {
                let (status, description) = call(endpoint, "POST", "/admin/snapshots")?;
                if status == 200 {
                    let id = description["id"].as_str().unwrap().to_owned();
                    self.snapshots.insert(id, files(&description));
                    self.snapshots_taken += 1;
                }
            }
            // Ids begin with the time: the first is the oldest.
            3 if self.snapshots.len() > KEPT_MAX => {
                let (id, _) = self.snapshots.pop_first()?;
                call(endpoint, "DELETE", &format!("/admin/snapshots/{id}"))?;
            }
            _ => {
                call(endpoint, "POST", "/admin/compact")?;
            }
        }
        Some(())
    }

    /// Looks for all that was answered, and removes snapshots that were not.
    ///
    /// # Panics
    /// When something is missing, or there again.
    pub fn check(&self, endpoint: &str) {
        let listed = call(endpoint, "GET", "/admin/keyspaces")
            .expect("an answer")
            .1;
        let has = |name: &String| {
            let mut keyspaces = listed["keyspaces"].as_array().unwrap().iter();
            keyspaces.any(|keyspace| keyspace["name"] == name.as_str())
        };
        let missing: Vec<_> = self.keyspaces.iter().filter(|name| !has(name)).collect();
        assert!(missing.is_empty(), "no {missing:?} in {listed}");
        let back: Vec<_> = self.dropped.iter().filter(|name| has(name)).collect();
        assert!(back.is_empty(), "again {back:?} in {listed}");

        let listed = call(endpoint, "GET", "/admin/snapshots")
            .expect("an answer")
            .1;
        let listed = listed["snapshots"].as_array().unwrap().iter();
        let listed: Vec<&str> = listed.map(|one| one["id"].as_str().unwrap()).collect();
        for (id, files) in &self.snapshots {
            assert!(
                listed.contains(&id.as_str()),
                "no snapshot {id}: {listed:?}"
            );
            for (file, bytes) in files {
                let path = format!("/admin/snapshots/{id}/{file}?length=4096");
                let url = format!("{endpoint}{path}");
                let piece = ureq::get(&url).call().unwrap().body_mut().read_to_vec();
                let expected = usize::try_from(*bytes.min(&4096)).unwrap();
                assert_eq!(piece.unwrap().len(), expected, "{path}");
            }
        }
        for id in listed {
            if !self.snapshots.contains_key(id) {
                let removed = call(endpoint, "DELETE", &format!("/admin/snapshots/{id}"));
                assert_eq!(removed.expect("an answer").0, 204);
            }
        }
    }
}

/// The files of a snapshot that its description names, and their sizes.
fn files(description: &Value) -> Vec<(String, u64)> {
    let stores = description["stores"].as_array().unwrap();
    let files = stores.iter().flat_map(|store| {
        let dir = store["dir"].as_str().unwrap();
        let of = move |list: &str, below: &str, extension: &str| {
            let files = store[list].as_array().unwrap().iter();
            let files = files.map(|file| {
                let name = file["name"].as_str().unwrap();
                let path = format!("{dir}/{below}{name}{extension}");
                (path, file["bytes"].as_u64().unwrap())
            });
            files.collect::<Vec<_>>()
        };
        [of("files", "", ""), of("tables", "tables/", ".table")].concat()
    });
    files.collect()
}

/// Status and document of an answer; `None` when there is none.
fn call(endpoint: &str, method: &str, path: &str) -> Option<(u16, Value)> {
    let agent = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(20)))
        .build()
        .new_agent();
    let url = format!("{endpoint}{path}");
    let answer = match method {
        "GET" => agent.get(url).call(),
        "PUT" => agent.put(url).send_empty(),
        "POST" => agent.post(url).send_empty(),
        _ => agent.delete(url).call(),
    };
    let mut answer = answer.ok()?;
    let text = answer.body_mut().read_to_string().ok()?;
    let document = serde_json::from_str(&text).unwrap_or_default();
    Some((answer.status().as_u16(), document))
}
