//! The server's configuration: a TOML file, then the environment, then `--set`, each overriding
//! the one before.
//!
//! Every key is known here; an unknown key or a value of the wrong type is refused with the line
//! of the file (or the name of the variable or flag) that holds it, before anything is started.
//! Unknown `TORC_*` variables are only reported, since other tools share the prefix.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Everything that `torc server` can be told. The defaults are those of the interface contract.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Who this node is and where its data lies.
    pub node: NodeSection,
    /// The addresses it listens on.
    pub listen: ListenSection,
    /// The cluster that it belongs to.
    pub cluster: ClusterSection,
    /// How many shards it runs, and how.
    pub shards: ShardsSection,
    /// When a write counts as durable.
    pub durability: DurabilitySection,
    /// Where the log is kept for restores to a moment.
    pub archive: ArchiveSection,
    /// What files are encrypted with.
    pub encryption: EncryptionSection,
    /// What is known of the disk.
    pub disk: DiskSection,
    /// Memory budgets.
    pub memory: MemorySection,
    /// How data lies on the disk.
    pub storage: StorageSection,
    /// What is logged.
    pub log: LogSection,
}

/// `[node]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NodeSection {
    /// Name of the node, unique in the cluster. Default: the host name is not guessed, `n1`.
    pub name: String,
    /// Directory of all data. Created when it does not exist.
    pub data_dir: PathBuf,
    /// Failure domain within a zone.
    pub rack: String,
    /// Failure domain within a data centre.
    pub zone: String,
    /// Data centre.
    pub datacenter: String,
}

impl Default for NodeSection {
    fn default() -> Self {
        Self {
            name: "n1".into(),
            data_dir: PathBuf::from("/var/lib/torc"),
            rack: "rack1".into(),
            zone: "zone1".into(),
            datacenter: "dc1".into(),
        }
    }
}

/// `[listen]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ListenSection {
    /// Binary client protocol.
    pub client: SocketAddr,
    /// HTTP: data, admin, metrics.
    pub http: SocketAddr,
    /// Redis protocol.
    pub resp: SocketAddr,
    /// Other nodes; this address is also the node's entry in `cluster.seeds`.
    pub internode: SocketAddr,
}

impl Default for ListenSection {
    fn default() -> Self {
        ListenSection::at_base(7400)
    }
}

impl ListenSection {
    /// The loopback addresses of a node with base port `base`.
    ///
    /// # Panics
    /// When `base` is above 65455 (a port above 65535 would follow).
    pub fn at_base(base: u16) -> Self {
        let at = |offset: u16| {
            let port = base
                .checked_add(offset)
                .expect("port base checked by the caller");
            SocketAddr::from(([127, 0, 0, 1], port))
        };
        Self {
            client: at(0),
            http: at(80),
            resp: at(79),
            internode: at(1),
        }
    }
}

/// `[cluster]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterSection {
    /// Name of the cluster; nodes of another name are refused.
    pub name: String,
    /// Internode addresses of the founding nodes, the same list on every node.
    pub seeds: Vec<SocketAddr>,
    /// Positions on the ring that a node of ordinary capacity takes.
    pub vnodes: u16,
    /// Milliseconds between two gossip rounds.
    pub gossip_interval_ms: u64,
    /// Whether writes that a replica missed are kept as hints for it.
    pub hints: bool,
    /// Seconds within which every range is compared with its other replicas.
    pub repair_interval_s: u64,
}

impl Default for ClusterSection {
    fn default() -> Self {
        Self {
            name: "torc".into(),
            seeds: Vec::new(),
            vnodes: 128,
            gossip_interval_ms: 500,
            hints: true,
            repair_interval_s: 24 * 3600,
        }
    }
}

/// `[shards]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ShardsSection {
    /// Number of shards; 0 means one for each core that this process may use.
    pub count: u16,
    /// Whether each shard's thread is pinned to a core of its own.
    pub pin: bool,
    /// Which cores: all that are allowed, or those of the plan of `torc tune`.
    pub cpus: ShardCpus,
    /// Where `torc tune` left that plan (its `--state`).
    pub plan_dir: PathBuf,
    /// Where flushes and compactions run.
    pub background: Background,
}

