//! Where the log of a layout ends: what lets a restore go on with the next one.
//!
//! Another number of shards is another layout of a node's data, with logs that begin anew. When the data has been divided anew, and all
//! that the logs of the old layout hold is archived, a file in the archive says so: `<lineage>/layouts/<layout>`. Written before the
//! new layout takes force. A node that starts without dividing its data removes the file of its layout: one that
//! broke off, or was called off, does not end a log that goes on.
//!
//! Format: `docs/formats/archive.md`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use torc_engine::{Layout, Mark};
use torc_env::{Disk, Env};

use super::{LINK, lineage_dir};
use crate::boot::identity::Identity;
use crate::config::ArchiveConfig;
use crate::sealed::{self, seal};
use crate::snapshot::place_whole;

/// Where the endings of a lineage lie beside the stores.
pub const ENDINGS: &str = "layouts";
const VERSION: u64 = 1;
const SEALED: sealed::Kind = sealed::Kind {
    format: "torc-layout-end",
    foreign: "it says nothing of the end of a layout",
    versions: VERSION..=VERSION,
};

/// The end of a layout's logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// The layout that ended.
    pub layout: Layout,
    /// The last frame with a record in the log of each of its shards.
    pub ends: Vec<Mark>,
    /// The frame in the log of each shard of the next layout behind which there is what was written in that layout. What is
    /// before was carried over.
    pub begins: Vec<Mark>,
}

impl Ending {
    /// The layout that followed.
    pub fn next(&self) -> Layout {
        Layout {
            number: self.layout.number + 1,
            shards: u16::try_from(self.begins.len()).unwrap_or(u16::MAX),
        }
    }

    /// Name of the file of a layout.
    pub fn name(layout: u16) -> String {
        format!("{layout:05}")
    }

    /// What stands in the file.
    pub fn encode(&self) -> String {
        let marks = |marks: &[Mark]| {
            let marks = marks.iter().map(
                |mark| json!({"sequence": mark.sequence, "hash": format!("{:016x}", mark.hash)}),
            );
            marks.collect::<Vec<_>>()
        };
        let document = json!({
            "format": SEALED.format,
            "version": VERSION,
            "layout": self.layout.number,
            "ends": marks(&self.ends),
            "begins": marks(&self.begins),
        });
        seal(&document.to_string())
    }

    /// Reads what [`Ending::encode`] wrote.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn decode(text: &str) -> Result<Ending, String> {
        let document = SEALED.open(text)?;
        fields(&document).ok_or_else(|| "it is malformed".into())
    }
}

fn fields(document: &Value) -> Option<Ending> {
    let marks = |name| {
        let marks = document.get(name)?.as_array()?.iter().map(|mark| {
            let hash = mark.get("hash")?.as_str()?;
            Some(Mark {
                sequence: mark.get("sequence")?.as_u64()?,
                hash: u64::from_str_radix(hash, 16).ok()?,
            })
        });
        marks.collect::<Option<Vec<_>>>()
    };
    let ends = marks("ends")?;
    Some(Ending {
        layout: Layout {
            number: u16::try_from(document.get("layout")?.as_u64()?).ok()?,
            shards: u16::try_from(ends.len()).ok()?,
        },
        ends,
        begins: marks("begins")?,
    })
}

/// Writes `ending` into the archive of a node. Durable on return.
///
/// # Errors
/// When the archive cannot be written.
pub(crate) async fn write<E: Env>(env: &E, identity: &Identity, ending: &Ending) -> io::Result<()> {
    let disk = env.disk();
    let dir = Path::new(LINK).join(dir_of(identity));
    disk.create_dir(&dir).await?;
    let name = Ending::name(ending.layout.number);
    place_whole(disk, &dir, &name, ending.encode().as_bytes()).await
}

/// Takes back that the layout of `identity` has ended: its logs go on. Runs before they do.
///
/// # Errors
/// When the archive cannot be written.
pub(crate) fn take_back(archive: Option<&ArchiveConfig>, identity: &Identity) -> io::Result<()> {
    let Some(config) = archive else {
        return Ok(());
    };
    let dir = config.dir.join(dir_of(identity));
    match fs::remove_file(dir.join(Ending::name(identity.layout))) {
        Ok(()) => File::open(&dir)?.sync_all(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn dir_of(identity: &Identity) -> PathBuf {
    lineage_dir(identity.node.0, identity.lineage).join(ENDINGS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ending() -> Ending {
        let mark = |sequence, hash| Mark { sequence, hash };
        Ending {
            layout: Layout {
                number: 0,
                shards: 2,
            },
            ends: vec![mark(1007, 0x1122_3344_5566_7788), mark(990, 0xff)],
            begins: vec![mark(1, 0xab), mark(1, 0xcd), mark(3, 0xef)],
        }
    }

    #[test]
    fn an_ending_comes_back_and_every_change_of_it_is_noticed() {
        let text = ending().encode();
        assert_eq!(Ending::decode(&text), Ok(ending()));
        let next = Layout {
            number: 1,
            shards: 3,
        };
        assert_eq!(ending().next(), next);
        for len in 0..text.len() {
            assert!(Ending::decode(&text[..len]).is_err(), "{len} bytes");
        }
        for at in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] ^= 1;
            let changed = String::from_utf8(bytes).unwrap();
            assert!(Ending::decode(&changed).is_err(), "byte {at}");
        }
    }

    #[test]
    fn what_a_later_build_wrote_is_refused_by_name() {
        let text = ending().encode();
        let (document, _) = text.split_once('\n').unwrap();
        let later = document.replace("\"version\":1", "\"version\":2");
        let refused = Ending::decode(&seal(&later)).unwrap_err();
        assert!(refused.contains("version Some(2)"), "{refused}");
    }

    /// The example of `docs/formats/archive.md`.
    #[test]
    fn the_text_is_that_of_the_format_page() {
        let page = include_str!("../../../docs/formats/archive.md");
        assert!(page.contains(&ending().encode()), "{}", ending().encode());
    }
}
