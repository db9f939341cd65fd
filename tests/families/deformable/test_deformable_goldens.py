"""Deformable, Efficient and Sparse DETR against numbers of the published code, case by case, section by section."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from asag.checkpoint import CheckpointInfo
from asag.deploy import DeployedDetector
from asag.families.deformable.detector import DeformableDetector, Queries
from asag.families.deformable.encoder import kept_counts
from asag.families.deformable.proposals import proposal_boxes
from asag.families.deformable.training.attention_map import decoder_attention_map
from asag.families.deformable.training.forward import TrainingOutputs, training_outputs
from asag.family import InputSpec
from asag.parts.deformable_layers import DecoderLayer
from asag.parts.levels import Levels, levels_of
from asag.parts.positions import map_embedding
from asag.runtime.metadata import ModelMetadata
from asag.runtime.parity.agreement import compare_detections
from asag.runtime.postprocessing import OUTPUT_NAMES, Detections, postprocess
from asag.training.protocol import Batch, Step
from tests.families.deformable.golden_cases import SPARSE, golden_batch, golden_detector, names
from tests.golden_files import module, read_case

CASES = sorted({name for start in ("deform", "efficient", "sparse", "two") for name in names(SPARSE, start)})

LOGIT_TOLERANCE = 2e-4
BOX_TOLERANCE = 2e-5
"""Fractions of the content."""
TOKEN_TOLERANCE = 1e-4
SCORE_TOLERANCE = 1e-4
"""Of the logits that tokens are chosen by, whose values reach some tens."""
MAP_TOLERANCE = 3e-3
"""Of the decoder's attention map; a token gets some tens of weights of up to 1."""


@torch.no_grad()
def all_values(detector: DeformableDetector, images: Tensor, sizes: Tensor) -> tuple[dict[str, Tensor], Levels]:
    """What the arrays of a case are named after, whole: the outputs of training, and what hooks see on the way."""
    found: dict[str, Tensor] = {}
    samplings = []
    number_of = {layer: i for layers in (detector.encoder.layers, detector.decoder) for i, layer in enumerate(layers)}
    look, queries_of_tokens, learned = DecoderLayer.look, detector.queries_of_tokens, detector.learned_queries

    def leave_backbone(_: Any, __: Any, maps: list[Tensor]) -> None:
        found.update({f"c{level}": value for level, value in enumerate(maps[-3:], start=3)})

    def enter_encoder_layer(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        found[f"memory_{number_of[layer]}"] = arguments[3]

    def noted_look(layer: DecoderLayer, *arguments: Any) -> Any:
        found[f"decoder_{number_of[layer]}"], sampling = look(layer, *arguments)
        samplings.append(sampling)
        return found[f"decoder_{number_of[layer]}"], sampling

    def noted(queries: Queries) -> Queries:
        found.update(query=queries.content, query_position=queries.position, initial_reference=queries.references)
        return queries

    handles = [detector.backbone.register_forward_hook(leave_backbone)]
    handles += [layer.register_forward_pre_hook(enter_encoder_layer) for layer in detector.encoder.layers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecoderLayer, "look", noted_look)
        patch.setattr(detector, "queries_of_tokens", lambda *arguments: noted(queries_of_tokens(*arguments)))
        patch.setattr(detector, "learned_queries", lambda *arguments: noted(learned(*arguments)))
        outputs = training_outputs(detector, Batch(images, sizes, []), Step(0), "none")
    for handle in handles:
        handle.remove()
    source = found["levels"] = found.pop("memory_0")
    maps = detector.neck([found[f"c{level}"] for level in (3, 4, 5)])
    levels = levels_of(maps, sizes, images)
    assert torch.equal(levels.flat(maps), source)
    position = [map_embedding(*content, source.shape[2]).flatten(1, 2) for content in levels.content]
    found |= {"position": torch.cat(position, dim=1), "dam": decoder_attention_map(samplings, levels.shapes)}
    return found | said(detector, outputs, levels, source), levels


def said(detector: DeformableDetector, outputs: TrainingOutputs, levels: Levels, source: Tensor) -> dict[str, Tensor]:
    """The outputs of training by the names of the arrays; source: [B, T, C], the normed maps."""
    found = {"logits": outputs.decoder[-1].logits[0]}
    parts = {f"decoder_{number}": each for number, each in enumerate(outputs.decoder)}
    parts |= {f"encoder_aux_{number}": each for number, each in enumerate(outputs.encoder)}
    for name, each in parts.items():
        found |= {f"{name}_max_logit": each.logits[0].amax(-1), f"{name}_boxes": each.boxes[0]}
    if outputs.proposals is not None:
        logits = outputs.proposals.logits[0]
        found["encoder_scores"] = logits.amax(-1) if detector.config.rank_by_class else logits[..., 0]
        found["proposal_tokens"] = detector.best_tokens(logits)
    if outputs.selection is not None and detector.config.keeping_ratio is not None:
        scores, counts = outputs.selection.scores, kept_counts(levels.padded, detector.config.keeping_ratio)
        found |= {"mask_prediction": scores, "encoder_token_nums": counts}
        found["encoder_tokens"] = scores.topk(int(counts.max()), dim=1).indices
        placed = source + levels.embedding(detector.level_embedding)
        found["mask_input"] = detector.candidates(placed, proposal_boxes(levels)[1])
    return found


def order_of(ours: NDArray, theirs: NDArray) -> NDArray:
    """[B, N] tokens of both sides -> where each of theirs is in ours; nearly equal scores may stand the other way."""
    assert (np.sort(ours, 1) == np.sort(theirs, 1)).all()
    return np.argsort(ours, 1)[np.arange(len(ours))[:, None], np.argsort(np.argsort(theirs, 1), 1)]


def compare(name: str, ours: NDArray, theirs: NDArray, tolerance: float) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=tolerance, err_msg=name)