impl Default for ShardsSection {
    fn default() -> Self {
        Self {
            count: 0,
            pin: true,
            cpus: ShardCpus::Allowed,
            plan_dir: torc_tuning::server::STATE_DIRECTORY.into(),
            background: Background::Glommio,
        }
    }
}

/// Which cores carry shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ShardCpus {
    /// All that this process may use.
    Allowed,
    /// Those of the plan of `torc tune`.
    Auto,
}

/// Where background work runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Background {
    /// On glommio executors of its own.
    Glommio,
    /// On the shards, in their flush share.
    Shard,
}

/// `[durability]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DurabilitySection {
    /// What an acknowledgement promises.
    pub fsync: Fsync,
    /// Milliseconds between two syncs under `fsync = "interval"`.
    pub interval_ms: u64,
}

impl Default for DurabilitySection {
    fn default() -> Self {
        Self {
            fsync: Fsync::Group,
            interval_ms: 100,
        }
    }
}

/// The fsync policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fsync {
    /// Each write is synced before it is acknowledged.
    Always,
    /// As `always`; writes that arrive during a sync share the next one.
    Group,
    /// Acknowledged at once, synced every `interval_ms`.
    Interval,
    /// Acknowledged at once, synced when the memtable is flushed.
    Never,
}

/// `[archive]`, of the log: what `torc restore --at` brings a backup forward with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ArchiveSection {
    /// Directory that full segments of the log are copied to, best on another device; it must exist. Empty for none.
    pub dir: PathBuf,
    /// MiB of a shard's log that are held back when they cannot be archived; beyond it the oldest segment is given up.
    pub held_mb: u64,
    /// Seconds after which a segment is archived though it is not full; 0 for only full ones.
    pub interval_s: u64,
}

impl Default for ArchiveSection {
    fn default() -> Self {
        Self {
            dir: PathBuf::new(),
            held_mb: 1024,
            interval_s: 60,
        }
    }
}

/// `[encryption]`, of everything that the stores write. With neither key, it is written in the clear.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EncryptionSection {
    /// File with the master keys, oldest first, one of 64 hexadecimal digits a line; empty for none.
    pub key_file: PathBuf,
    /// Command, run by `/bin/sh`, that prints what such a file would hold; empty for none.
    pub key_command: String,
}

/// `[disk]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiskSection {
    /// Properties file that `torc tune disk --output` wrote; empty for none. With it, background jobs
    /// leave a part of the disk's time to requests.
    pub properties: PathBuf,
}

/// `[memory]`, each figure for one shard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemorySection {
    /// Bytes of recent writes kept in memory before they are flushed, in MiB.
    pub memtable_mb: u64,
    /// Record cache, in MiB.
    pub cache_mb: u64,
    /// Requests and answers held for clients, in MiB. Large ones beyond it are refused as `overloaded`.
    pub clients_mb: u64,
}

impl Default for MemorySection {
    fn default() -> Self {
        Self {
            memtable_mb: 64,
            cache_mb: 128,
            clients_mb: 128,
        }
    }
}

/// `[storage]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StorageSection {
    /// Values of at least so many KiB are written once, to files of their own (blobs), instead of being
    /// merged again and again; 0: none is. Takes effect for what is written from then on.
    pub blob_from_kb: u64,
}

impl Default for StorageSection {
    fn default() -> Self {
        Self { blob_from_kb: 8 }
    }
}

/// `[log]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogSection {
    /// `error`, `warn`, `info`, `debug` or `trace`, or a filter such as `info,torc_engine=debug`.
    pub level: String,
}

impl Default for LogSection {
    fn default() -> Self {
        Self {
            level: "info".into(),
        }
    }
}

