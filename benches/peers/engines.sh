#!/usr/bin/env bash
# The engine beside RocksDB and fjall on this machine, with values of four sizes: one table, and one page.
#
#     benches/peers/engines.sh [--directory DIR] [--results FILE.json] [--quick] … (see --help)
#
# The directory must lie on a disk; default is the directory of temporary files. Takes RocksDB, jemalloc for it, libclang
# and fio from Debian, installing them when they are missing (needs root; so does the bound on memory). Twenty minutes.
# Figures of one run on one machine: compare the ratios, not the figures.
set -euo pipefail
cd "$(dirname "$0")/../.."

packages=(librocksdb-dev libjemalloc2 libclang-dev fio)
if ! dpkg -s "${packages[@]}" >/dev/null 2>&1; then
    apt-get update -q && apt-get install -q -y --no-install-recommends "${packages[@]}"
fi
ROCKSDB_LIB_DIR=$(dirname "$(ldconfig -p | awk '/librocksdb\.so / { print $NF; exit }')")
ROCKSDB_MALLOC=$(ldconfig -p | awk '/libjemalloc\.so\.2 / { print $NF; exit }')
export ROCKSDB_LIB_DIR ROCKSDB_MALLOC ROCKSDB_INCLUDE_DIR=/usr/include
exec cargo run --release --locked -p torc-benches --features engines --bin engine -- compare "$@"
