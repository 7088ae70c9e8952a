#!/usr/bin/env bash
# Load generators on one core, against the null server on another: requests for each second of
# client CPU (user and system), medians of interleaved rounds with their spread. Programs that are not
# installed are left out; MEMTIER names memtier_benchmark.
set -eu
torc=${TORC:-target/release/torc}
memtier=${MEMTIER:-memtier_benchmark}
seconds=${SECONDS_EACH:-5}
rounds=${ROUNDS:-5}
scratch=$(mktemp -d)
taskset -c 0 "$torc" load selftest --serve 127.0.0.1:0 >"$scratch/server" &
server=$!
trap 'kill $server; rm -rf "$scratch"' EXIT
until [ -s "$scratch/server" ]; do sleep 0.05; done
address=$(awk '{ print $NF }' "$scratch/server")
port=${address##*:}

# measure NAME COUNT COMMAND…: COUNT is a command that reads the output and prints the requests made.
measure() {
    local name=$1 count=$2
    shift 2
    command -v "$1" >/dev/null || return 0
    /usr/bin/time -f "%e %U %S" -o "$scratch/time" taskset -c 1 "$@" >"$scratch/out" 2>&1
    read -r wall user system <"$scratch/time"
    eval "$count" <"$scratch/out" | awk -v name="$name" -v wall="$wall" -v cpu="$user $system" \
        '{ split(cpu, part); printf "%s\t%.0f\t%.0f\n", name, $1 / (part[1] + part[2]), $1 / wall }' \
        >>"$scratch/found"
}

load=("$torc" load run --address "$address" --model closed --no-fill --may-evict --warmup 0s
    --duration "${seconds}s" --connections 64 --value-bytes 100 --verify-share 0 --live off)
for ((round = 0; round < rounds; round++)); do
    for pipeline in 1 16; do
        n=$((pipeline == 1 ? 100000 * seconds / 2 : 1000000 * seconds / 2))
        measure "RESP x$pipeline, torc load" "awk '/^rate/ { print \$3 }'" \
            "${load[@]}" --protocol resp --pipeline $pipeline
        measure "RESP x$pipeline, redis-benchmark" "echo $((2 * n))" \
            redis-benchmark -p "$port" -c 64 -P $pipeline -n $n -t set,get -d 100 -r 10000 -q
        measure "RESP x$pipeline, memtier_benchmark" "awk -v s=$seconds '/^Totals/ { print \$2 * s }'" \
            "$memtier" -s 127.0.0.1 -p "$port" -c 64 -t 1 --pipeline $pipeline --test-time "$seconds" \
            --ratio 1:1 -d 100 --hide-histogram --key-maximum 10000
    done
    measure "HTTP x1, torc load" "awk '/^rate/ { print \$3 }'" "${load[@]}" --protocol http --reads 100
    measure "HTTP x1, wrk" "awk '/requests in/ { print \$1 }'" \
        wrk -t1 -c64 -d"${seconds}s" "http://$address/"
done

# The median of each generator, with the lowest and the highest.
printf '%-32s %30s %30s\n' "medians of $rounds rounds" "requests a second of CPU" "requests a second"
cut -f1 "$scratch/found" | awk '!seen[$0]++' | while IFS= read -r name; do
    cells=()
    for column in 2 3; do
        cells+=("$(awk -F'\t' -v name="$name" -v column=$column '$1 == name { print $column }' \
            "$scratch/found" | sort -n | awk '{ all[NR] = $1 }
            END { printf "%d (%d to %d)", all[int((NR + 1) / 2)], all[1], all[NR] }')")
    done
    printf '%-32s %30s %30s\n' "$name" "${cells[@]}"
done
