#!/usr/bin/env bash
# Wheels of the small packages that a bare machine with PyTorch lacks, for Python 3.12 on Linux x86-64.
#
#   scripts/gather_wheels.sh [FOLDER]        `wheels` by default, which git ignores
#
# `python -m benchmarks.gpu_check` installs what it finds there into its own folder of results, without a network.
set -eu
exec "${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary :all: --python-version 312 \
    --implementation cp --abi cp312 --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 \
    --dest "${1:-wheels}" anyascii click rich markdown-it-py mdurl pygments msgspec pycocotools ml-dtypes
