//! The binary protocol: frames, handshake, messages. Format page: `docs/formats/binary-protocol.md`.
//!
//! A connection starts with one [`Hello`](handshake::Hello) each way; then [frames](frame) carry
//! [messages](message) both ways, answers in any order, matched by request id.
//!
//! Invariant: bytes from the peer never panic and never make more memory than
//! [`FRAME_BYTES_MAX`](frame::FRAME_BYTES_MAX) at a time.

pub mod frame;
#[cfg(test)]
mod fuzz_tests;
pub mod handshake;
pub mod message;
pub mod sealed;
