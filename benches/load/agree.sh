#!/usr/bin/env bash
# Whether comparisons tell the truth on this machine: servers that are equal, compared many times
# (a difference is a false alarm), and one that takes 5 % longer over each request (no difference is a
# miss). Servers on one core, the client on the other and, as root, before all else there.
#
#   agree.sh [equal] [slower]     only these comparisons
#
# ROUNDS comparisons of each kind, of REPEATS + REPEATS interleaved runs of LENGTH.
set -eu
torc=${TORC:-target/release/torc}
rounds=${ROUNDS:-10}
repeats=${REPEATS:-12}
length=${LENGTH:-500ms}
[ $# -gt 0 ] || set -- equal slower
place=(--cpus 1)
[ "$(id -u)" -ne 0 ] || place+=(--realtime)
scratch=$(mktemp -d)
servers=()
trap 'kill "${servers[@]}"; rm -rf "$scratch"' EXIT

# serve NAME TIME: a server that computes so long over each request; its address is in $scratch/NAME.
serve() {
    taskset -c 0 "$torc" load selftest --serve 127.0.0.1:0 --work "$2" >"$scratch/$1" &
    servers+=($!)
    until [ -s "$scratch/$1" ]; do sleep 0.05; done
}
address() { awk '{ print $NF }' "$scratch/$1"; }
# A request takes about 420 us with its way through the loopback device: 21 us are 5 %.
serve one 400us
serve equal 400us
serve slower 421us

# compared TITLE OTHER OPTIONS…: `one` beside OTHER, $rounds times.
compared() {
    local title=$1 other=$2 differs=0 equal=0 unsure=0
    shift 2
    for ((round = 0; round < rounds; round++)); do
        "$torc" load compare --run "one=--address $(address one)" \
            --run "other=--address $(address "$other")" --repeats "$repeats" -- --protocol resp --no-fill \
            --may-evict --keys 1000 --reads 100 --connections 4 --duration "$length" --warmup 0s \
            --live off "${place[@]}" "$@" >"$scratch/out" 2>"$scratch/errors" || {
            cat "$scratch/errors" >&2
            return 1
        }
        if grep -q '^B differs' "$scratch/out"; then differs=$((differs + 1))
        elif grep -q '^no difference' "$scratch/out"; then equal=$((equal + 1))
        else unsure=$((unsure + 1)); fi
    done
    printf '%-34s %12d %14d %12d\n' "$title" "$differs" "$equal" "$unsure"
}
printf '%-34s %12s %14s %12s\n' "$rounds comparisons of" "differs" "no difference" "cannot tell"
closed=(--model closed --connections 1)
open=(--rate 700)
for kind in "$@"; do
    case $kind in
    equal) title="equal servers" ;;
    slower) title="5 % slower" ;;
    *) echo "agree.sh: $kind? expected equal or slower" >&2; exit 2 ;;
    esac
    compared "$title, closed loop" "$kind" "${closed[@]}"
    compared "$title, open loop" "$kind" "${open[@]}"
done
