#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, for a machine without a network:
#
#     benchmarks/gpu.sh [measure|tests|ops|slow|e2e|layers|sanitizer|tune|train|all] ...
#     benchmarks/gpu.sh pack FOLDER [...]     on any machine: the folder that one without a compiler needs (pack.py)
#     benchmarks/gpu.sh try                   on any machine: everything of `measure` with tiny sizes, to see that it runs
#
# It must have Python with torch (CUDA build) and pytest; and pybind11, cmake, ninja, setuptools and nvcc, or a built
# vpd_fast._C_cuda, or be run in a folder of `pack`. Results, logs and summary.json go to $OUT (default
# benchmarks/results). No command runs longer than $LIMIT seconds (default 540). A command that succeeded is not run
# again unless FORCE=1, so an interrupted run is continued by the same call. Exits non-zero if one failed.
# GPU_SH_DRY=1 prints the commands and runs nothing.
set -uo pipefail

[[ ${1:-} == pack ]] && exec "${PYTHON:-python3}" "$(dirname "$0")/pack.py" "${@:2}"
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit 1
out=$(mkdir -p "${OUT:-benchmarks/results}" && cd "${OUT:-benchmarks/results}" && pwd) || exit 1
python=${PYTHON:-$(command -v python || command -v python3)}
dry=${GPU_SH_DRY:-0}
export VPD_FAST_RESULTS=$out PYTHONUNBUFFERED=1
failed=() rows=() # of the summary: name, status, seconds; name, status, seconds; ...
limited=(timeout -s INT -k 20 "${LIMIT:-540}") # interrupted, pytest and our scripts have written what they measured

