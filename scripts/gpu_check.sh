#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one run. Never changes the GPU's settings.
#
#   scripts/gpu_check.sh OUTPUT_FOLDER [CHECKPOINT [COCO_FOLDER]]
#
# CHECKPOINT defaults to the demo's weights. With COCO_FOLDER, ResNet-50 is overfitted on its training images from
# random weights, exported in float32 and float16, and compared. Needs Python with PyTorch; nothing has to be installed
# of this repository, and a step that lacks a package says which.
#
# In OUTPUT_FOLDER: summary.json, rewritten after every step (versions, and per step ok, failed or skipped, the reason
# and the seconds), the steps' own JSON, logs/, and work/ with models and data. Every step has a time limit and runs
# even when one before it failed. Exit code 0: some ran and none failed; 1: one failed; 2: none ran.
#
# In the environment:
#   ONLY="tests-kernels pytorch"  run these steps alone; the summary keeps what earlier runs into the same folder found
#   TIME_LIMIT=570                seconds for all of it; what does not fit is skipped, and ONLY makes up for it later
#   PYTHON=python3.12             the interpreter
set -u
[ -n "${1:-}" ] || { echo "name a folder for the results" >&2; exit 2; }
mkdir -p "$1/logs" "$1/steps" "$1/work" || exit 2
output=$(cd "$1" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
checkpoint=$(realpath "${2:-$root/checkpoints/asag-a-tiny.safetensors}")
coco=${3:+$(realpath "$3")}
split=$coco/annotations/instances_train2017.json
[ -z "$coco" ] || [ -e "$split" ] || { echo "no file $split" >&2; exit 2; }
python=${PYTHON:-python3}
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
total=${TIME_LIMIT:-86400}
work=$output/work
cd "$root" || exit 2
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

ran=0
failed=0

plain() { # standard input as text that a JSON string can hold
    LC_ALL=C tr -cd '\40-\176' | tr -d '"\134' | cut -c 1-300
}

missing() { # NEED...: what is lacking of "gpu", commands (command:NAME), files in the output (a/b) and Python modules
    local need lacking="" modules=""
    for need; do
        case $need in
            gpu) [ -n "$gpu" ] || lacking="$lacking, no NVIDIA GPU" ;;
            command:*) command -v "${need#command:}" >/dev/null || lacking="$lacking, no command ${need#command:}" ;;
            */*) [ -e "$output/$need" ] || lacking="$lacking, no file $need" ;;
            *) modules="$modules $need" ;;
        esac
    done
    # shellcheck disable=SC2086  # one word per module
    lacking="$lacking$("$python" -c '
import importlib.util, sys
def is_there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False
print(*(f", no Python module {name}" for name in sys.argv[1:] if not is_there(name)), sep="", end="")
' $modules 2>&1)"
    printf '%s' "${lacking#, }"
}

summarize() {
    local file separator=""
    {
        printf '{"machine": '
        if [ -s "$work/machine.json" ]; then cat "$work/machine.json"; else printf 'null'; fi
        printf ',\n"steps": ['
        for file in "$output"/steps/*.json; do
            [ -e "$file" ] || continue
            printf '%s\n' "$separator"
            cat "$file"
            separator=,
        done
        printf '\n]}\n'
    } >"$output/.summary.partial" && mv "$output/.summary.partial" "$output/summary.json"
}

record() { # NAME STATUS SECONDS EXIT_CODE REASON
    local said=""
    [ "$2" = skipped ] || said=$(grep -av '^[[:space:]]*$' "$output/logs/$1.log" | tail -n 1 | plain)
    printf '{"step": "%s", "status": "%s", "seconds": %s, "exit_code": %s, "reason": "%s", "said_last": "%s"}' \
        "$1" "$2" "$3" "$4" "$(printf '%s' "$5" | plain)" "$said" >"$output/steps/$1.json"
    summarize
    echo "== $1: $2 after $3 s${5:+: $5}"
}

step() { # NAME SECONDS NEEDS COMMAND...: run with a time limit, keep what it prints, remember how it ended
    local name=$1 limit=$2 needs=$3 reason="" code started seconds
    shift 3
    case " ${ONLY:-$name} " in *" $name "*) ;; *) return 0 ;; esac
    # shellcheck disable=SC2086  # one word per need
    reason=$(missing $needs)
    [ "$limit" -le $((total - SECONDS)) ] || limit=$((total - SECONDS))
    if [ -z "$reason" ] && [ "$limit" -lt 1 ]; then reason="no time left of $total s"; fi
    if [ -n "$reason" ]; then
        record "$name" skipped 0 null "$reason"
        return 0
    fi
    echo "== $name"
    started=$SECONDS
    timeout -k 10 "$limit" "$@" >"$output/logs/$name.log" 2>&1
    code=$?
    seconds=$((SECONDS - started))
    if [ $code -eq 0 ] && tail -n 1 "$output/logs/$name.log" | grep -q '^[0-9]* skipped'; then
        record "$name" skipped $seconds 0 "every test was skipped; see logs/$name.log"
        return 0
    fi
    ran=1
    if [ $code -eq 0 ]; then
        record "$name" ok $seconds 0 ""
        return 0
    fi
    failed=1
    reason="exit code $code; see logs/$name.log"
    if [ $code -eq 124 ] || [ $seconds -ge "$limit" ]; then reason="stopped after $limit s"; fi
    tail -n 5 "$output/logs/$name.log"
    record "$name" failed $seconds $code "$reason"
}

compare() { # NAME FILE...: the checkpoint against those of the files in work/ that are there
    local name=$1 first=$2 file
    shift
    for file; do
        shift
        [ -e "$work/$file" ] && set -- "$@" "$work/$file"
    done
    step "$name" 400 "gpu $runs onnxruntime pycocotools jinja2 work/data/val2017 work/$first" \
        "$python" -m asag.cli.main parity "$checkpoint" "$@" --data "$work/data" --device cuda \
        --json "$output/$name.json" --report "$output/$name.html"
}

describe='import json
from asag.runtime.machine import describe_machine
print(json.dumps(describe_machine().to_json(), indent=1))'
if ! timeout 120 "$python" -c "$describe" >"$work/machine.json" 2>"$output/logs/machine.log"; then
    rm "$work/machine.json"
    tail -n 1 "$output/logs/machine.log"
fi
gpu=$(nvidia-smi -L 2>/dev/null | grep -m 1 '^GPU')
ask='import torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")'
[ -n "$gpu" ] || gpu=$(timeout 120 "$python" -c "$ask" 2>/dev/null)
echo "GPU: ${gpu:-none}"
summarize

runs="anyascii click rich msgspec numpy PIL torch torchvision safetensors"
writes="$runs onnx onnxscript ml_dtypes"
kernels="numpy torch torchvision cuda.bindings"
tests="gpu pytest hypothesis $writes $kernels onnxruntime"

step tests-kernels 400 "$tests" "$python" -m pytest -m gpu -q -k "not sanitizer" \
    --junitxml "$output/tests-kernels.xml" tests/trt_plugins/test_gpu.py tests/benchmarks \
    tests/asag/test_ops_cuda.py
for op in AdaptiveProbing PyramidRoIAlign SamplingMixing MultiScaleDeformableAttention GatherAnchors SelectTokens SampleGrid; do
    step "kernels-$op" 300 "gpu $runs cuda.bindings" "$python" -m benchmarks.kernels --op "$op" \
        --output "$output/kernels-$op.md" --json "$output/kernels-$op.json"
done
step pytorch 300 "gpu $runs cuda.bindings" "$python" -m benchmarks.latency "$checkpoint" --json "$output/pytorch.json"
step pytorch-half 300 "gpu $runs cuda.bindings" "$python" -m benchmarks.latency "$checkpoint" --half \
    --json "$output/pytorch-half.json"
step tests-runtime 300 "$tests" "$python" -m pytest -m gpu -q --junitxml "$output/tests-runtime.xml" tests/runtime
step sanitizer 500 "$tests command:compute-sanitizer" "$python" -m pytest -m gpu -q -k sanitizer \
    tests/trt_plugins/test_gpu.py
step data 120 "gpu $runs" "$python" -m asag.cli.main data synthetic "$work/data" --train-images 1 --val-images 100
step export 120 "gpu $writes" "$python" -m asag.cli.main export "$checkpoint" -o "$work/model.onnx"
step bench 240 "gpu $runs onnxruntime work/model.onnx work/data/val2017" "$python" -m asag.cli.main bench \
    "$checkpoint" "$work/model.onnx" --images "$work/data/val2017" --device cuda --limit --json "$output/bench.json"
step rtx-build 300 "gpu $writes tensorrt_rtx_bindings work/model.onnx" "$python" -m asag.cli.main build \
    "$work/model.onnx" -o "$work/model.engine"
compare parity model.onnx model.engine
step libnvinfer 60 "gpu" find / -xdev -name 'libnvinfer*' -not -path '/proc/*'
step trt-build 500 "gpu $writes $kernels tensorrt work/model.onnx" "$python" -m asag.cli.main build "$work/model.onnx" \
    -o "$work/tensorrt.engine" --backend tensorrt --batch 1:4 --timing-cache "$work/timings" \
    --log "$output/logs/trt-build-messages.log"
step trt-inspect 60 "gpu tensorrt work/tensorrt.engine" "$python" -m asag.cli.main inspect "$work/tensorrt.engine" \
    --json "$output/trt-layers.json"
step trt-build-int8 500 "gpu $writes $kernels tensorrt onnxruntime work/model.onnx work/data/val2017" \
    "$python" -m asag.cli.main build "$work/model.onnx" -o "$work/tensorrt-int8.engine" --backend tensorrt --batch 1 \
    --precision int8 --calibration "$work/data/val2017" --timing-cache "$work/timings"
compare trt-parity tensorrt.engine tensorrt-int8.engine
step profile 300 "gpu $runs scipy yaml" "$python" -m benchmarks.training --batch-size 16 --steps 10 \
    --json "$output/profile.json"

if [ -n "$coco" ]; then
    step overfit 560 "gpu $runs scipy yaml pycocotools" "$python" -m asag.cli.main train \
        --preset asag-a-r50-1x-100 --data "$coco" --val-annotations "$split" --val-images "$coco/train2017" \
        --steps 1500 --batch-size 16 --learning-rate 4e-4 --backbone-learning-rate 4e-4 --set learn_norms=true \
        --set flip_probability=0 --set schedule=cosine --set warmup_steps=100 --set gradient_clip=1.0 \
        --set evaluation_interval=500 --set picture_interval=0 --set time_limit=420 --workers 8 --quiet -o "$work/r50"
    cp "$work"/r50/*.csv "$output" 2>/dev/null
    for precision in fp32 fp16; do
        step "overfit-$precision" 200 "gpu $writes work/r50/weights.safetensors" "$python" -m asag.cli.main export \
            "$work/r50/weights.safetensors" -o "$work/$precision.onnx" --precision "$precision"
    done
    step overfit-parity 400 "gpu $runs onnxruntime pycocotools work/fp32.onnx work/fp16.onnx" "$python" \
        -m asag.cli.main parity "$work/r50/weights.safetensors" "$work/fp32.onnx" "$work/fp16.onnx" --data "$coco" \
        --split train2017 --device cuda --json "$output/overfit-parity.json"
fi

echo "summary: $output/summary.json"
[ $failed -eq 0 ] || exit 1
[ $ran -eq 1 ] || { echo "no step ran" >&2; exit 2; }
