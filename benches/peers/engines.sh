#!/usr/bin/env bash
# The engine beside RocksDB and fjall on this machine, with values of four sizes: one table, and one page.
#
#     benches/peers/engines.sh [--directory DIR] [--results FILE.json] [--quick] … (see --help)
#
# The directory must lie on a disk; default is the directory of temporary files. Takes RocksDB, libclang and fio
# from Debian, installing them when they are missing (needs root; so does the bound on memory). About ten minutes.
# Figures of one run on one machine: compare the ratios, not the figures.
set -euo pipefail
cd "$(dirname "$0")/../.."

if ! dpkg -s librocksdb-dev libclang-dev fio >/dev/null 2>&1; then
    apt-get update -q && apt-get install -q -y --no-install-recommends librocksdb-dev libclang-dev fio
fi
ROCKSDB_LIB_DIR=$(dirname "$(ldconfig -p | awk '/librocksdb\.so / { print $NF; exit }')")
export ROCKSDB_LIB_DIR ROCKSDB_INCLUDE_DIR=/usr/include
exec cargo run --release --locked -p torc-benches --features engines --bin engine -- compare "$@"
