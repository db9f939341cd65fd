"""What `test_instruction_counts.py` runs under callgrind: workloads between calls of a C function that it watches.

Run as a script. A workload of the package stands beside a reference, plain work of the same kind in numpy and
Pillow, so that their quotient depends little on the versions and the processor.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import numpy as np
from PIL import Image

from asag.runtime.postprocessing import non_maximum_suppression, postprocess
from asag.runtime.preprocessing import prepare
from tests.runtime.toy_detector import toy_metadata

WATCHED = "*sched_get_priority_max*"
"""A function of the C library that nothing else here calls: callgrind writes its counts at each call of it."""

BOXES = 300


def workloads() -> dict[str, Callable[[], object]]:
    """By name, in the order that they run; a name ending in ``reference`` is that of the one before."""
    generator = np.random.default_rng(0)
    metadata = toy_metadata(input_height=320, input_width=320, shorter_side=320, longer_side=320)
    picture = Image.fromarray(generator.integers(0, 256, (480, 640, 3), np.uint8))
    corners = generator.random((BOXES, 2), np.float32) * 0.8
    boxes = np.concatenate((corners, corners + 0.02 + generator.random((BOXES, 2), np.float32) * 0.2), axis=1)
    scores = generator.random(BOXES).astype(np.float32)
    labels = generator.integers(0, 5, BOXES)
    outputs = {
        "boxes": boxes[None, :100],
        "scores": np.sort(scores[:100])[None, ::-1],
        "labels": labels[None, :100],
        "overflow": np.zeros(1, np.int32),
    }

    def resize_and_place() -> object:
        batch = np.zeros((1, 3, 320, 320), np.uint8)
        batch[0, :, :240] = np.asarray(picture.resize((320, 240), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        return batch

    def compare_all_pairs() -> object:
        for _ in range(3):
            np.maximum(boxes[:, None, :2], boxes[None, :, :2])
        return np.argsort(-scores, kind="stable")

    def select_some() -> object:
        for _ in range(10):
            kept = np.flatnonzero(outputs["scores"][0] > 0.5)
            found = outputs["boxes"][0][kept] * np.float32(2)
        return found

    return {
        "prepare": lambda: prepare([picture], metadata),
        "prepare reference": resize_and_place,
        "non_maximum_suppression": lambda: non_maximum_suppression(boxes, scores, labels, 0.7),
        "non_maximum_suppression reference": compare_all_pairs,
        "postprocess": lambda: postprocess(outputs, [(480, 640)], metadata),
        "postprocess reference": select_some,
    }


def main() -> None:
    """Each workload once to warm up, then once more between calls of the watched function."""
    gc.disable()
    named = workloads()
    for work in named.values():
        work()
    for work in named.values():
        os.sched_get_priority_max(os.SCHED_OTHER)
        work()
    os.sched_get_priority_max(os.SCHED_OTHER)


if __name__ == "__main__":
    main()