def compare_parts(name: str, ours: NDArray, case: Mapping[str, NDArray], cells: NDArray | None) -> None:
    """Mean, deviation and samples of each image's values; cells: [B, T], those that count, None for all."""
    for image, whole in enumerate(ours):
        values = whole if cells is None else whole[cells[image]]
        stats = case[f"{name}_stats"][image]
        compare(name, np.array([values.mean(dtype=np.float64), values.std(dtype=np.float64)]), stats, 2e-6)
        positions = module(SPARSE).sample_positions(name, values.size)
        compare(name, values.flatten()[positions], case[f"{name}_sample"][image], TOKEN_TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_every_section(goldens: Path, name: str) -> None:
    case, meta = read_case(SPARSE, name)
    images, sizes = golden_batch(meta)
    detector = golden_detector(SPARSE, meta)
    found, levels = all_values(detector, images, sizes)
    values = {key: value.detach().numpy() for key, value in found.items()}
    np.testing.assert_array_equal(levels.padded, case.pop("mask_flatten"))
    np.testing.assert_array_equal(levels.shapes, case.pop("spatial_shapes"))
    compare("valid_ratios", levels.ratios.numpy(), case.pop("valid_ratios"), 1e-7)
    check_choices(values, case)

    for key in list(case):
        base, _, part = key.rpartition("_")
        if part == "sample":
            of_cells = base in ("levels", "position", "mask_input") or base.startswith("memory")
            # What leaves the last layer nothing but the decoder and the proposals see.
            if base != "memory_6":
                compare_parts(base, values[base], case, ~levels.padded.numpy() if of_cells else None)
        elif part != "stats" and not key.startswith("det_"):
            kinds = {"boxes": BOX_TOLERANCE, "reference": BOX_TOLERANCE, "dam": MAP_TOLERANCE}
            kinds |= {"scores": SCORE_TOLERANCE, "prediction": SCORE_TOLERANCE}
            compare(key, values[key], case[key], kinds.get(part, LOGIT_TOLERANCE))
    if detector.config.sparse or name == "deformable_detr_r50_batch":  # what deployment does to others it does to these
        check_detections(detector, images, sizes, case)


def check_choices(values: dict[str, NDArray], case: dict[str, NDArray]) -> None:
    """The same tokens are kept and become queries; all that follows is put in the order of the case."""
    if "encoder_tokens" in case:
        np.testing.assert_array_equal(values.pop("encoder_token_nums"), case.pop("encoder_token_nums"))
        order = order_of(values.pop("encoder_tokens"), case.pop("encoder_tokens"))
        for key in [key for key in values if key.startswith("encoder_aux")]:
            values[key] = np.stack([value[rows] for value, rows in zip(values[key], order, strict=True)])
    if "proposal_tokens" in case:
        order = order_of(values.pop("proposal_tokens"), case.pop("proposal_tokens"))
        ordered = ("query", "query_position", "initial_reference", "logits")
        for key in [key for key in values if key in ordered or key.startswith("decoder_")]:
            values[key] = np.stack([value[rows] for value, rows in zip(values[key], order, strict=True)])


def check_detections(detector: DeformableDetector, images: Tensor, sizes: Tensor, case: Mapping[str, NDArray]) -> None:
    """The model as it is exported (folded norms, no heads of training) gives the reference's detections."""
    size = (images.shape[2], images.shape[3])
    classes = tuple(range(detector.config.classes))
    spec = InputSpec(min(size), max(size), size, divisor=1)
    info = CheckpointInfo("golden", classes, tuple(map(str, classes)), spec)
    deployed = DeployedDetector(detector, info, input_type="float32")
    with torch.no_grad():
        outputs = dict(zip(OUTPUT_NAMES, (value.numpy() for value in deployed(images, sizes)), strict=True))
    contents = [(int(height), int(width)) for height, width in sizes]
    for image, ours in enumerate(postprocess(outputs, contents, ModelMetadata(**deployed.describe()))):
        boxes, scores, labels = (case[f"det_{name}"][image] for name in ("boxes", "scores", "labels"))
        reference = Detections(boxes, scores, labels, 0, contents[image])
        tolerances = {"score_tolerance": 2e-5, "box_tolerance": 2e-2}
        assert compare_detections(image, reference, ours, len(reference), **tolerances).within()


def test_all_variants_are_covered(goldens: Path) -> None:
    for part in ("refine", "iterative", "two_stage", "shared_heads", "efficient", "rho10", "rho30", "swint", "batch"):
        assert any(part in name for name in CASES)
