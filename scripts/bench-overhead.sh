#!/usr/bin/env bash
# What digests, deadlines, heartbeats and traces cost an update on host memory: processor time with and without, in pairs.
#
#   scripts/bench-overhead.sh FOLDER [PAIRS [SHAPE [ITERATIONS]]]
#
# FOLDER takes a copy of tokio whose `timeout` does not look at its clock while PROBE=off is set, and which counts with
# PROBE=count. Nothing but this benchmark is built with it: a program that waits without deadlines is of no use.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
pairs=${2:-5} shape=${3:-qwen:256} iterations=${4:-8}
cd "$(dirname "$0")/.."

build() {
    local manifest
    manifest=$(cargo metadata --format-version 1 --locked --filter-platform "$(rustc -vV | sed -n 's/^host: //p')" | python3 -c '
import json, sys
print(next(p["manifest_path"] for p in json.load(sys.stdin)["packages"] if p["name"] == "tokio"))')
    rm -rf "$folder/tokio" "$folder/source"
    cp -r "$(dirname "$manifest")" "$folder/tokio"
    cat > "$folder/tokio/src/time/probe.rs" <<'RUST'
use std::sync::{OnceLock, atomic::{AtomicU64, Ordering::Relaxed}};

static MADE: AtomicU64 = AtomicU64::new(0);
static REGISTERED: AtomicU64 = AtomicU64::new(0);

fn is(what: &str) -> bool {
    static MODE: OnceLock<String> = OnceLock::new();
    MODE.get_or_init(|| std::env::var("PROBE").unwrap_or_default()) == what
}

pub(crate) fn off() -> bool {
    is("off")
}

pub(crate) fn made() {
    tell(&MADE);
}

pub(crate) fn registered() {
    tell(&REGISTERED);
}

fn tell(counter: &AtomicU64) {
    if is("count") {
        counter.fetch_add(1, Relaxed);
        let folder = std::env::var("PROBE_FOLDER").unwrap_or_default();
        let words: Vec<String> = std::env::args().collect();
        let counts = format!("{} {} {}\n", MADE.load(Relaxed), REGISTERED.load(Relaxed), words.join(" "));
        let _ = std::fs::write(format!("{folder}/{}", std::process::id()), counts);
    }
}
RUST
    python3 - "$folder/tokio/src/time" <<'PYTHON'
import pathlib, sys

folder = pathlib.Path(sys.argv[1])

def change(name, *changes):
    text = (folder / name).read_text()
    for old, new in changes:
        assert text.count(old) >= 1, f"this tokio's {name} has no {old!r}"
        text = text.replace(old, new)
    (folder / name).write_text(text)

change("mod.rs", ("mod timeout;", "pub(crate) mod probe;\nmod timeout;"))
change(
    "timeout.rs",
    ("        match me.delay.as_pin_mut() {",
     "        if crate::time::probe::off() {\n            return Poll::Pending;\n        }\n        match me.delay.as_pin_mut() {"),
    ("    Timeout {\n        value: future.into_future(),",
     "    crate::time::probe::made();\n    Timeout {\n        value: future.into_future(),"),
)
change("sleep.rs", ("let timer = Timer::new(", "crate::time::probe::registered();\n                let timer = Timer::new("))
PYTHON
    # A copy, so that the lock file here stays as it is.
    mkdir "$folder/source"
    git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$folder/source"
    (cd "$folder/source" && CARGO_TARGET_DIR="$folder/target" cargo build --release -p ckpt-cli --no-default-features \
        --features cluster-cpu --config "patch.crates-io.tokio.path='$folder/tokio'")
}

[ -n "${CKPT_PROBE:-}" ] || build
ckpt=${CKPT_PROBE:-$folder/target/release/ckpt}
export CKPT_RUNTIME_DIR="$folder/run"

# User and system seconds of one run with its children, after the words before `--` as environment.
seconds() {
    local settings=()
    while [ "$1" != -- ]; do settings+=("$1"); shift; done
    shift
    local TIMEFORMAT='%U %S'
    { time env ${settings[@]+"${settings[@]}"} "$ckpt" bench update --device host --shape "$shape" --ranks 2 --floor-iterations 0 "$@" \
        > /dev/null 2>> "$folder/errors" ; } 2>&1 | awk '{ print $1 + $2 }'
}

# NAME, iterations, words of A, `/`, words of B: runs A B A B ..., prints both medians and the median of A - B.
compare() {
    local name=$1 a=() b=() side=a
    shift
    for word in "$@"; do
        if [ "$word" = / ]; then side=b; elif [ $side = a ]; then a+=("$word"); else b+=("$word"); fi
    done
    : > "$folder/pairs"
    for _ in $(seq "$pairs"); do
        echo "$(seconds "${a[@]}") $(seconds "${b[@]}")" >> "$folder/pairs"
    done
    python3 - "$name" "$folder/pairs" <<'PYTHON'
import statistics, sys

name, file = sys.argv[1:]
pairs = [tuple(map(float, line.split())) for line in open(file)]
a, b = (statistics.median(side) for side in zip(*pairs))
differences = sorted(x - y for x, y in pairs)
print(f"{name}: with {a:.2f} s, without {b:.2f} s, difference {statistics.median(differences):+.3f} s "
      f"({differences[0]:+.3f} to {differences[-1]:+.3f}), {statistics.median(differences) / b:+.1%}, {len(pairs)} pairs",
      flush=True)
PYTHON
}

many=(--iterations "$iterations")
compare "nothing (the same twice)" -- "${many[@]}" / -- "${many[@]}"
compare "deadlines" -- "${many[@]}" / PROBE=off -- "${many[@]}"
compare "heartbeats, 100 a second instead of 1" -- "${many[@]}" --heartbeat 0.01 / -- "${many[@]}"
compare "trace" -- "${many[@]}" --trace "$folder/trace.json" / -- "${many[@]}"
compare "digests at registration (one update)" -- --iterations 1 --verify pulls / -- --iterations 1 --verify none
compare "--verify all" -- "${many[@]}" --verify all / -- "${many[@]}" --verify none

# Deadlines by count: the difference of runs with more and with fewer updates.
for count in 1 $((1 + iterations)); do
    rm -rf "$folder/counts"
    mkdir "$folder/counts"
    env PROBE=count PROBE_FOLDER="$folder/counts" "$ckpt" bench update --device host --shape "$shape" --ranks 2 \
        --floor-iterations 0 --iterations "$count" > "$folder/report"
    awk -v n="$count" '{ made += $1; registered += $2 } END { print n " updates: " made " timeouts made, " registered " timers registered, all processes" }' \
        "$folder"/counts/*
done
