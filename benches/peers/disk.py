#!/usr/bin/env python3
"""`torc tune disk` beside fio: the same rows on the same file, taking turns.

    benches/peers/disk.py [--dir DIR] [--file-mib 1024] [--pass 4] [--rounds 5]
                          [--work random-read,durable-write] [--torc PATH]

For each row: torc, fio, fio, torc, torc, fio … The ratio is that of the medians; `agrees` means within
ten percent. The spread beside it is how far each tool's own rounds lie apart: where the device
itself does not repeat, no two tools can agree, and the row says so. Installs fio from Debian when it
is missing (needs root for that). Exit status 1 when a row of a device that repeats does not agree.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
AGREES = 0.10
# Kind of work as torc names it, its depth, and the same in fio's words.
ROWS = [
    ("random-read", 1, ["--rw=randread", "--bs=4k"]),
    ("random-read", 4, ["--rw=randread", "--bs=4k"]),
    ("random-read", 16, ["--rw=randread", "--bs=4k"]),
    ("random-read", 64, ["--rw=randread", "--bs=4k"]),
    ("sequential-read", 8, ["--rw=read", "--bs=1m"]),
    ("mixed", 16, ["--rw=randrw", "--rwmixread=70", "--bs=4k"]),
    ("durable-write", 1, ["--rw=write", "--bs=4k", "--sync=dsync"]),
    ("sequential-write", 8, ["--rw=write", "--bs=1m"]),
]


def run(*words):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{words[0]} failed: {done.stderr.strip()}")
    return json.loads(done.stdout)


def with_torc(torc, file, work, depth, seconds):
    """Requests a second and median latency in microseconds, the mean of torc's two passes."""
    half = f"{seconds * 500}ms"
    figures = run(torc, "tune", "disk", "--file", file, "--work", work, "--depths", depth,
                  "--pass", half, "--json")["figures"]
    return figures[0]["per_second"], figures[0]["p50_us"]


# From before the submission, as torc measures; fio's default leaves that system call out.
def with_fio(file, depth, options, seconds):
    job = run("fio", "--name=row", f"--filename={file}", "--ioengine=io_uring", "--direct=1",
              f"--iodepth={depth}", "--time_based", f"--runtime={seconds}", "--ramp_time=1",
              "--norandommap", "--randrepeat=0", "--clat_percentiles=0", "--lat_percentiles=1",
              "--output-format=json", *options)["jobs"][0]
    sides = [job[side] for side in ("read", "write") if job[side]["total_ios"]]
    total = sum(side["total_ios"] for side in sides)
    p50_ns = sum(side["lat_ns"]["percentile"]["50.000000"] * side["total_ios"] for side in sides)
    return sum(side["iops"] for side in sides), p50_ns / total / 1000


def spread(values):
    return (max(values) - min(values)) / min(values)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default=str(TARGET), help="directory on the disk")
    parser.add_argument("--file-mib", type=int, default=1024)
    parser.add_argument("--pass", dest="seconds", type=int, default=4, help="seconds of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", default=",".join(dict.fromkeys(row[0] for row in ROWS)),
                        help="kinds of work, by commas")
    parser.add_argument("--torc", default=str(TARGET / "release/torc"))
    parser.add_argument("--json", help="write the rounds here")
    args = parser.parse_args()
    if not shutil.which("fio"):
        subprocess.run(["apt-get", "install", "-q", "-y", "--no-install-recommends", "fio"],
                       check=True, stdout=subprocess.DEVNULL)
    disagree = 0
    rounds = []
    with tempfile.NamedTemporaryFile(dir=args.dir, prefix="disk-beside-fio-") as file:
        block = os.urandom(1 << 20)
        for _ in range(args.file_mib):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        print(f"{'work':<17}{'depth':>6}{'torc/s':>10}{'fio/s':>10}{'ratio':>7}"
              f"{'p50 us':>9}{'fio':>7}{'ratio':>7}{'spread':>14}")
        for work, depth, options in ROWS:
            if work not in args.work.split(","):
                continue
            ours, theirs = [], []
            for number in range(args.rounds):
                turns = [lambda: ours.append(with_torc(args.torc, file.name, work, depth, args.seconds)),
                         lambda: theirs.append(with_fio(file.name, depth, options, args.seconds))]
                for turn in turns if number % 2 == 0 else reversed(turns):
                    turn()
            rounds.append({"work": work, "depth": depth, "torc": ours, "fio": theirs})
            (rate, p50), (fio_rate, fio_p50) = ([statistics.median(side) for side in zip(*rows)]
                                                for rows in (ours, theirs))
            own = [spread([rate for rate, _ in rows]) for rows in (ours, theirs)]
            ratio = rate / fio_rate
            repeats = max(own) <= AGREES
            if abs(ratio - 1) <= AGREES:
                verdict = "agrees"
            elif repeats:
                verdict = "DISAGREES"
                disagree += 1
            else:
                verdict = "the device does not repeat"
            print(f"{work:<17}{depth:>6}{rate:>10.0f}{fio_rate:>10.0f}{ratio:>7.3f}"
                  f"{p50:>9.0f}{fio_p50:>7.0f}{p50 / fio_p50:>7.3f}"
                  f"{own[0]:>7.0%}{own[1]:>7.0%}  {verdict}", flush=True)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rounds, indent=1))
    return 1 if disagree else 0


if __name__ == "__main__":
    sys.exit(main())
