//! One module for each group of subcommands.

pub mod admin;
pub mod backup;
pub mod dev;
pub mod encryption;
pub mod inspect;
pub mod kv;
pub mod restore;
pub mod server;
pub mod sim;
pub mod tune;

use std::ops::RangeInclusive;

/// Reads the value of a flag that is a whole number of `range`. Flags that take one allow hyphens, so that a negative
/// number is told the range as well.
pub fn whole(text: &str, range: RangeInclusive<u64>) -> Result<u64, String> {
    let number = text.parse().ok();
    let (first, last) = (range.start(), range.end());
    number
        .filter(|number| range.contains(number))
        .ok_or_else(|| format!("expected a whole number from {first} to {last}"))
}
