//! Where a node's master keys come from, and going over to others while it serves.
//!
//! Not on a request's path. The file is read, or the command run, at the start and by
//! `POST /admin/encryption/reload`. Invariant: either all shards take the new keys or none does.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use torc_engine::{KeyFileError, KeyId, Keys};
use torc_env::Env;

use crate::gather::{on_every_shard, or_ended};
use crate::http::response::Problem;
use crate::service::Service;

/// How long a reload waits for the command.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);
/// How often it looks.
const COMMAND_INTERVAL: Duration = Duration::from_millis(5);

/// Where the master keys come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum KeySource {
    /// There are none: everything is written in the clear.
    #[default]
    None,
    /// `encryption.key_file`.
    File(PathBuf),
    /// `encryption.key_command`: run by `/bin/sh`, and what it prints is what a key file holds.
    Command(String),
}

/// Why there are no keys although there should be.
#[derive(Debug)]
pub struct KeySourceError {
    source: KeySource,
    cause: Cause,
}

#[derive(Debug)]
enum Cause {
    Io(io::Error),
    Status(ExitStatus),
    NotText,
    Content(KeyFileError),
}

impl fmt::Display for KeySourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            KeySource::None => write!(f, "no master keys: ")?,
            KeySource::File(path) => write!(f, "encryption.key_file = {}: ", path.display())?,
            KeySource::Command(_) => write!(f, "encryption.key_command: ")?,
        }
        match &self.cause {
            Cause::Io(error) => write!(f, "{error}"),
            Cause::Status(status) => write!(f, "the command failed ({status})"),
            Cause::NotText => write!(f, "not text"),
            Cause::Content(error) => write!(f, "{error}"),
        }
    }
}

impl std::error::Error for KeySourceError {}

impl KeySource {
    /// The keys as they are there now. Blocks until the command ends; its messages go where this
    /// process's go.
    ///
    /// # Errors
    /// When they cannot be read. Says nothing of what they are.
    pub fn read(&self) -> Result<Keys, KeySourceError> {
        let failed = |cause| KeySourceError {
            source: self.clone(),
            cause,
        };
        let io = |error| failed(Cause::Io(error));
        let bytes = match self {
            KeySource::None => return Ok(Keys::default()),
            KeySource::File(path) => std::fs::read(path).map_err(io)?,
            KeySource::Command(command) => {
                let mut shell = Command::new("/bin/sh");
                shell.arg("-c").arg(command);
                shell.stdin(Stdio::null()).stderr(Stdio::inherit());
                let output = shell.output().map_err(io)?;
                if !output.status.success() {
                    return Err(failed(Cause::Status(output.status)));
                }
                output.stdout
            }
        };
        let text = String::from_utf8(bytes).map_err(|_| failed(Cause::NotText))?;
        Keys::parse(&text).map_err(|error| failed(Cause::Content(error)))
    }
}

/// What the files of this node need: `GET /admin/encryption`.
///
/// # Errors
/// When a shard has ended.
pub async fn describe(service: &Service) -> Result<Value, Problem> {
    let shards = on_every_shard(&service.handle, |service: Rc<Service>| async move {
        let store = &service.store;
        Ok::<_, String>((store.keys(), store.files_by_key()))
    });
    let mut files: BTreeMap<Option<KeyId>, u64> = BTreeMap::new();
    let mut keys = Keys::default();
    for shard in or_ended(shards.await) {
        let (known, of_shard) = shard.map_err(Problem::not_ready)?;
        keys = known;
        for (key, count) in of_shard {
            *files.entry(key).or_default() += count;
        }
    }
    let active = keys.active();
    for id in keys.ids() {
        files.entry(Some(id)).or_default();
    }
    let files = files.into_iter().map(|(key, count)| {
        json!({
            "key": key.map(|id| id.to_string()),
            "files": count,
            "active": key == active,
        })
    });
    Ok(json!({
        "active": active.map(|id| id.to_string()),
        "keys": files.collect::<Vec<_>>(),
    }))
}

/// Reads the keys anew and has every shard take them: `POST /admin/encryption/reload`.
///
/// # Errors
/// When they cannot be read, or one that files need is missing. All shards keep the keys that they have.
pub async fn reload(service: &Service) -> Result<Value, Problem> {
    let source = service.config.key_source.clone();
    if source == KeySource::None {
        return Err(refused(
            "this node was started without encryption.key_file or encryption.key_command",
        ));
    }
    let read = read_aside(service, source).await?;
    let keys = read.map_err(|error| refused(error.to_string()))?;
    let wanted = keys.clone();
    let missing = on_every_shard(&service.handle, move |service: Rc<Service>| {
        let missing = service.store.missing_key(&wanted);
        async move { missing.map_or(Ok(()), |missing| Err(missing.to_string())) }
    });
    for shard in or_ended(missing.await) {
        shard.map_err(refused)?;
    }
    let taken = on_every_shard(&service.handle, move |service: Rc<Service>| {
        let taken = service.store.set_keys(&keys);
        async move { taken.map_err(|missing| missing.to_string()) }
    });
    for shard in or_ended(taken.await) {
        shard.map_err(refused)?;
    }
    tracing::info!("the master keys are read anew");
    describe(service).await
}

fn refused(message: impl Into<String>) -> Problem {
    Problem::new(409, "refused", message.into())
}

/// Reads on a thread of its own: a command may take long, and the shard must not wait for it.
async fn read_aside(
    service: &Service,
    source: KeySource,
) -> Result<Result<Keys, KeySourceError>, Problem> {
    let done = Arc::new(Mutex::new(None));
    let place = Arc::clone(&done);
    std::thread::spawn(move || {
        let read = source.read();
        *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(read);
    });
    let until = service.env.now() + COMMAND_TIMEOUT;
    while service.env.now() < until {
        if let Some(read) = done.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Ok(read);
        }
        service.env.sleep(COMMAND_INTERVAL).await;
    }
    let seconds = COMMAND_TIMEOUT.as_secs();
    Err(refused(format!(
        "encryption.key_command has not ended after {seconds} s"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(byte: u8) -> String {
        format!("{byte:02x}").repeat(32)
    }

    #[test]
    fn a_file_and_a_command_give_the_same_keys() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        std::fs::write(&path, line(1) + "\n" + &line(2)).unwrap();
        let from_file = KeySource::File(path.clone()).read().unwrap();
        let command = KeySource::Command(format!("cat '{}'", path.display()));
        assert_eq!(command.read().unwrap().ids(), from_file.ids());
        assert_eq!(from_file.ids().len(), 2);
        assert_eq!(KeySource::None.read().unwrap().active(), None);
    }

    #[test]
    fn what_goes_wrong_is_said_and_the_key_is_not() {
        let secret = line(7);
        let cases = [
            (
                KeySource::File("/nowhere/keys".into()),
                "key_file = /nowhere/keys",
            ),
            (KeySource::Command("exit 3".into()), "exit status: 3"),
            (KeySource::Command("true".into()), "there is no key in it"),
            (KeySource::Command(format!("echo {secret}x")), "line 1"),
            (KeySource::Command("printf '\\377'".into()), "not text"),
        ];
        for (source, expected) in cases {
            let error = source.read().unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert!(!error.contains(&secret), "{error}");
        }
    }
}
