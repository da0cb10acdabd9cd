#!/usr/bin/env bash
# What speed work on cards is judged by: the operations' tests, parity, then speed and memory at FLUX.1-dev's sizes.
#
#   eval "$(scripts/cuda-env)"; benches/gpu.sh build     # on a machine with a toolkit; collects the programs in target/gpu
#   benches/gpu.sh run target/gpu [OUT] [gpu's options]  # on the machine with the card, from the repository's root
#   benches/gpu.sh load target/gpu [OUT] [GB]            # how fast so many GB of weights are loaded (24, which TMPDIR must have room for)
#   benches/gpu.sh sanitize target/gpu [OUT] [TOOL...]   # the kernels' tests under compute-sanitizer, each tool for minutes
#
# The last three need no toolchain: target/gpu may be carried there, also with its programs as .xz. `run` writes OUT/gpu.json, OUT/gpu.txt
# and OUT/tests.txt (OUT is `.` unless given), `load` OUT/load.json, `sanitize` OUT/sanitizer.txt; they exit with 1 if something fails.
set -euo pipefail

build() {
    local out=target/gpu name path
    mkdir -p "$out"
    cargo bench --no-run --workspace --features cuda --bench gpu --test ops --test fused --message-format=json-render-diagnostics |
        python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] in ("gpu", "ops", "fused"):
        print(message["target"]["kind"][0], message["target"]["name"], message["executable"])
' | while read -r kind name path; do
        # Of the operations there is a bench, for the processor, beside the test.
        [ "$kind $name" = "bench ops" ] || { cp "$path" "$out/$name" && strip "$out/$name"; }
    done
    # What is measured later is this, whatever the tree is by then.
    git describe --always --dirty >"$out/commit" 2>/dev/null || echo unknown >"$out/commit"
    ls -l "$out"
}

# Unpacks the programs and finds their libraries.
prepare() {
    local packed missing
    for packed in "$programs"/*.xz; do
        if [ -e "$packed" ] && [ ! -e "${packed%.xz}" ]; then
            xz -dk "$packed"
            chmod +x "${packed%.xz}"
        fi
    done
    mkdir -p "$out"
    # CUDA's libraries may come from the machine, from Python wheels, or from both.
    if command -v python3 >/dev/null; then
        LD_LIBRARY_PATH=$(python3 "$(dirname "${BASH_SOURCE[0]}")/peers/libraries.py")
        export LD_LIBRARY_PATH
    fi
    missing=$(ldd "$programs/gpu" | grep "not found" || true)
    if [ -n "$missing" ]; then
        printf 'missing here:\n%s\nWheels have them too: nvidia-cublas, nvidia-curand, nvidia-cuda-nvrtc\n' "$missing" >&2
        exit 1
    fi
}

run() {
    local programs=${1:?the folder that "benches/gpu.sh build" filled} out=${2:-.} failed=0 test name
    shift $(($# < 2 ? $# : 2))
    prepare
    {
        date -u +%FT%TZ
        cat "$programs/commit" 2>/dev/null || true
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.limit --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
    } | tee "$out/gpu.txt" >"$out/tests.txt"
    for test in ops fused; do
        echo "$test: the operations against their references" | tee -a "$out/tests.txt"
        # Each in a process of its own: after a fault a card answers nothing more to the one that made it.
        for name in $("$programs/$test" --list 2>/dev/null | sed -n 's/: test$//p'); do
            "$programs/$test" --exact "$name" --nocapture >>"$out/tests.txt" 2>&1 || {
                failed=1
                echo "$name failed"
                tail -n 20 "$out/tests.txt"
            }
        done
    done
    "$programs/gpu" --bench --json "$out/gpu.json" "$@" 2>&1 | tee -a "$out/gpu.txt" || failed=1
    return "$failed"
}

load() {
    local programs=${1:?the folder that "benches/gpu.sh build" filled} out=${2:-.}
    prepare
    "$programs/gpu" --bench --json "$out/load.json" --load "${3:-24}"
}

sanitize() {
    local programs=${1:?the folder that "benches/gpu.sh build" filled} out=${2:-.} failed=0 tool
    shift $(($# < 2 ? $# : 2))
    prepare
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed" >&2 && exit 1; }
    [ $# -gt 0 ] || set -- memcheck racecheck initcheck synccheck
    for tool; do
        echo "compute-sanitizer, $tool" | tee -a "$out/sanitizer.txt"
        compute-sanitizer --tool "$tool" --error-exitcode 1 "$programs/fused" --test-threads 1 >>"$out/sanitizer.txt" 2>&1 ||
            { failed=1 && tail -n 20 "$out/sanitizer.txt"; }
    done
    return "$failed"
}

case ${1:-} in
build) build ;;
run) shift && run "$@" ;;
load) shift && load "$@" ;;
sanitize) shift && sanitize "$@" ;;
*) sed -n '2,11s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
