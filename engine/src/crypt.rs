//! Encryption at rest: master keys, and the data keys derived from them.
//!
//! Stands below tables, log and manifest, which hand it bytes that are about to be written, or were
//! read, with the place that they belong to. AES-256-GCM; a *data key* seals one file, or what one
//! process wrote to one log file, and is derived (HKDF-SHA-256) from a *master key*, a random salt that
//! stands beside what it seals, and the identity of the file.
//!
//! Invariants: no data key seals twice under one nonce, because its salt is drawn anew by whoever begins
//! to write and nonces (offsets in a table, sequence numbers in a log) are not written twice by one
//! writer; bytes moved to another place, or to another file, do not open; a file says which master key
//! it needs by that key's [`KeyId`], so a wrong key is recognised before anything is opened with it.
//!
//! It does not hide names, lengths, times, or how many records a frame or block has. Keys are in the
//! process's memory in the clear. Page: `docs/encryption.md`; choices: `docs/decisions`.

#[cfg(test)]
pub(crate) mod audit;
mod key_file;
mod opener;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, Tag, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Salt};
use torc_env::{Env, mutation};

use crate::codec::Reader;

pub use key_file::KeyFileError;
pub(crate) use opener::{Opener, SEAL_BYTES, Unopened, key_of};

/// Bytes of a master key.
pub const MASTER_KEY_BYTES: usize = 32;
/// Bytes of a salt.
const SALT_BYTES: usize = 16;
/// Bytes of an authentication tag.
pub(crate) const TAG_BYTES: usize = 16;
/// Bytes of a [`KeyRef`].
pub(crate) const KEY_REF_BYTES: usize = 8 + SALT_BYTES;

/// Names a master key without telling it: the first 64 bits that HKDF derives from it for this purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub u64);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A file needs a master key that was not given. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MissingKey {
    /// The key that it needs.
    pub needed: KeyId,
    /// Those that there are.
    pub known: Vec<KeyId>,
}

impl fmt::Display for MissingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let needed = self.needed;
        write!(f, "this file is encrypted with master key {needed}, but ")?;
        if self.known.is_empty() {
            write!(f, "no key file is given")?;
        } else {
            let known: Vec<String> = self.known.iter().map(KeyId::to_string).collect();
            write!(f, "the key file given holds only {}", known.join(", "))?;
        }
        write!(f, ": give one that holds it; nothing was changed")
    }
}

impl std::error::Error for MissingKey {}

/// Master keys: the one that new files are sealed with, and those that older files need. Clones share
/// them. Without any, files are written in the clear.
#[derive(Clone, Default)]
pub struct Keys(Option<Arc<Ring>>);

struct Ring {
    secrets: BTreeMap<KeyId, [u8; MASTER_KEY_BYTES]>,
    active: Option<KeyId>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys")
            .field("known", &self.ids())
            .field("active", &self.active())
            .finish()
    }
}

impl Keys {
    /// Reads a key file (`docs/encryption.md`): a key of 64 hexadecimal digits a line, oldest first; new
    /// files get the last one.
    ///
    /// # Errors
    /// Names the line, never what it holds.
    pub fn parse(text: &str) -> Result<Keys, KeyFileError> {
        key_file::parse(text)
    }

    fn new(secrets: BTreeMap<KeyId, [u8; MASTER_KEY_BYTES]>, active: Option<KeyId>) -> Keys {
        Keys(Some(Arc::new(Ring { secrets, active })))
    }

    /// The key that new files are sealed with; `None` when they are written in the clear.
    pub fn active(&self) -> Option<KeyId> {
        self.0.as_ref()?.active
    }

    /// All keys, ascending by id.
    pub fn ids(&self) -> Vec<KeyId> {
        let ring = self.0.iter();
        ring.flat_map(|ring| ring.secrets.keys().copied()).collect()
    }

    /// The data key of whoever begins to write a file now; `None` when it is written in the clear.
    pub(crate) fn begin(
        &self,
        salt: impl FnOnce() -> WriterSalt,
        file: FileUse,
    ) -> Option<DataKey> {
        let ring = self.0.as_ref()?;
        let id = ring.active?;
        let reference = KeyRef { id, salt: salt().0 };
        let secret = ring.secrets.get(&id)?;
        Some(DataKey::derive(secret, reference, file))
    }

    /// The data key of a file that says `reference` of itself.
    pub(crate) fn find(&self, reference: KeyRef, file: FileUse) -> Result<DataKey, MissingKey> {
        let ring = self.0.as_ref();
        match ring.and_then(|ring| ring.secrets.get(&reference.id)) {
            Some(secret) => Ok(DataKey::derive(secret, reference, file)),
            None => Err(MissingKey {
                needed: reference.id,
                known: self.ids(),
            }),
        }
    }
}

/// Makes the data keys of one writer its own.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct WriterSalt([u8; SALT_BYTES]);

impl WriterSalt {
    pub(crate) fn draw(env: &impl Env) -> WriterSalt {
        let mut salt = [0; SALT_BYTES];
        if mutation::on("share_salts") {
            return WriterSalt(salt);
        }
        for half in salt.chunks_exact_mut(8) {
            half.copy_from_slice(&env.random().to_le_bytes());
        }
        WriterSalt(salt)
    }
}

