//! What the load generator and the benchmarks share: which operation on which key comes next and how large
//! it is, and how a page of results is put together. Knows no store and measures nothing itself.

#![forbid(unsafe_code)]

pub mod keys;
pub mod mix;
pub mod page;
pub mod sizes;
