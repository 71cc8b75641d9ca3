#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, for a machine without a network:
#
#     benchmarks/gpu.sh [tests|ops|slow|e2e|train|all]
#
# It must have Python with torch (CUDA build), pybind11, cmake, ninja, setuptools, pytest and pytest-benchmark, and nvcc
# or a built vpd_fast._C_cuda. Results and logs go to $OUT (default benchmarks/results). A part that finished is
# not run again unless FORCE=1. Exits non-zero if a part failed.
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
out=$(mkdir -p "${OUT:-benchmarks/results}" && cd "${OUT:-benchmarks/results}" && pwd)
python=${PYTHON:-$(command -v python || command -v python3)}
export VPD_FAST_RESULTS=$out PYTHONUNBUFFERED=1
failed=()

build() {
    "$python" -P -c 'import torch, vpd_fast._C, vpd_fast._C_cuda' 2>/dev/null && return
    VPD_FAST_CUDA=ON "$python" -m pip install --no-build-isolation --no-deps --quiet -e . >"$out/build.log" 2>&1 ||
        { tail -n 40 "$out/build.log"; echo "gpu.sh: the build failed, see $out/build.log"; exit 1; }
}

part() { # part NAME COMMAND...
    local name=$1 status
    shift
    if [[ -e $out/$name.done && ${FORCE:-0} != 1 ]]; then
        echo "== $name: done before (FORCE=1 runs it again)"
        return
    fi
    echo "== $name"
    if "$@" 2>&1 | tee "$out/$name.log"; then
        touch "$out/$name.done"
    else
        status=$?
        echo "== $name: FAILED with exit code $status"
        failed+=("$name")
    fi
}

# Interrupted before a limit of ten minutes, pytest still prints and writes what it has measured.
limited=(timeout -s INT "${LIMIT:-540}")
parallel() { "$python" -P -c 'import xdist' 2>/dev/null && echo "-n 8"; }
tests() { part tests "${limited[@]}" "$python" -P -m pytest tests -q -m gpu --maxfail 60 $(parallel); }
ops() {
    part ops "${limited[@]}" "$python" -P -m pytest benchmarks -q -m "gpu and not slow"
}
slow() { VPD_FAST_RESULTS=$out/slow part slow "${limited[@]}" "$python" -P -m pytest benchmarks -q -m "gpu and slow"; }
e2e() { part e2e "$python" benchmarks/e2e.py --device cuda --batch 1 8; }
train() { echo "== train: there is no training benchmark yet; nothing was run"; }

case ${1:-all} in
    tests | ops | slow | e2e | train) chosen=("$1") ;;
    all) chosen=(tests ops e2e slow train) ;;
    *) echo "usage: benchmarks/gpu.sh [tests|ops|slow|e2e|train|all]"; exit 2 ;;
esac

"$python" -P -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "gpu.sh: PyTorch finds no NVIDIA GPU here; nothing was run"; exit 1; }
build
"$python" -P -m vpd_fast
for name in "${chosen[@]}"; do "$name"; done
if ((${#failed[@]})); then
    echo "gpu.sh: failed: ${failed[*]}"
    exit 1
fi