/// A configuration that cannot be used, and why.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML, has an unknown key, or a value of the wrong kind.
    #[error("in the configuration {path}: {message}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Line, column, excerpt and reason.
        message: String,
    },
    /// `--set` or a variable names no known key, or its value does not fit.
    #[error("{origin}: {message}")]
    Override {
        /// The flag or variable.
        origin: String,
        /// The reason.
        message: String,
    },
    /// Values that are each well-formed but do not go together.
    #[error("{key} = {value}: {message}")]
    Value {
        /// The key, as `section.key`.
        key: &'static str,
        /// Its value.
        value: String,
        /// What is wrong and what to do.
        message: String,
    },
}

/// A configuration together with what should be said about it.
#[derive(Debug)]
pub struct Loaded {
    /// The checked configuration.
    pub config: Config,
    /// Warnings for the log.
    pub warnings: Vec<String>,
}

/// The longest interval in seconds, a century and more: added to a time, it does not overflow.
const INTERVAL_S_MAX: u64 = u32::MAX as u64;
/// The most that a shard's log may wait for the archive, in MiB: more than any volume has.
const HELD_MB_MAX: u64 = 1 << 30;
/// The largest cache of a shard, in MiB: more than any host has memory for one.
const CACHE_MB_MAX: u64 = 1 << 22;

/// `TORC_*` variables that belong to other parts of the program.
const OTHER_VARIABLES: [&str; 2] = ["TORC_ENDPOINT", "TORC_LOG"];

/// Reads `path`, applies `environment` (pairs of name and value) and `sets` (`section.key=value`),
/// and checks the result.
pub fn load(
    path: Option<&Path>,
    environment: impl Iterator<Item = (String, String)>,
    sets: &[String],
) -> Result<Loaded, ConfigError> {
    let table = match path {
        Some(path) => read_file(path)?,
        None => toml::Table::new(),
    };
    overridden(table, environment, sets)
}

/// As [`load`], of what a file would hold.
pub fn overridden(
    mut table: toml::Table,
    environment: impl Iterator<Item = (String, String)>,
    sets: &[String],
) -> Result<Loaded, ConfigError> {
    let mut warnings = Vec::new();
    let mut variables: Vec<_> = environment
        .filter(|(name, _)| name.starts_with("TORC_"))
        .collect();
    variables.sort();
    for (name, value) in variables {
        if OTHER_VARIABLES.contains(&name.as_str()) {
            continue;
        }
        match key_of_variable(&name) {
            Some((section, key)) => override_key(&mut table, &section, &key, &value, &name)?,
            None => warnings.push(format!("unknown environment variable {name} is ignored")),
        }
    }
    for set in sets {
        let origin = format!("--set {set}");
        let fail = |message: &str| ConfigError::Override {
            origin: origin.clone(),
            message: message.to_owned(),
        };
        let (name, value) = set
            .split_once('=')
            .ok_or_else(|| fail("expected section.key=value"))?;
        let (section, key) = name
            .trim()
            .split_once('.')
            .ok_or_else(|| fail("expected section.key=value"))?;
        override_key(&mut table, section, key, value.trim(), &origin)?;
    }
    let config: Config =
        table
            .try_into()
            .map_err(|error: toml::de::Error| ConfigError::Override {
                origin: "configuration".into(),
                message: error.message().into(),
            })?;
    check(&config)?;
    Ok(Loaded { config, warnings })
}

fn read_file(path: &Path) -> Result<toml::Table, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
        path: path.into(),
        source,
    })?;
    let invalid = |error: toml::de::Error| ConfigError::Invalid {
        path: path.into(),
        message: error.to_string().trim_end().to_owned(),
    };
    // Typed first: only this pass knows the line of an unknown key.
    toml::from_str::<Config>(&text).map_err(invalid)?;
    toml::from_str(&text).map_err(invalid)
}

/// Whether [`load`] takes an environment variable for a key of the configuration.
pub fn is_key(variable: &str) -> bool {
    key_of_variable(variable).is_some()
}

