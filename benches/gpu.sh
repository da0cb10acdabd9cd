#!/usr/bin/env bash
# Parity, then speed and memory of a FLUX.1-dev-sized transformer, on a machine that has a card but no toolchain.
#
#   cargo bench --no-run --bench gpu --features cuda        # on a machine with a toolkit; prints the binary's path
#   benches/gpu.sh target/release/deps/gpu-<hash> [OUT]     # on the machine with the card, from the repository's root
#
# Writes OUT/gpu.json, OUT/gpu.txt (OUT is `.` unless given). Exits with 1 if a parity check fails.
set -euo pipefail
binary=${1:?the binary that "cargo bench --no-run --bench gpu --features cuda" built}
out=${2:-.}
shift $(($# < 2 ? $# : 2))
mkdir -p "$out"

# CUDA's libraries may come from the driver's machine or from Python wheels.
if ! ldconfig -p 2>/dev/null | grep -q libcublas.so && command -v python3 >/dev/null; then
    wheels=$(python3 - <<'PY'
import glob, site, sys
folders = {p for base in {*site.getsitepackages(), site.getusersitepackages(), *sys.path} for p in glob.glob(f"{base}/nvidia/*/lib")}
print(":".join(sorted(folders)))
PY
    )
    export LD_LIBRARY_PATH="${wheels}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
fi

{
    date -u +%FT%TZ
    git rev-parse --short HEAD 2>/dev/null || true
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.limit --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
    "$binary" --bench --json "$out/gpu.json" "$@"
} | tee "$out/gpu.txt"
