"""SAP-DETR against numbers of the published code, case by case, section by section."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from asag.detector import recorded
from asag.families.sap_detr.detector import SAPDETRDetector
from asag.families.sap_detr.gaussian import gaussian_bias
from asag.families.sap_detr.training.forward import training_outputs
from asag.training.protocol import Batch, Step
from tests.families.sap_detr.golden_cases import FOLDER, golden_batch, golden_detector, names
from tests.golden_files import read_case

CASES = sorted(names("sap_detr_"), key=lambda name: name.split("_batch")[0].split("_odd")[0])
"""Those of one detector follow one another."""

LOGITS, BOXES, SCORES = 1e-3, 5e-5, 1e-4
TOLERANCES = {"logits": LOGITS, "boxes": BOXES, "points": BOXES, "in": BOXES, "gaussian": 5e-3, "pos": 2e-6}
"""By the last word of an array's name; those of boxes and points are fractions."""
OTHERS = 2e-4
"""Maps and queries, whose values reach some units."""


@torch.no_grad()
def all_values(detector: SAPDETRDetector, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
    """What the arrays of a case are named after, whole."""
    found: dict[str, Tensor] = {}
    handles = [
        detector.backbone.register_forward_hook(lambda _, __, maps: found.update(c5=maps[-1])),
        detector.encoder.layers[0].register_forward_hook(lambda _, __, cells: found.update(encoder_0=cells)),
        detector.point_map.register_forward_hook(lambda _, __, map_: found.update(point_map=map_)),
    ]
    with recorded() as values:
        detector(images, sizes)
    for handle in handles:
        handle.remove()
    map_ = values["features/p5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector, "features", lambda _: [map_])
        outputs = training_outputs(detector, Batch(images, sizes, []), Step(0))
    frame = detector.frame_of(map_, images, sizes)
    found["mask"], found["proj"], found["queries"] = ~frame.valid, map_, values["start/queries"]
    found["pos"] = frame.embedding(map_.shape[1]).transpose(1, 2).unflatten(2, map_.shape[-2:])
    found["encoder_0"] = found["encoder_0"].unflatten(1, map_.shape[-2:])
    found["memory"] = values["encoder/m5"].permute(0, 2, 3, 1)
    places = [values["start/points"], *(values[f"decoder_{number}/points"] for number in range(5))]
    boxes = [values["start/boxes"], *(values[f"decoder_{number}/boxes"] for number in range(5))]
    for number, said in enumerate(outputs):
        name, queries = f"layer_{number}", values[f"decoder_{number}/queries"]
        found |= {f"{name}_points_in": places[number], f"{name}_boxes_in": boxes[number]}
        found[f"{name}_gaussian"] = gaussian_bias(values[f"decoder_{number}/gaussians"], frame)
        found |= {f"{name}_output": queries, f"{name}_hs": detector.decoder_norm(queries)}
        found |= {f"{name}_logits": said.logits, f"{name}_objectness": said.objectness.unsqueeze(-1)}
        found |= {f"{name}_boxes": said.boxes, f"{name}_points": said.points}
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_section(goldens: Path, name: str) -> None:
    case, meta = read_case(FOLDER, name)
    images, sizes = golden_batch(meta)
    detector = golden_detector(meta["preset"])
    values = {key: value.numpy() for key, value in all_values(detector, images, sizes).items()}
    mask = case.pop("mask")
    np.testing.assert_array_equal(values["mask"], mask)
    inside = ~mask.reshape(len(mask), 1, 1, -1)
    for number in range(6):  # padding is none of the Gaussian's in the published code
        before, after = np.split(case.pop(f"layer_{number}_distances_in"), 2, axis=-1)
        points = case[f"layer_{number}_points_in"]
        case[f"layer_{number}_boxes_in"] = np.concatenate((points + (after - before) / 2, before + after), axis=-1)
        meta["slices"][f"layer_{number}_boxes_in"] = meta["slices"][f"layer_{number}_points_in"]
        values[f"layer_{number}_gaussian"] = np.where(inside, values[f"layer_{number}_gaussian"], 0)
        steps = [slice(None, None, step) for step in meta["slices"][f"layer_{number}_gaussian"]]
        case[f"layer_{number}_gaussian"] *= np.broadcast_to(inside, (len(mask), 8, 306, inside.shape[-1]))[tuple(steps)]
    for key in (key for key in case if not key.startswith("det_")):
        steps = tuple(slice(None, None, step) for step in meta["slices"][key])
        tolerance = TOLERANCES.get(key.rpartition("_")[2], OTHERS)
        np.testing.assert_allclose(values[key][steps], case[key], rtol=1e-5, atol=tolerance, err_msg=key)
    check_detections(values, sizes, case)


def check_detections(values: Mapping[str, NDArray], sizes: Tensor, case: Mapping[str, NDArray]) -> None:
    """The same pairs of query and label, whatever their order."""
    boxes, scores, labels, queries = (case[f"det_{part}"] for part in ("boxes", "scores", "labels", "queries"))
    best, chosen = torch.from_numpy(values["layer_5_logits"]).sigmoid().flatten(1).topk(300, dim=1)
    for image, (height, width) in enumerate(sizes.tolist()):
        ours, theirs = chosen[image].numpy(), queries[image] * 91 + labels[image]
        assert set(ours) == set(theirs)
        order = np.argsort(ours)[np.argsort(np.argsort(theirs))]
        np.testing.assert_allclose(best[image].numpy()[order], scores[image], rtol=0, atol=SCORES)
        cxcywh = values["layer_5_boxes"][image, queries[image]]
        corners = np.concatenate((cxcywh[:, :2] - cxcywh[:, 2:] / 2, cxcywh[:, :2] + cxcywh[:, 2:] / 2), axis=1)
        pixels = np.array([width, height, width, height])
        np.testing.assert_allclose(corners, boxes[image] / pixels, rtol=0, atol=BOXES)