/// A master key for each byte; the last one is active.
#[cfg(test)]
pub(crate) fn test_keys(bytes: &[u8]) -> Keys {
    let line = |byte: &u8| format!("{byte:02x}").repeat(MASTER_KEY_BYTES) + "\n";
    Keys::parse(&bytes.iter().map(line).collect::<String>()).expect("well-formed")
}

#[cfg(test)]
impl WriterSalt {
    pub(crate) fn fixed(byte: u8) -> WriterSalt {
        WriterSalt([byte; SALT_BYTES])
    }
}

/// What a background job reads and writes tables with.
#[derive(Clone, Debug, Default)]
pub struct Sealing {
    keys: Keys,
    /// Of this job alone.
    salt: WriterSalt,
}

impl Sealing {
    /// For one job. Draws random numbers only when tables are to be sealed.
    pub fn new(keys: &Keys, env: &impl Env) -> Sealing {
        let salt = keys.active().map(|_| WriterSalt::draw(env));
        Sealing {
            keys: keys.clone(),
            salt: salt.unwrap_or_default(),
        }
    }

    #[cfg(test)]
    pub(crate) fn fixed(keys: &Keys, salt: WriterSalt) -> Sealing {
        Sealing {
            keys: keys.clone(),
            salt,
        }
    }

    pub(crate) fn keys(&self) -> &Keys {
        &self.keys
    }

    /// The data key of a new table, whose id no other table of this job has.
    pub(crate) fn table_key(&self, file_id: u64) -> Option<DataKey> {
        self.keys.begin(|| self.salt, FileUse::Table(file_id))
    }

    /// The data key of a new blob, whose id no other file of this job has.
    pub(crate) fn blob_key(&self, file_id: u64) -> Option<DataKey> {
        self.keys.begin(|| self.salt, FileUse::Blob(file_id))
    }
}

/// What a data key is for. Keys of two uses differ even when salts are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum FileUse {
    /// A table, by file id.
    Table(u64),
    /// A blob, by file id.
    Blob(u64),
    /// A log segment, by its identity, which a recycled file does not keep.
    Segment(u64),
    /// A log of the manifest, by its id.
    Manifest(u64),
}

impl FileUse {
    fn info(self) -> (&'static [u8], [u8; 8]) {
        let (label, id): (&[u8], u64) = match self {
            FileUse::Table(id) => (b"torc table", id),
            FileUse::Blob(id) => (b"torc blob", id),
            FileUse::Segment(id) => (b"torc wal", id),
            FileUse::Manifest(id) => (b"torc manifest", id),
        };
        (label, id.to_le_bytes())
    }
}

/// Which data key sealed something: stands beside it in the clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct KeyRef {
    pub(crate) id: KeyId,
    salt: [u8; SALT_BYTES],
}

impl KeyRef {
    pub(crate) fn encode(self) -> [u8; KEY_REF_BYTES] {
        let mut bytes = [0; KEY_REF_BYTES];
        bytes[..8].copy_from_slice(&self.id.0.to_le_bytes());
        bytes[8..].copy_from_slice(&self.salt);
        bytes
    }

    /// Reads the first [`KEY_REF_BYTES`]; `None` when there are fewer.
    pub(crate) fn decode(bytes: &[u8]) -> Option<KeyRef> {
        let mut fields = Reader::new(bytes);
        let id = KeyId(fields.u64()?);
        let salt = fields.bytes(SALT_BYTES)?.try_into().ok()?;
        Some(KeyRef { id, salt })
    }
}

/// Seals and opens the parts of one file.
pub(crate) struct DataKey {
    aead: LessSafeKey,
    reference: KeyRef,
    #[cfg(test)]
    file: FileUse,
}

/// Bytes were not sealed by this key for this place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Forged;

impl DataKey {
    fn derive(secret: &[u8; MASTER_KEY_BYTES], reference: KeyRef, file: FileUse) -> DataKey {
        let prk = Salt::new(HKDF_SHA256, &reference.salt).extract(secret);
        let (label, id) = file.info();
        let info = [label, &id[..]];
        let okm = prk.expand(&info, &AES_256_GCM);
        let okm = okm.expect("a key is shorter than what HKDF can give");
        DataKey {
            aead: LessSafeKey::new(UnboundKey::from(okm)),
            reference,
            #[cfg(test)]
            file,
        }
    }

    pub(crate) fn reference(&self) -> KeyRef {
        self.reference
    }

    pub(crate) fn id(&self) -> KeyId {
        self.reference.id
    }

    /// Encrypts `bytes` where they are; returns the tag. `place` must not have been sealed by this key
    /// before, unless it was the very same bytes; `context` is authenticated with it.
    pub(crate) fn seal(&self, place: u64, context: &[u8], bytes: &mut [u8]) -> [u8; TAG_BYTES] {
        #[cfg(test)]
        audit::note((self.reference, self.file, place), context, bytes);
        let sealed = self
            .aead
            .seal_in_place_separate_tag(nonce(place), Aad::from(context), bytes);
        let tag = sealed.expect("far below the 64 GiB that one nonce is good for");
        let mut out = [0; TAG_BYTES];
        out.copy_from_slice(tag.as_ref());
        out
    }

