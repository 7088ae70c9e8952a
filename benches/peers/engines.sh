#!/usr/bin/env bash
# The engine beside RocksDB and fjall on this machine: one table, and one plot.
#
#     benches/peers/engines.sh [seconds a load] [directory] [plot.svg]
#
# The directory must lie on a disk; default is the directory of temporary files. Takes RocksDB and
# libclang from Debian, installing them when they are missing (needs root). Figures of one run on one
# machine: compare the ratios, not the figures.
set -euo pipefail
cd "$(dirname "$0")/../.."

if ! dpkg -s librocksdb-dev libclang-dev >/dev/null 2>&1; then
    apt-get update -q && apt-get install -q -y --no-install-recommends librocksdb-dev libclang-dev
fi
ROCKSDB_LIB_DIR=$(dirname "$(ldconfig -p | awk '/librocksdb\.so / { print $NF; exit }')")
export ROCKSDB_LIB_DIR ROCKSDB_INCLUDE_DIR=/usr/include
exec cargo run --release --locked -p torc-benches --features engines --bin engine -- "$@"