build() {
    if compgen -G "$root/wheel/*.whl" >/dev/null; then # a folder of `pack`
        if [[ ! -e $root/site/vpd_fast ]]; then
            "$python" -m pip install --no-index --no-deps --no-compile --quiet --target "$root/site" "$root"/wheel/*.whl \
                >"$out/build.log" 2>&1 ||
                { tail -n 40 "$out/build.log"; echo "gpu.sh: the wheel does not fit this Python, see $out/build.log"; exit 1; }
            [[ ! -e $root/kernels/cubins.zip ]] || cp "$root/kernels/cubins.zip" "$root/site/vpd_fast/kernels/"
        fi
        export PYTHONPATH=$root/site:$root${PYTHONPATH:+:$PYTHONPATH}
        return
    fi
    "$python" -c 'import torch, vpd_fast._C, vpd_fast._C_cuda' 2>/dev/null && return
    VPD_FAST_CUDA=ON "$python" -m pip install --no-build-isolation --no-deps --quiet -e . >"$out/build.log" 2>&1 ||
        { tail -n 40 "$out/build.log"; echo "gpu.sh: the build failed, see $out/build.log"; exit 1; }
}

skip() { # skip NAME REASON
    echo "== $1: $2; nothing was run"
    rows+=("$1" skipped 0)
}

part() { # part NAME COMMAND...
    local name=$1 status start=$SECONDS
    shift
    if [[ $dry == 1 ]]; then
        printf '%s:' "$name"
        printf ' %q' "${limited[@]}" "$@"
        printf '\n'
        return
    fi
    if [[ -e $out/$name.done && ${FORCE:-0} != 1 ]]; then
        echo "== $name: done before (FORCE=1 runs it again)"
        rows+=("$name" before 0)
        return
    fi
    echo "== $name"
    "${limited[@]}" "$@" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    if [[ $status == 0 ]]; then
        touch "$out/$name.done"
        rows+=("$name" passed $((SECONDS - start)))
    else
        echo "== $name: FAILED with exit code $status, see $out/$name.log"
        rm -f "$out/$name.done"
        rows+=("$name" "failed($status)" $((SECONDS - start)))
        failed+=("$name")
    fi
}

tests() {
    local parallel=()
    "$python" -c 'import xdist' 2>/dev/null && parallel=(-n 8)
    part tests "$python" -m pytest tests -q -m gpu --maxfail 60 "${parallel[@]}"
}
ops() { part ops "$python" -m pytest benchmarks -q -m "gpu and not slow"; }
slow() { part slow env VPD_FAST_RESULTS="$out/slow" "$python" -m pytest benchmarks -q -m "gpu and slow"; }

# Everything in one run, the most valuable first (measure.py); it ends by itself before it would be ended.
measure() {
    part measure "$python" benchmarks/measure.py --out "$out" --seconds $((${LIMIT:-540} - 20)) \
        ${FORCE:+$([[ $FORCE == 1 ]] && echo --force)}
}

# The same on a CPU, with tiny sizes and stand-ins: whether a folder of `pack` has all that it needs.
try() { part try "$python" benchmarks/measure.py --dry --out "$out/try" --seconds $((${LIMIT:-540} - 20)); }

# Batch sizes apart, each within the limit: torch.compile takes minutes for each, and comes last. What it compiled it
# keeps.
e2e() {
    for batch in 1 8; do
        part "e2e-batch$batch" "$python" -m vpd_fast bench \
            --in-process --device cuda --batch "$batch" \
            --seconds 120 --compile-seconds 120 --json "$out/e2e_batch$batch.json"
    done
}

# Then what would be possible: the floors of every layer at the measured rates, beside the measured times.
layers() {
    part layers "$python" benchmarks/layers.py --device cuda --batch 1 8
    local file
    if [[ $dry == 1 ]]; then
        file=$out/DEVICE/layers.json
    else # of this GPU, if there are several: the newest
        file=$(find "$out" -maxdepth 2 -name layers.json -exec grep -q '"kind": "cuda"' {} ';' -printf '%T@ %p\n' |
            sort -rn | head -n 1 | cut -d ' ' -f 2-)
    fi
    if [[ -z $file ]]; then
        skip roofline "there are no times of layers on a GPU"
        return
    fi
    for batch in 1 8; do
        part "roofline-batch$batch" "$python" benchmarks/roofline.py --device "$file" --batch "$batch" \
            --json "$out/roofline_batch$batch.json" --png "$out/roofline_batch$batch.png"
    done
}

# A few tests of the CUDA C++ kernels under each tool; PyTorch's memory cache would hide accesses beyond a tensor.
sanitizer() {
    if [[ $dry != 1 ]] && ! command -v compute-sanitizer >/dev/null; then
        skip sanitizer "compute-sanitizer is not installed (it comes with the CUDA toolkit)"
        return
    fi
    local few="cuda and not triton and not reference and (schedules or strides or two_runs or special_values)"
    for tool in memcheck racecheck synccheck; do
        part "sanitizer-$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 99 --target-processes all \
            "$python" -m pytest tests/ops -q -m "gpu and not slow" --maxfail 5 -k "$few"
    done
}

# What it has measured it keeps, so another call goes on where the time was over.
tune() { part tune "$python" -m vpd_fast tune --seconds 420; }

# Batch sizes apart, as with e2e.
train() {
    for batch in 1 16; do
        part "train-batch$batch" env VPD_FAST_RESULTS="$out/train$batch" \
            "$python" benchmarks/train_step.py --device cuda --batch "$batch"
    done
}

summary() {
    local json
    printf '\n'
    printf '%-24s %-12s %s\n' part status seconds "${rows[@]}"
    printf -v json '\n {"part": "%s", "status": "%s", "seconds": %s},' "${rows[@]}"
    printf '{"rows": [%s\n]}\n' "${json%,}" >"$out/summary.json.tmp" && mv "$out/summary.json.tmp" "$out/summary.json"
}

known=(tests tune measure ops e2e layers slow sanitizer train) # tuned before it is measured
chosen=()
for name in "${@:-all}"; do
    if [[ $name == all ]]; then
        chosen+=("${known[@]}")
    elif [[ " ${known[*]} try " == *" $name "* ]]; then
        chosen+=("$name")
    else
        echo "usage: benchmarks/gpu.sh [$(IFS='|'; echo "${known[*]}")|all|try] ..."
        exit 2
    fi
done

if [[ $dry != 1 ]]; then
    [[ ${chosen[*]} == try ]] || "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        { echo "gpu.sh: PyTorch finds no NVIDIA GPU here; nothing was run"; exit 1; }
    build
    "$python" -m vpd_fast
fi
for name in "${chosen[@]}"; do "$name"; done
[[ $dry == 1 ]] && exit 0
summary
if ((${#failed[@]})); then
    echo "gpu.sh: failed: ${failed[*]}"
    exit 1
fi
