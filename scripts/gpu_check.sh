#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one run. Writes JSON, XML and text into a folder; never changes the GPU's settings.
#
#   scripts/gpu_check.sh OUTPUT_FOLDER [CHECKPOINT]
#
# CHECKPOINT defaults to the demo's weights. Every step runs even when one before it failed; summary.json holds the exit codes.
# This script has not run on a GPU yet.
set -u
cd "$(dirname "$0")/.."
output=${1:?name a folder for the results}
checkpoint=${2:-checkpoints/asag-a-tiny.safetensors}
python=${PYTHON:-python3}
mkdir -p "$output"
results=""

step() { # NAME COMMAND...: run, keep what it prints, remember how it ended
    local name=$1 code
    shift
    echo "== $name"
    "$@" >"$output/$name.log" 2>&1
    code=$?
    tail -n 3 "$output/$name.log"
    results="$results${results:+, }\"$name\": $code"
    echo "{$results}" >"$output/summary.json"
}

step machine nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv
step tests "$python" -m pytest -m gpu -q --junitxml "$output/tests.xml"
step kernels "$python" -m trt_plugins.bench --output "$output/kernels.md"
if command -v compute-sanitizer >/dev/null; then
    step sanitizer compute-sanitizer --error-exitcode 1 "$python" -m pytest -m gpu -q tests/trt_plugins
fi
step pytorch "$python" scripts/gpu_latency.py "$checkpoint" --json "$output/pytorch.json"
step libnvinfer find / -xdev -name 'libnvinfer*' -not -path '/proc/*'
step export "$python" -m asag_cli.main export "$checkpoint" -o "$output/model.onnx"
step rtx-build "$python" -m asag_cli.main build "$output/model.onnx" -o "$output/model.engine"
step data "$python" -m asag_cli.main data synthetic "$output/data" --train-images 1 --val-images 100
step parity "$python" -m asag_cli.main parity "$checkpoint" "$output/model.onnx" "$output/model.engine" \
    --data "$output/data" --device cuda --json "$output/parity.json" --report "$output/parity.html"
step bench "$python" -m asag_cli.main bench "$checkpoint" "$output/model.onnx" --images "$output/data/val2017" \
    --device cuda --json "$output/bench.json"
cat "$output/summary.json"
