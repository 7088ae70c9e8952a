//! Texts that say what else is whole, and must therefore be whole themselves: a JSON document with a last line that holds
//! its checksum.
//!
//! The ends of layouts in an archive of the log ([`crate::archive::ending`]) and the manifests of backups are such texts.
//! What stands in the document is theirs; here are its `format` and its `version`, which decide before any other
//! field is asked for.

use std::ops::RangeInclusive;

use serde_json::Value;
use xxhash_rust::xxh3::xxh3_128;

/// Before the checksum in the last line.
const CHECK: &str = "xxh3-128 ";

/// A kind of sealed text.
#[derive(Clone, Debug)]
pub struct Kind {
    /// What the document's `format` is.
    pub format: &'static str,
    /// What is said of a whole text of another format.
    pub foreign: &'static str,
    /// The `version`s that this build reads.
    pub versions: RangeInclusive<u64>,
}

/// The text of a document, in whatever layout it comes.
pub fn seal(document: &str) -> String {
    let body = format!("{document}\n");
    let check = check_line(&body);
    body + &check
}

impl Kind {
    /// The document in a text that [`seal`] made.
    ///
    /// # Errors
    /// What is wrong with the text, in words: it is not whole, or nothing that this build reads.
    pub fn open(&self, text: &str) -> Result<Value, String> {
        let end = text
            .rfind(CHECK)
            .ok_or("its last line is no checksum: it is cut off, or something else")?;
        let (body, check) = text.split_at(end);
        if check != check_line(body) {
            return Err("its checksum does not fit: it was changed or damaged".into());
        }
        let document: Value = serde_json::from_str(body).map_err(|error| error.to_string())?;
        if document.get("format").and_then(Value::as_str) != Some(self.format) {
            return Err(self.foreign.into());
        }
        let version = document.get("version").and_then(Value::as_u64);
        if !version.is_some_and(|version| self.versions.contains(&version)) {
            let newest = self.versions.end();
            return Err(format!(
                "it has version {version:?}, this build reads up to {newest}"
            ));
        }
        Ok(document)
    }
}

fn check_line(body: &str) -> String {
    format!("{CHECK}{:032x}\n", xxh3_128(body.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: Kind = Kind {
        format: "torc-test",
        foreign: "it is no test",
        versions: 2..=3,
    };

    fn sealed(format: &str, version: u64) -> String {
        let document = serde_json::json!({"format": format, "version": version, "x": CHECK});
        seal(&document.to_string())
    }

    #[test]
    fn a_document_comes_back_and_every_change_of_its_text_is_noticed() {
        let text = sealed("torc-test", 2);
        assert_eq!(KIND.open(&text).unwrap()["x"], CHECK);
        for len in 0..text.len() {
            assert!(KIND.open(&text[..len]).is_err(), "{len} bytes");
        }
        for at in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] ^= 1;
            let changed = String::from_utf8(bytes).unwrap();
            assert!(KIND.open(&changed).is_err(), "byte {at}");
        }
    }

    #[test]
    fn whole_texts_of_other_formats_and_versions_are_refused_by_name() {
        let reason = |text: &str| KIND.open(text).unwrap_err();
        assert_eq!(reason(&sealed("torc-other", 9)), "it is no test");
        assert_eq!(reason(&seal("[]")), "it is no test");
        assert_eq!(
            reason(&sealed("torc-test", 4)),
            "it has version Some(4), this build reads up to 3"
        );
        assert!(reason(&sealed("torc-test", 1)).contains("version Some(1)"));
        assert!(KIND.open(&sealed("torc-test", 3)).is_ok());
    }
}
