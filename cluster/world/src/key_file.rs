//! The key file of a simulated node, as its operator keeps it (`docs/encryption.md`).

use torc_engine::Keys;

/// Master keys, oldest first. Without any, everything is in the clear.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct KeyFile {
    /// Each key is the line of its number.
    keys: Vec<u64>,
    /// Whether the last line is `plain`.
    plain: bool,
}

impl KeyFile {
    /// One key, or none.
    pub(crate) fn new(is_encrypted: &bool) -> Self {
        Self {
            keys: is_encrypted.then_some(1).into_iter().collect(),
            plain: false,
        }
    }

    /// Adds a line: a new key, or `plain`. Without any key, everything is in the clear already.
    pub(crate) fn extend(&mut self, plain: bool) {
        self.plain = plain && !self.keys.is_empty();
        if !plain {
            let newest = self.keys.last().copied().unwrap_or(0);
            self.keys.push(newest + 1);
        }
    }

    /// What is left when all keys but the active one go; `None` when that is all there is. With `plain`, the newest
    /// key stays: a key file holds one.
    pub(crate) fn newest(&self) -> Option<Self> {
        let (newest, older) = self.keys.split_last()?;
        (!older.is_empty()).then(|| Self {
            keys: vec![*newest],
            plain: self.plain,
        })
    }

    /// The keys that the product reads out of it.
    pub(crate) fn read(&self) -> Keys {
        if self.keys.is_empty() {
            return Keys::default();
        }
        let mut text: String = self
            .keys
            .iter()
            .map(|key| format!("{key:064x}\n"))
            .collect();
        if self.plain {
            text += "plain\n";
        }
        Keys::parse(&text).expect("a key file as the product asks for it")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_files_get_the_last_line_and_older_keys_stay_until_they_are_taken_away() {
        let mut file = KeyFile::new(&false);
        file.extend(true);
        assert_eq!((file.read().active(), file.newest()), (None, None));
        file.extend(false);
        let first = file.read().active();
        assert!(first.is_some() && file.newest().is_none());
        file.extend(true);
        assert_eq!((file.read().active(), file.read().ids().len()), (None, 1));
        file.extend(false);
        assert_ne!(file.read().active(), first);
        assert_eq!(file.read().ids().len(), 2);
        let newest = file.newest().unwrap().read();
        assert_eq!(newest.active(), file.read().active());
        assert_eq!(newest.ids().len(), 1);
    }
}