/// The variable or flag among those that [`load`] would get that sets `key`, a `section.key`.
pub fn origin_of(
    key: &str,
    environment: impl Iterator<Item = (String, String)>,
    sets: &[String],
) -> Option<String> {
    let named = |set: &&String| {
        set.split_once('=')
            .is_some_and(|(name, _)| name.trim() == key)
    };
    if let Some(set) = sets.iter().find(named) {
        return Some(format!("--set {set}"));
    }
    let variable = format!("TORC_{}", key.replace('.', "_").to_ascii_uppercase());
    let mut names = environment.map(|(name, _)| name);
    names.find(|name| *name == variable)
}

/// `TORC_LISTEN_HTTP` → (`listen`, `http`), when such a key exists.
fn key_of_variable(name: &str) -> Option<(String, String)> {
    let rest = name.strip_prefix("TORC_")?.to_ascii_lowercase();
    let (section, key) = rest.split_once('_')?;
    known_keys()
        .contains(&format!("{section}.{key}"))
        .then(|| (section.into(), key.into()))
}

fn known_keys() -> Vec<String> {
    let table = toml::Table::try_from(Config::default()).expect("the defaults are a TOML table");
    let mut keys = Vec::new();
    for (section, value) in &table {
        if let toml::Value::Table(inner) = value {
            keys.extend(inner.keys().map(|key| format!("{section}.{key}")));
        }
    }
    keys
}

fn override_key(
    table: &mut toml::Table,
    section: &str,
    key: &str,
    value: &str,
    origin: &str,
) -> Result<(), ConfigError> {
    let fail = |message: String| ConfigError::Override {
        origin: origin.into(),
        message,
    };
    if !known_keys().contains(&format!("{section}.{key}")) {
        return Err(fail(format!("there is no key {section}.{key}")));
    }
    let inner = table
        .entry(section)
        .or_insert_with(|| toml::Value::Table(toml::Table::new()))
        .as_table_mut()
        .ok_or_else(|| fail(format!("{section} is not a section")))?;
    // A value that reads as TOML is taken as such (numbers, booleans, lists), anything else as a
    // string; where a string is wanted, `--set node.name=7` must stay one.
    let literal = toml::from_str::<toml::Table>(&format!("v = {value}"))
        .ok()
        .and_then(|mut parsed| parsed.remove("v"));
    let string = toml::Value::String(value.into());
    let mut last_error = String::new();
    for candidate in literal.into_iter().chain([string]) {
        let mut trial = toml::Table::new();
        trial.insert(
            section.into(),
            toml::Value::Table(toml::Table::from_iter([(
                key.to_owned(),
                candidate.clone(),
            )])),
        );
        match trial.try_into::<Config>() {
            Ok(_) => {
                inner.insert(key.into(), candidate);
                return Ok(());
            }
            Err(error) if last_error.is_empty() => last_error = error.message().into(),
            Err(_) => {}
        }
    }
    Err(fail(last_error))
}

