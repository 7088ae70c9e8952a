//! Room for what a connection receives.

use bytes::BytesMut;

use crate::limits::RECEIVE_BYTES;

/// Makes room for a message of `total` bytes of which `input` holds the first, step by step: at most
/// as much again as was received, so that an announced length alone takes no memory.
pub fn reserve(input: &mut BytesMut, total: usize) {
    let missing = total.saturating_sub(input.len());
    input.reserve(missing.min(input.len() + RECEIVE_BYTES));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announced_length_alone_takes_no_memory() {
        let mut input = BytesMut::new();
        reserve(&mut input, 16 << 20);
        assert!(input.capacity() <= 4 * RECEIVE_BYTES);
        input.resize(1 << 20, 0);
        reserve(&mut input, 16 << 20);
        assert!(input.capacity() <= 4 << 20);
        let mut short = BytesMut::from(&b"abc"[..]);
        reserve(&mut short, 4);
        assert!(short.capacity() >= 4);
    }
}
