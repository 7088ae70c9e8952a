#!/usr/bin/env bash
# The engine beside RocksDB and fjall on this machine: one table, and one plot.
#
#     benches/peers/engines.sh [seconds a load] [directory] [plot.svg]
#
# The directory must lie on a disk; default is the directory of temporary files. Builds RocksDB, which takes
# many minutes the first time, and installs libclang for that from Debian when it is missing (needs
# root). Figures of one run on one machine: compare the ratios, not the figures.
set -euo pipefail
cd "$(dirname "$0")/../.."

if ! ldconfig -p | grep -q 'libclang[.-]'; then
    apt-get update -q && apt-get install -q -y --no-install-recommends libclang-dev
fi
# Without these RocksDB computes its checksums without the CPU's instructions for them.
export CXXFLAGS="${CXXFLAGS:-} -O2 -msse4.2 -mpclmul -w"
exec cargo run --release --locked -p torc-benches --features engines --bin engine -- "$@"
