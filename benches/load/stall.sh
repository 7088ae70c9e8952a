#!/usr/bin/env bash
# Coordinated omission for real: a Redis that is stopped twice for 200 ms in 20 s, at 8000/s.
# Latency from the intended time shows the stalls, from the sent time hides them.
set -eu
torc=${TORC:-target/release/torc}
port=16379
redis-server --port $port --save "" --appendonly no >/dev/null &
redis=$!
trap 'kill $redis' EXIT
sleep 0.5
(
    # Two seconds of filling, connecting and warming up, then five into the measurement.
    sleep 7; kill -STOP $redis; sleep 0.2; kill -CONT $redis
    sleep 6.8; kill -STOP $redis; sleep 0.2; kill -CONT $redis
) &
"$torc" load --protocol resp --address 127.0.0.1:$port --rate 8000 --connections 16 \
    --duration 20s --warmup 1s --no-settle --live off "$@"
