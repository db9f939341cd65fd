"""The detector against numbers of an independent implementation, case by case."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from asag import build_detector, load_published
from asag.checkpoint import CheckpointInfo
from asag.deploy import DeployedDetector
from asag.families.asag.config import HEADS, ASAGConfig
from asag.families.asag.detector import ASAGDetector
from asag.family import InputSpec
from asag.parts.boxes import cxcywh_to_xyxy
from asag.runtime.metadata import ModelMetadata
from asag.runtime.parity.agreement import compare_detections
from asag.runtime.postprocessing import OUTPUT_NAMES, Detections, postprocess
from tests.builders import normalized_batch
from tests.families.asag.everything import all_stages
from tests.golden_files import GOLDENS as FOLDER
from tests.golden_files import module

CASES = sorted(path.stem for path in FOLDER.glob("asag_*.npz"))

# One per decoder, of an image whose sides are multiples of 32.
DEPLOYED_CASES = ("asag_a_r50_100", "asag_s_r50_100")

# The 80 used category ids of COCO are 1..90 without these.
UNUSED_COCO_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = tuple(number for number in range(1, 91) if number not in UNUSED_COCO_IDS)

LOGIT_TOLERANCE = 1e-4
BOX_TOLERANCE = 1e-5
"""Of normalized coordinates, and of patch coordinates."""


@functools.lru_cache(maxsize=1)
def unshifted_state(shapes_name: str) -> dict[str, NDArray[np.float32]]:
    return module(FOLDER).golden_state_dict(json.loads((FOLDER / shapes_name).read_text()))


def golden_detector(options: Mapping[str, Any], confidence_shift: float) -> ASAGDetector:
    letter = {"adamixer": "a", "sparse_rcnn": "s"}[options["decoder"]]
    shapes_name = f"asag_{letter}_{options['backbone'].replace('resnet', 'r')}_{options['queries']}.shapes.json"
    state = unshifted_state(shapes_name)
    # The shift reaches few tensors; making all of them again for each case would take longer than the detector.
    shifted = {name: list(value.shape) for name, value in state.items() if ".proj_" in name and name.endswith("bias")}
    detector = build_detector(ASAGConfig(**options))
    load_published(detector, state | module(FOLDER).golden_state_dict(shifted, confidence_shift))
    assert isinstance(detector, ASAGDetector)
    return detector


def detections_of(found: Mapping[str, torch.Tensor], head: str, size: tuple[int, int], nms: float | None) -> Detections:
    """A head's output as detections: the 100 best pairs of query and class, then the runtime's post-processing."""
    scores = torch.where(found["valid"].unsqueeze(-1), found[f"{head}_logits"].sigmoid(), 0.0)
    classes = scores.shape[-1]
    scores, chosen = scores.flatten(1).topk(100)
    corners = cxcywh_to_xyxy(found[f"{head}_boxes"])
    outputs = {
        "boxes": corners.gather(1, (chosen // classes).unsqueeze(-1).expand(-1, -1, 4)).numpy(),
        "scores": scores.numpy(),
        "labels": torch.tensor(COCO_IDS)[chosen % classes].numpy(),
        "overflow": np.zeros(1, np.int32),
    }
    return postprocess(outputs, [size], metadata_of(nms))[0]


def metadata_of(nms_iou: float | None) -> ModelMetadata:
    return ModelMetadata(
        family="golden",
        preset="golden",
        choices={},
        stages=(),
        half_layers=(),
        precision="fp32",
        input_height=640,
        input_width=640,
        input_type="float32",
        shorter_side=640,
        longer_side=640,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        category_ids=COCO_IDS,
        category_names=tuple(map(str, COCO_IDS)),
        nms_iou=nms_iou,
        max_detections=100,
        package_version="0",
        weights_digest="0",
    )


def in_one_order(anchors: NDArray, corners: NDArray, image_index: NDArray) -> tuple[NDArray, NDArray]:
    """Patches sorted by image and corner: rows (image, x, y) and anchors."""
    keys = np.column_stack((image_index, corners))
    order = np.lexsort(keys.T[::-1])
    return keys[order], anchors[order]


def check_patches(expected: Mapping[str, NDArray], found: Mapping[str, NDArray], level: str) -> None:
    names = [f"{level}_anchors", f"{level}_crop_xy", f"{level}_image_index"]
    assert (names[0] in found) == (names[0] in expected), f"{level} was explored by one of the two only"
    if names[0] in expected:
        keys, anchors = in_one_order(*(expected[name] for name in names))
        found_keys, found_anchors = in_one_order(*(found[name] for name in names))
        np.testing.assert_array_equal(found_keys, keys)
        check_predictions(found_anchors, anchors)


def check_predictions(found: NDArray, expected: NDArray) -> None:
    """Anchors [..., 5] of patches: boxes, and the confidence's logit."""
    np.testing.assert_allclose(found[..., :4], expected[..., :4], rtol=0, atol=BOX_TOLERANCE)
    np.testing.assert_allclose(found[..., 4], expected[..., 4], rtol=0, atol=LOGIT_TOLERANCE)


