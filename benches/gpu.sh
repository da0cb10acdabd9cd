#!/usr/bin/env bash
# What speed work on cards is judged by: the operations' tests, parity, then speed and memory at FLUX.1-dev's sizes.
#
#   eval "$(scripts/cuda-env)"; benches/gpu.sh build     # on a machine with a toolkit; collects the programs in target/gpu
#   benches/gpu.sh run target/gpu [OUT] [gpu's options]  # on the machine with the card, from the repository's root
#
# `run` needs no toolchain: target/gpu may be carried there. It writes OUT/gpu.json, OUT/gpu.txt and OUT/tests.txt (OUT is `.` unless
# given), and exits with 1 if a test or a parity check fails. compute-sanitizer looks at the tests where it is installed.
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
    ls -l "$out"
}

run() {
    local programs=${1:?the folder that "benches/gpu.sh build" filled} out=${2:-.} failed=0
    shift $(($# < 2 ? $# : 2))
    mkdir -p "$out"
    # CUDA's libraries may come from the machine, from Python wheels, or from both.
    if command -v python3 >/dev/null; then
        LD_LIBRARY_PATH=$(python3 "$(dirname "${BASH_SOURCE[0]}")/peers/libraries.py")
        export LD_LIBRARY_PATH
    fi
    {
        date -u +%FT%TZ
        git rev-parse --short HEAD 2>/dev/null || true
        nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.limit --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
    } | tee "$out/gpu.txt" >"$out/tests.txt"
    for test in ops fused; do
        echo "$test: the operations against their references" | tee -a "$out/tests.txt"
        "$programs/$test" --nocapture --test-threads 1 >>"$out/tests.txt" 2>&1 || { failed=1 && tail -n 20 "$out/tests.txt"; }
    done
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck initcheck synccheck; do
            echo "compute-sanitizer, $tool" | tee -a "$out/tests.txt"
            compute-sanitizer --tool "$tool" --error-exitcode 1 "$programs/fused" --test-threads 1 >"$out/sanitizer.txt" 2>&1 ||
                if grep -q "not supported" "$out/sanitizer.txt"; then
                    echo "compute-sanitizer does not work on this machine" | tee -a "$out/tests.txt"
                else
                    failed=1 && tail -n 20 "$out/sanitizer.txt"
                fi
            cat "$out/sanitizer.txt" >>"$out/tests.txt"
        done
    else
        echo "compute-sanitizer is not installed" | tee -a "$out/tests.txt"
    fi
    "$programs/gpu" --bench --json "$out/gpu.json" "$@" | tee -a "$out/gpu.txt" || failed=1
    return "$failed"
}

case ${1:-} in
build) build ;;
run) shift && run "$@" ;;
*) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
