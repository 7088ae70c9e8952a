#!/usr/bin/env python3
"""Torc beside its peers on this machine: interleaved runs, one table, one plot.

    benches/peers/run.py etcd  [--runs 5] [--seconds 10]   three nodes, N=3, W=2, R=2, beside etcd
    benches/peers/run.py redis [--runs 5] [--seconds 10]   one node, SET over RESP, beside Redis
    benches/peers/run.py all   [--runs 6] [--seconds 5] [--rate 2000] [--out DIR]
                               Redis, memcached and three nodes of Torc, open loop, YCSB B, into one
                               report with plots (`torc load compare`). The client has the last CPU
                               for itself and runs before all else there, as root; the servers have
                               the others

Installs the peer from Debian when it is missing (needs root for that), starts it on loopback in a
temporary directory, and stops it at the end. Every system gets the same file system, the same
client machine (this one), 64 connections with one request outstanding each and 1 KB values; every
acknowledged write is synced. Figures of one run on one machine: compare the ratios, not the
figures.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
CONNECTIONS = 64
VALUE_BYTES = 1024
KEYS = 10_000


def sh(*words, **options):
    return subprocess.run([str(word) for word in words], check=True, **options)


def build(peer):
    sh("cargo", "build", "--release", "--quiet", "-p", "torc", cwd=ROOT)
    if peer == "etcd":
        sh("cargo", "build", "--release", "--quiet", "-p", "torc-benches", "--features", "peers",
           "--bin", "etcd_load", cwd=ROOT)


def install(program, package):
    """Installs a Debian package unless its program is there, without starting its service."""
    if shutil.which(program):
        return
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive", RUNLEVEL="1")
    sh("apt-get", "update", "-q", stdout=subprocess.DEVNULL)
    sh("apt-get", "install", "-q", "-y", "--no-install-recommends", package,
       stdout=subprocess.DEVNULL, env=env)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextlib.contextmanager
def processes():
    """A list of child processes that are all stopped in the end."""
    running = []
    try:
        yield running
    finally:
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(check, what, seconds=30):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(Exception):
            if check():
                return
        time.sleep(0.1)
    sys.exit(f"{what} is not ready after {seconds} s")


def http_ok(url):
    with urllib.request.urlopen(url, timeout=1) as answer:
        return answer.status == 200


def torc(running, directory, nodes, log):
    base = 17400
    command = [TARGET / "release" / "torc", "dev", "--nodes", nodes, "--dir", directory,
               "--port-base", base]
    running.append(subprocess.Popen([str(word) for word in command], stdout=log, stderr=log))
    for node in range(nodes):
        wait_for(lambda: http_ok(f"http://127.0.0.1:{base + 80 + 100 * node}/ready"), "torc", 60)
    return base


def torc_load(base, seconds, *more):
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        sh(TARGET / "release" / "torc", "load", "--endpoint", f"http://127.0.0.1:{base + 80}",
           "--connections", CONNECTIONS, "--keys", KEYS, "--value-bytes", VALUE_BYTES,
           "--model", "closed", "--warmup", "0s", "--duration", f"{seconds}s",
           "--json", out.name, *more, stdout=subprocess.DEVNULL,
           stderr=subprocess.DEVNULL)
        return json.loads(pathlib.Path(out.name).read_text())


def etcd(running, directory, log):
    ports = free_ports(6)
    names = ["e1", "e2", "e3"]
    cluster = ",".join(f"{name}=http://127.0.0.1:{ports[3 + i]}" for i, name in enumerate(names))
    for i, name in enumerate(names):
        client, peer = f"http://127.0.0.1:{ports[i]}", f"http://127.0.0.1:{ports[3 + i]}"
        command = ["etcd", "--name", name, "--data-dir", f"{directory}/{name}",
                   "--listen-client-urls", client, "--advertise-client-urls", client,
                   "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
                   "--initial-cluster", cluster, "--initial-cluster-token", "bench",
                   "--quota-backend-bytes", str(8 << 30)]
        env = dict(os.environ, ETCD_UNSUPPORTED_ARCH=os.uname().machine)
        running.append(subprocess.Popen(command, stdout=log, stderr=log, env=env))
    for port in ports[:3]:
        wait_for(lambda: http_ok(f"http://127.0.0.1:{port}/health"), "etcd")
    return ",".join(f"http://127.0.0.1:{port}" for port in ports[:3])


def etcd_load(endpoints, seconds, *more):
    out = sh(TARGET / "release" / "etcd_load", "--endpoints", endpoints, "--clients", CONNECTIONS,
             "--keys", KEYS, "--value-bytes", VALUE_BYTES, "--seconds", seconds, *more,
             capture_output=True, text=True).stdout
    result = json.loads(out)
    if result["errors"]:
        sys.exit(f"etcd: {result['errors']} operations failed")
    return result


def redis(running, directory, log, policy):
    (port,) = free_ports(1)
    os.makedirs(directory)
    command = ["redis-server", "--port", port, "--bind", "127.0.0.1", "--dir", directory,
               "--save", "", "--appendonly", "yes", "--appendfsync", policy]
    running.append(subprocess.Popen([str(word) for word in command], stdout=log, stderr=log))
    wait_for(lambda: socket.create_connection(("127.0.0.1", port), 1), "redis")
    return port


def latency(result, operation, percentile):
    series = result["operations"][operation]["latency_us_from_sent"]
    return series[percentile] / 1000.0


def row(name, results, operations):
    """Medians and spread of one system's runs."""
    rates = [result["rate_per_s"] for result in results]
    cells = [name, f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f}-{max(rates):,.0f}"]
    for operation in operations:
        for percentile in ["p50", "p99"]:
            values = [latency(result, operation, percentile) for result in results]
            cells.append(f"{statistics.median(values):.2f}")
    return cells


