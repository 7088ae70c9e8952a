//! What the storage engine does by itself, and beside RocksDB and fjall: shards' stores on the real runtime and
//! the real disk.
//!
//! `cargo run --release -p torc-benches --bin engine -- COMMAND`
//!
//! - [`compare`]: every load with values of every size, beside others; a table and a page.
//! - [`overwrite`]: whether the rate of overwrites holds for minutes, and what reads cost meanwhile.
//! - [`amplification`]: what each strategy of compaction writes, reads and keeps, beside the bounds of the design.

mod amplification;
mod ceiling;
mod compare;
#[cfg(feature = "fjall")]
mod fjall;
mod layout;
mod memory;
mod overwrite;
mod results;
#[cfg(feature = "rocksdb")]
mod rocksdb;
#[cfg(any(feature = "fjall", feature = "rocksdb"))]
mod threads;
mod torc;
mod workload;

use clap::Parser;

/// As in the program. RocksDB brings its own.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Benchmarks of the storage engine
#[derive(Parser)]
enum Benchmark {
    Compare(compare::Compare),
    #[command(hide = true)]
    One(compare::One),
    Overwrite(overwrite::Overwrite),
    Amplification(amplification::Amplification),
}

fn main() {
    match Benchmark::parse() {
        Benchmark::Compare(args) => compare::compare(&args),
        Benchmark::One(args) => compare::one(&args),
        Benchmark::Overwrite(args) => overwrite::main(args),
        Benchmark::Amplification(args) => amplification::main(&args),
    }
}
