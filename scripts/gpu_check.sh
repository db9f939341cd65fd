#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one run. Writes JSON, XML and text into a folder; never changes the GPU's settings.
#
#   scripts/gpu_check.sh OUTPUT_FOLDER [CHECKPOINT [COCO_FOLDER]]
#
# CHECKPOINT defaults to the demo's weights. With COCO_FOLDER, ResNet-50 is overfitted on its training images from random
# weights, exported in float32 and float16, and compared. Needs the packages of `pip install '.[train,runtime]'`, pytest and
# hypothesis. Every step runs even when one before it failed; summary.json holds the exit codes. ONLY="tests kernels" in the
# environment runs these steps alone.
# This script has not run on a GPU yet.
set -u
cd "$(dirname "$0")/.."
output=${1:?name a folder for the results}
checkpoint=${2:-checkpoints/asag-a-tiny.safetensors}
coco=${3:-}
python=${PYTHON:-python3}
mkdir -p "$output"
results=""

step() { # NAME COMMAND...: run, keep what it prints, remember how it ended
    local name=$1 code
    [[ -z "${ONLY:-}" || " $ONLY " == *" $name "* ]] || return 0
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
step data "$python" -m asag_cli.main data synthetic "$output/data" --train-images 1 --val-images 100
step export "$python" -m asag_cli.main export "$checkpoint" -o "$output/model.onnx"
step rtx-build "$python" -m asag_cli.main build "$output/model.onnx" -o "$output/model.engine"
step trt-build "$python" -m asag_cli.main build "$output/model.onnx" -o "$output/tensorrt.engine" --backend tensorrt \
    --batch 1:4 --timing-cache "$output/timings" --log "$output/trt-build-messages.log"
step trt-inspect "$python" -m asag_cli.main inspect "$output/tensorrt.engine" --json "$output/tensorrt-layers.json"
step trt-build-int8 "$python" -m asag_cli.main build "$output/model.onnx" -o "$output/tensorrt-int8.engine" \
    --backend tensorrt --batch 1 --precision int8 --calibration "$output/data/val2017" --timing-cache "$output/timings"
step parity "$python" -m asag_cli.main parity "$checkpoint" "$output/model.onnx" "$output/model.engine" \
    --data "$output/data" --device cuda --json "$output/parity.json" --report "$output/parity.html"
step trt-parity "$python" -m asag_cli.main parity "$checkpoint" "$output/tensorrt.engine" "$output/tensorrt-int8.engine" \
    --data "$output/data" --device cuda --json "$output/trt-parity.json" --report "$output/trt-parity.html"
step bench "$python" -m asag_cli.main bench "$checkpoint" "$output/model.onnx" --images "$output/data/val2017" \
    --device cuda --limit --json "$output/bench.json"
step profile "$python" -m train.profile --batch-size 16 --steps 10 --json "$output/profile.json"
if [ -n "$coco" ]; then
    run=$(mktemp -d)
    split="$coco/annotations/instances_train2017.json"
    step overfit "$python" -m asag_cli.main train --preset asag-a-r50-1x-100 --data "$coco" --val-annotations "$split" \
        --val-images "$coco/train2017" --steps 1500 --batch-size 16 --learning-rate 4e-4 --backbone-learning-rate 4e-4 \
        --set learn_norms=true --set flip_probability=0 --set schedule=cosine --set warmup_steps=100 \
        --set gradient_clip=1.0 --set evaluation_interval=500 --set picture_interval=0 --set time_limit=420 \
        --workers 8 --quiet -o "$run/r50"
    cp "$run"/r50/*.csv "$output"
    for precision in fp32 fp16; do
        step "overfit-$precision" "$python" -m asag_cli.main export "$run/r50/weights.safetensors" \
            -o "$run/$precision.onnx" --precision "$precision"
    done
    step overfit-parity "$python" -m asag_cli.main parity "$run/r50/weights.safetensors" "$run/fp32.onnx" "$run/fp16.onnx" \
        --data "$coco" --split train2017 --device cuda --json "$output/overfit-parity.json"
fi
cat "$output/summary.json"
