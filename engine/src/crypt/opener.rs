//! Opens the sealed frames of one log file, one after the other.

use std::borrow::Cow;

use super::{DataKey, FileUse, KEY_REF_BYTES, KeyId, KeyRef, Keys, MissingKey, TAG_BYTES};
use crate::frame::{CONTEXT_BYTES, Header};

/// What stands behind the payload of a sealed frame: tag and key reference.
pub(crate) const SEAL_BYTES: usize = TAG_BYTES + KEY_REF_BYTES;

/// Why a frame does not open.
#[derive(Debug)]
pub(crate) enum Unopened {
    /// Its master key is not there.
    Missing(MissingKey),
    /// It is whole, but nobody who has the key has sealed it.
    Forged,
}

impl Unopened {
    /// What to say of a frame that nobody has sealed.
    pub(crate) const FORGED: &str =
        "expected a frame sealed with the key that it names, found one that does not authenticate";
}

/// The keys, and the data key of the frame before: a log has few.
pub(crate) struct Opener {
    keys: Keys,
    file: FileUse,
    last: Option<DataKey>,
}

impl Opener {
    pub(crate) fn new(keys: &Keys, file: FileUse) -> Opener {
        Opener {
            keys: keys.clone(),
            file,
            last: None,
        }
    }

    /// The records of the frame `header`, which begins `frame` and was verified. One copy if it is sealed.
    pub(crate) fn open<'a>(
        &mut self,
        header: &Header,
        frame: &'a [u8],
        payload: &'a [u8],
    ) -> Result<Cow<'a, [u8]>, Unopened> {
        if !header.sealed {
            return Ok(Cow::Borrowed(payload));
        }
        let at = payload.len().checked_sub(KEY_REF_BYTES);
        let (sealed, reference) = at.map(|at| payload.split_at(at)).ok_or(Unopened::Forged)?;
        let reference = KeyRef::decode(reference).ok_or(Unopened::Forged)?;
        if self.last.as_ref().map(DataKey::reference) != Some(reference) {
            let key = self.keys.find(reference, self.file);
            self.last = Some(key.map_err(Unopened::Missing)?);
        }
        let key = self.last.as_ref().ok_or(Unopened::Forged)?;
        key.open_copy(header.sequence, &frame[..CONTEXT_BYTES], sealed)
            .map(Cow::Owned)
            .map_err(|_| Unopened::Forged)
    }
}

/// The master key that a verified frame names; `None` when it is not sealed.
pub(crate) fn key_of(header: &Header, payload: &[u8]) -> Option<KeyId> {
    let at = payload.len().checked_sub(KEY_REF_BYTES);
    let at = at.filter(|_| header.sealed)?;
    KeyRef::decode(&payload[at..]).map(|reference| reference.id)
}
