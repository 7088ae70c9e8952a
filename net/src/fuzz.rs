//! What the fuzz tests of this crate share.

use torc_sim::fuzz::Target;

/// A parser of bytes from outside, whose memory is measured.
pub(crate) fn parser<'a>(name: &'a str, valid: &'a [Vec<u8>]) -> Target<'a> {
    Target {
        name,
        valid,
        one_in: 1,
        within: Some(|run| allocation_counter::measure(run).bytes_max),
    }
}