def check_queries(expected: Mapping[str, NDArray], found: Mapping[str, NDArray], sizes: NDArray) -> None:
    """Anchors, proposals and heads of every image as sets: queries are paired by their anchor."""
    assert found["valid"].sum(axis=1).tolist() == expected["valid"].sum(axis=1).tolist()
    for image, size in enumerate(sizes):
        scale = np.tile(size[::-1], 2)
        ours = found["anchors"][image][found["valid"][image]] / scale
        theirs = expected["anchors"][image][expected["valid"][image]] / scale
        pairing = np.abs(ours[:, None] - theirs[None]).max(axis=2).argmin(axis=0)
        assert sorted(pairing) == list(range(len(theirs)))
        np.testing.assert_allclose(ours[pairing], theirs, rtol=0, atol=BOX_TOLERANCE)
        for part in ("proposal", *HEADS):
            for kind, tolerance in (("logits", LOGIT_TOLERANCE), ("boxes", BOX_TOLERANCE)):
                name = f"{part}_{kind}"
                value = found[name][image][found["valid"][image]][pairing]
                reference = expected[name][image][expected["valid"][image]]
                np.testing.assert_allclose(value, reference, rtol=0, atol=tolerance, err_msg=name)


def check_detections(expected: Mapping[str, NDArray], found: Mapping[str, torch.Tensor], size: tuple[int, int]) -> None:
    for head in HEADS:
        for prefix, nms in ((f"{head}_det", None), (f"{head}_det_nms", 0.7)):
            reference = Detections(
                expected[f"{prefix}_boxes"], expected[f"{prefix}_scores"], expected[f"{prefix}_labels"], 0, size
            )
            ours = detections_of(found, head, size, nms)
            assert len(ours) == len(reference), prefix
            assert compare_detections(0, reference, ours, 100, score_tolerance=1e-5, box_tolerance=0.01).within(), (
                prefix
            )


def check_deployed(
    expected: Mapping[str, NDArray], detector: ASAGDetector, images: torch.Tensor, sizes: torch.Tensor
) -> None:
    """The model as it is exported (one head, folded norms, fixed capacities) gives the same detections."""
    size = tuple(images.shape[-2:])
    names = tuple(map(str, COCO_IDS))
    info = CheckpointInfo("golden", COCO_IDS, names, InputSpec(min(size), max(size), size))
    detector.config = dataclasses.replace(detector.config, patch_capacity=(16, 32))
    deployed = DeployedDetector(detector, info, input_type="float32")
    head = detector.config.head
    with torch.no_grad():
        outputs = dict(zip(OUTPUT_NAMES, (value.numpy() for value in deployed(images, sizes)), strict=True))
    ours = postprocess(outputs, [size], ModelMetadata(**deployed.describe()))[0]
    reference = Detections(
        expected[f"{head}_det_boxes"], expected[f"{head}_det_scores"], expected[f"{head}_det_labels"], 0, size
    )
    assert ours.overflow == 0
    assert compare_detections(0, reference, ours, 100, score_tolerance=2e-5, box_tolerance=0.02).within()


@pytest.mark.parametrize("case", CASES or ["none"])
def test_stages_and_detections(goldens: Path, case: str) -> None:
    with np.load(goldens / f"{case}.npz", allow_pickle=False) as file:
        expected = dict(file)
    meta = json.loads(str(expected["meta"]))
    detector = golden_detector(meta["options"], meta["confidence_shift"])
    pictures = [module(FOLDER).golden_image(*arguments) for arguments in meta["images"]]
    height, width = np.max([picture.shape[:2] for picture in pictures], axis=0)
    images, sizes = normalized_batch(pictures, height, width)
    found = all_stages(detector, images, sizes)
    arrays = {name: value.numpy() for name, value in found.items()}

    check_predictions(arrays["p6_anchors"], expected["p6_anchors"])
    check_predictions(arrays["p5_anchors"], expected["p5_anchors"])
    for level in ("p4", "p3"):
        check_patches(expected, arrays, level)
    check_queries(expected, arrays, sizes.numpy())
    if len(pictures) == 1:
        check_detections(expected, found, pictures[0].shape[:2])
    if case in DEPLOYED_CASES:
        check_deployed(expected, detector, images, sizes)


def test_all_variants_are_covered(goldens: Path) -> None:
    """A folder without one of these would leave a rule of the method untested."""
    names = " ".join(CASES)
    for part in ("_batch", "few_anchors", "odd_size", "p5p6", "a_r50_300", "s_r50_100"):
        assert part in names