fn check(config: &Config) -> Result<(), ConfigError> {
    let fail = |key, value: &dyn ToString, message: &str| {
        Err(ConfigError::Value {
            key,
            value: value.to_string(),
            message: message.into(),
        })
    };
    if config.node.name.trim().is_empty() {
        return fail("node.name", &config.node.name, "give the node a name");
    }
    if config.node.data_dir.as_os_str().is_empty() {
        let message = "give the directory of the node's data, such as /var/lib/torc";
        return fail("node.data_dir", &"\"\"", message);
    }
    let within = |key, value: u64, bounds: RangeInclusive<u64>, message: &str| {
        if bounds.contains(&value) {
            return Ok(());
        }
        fail(key, &value, message)
    };
    let Config {
        cluster,
        archive,
        memory,
        ..
    } = config;
    let (shards, vnodes) = (config.shards.count.into(), cluster.vnodes.into());
    within("shards.count", shards, 0..=1024, "at most 1024 shards")?;
    within("cluster.vnodes", vnodes, 1..=4096, "between 1 and 4096")?;
    let (key, value) = ("cluster.gossip_interval_ms", cluster.gossip_interval_ms);
    within(key, value, 10..=60_000, "between 10 and 60000")?;
    let (key, value) = ("cluster.repair_interval_s", cluster.repair_interval_s);
    within(key, value, 1..=INTERVAL_S_MAX, "between 1 and 4294967295")?;
    let message = "at most 4294967295; 0 for full segments only";
    within(
        "archive.interval_s",
        archive.interval_s,
        0..=INTERVAL_S_MAX,
        message,
    )?;
    let message = "at most 1073741824 (1 PiB)";
    within("archive.held_mb", archive.held_mb, 0..=HELD_MB_MAX, message)?;
    let (key, value) = ("durability.interval_ms", config.durability.interval_ms);
    within(key, value, 1..=60_000, "between 1 and 60000")?;
    let (key, value) = ("memory.memtable_mb", memory.memtable_mb);
    within(key, value, 1..=65_536, "between 1 and 65536")?;
    let (key, value) = ("memory.clients_mb", memory.clients_mb);
    within(key, value, 16..=65_536, "between 16 and 65536")?;
    let message = "at most 4194304 (4 TiB), for each shard";
    within(
        "memory.cache_mb",
        memory.cache_mb,
        0..=CACHE_MB_MAX,
        message,
    )?;
    let (key, value) = ("storage.blob_from_kb", config.storage.blob_from_kb);
    within(key, value, 0..=1 << 20, "at most 1048576; 0 for none")?;
    let encryption = &config.encryption;
    if !encryption.key_file.as_os_str().is_empty() && !encryption.key_command.is_empty() {
        return fail(
            "encryption.key_command",
            &encryption.key_command,
            "encryption.key_file is set, too: keys come from one place",
        );
    }
    let listen = &config.listen;
    let all = [listen.client, listen.http, listen.resp, listen.internode];
    for (index, address) in all.iter().enumerate() {
        if address.port() != 0 && all[..index].contains(address) {
            return fail(
                "listen",
                address,
                "the same address twice: each listener needs its own",
            );
        }
    }
    if config.cluster.seeds.iter().any(|seed| seed.port() == 0) {
        return fail(
            "cluster.seeds",
            &"port 0",
            "a seed is the internode address of a node",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_text(text: &str, sets: &[&str], env: &[(&str, &str)]) -> Result<Loaded, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        let env = env
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        load(Some(file.path()), env, &sets)
    }

    #[test]
    fn the_documented_example_is_read_as_written() {
        let loaded = from_text(
            "[node]\nname = \"n7\"\n[listen]\nhttp = \"127.0.0.1:9980\"\n[cluster]\nseeds = \
             [\"127.0.0.1:7401\"]\n[shards]\ncount = 2\npin = false\n[durability]\nfsync = \
             \"always\"\n",
            &[],
            &[],
        )
        .unwrap();
        assert_eq!(loaded.config.node.name, "n7");
        assert_eq!(loaded.config.shards.count, 2);
        assert_eq!(loaded.config.durability.fsync, Fsync::Always);
        assert_eq!(loaded.config.listen.http.port(), 9980);
        assert_eq!(
            loaded.config.listen.client.port(),
            7400,
            "the rest keeps its default"
        );
    }

    #[test]
    fn keys_come_from_one_place() {
        let file = "[encryption]\nkey_file = \"/etc/torc/keys\"\n";
        let loaded = from_text(file, &[], &[]).unwrap();
        let path = std::path::Path::new("/etc/torc/keys");
        assert_eq!(loaded.config.encryption.key_file, path);
        let loaded = from_text("", &[], &[("TORC_ENCRYPTION_KEY_COMMAND", "vault read")]);
        assert_eq!(loaded.unwrap().config.encryption.key_command, "vault read");
        let both = from_text(file, &["encryption.key_command=cat /k"], &[]);
        let error = both.unwrap_err().to_string();
        assert!(error.contains("encryption.key_command"), "{error}");
    }

    #[test]
    fn flags_override_the_environment_and_the_environment_the_file() {
        let loaded = from_text(
            "[shards]\ncount = 2\n[node]\nname = \"file\"\n",
            &["shards.count=4"],
            &[("TORC_SHARDS_COUNT", "3"), ("TORC_NODE_NAME", "17")],
        )
        .unwrap();
        assert_eq!(loaded.config.shards.count, 4);
        assert_eq!(
            loaded.config.node.name, "17",
            "a string key takes digits as a string"
        );
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line() {
        let error = from_text("[shards]\ncount = 2\ncuont = 3\n", &[], &[]).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("line 3") && text.contains("cuont"), "{text}");
    }

    #[test]
    fn an_unknown_flag_key_is_refused_and_an_unknown_variable_reported() {
        let error = from_text("", &["shards.cuont=3"], &[]).unwrap_err();
        assert!(error.to_string().contains("no key shards.cuont"), "{error}");
        let loaded = from_text("", &[], &[("TORC_SHARDS_CUONT", "3")]).unwrap();
        assert_eq!(loaded.warnings.len(), 1);
        assert!(loaded.warnings[0].contains("TORC_SHARDS_CUONT"));
    }

    #[test]
    fn a_value_of_the_wrong_kind_names_its_origin() {
        let error = from_text("", &["shards.count=many"], &[]).unwrap_err();
        assert!(
            error.to_string().contains("--set shards.count=many"),
            "{error}"
        );
        let error = from_text("", &[], &[("TORC_LISTEN_HTTP", "nowhere")]).unwrap_err();
        assert!(error.to_string().contains("TORC_LISTEN_HTTP"), "{error}");
    }

    #[test]
    fn values_that_do_not_go_together_are_refused() {
        let error = from_text("", &["listen.http=127.0.0.1:7400"], &[]).unwrap_err();
        assert!(error.to_string().contains("same address twice"), "{error}");
        let error = from_text("", &["cluster.vnodes=0"], &[]).unwrap_err();
        assert!(error.to_string().contains("between 1 and 4096"), "{error}");
    }

    #[test]
    fn what_no_host_has_is_refused_with_the_bound() {
        for (set, bound) in [
            ("memory.cache_mb=9223372036854775807", "at most 4194304"),
            ("memory.cache_mb=100000000", "at most 4194304"),
            ("archive.held_mb=9223372036854775807", "at most 1073741824"),
            (
                "archive.interval_s=9223372036854775807",
                "at most 4294967295",
            ),
            (
                "cluster.repair_interval_s=9223372036854775807",
                "4294967295",
            ),
            ("node.data_dir=", "give the directory"),
        ] {
            let error = from_text("", &[set], &[]).unwrap_err().to_string();
            assert!(error.contains(bound), "{set}: {error}");
        }
        let high = ["memory.cache_mb=262144", "archive.interval_s=0"];
        assert!(from_text("", &high, &[]).is_ok());
    }

    #[test]
    fn who_sets_a_key_is_named() {
        let origin = |sets: &[&str], variables: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
            let pairs = variables
                .iter()
                .map(|name| ((*name).to_owned(), "v".into()));
            origin_of("listen.http", pairs, &sets)
        };
        let variable = "TORC_LISTEN_HTTP";
        assert_eq!(origin(&[], &[]), None);
        assert_eq!(
            origin(&["listen.resp=a"], &["TORC_LISTEN", "TORC_LISTEN_RESP"]),
            None
        );
        assert_eq!(origin(&[], &[variable]).as_deref(), Some(variable));
        let set = "--set listen.http=a";
        assert_eq!(
            origin(&["listen.http=a"], &[variable]).as_deref(),
            Some(set)
        );
        assert!(is_key(variable) && !is_key("TORC_ENDPOINT") && !is_key("HOME"));
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = load(
            Some(Path::new("does/not/exist.toml")),
            std::iter::empty(),
            &[],
        );
        assert!(
            error
                .unwrap_err()
                .to_string()
                .contains("does/not/exist.toml")
        );
    }
}
