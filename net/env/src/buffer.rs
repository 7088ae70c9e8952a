//! Buffers that O_DIRECT accepts: address and capacity are multiples of [`SECTOR_BYTES`].

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use bytes::Bytes;

/// Alignment of every buffer, file offset and length that goes to the disk, in bytes. Devices may
/// report 512; 4096 is right for all of them.
pub const SECTOR_BYTES: usize = 4096;

/// An owned, zero-initialised byte buffer aligned to [`SECTOR_BYTES`].
///
/// `len` is what counts as content; the capacity is `len` at creation rounded up to a whole number
/// of sectors. An empty buffer owns no memory.
pub struct AlignedBuf {
    start: NonNull<u8>,
    len: usize,
    capacity: usize,
}

// SAFETY: the buffer owns its memory alone, as `Vec<u8>` does; nothing about it is bound to a thread.
unsafe impl Send for AlignedBuf {}
// SAFETY: a shared reference only allows reads.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// A buffer of `len` zero bytes. One allocation.
    pub fn zeroed(len: usize) -> Self {
        let capacity = len.next_multiple_of(SECTOR_BYTES);
        if capacity == 0 {
            return Self {
                start: NonNull::dangling(),
                len: 0,
                capacity: 0,
            };
        }
        let layout = Self::layout(capacity);
        // SAFETY: the layout has a size above zero, checked by the branch above.
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(raw) else {
            handle_alloc_error(layout)
        };
        Self {
            start,
            len,
            capacity,
        }
    }

    /// A buffer with the content of `bytes`. One allocation, one copy.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buffer = Self::zeroed(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }

    /// Bytes owned; a multiple of [`SECTOR_BYTES`].
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Sets the length. Bytes beyond the old length keep what was last written there (zero at
    /// first).
    ///
    /// # Panics
    /// When `len` is above the capacity.
    pub fn set_len(&mut self, len: usize) {
        assert!(
            len <= self.capacity,
            "length {len} above capacity {}",
            self.capacity
        );
        self.len = len;
    }

    /// Hands the buffer over as reference-counted bytes without copying.
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }

    fn layout(capacity: usize) -> Layout {
        Layout::from_size_align(capacity, SECTOR_BYTES).expect("buffer size overflows an address")
    }
}

impl Default for AlignedBuf {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if self.capacity > 0 {
            // SAFETY: `start` came from `alloc_zeroed` with this very layout and is freed once.
            unsafe { dealloc(self.start.as_ptr(), Self::layout(self.capacity)) };
        }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len <= capacity` bytes from `start` are owned and initialised (zeroed at birth);
        // for an empty buffer the dangling pointer is aligned and the length zero.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} of {} bytes)", self.len, self.capacity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_and_capacity_are_whole_sectors() {
        for len in [1, 511, 4095, 4096, 4097, 1 << 20] {
            let buffer = AlignedBuf::zeroed(len);
            assert_eq!(buffer.as_ptr() as usize % SECTOR_BYTES, 0);
            assert_eq!(buffer.capacity() % SECTOR_BYTES, 0);
            assert!(buffer.capacity() >= len && buffer.capacity() < len + SECTOR_BYTES);
            assert!(buffer.iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn content_survives_the_way_into_bytes() {
        let bytes = AlignedBuf::copy_of(b"value").into_bytes();
        assert_eq!(&bytes[..], b"value");
        assert!(AlignedBuf::default().into_bytes().is_empty());
    }

    #[test]
    #[should_panic(expected = "above capacity")]
    fn a_length_above_the_capacity_is_refused() {
        AlignedBuf::zeroed(10).set_len(4097);
    }
}