    /// Decrypts `bytes` where they are. What they hold after an error means nothing.
    pub(crate) fn open(
        &self,
        place: u64,
        context: &[u8],
        bytes: &mut [u8],
        tag: [u8; TAG_BYTES],
    ) -> Result<(), Forged> {
        let context = Aad::from(context);
        self.aead
            .open_in_place_separate_tag(nonce(place), context, Tag::from(tag), bytes, 0..)
            .map(drop)
            .map_err(|_| Forged)
    }

    /// Decrypts what [`DataKey::seal`] encrypted, the tag behind it. One copy.
    pub(crate) fn open_copy(
        &self,
        place: u64,
        context: &[u8],
        sealed: &[u8],
    ) -> Result<Vec<u8>, Forged> {
        let (bytes, tag) = sealed.split_last_chunk().ok_or(Forged)?;
        let mut bytes = bytes.to_vec();
        self.open(place, context, &mut bytes, *tag)?;
        Ok(bytes)
    }
}

fn nonce(place: u64) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[..8].copy_from_slice(&place.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

/// What names a master key.
fn key_id(secret: &[u8; MASTER_KEY_BYTES]) -> KeyId {
    struct IdLen;
    impl KeyType for IdLen {
        fn len(&self) -> usize {
            8
        }
    }
    let prk = Salt::new(HKDF_SHA256, &[]).extract(secret);
    let mut id = [0; 8];
    prk.expand(&[b"torc key id"], IdLen)
        .and_then(|okm| okm.fill(&mut id))
        .expect("an id is shorter than what HKDF can give");
    KeyId(u64::from_le_bytes(id))
}

#[cfg(test)]
mod tests {
    use super::{test_keys as keys, *};

    const FILE: FileUse = FileUse::Table(7);

    fn sealed(key: &DataKey, place: u64) -> Vec<u8> {
        let mut bytes = b"a value".to_vec();
        let tag = key.seal(place, b"context", &mut bytes);
        bytes.extend_from_slice(&tag);
        bytes
    }

    #[test]
    fn what_was_sealed_opens_at_its_place_only() {
        let keys = keys(&[1]);
        let salt = || WriterSalt::fixed(9);
        let key = keys.begin(salt, FILE).unwrap();
        let bytes = sealed(&key, 5);
        assert!(!bytes.windows(5).any(|window| window == b"value"));
        let again = keys.find(key.reference(), FILE).unwrap();
        assert_eq!(again.open_copy(5, b"context", &bytes).unwrap(), b"a value");
        assert_eq!(again.open_copy(6, b"context", &bytes), Err(Forged));
        assert_eq!(again.open_copy(5, b"another", &bytes), Err(Forged));
        assert_eq!(again.open_copy(5, b"context", &bytes[..9]), Err(Forged));
        for other in [FileUse::Table(8), FileUse::Segment(7), FileUse::Manifest(7)] {
            let other = keys.find(key.reference(), other).unwrap();
            assert_eq!(other.open_copy(5, b"context", &bytes), Err(Forged));
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(
                key.open_copy(5, b"context", &flipped),
                Err(Forged),
                "bit {bit}"
            );
        }
    }

    #[test]
    fn two_writers_of_one_file_never_share_a_key() {
        let keys = keys(&[1]);
        let first = keys.begin(|| WriterSalt::fixed(1), FILE).unwrap();
        let second = keys.begin(|| WriterSalt::fixed(2), FILE).unwrap();
        assert_ne!(sealed(&first, 5), sealed(&second, 5));
    }

    #[test]
    fn the_last_key_seals_and_all_keys_open() {
        let (old, new) = (keys(&[1]), keys(&[1, 2]));
        let salt = || WriterSalt::fixed(9);
        let key = old.begin(salt, FILE).unwrap();
        let bytes = sealed(&key, 5);
        let found = new.find(key.reference(), FILE).unwrap();
        assert!(found.open_copy(5, b"context", &bytes).is_ok());
        assert_eq!(new.active(), keys(&[2]).active());
        let missing = keys(&[2]).find(key.reference(), FILE).err().unwrap();
        assert_eq!(missing.needed, old.active().unwrap());
        assert!(
            missing
                .to_string()
                .contains(&old.active().unwrap().to_string())
        );
        assert_eq!(
            Keys::default()
                .find(key.reference(), FILE)
                .err()
                .unwrap()
                .known,
            []
        );
    }

    #[test]
    fn a_reference_comes_back_whole() {
        let key = keys(&[3]).begin(|| WriterSalt::fixed(4), FILE).unwrap();
        let bytes = key.reference().encode();
        assert_eq!(KeyRef::decode(&bytes), Some(key.reference()));
        assert_eq!(KeyRef::decode(&bytes[1..]), None);
    }
}