def print_table(head, rows):
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    for line in [head, *rows]:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(line, widths))))


def print_plot(named):
    """Throughput of every run as a bar: the spread is seen, not averaged away."""
    top = max(result["rate_per_s"] for _, results in named for result in results)
    print("\nthroughput of each run")
    for name, results in named:
        for result in results:
            rate = result["rate_per_s"]
            print(f"{name:<28} {'#' * max(1, round(50 * rate / top))} {rate:,.0f}/s")


def compare_etcd(args, directory, log):
    install("etcd", "etcd-server")
    results = {"torc": [], "etcd": [], "etcd, serializable reads": []}
    with processes() as running:
        base = torc(running, directory / "torc", 3, log)
        endpoints = etcd(running, directory, log)
        mix = ["--reads", args.reads]
        for _ in range(args.runs):
            results["torc"].append(torc_load(base, args.seconds, *mix, "--r", "2", "--w", "2"))
            results["etcd"].append(etcd_load(endpoints, args.seconds, *mix))
            results["etcd, serializable reads"].append(
                etcd_load(endpoints, args.seconds, *mix, "--serializable"))
    operations = ["read", "write"]
    head = ["system", "ops/s", "spread", "get p50 ms", "get p99", "put p50", "put p99"]
    print(f"three nodes, 1 KB values, {args.reads} % reads, {CONNECTIONS} connections, sync before "
          f"ack; medians of {args.runs} interleaved runs of {args.seconds} s")
    print_table(head, [row(name, runs, operations) for name, runs in results.items()])
    print_plot(results.items())
    ratios = [a["rate_per_s"] / b["rate_per_s"]
              for a, b in zip(results["torc"], results["etcd"])]
    print(f"\nthroughput torc/etcd, pair by pair: median {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f}-{max(ratios):.2f})")
    for operation in operations:
        pairs = [latency(a, operation, "p99") / latency(b, operation, "p50")
                 for a, b in zip(results["torc"], results["etcd"])]
        print(f"{operation}: torc's p99 / etcd's p50: median {statistics.median(pairs):.2f} "
              f"({min(pairs):.2f}-{max(pairs):.2f})")


def compare_redis(args, directory, log):
    install("redis-server", "redis-server")
    results = {"torc": [], "redis appendfsync always": []}
    write = ["--protocol", "resp", "--reads", "0"]
    with processes() as running:
        base = torc(running, directory / "torc", 1, log)
        port = redis(running, directory / "redis", log, "always")
        for _ in range(args.runs):
            results["torc"].append(torc_load(base, args.seconds, *write))
            results["redis appendfsync always"].append(
                torc_load(base, args.seconds, *write, "--address", f"127.0.0.1:{port}"))
    print(f"one node, SET of 1 KB over RESP, {CONNECTIONS} connections, no pipelining, sync before "
          f"ack; medians of {args.runs} interleaved runs of {args.seconds} s")
    head = ["system", "ops/s", "spread", "set p50 ms", "set p99"]
    print_table(head, [row(name, runs, ["write"]) for name, runs in results.items()])
    print_plot(results.items())
    ratios = [a["rate_per_s"] / b["rate_per_s"] for a, b in zip(*results.values())]
    print(f"\nthroughput torc/redis, pair by pair: median {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f}-{max(ratios):.2f})")


def compare_all(args, directory, log):
    install("redis-server", "redis-server")
    install("memcached", "memcached")
    cpus = sorted(os.sched_getaffinity(0))
    place = []
    if len(cpus) > 1:
        place = ["--cpus", cpus[-1]] + (["--realtime"] if os.geteuid() == 0 else [])
        # What is started from here on inherits it; the client's threads take theirs back.
        os.sched_setaffinity(0, cpus[:-1])
    with processes() as running:
        base = torc(running, directory / "torc", 3, log)
        redis_port = redis(running, directory / "redis", log, "everysec")
        (memcached_port,) = free_ports(1)
        running.append(subprocess.Popen(["memcached", "-u", "root", "-l", "127.0.0.1", "-p",
                                         str(memcached_port)], stdout=log, stderr=log))
        wait_for(lambda: socket.create_connection(("127.0.0.1", memcached_port), 1), "memcached")
        sh(TARGET / "release" / "torc", "load", "compare",
           "--run", f"redis=--protocol resp --address 127.0.0.1:{redis_port}",
           "--run", f"memcached=--protocol memcached --address 127.0.0.1:{memcached_port}",
           "--run", f"torc=--endpoint http://127.0.0.1:{base + 80}",
           "--repeats", args.runs, "--out", args.out, "--", "--workload", "b", "--rate", args.rate,
           "--duration", f"{args.seconds}s", "--warmup", "2s", "--no-settle", "--live", "off",
           *place)
    print(f"{args.out}/report.html")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["etcd", "redis", "all"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--reads", type=int, default=50, help="percent of reads beside etcd")
    parser.add_argument("--rate", type=int, default=2000, help="operations a second of `all`")
    parser.add_argument("--out", default="load-report", help="directory for the report of `all`")
    parser.add_argument("--dir", help="where the systems keep their data [default: a temporary "
                                      "directory beside the build]")
    args = parser.parse_args()
    build(args.peer)
    # Not /tmp: it may be in memory, and then nobody's sync costs anything.
    parent = pathlib.Path(args.dir) if args.dir else TARGET
    with tempfile.TemporaryDirectory(prefix="torc-peers-", dir=parent) as directory:
        directory = pathlib.Path(directory)
        with open(directory / "log", "w") as log:
            {"etcd": compare_etcd, "redis": compare_redis, "all": compare_all}[args.peer](args, directory, log)


if __name__ == "__main__":
    main()
