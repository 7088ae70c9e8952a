#!/usr/bin/env bash
# Load generators on one core, against the null server on another: requests for each second of
# client CPU. Programs that are not installed are left out; MEMTIER names memtier_benchmark.
set -eu
torc=${TORC:-target/release/torc}
memtier=${MEMTIER:-memtier_benchmark}
seconds=${SECONDS_EACH:-5}
port=17001
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
taskset -c 0 "$torc" load selftest --serve 127.0.0.1:$port >/dev/null &
server=$!
trap 'kill $server; rm -rf "$scratch"' EXIT
sleep 0.5

# measure NAME COUNT COMMAND…: COUNT is a command that reads the output and prints the requests made.
measure() {
    local name=$1 count=$2
    shift 2
    command -v "$1" >/dev/null || return 0
    /usr/bin/time -f "%e %U %S" -o "$scratch/time" taskset -c 1 "$@" >"$scratch/out" 2>&1
    read -r wall user system <"$scratch/time"
    eval "$count" <"$scratch/out" | awk -v name="$name" -v wall="$wall" -v cpu="$(awk "BEGIN { print $user + $system }")" \
        '{ printf "%-28s %10.0f/s  %10.0f for each second of CPU\n", name, $1 / wall, $1 / cpu }'
}

load=("$torc" load run --address 127.0.0.1:$port --model closed --no-fill --may-evict --warmup 0s
    --duration "${seconds}s" --connections 64 --value-bytes 100 --verify-share 0 --live off)
for pipeline in 1 16; do
    n=$((pipeline == 1 ? 500000 : 4000000))
    measure "torc load, RESP, x$pipeline" "awk '/^rate/ { print \$3 }'" \
        "${load[@]}" --protocol resp --pipeline $pipeline
    measure "redis-benchmark, x$pipeline" "echo $((2 * n))" \
        redis-benchmark -p $port -c 64 -P $pipeline -n $n -t set,get -d 100 -r 10000 -q
    measure "memtier_benchmark, x$pipeline" "awk -v s=$seconds '/^Totals/ { print \$2 * s }'" \
        "$memtier" -s 127.0.0.1 -p $port -c 64 -t 1 --pipeline $pipeline --test-time "$seconds" \
        --ratio 1:1 -d 100 --hide-histogram --key-maximum 10000
done
measure "torc load, HTTP, x1" "awk '/^rate/ { print \$3 }'" "${load[@]}" --protocol http --reads 100
measure "wrk, HTTP, x1" "awk '/requests in/ { print \$1 }'" \
    wrk -t1 -c64 -d"${seconds}s" http://127.0.0.1:$port/
