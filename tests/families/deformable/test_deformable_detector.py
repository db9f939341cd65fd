"""What holds for any detector of the family: switches, padding, batches, kept tokens, deployment."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from asag.detector import recorded
from asag.families.deformable import DEFORMABLE
from asag.families.deformable.config import DeformableConfig
from asag.families.deformable.encoder import Kept, keep_best, kept_counts
from asag.families.deformable.presets import PRESETS
from asag.families.deformable.proposals import UNUSABLE, proposal_boxes
from asag.parts.levels import Levels
from tests.builders import normalized_batch, random_picture
from tests.families.deformable.small_detector import PLAIN, SPARSE, random_detector, small_config

REFINE = {"head_per_layer": True, "refine_boxes": True}
TWO_STAGE = {**REFINE, "two_stage": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "own heads": {"head_per_layer": True},
    "refine": REFINE,
    "two stages": TWO_STAGE,
    "one head": {**TWO_STAGE, "head_per_layer": False},
    "efficient": {**TWO_STAGE, "content_from_memory": True, "rank_by_class": True},
    "MMDetection": {"projection_bias": False, "clip_boxes": True},
}

every_variant = pytest.mark.parametrize(
    "config",
    [*(small_config(PLAIN, **changes) for changes in VARIANTS.values()), small_config(SPARSE)],
    ids=[*VARIANTS, "sparse"],
)


def batch() -> tuple[Tensor, Tensor]:
    return normalized_batch([random_picture(1, 90, 150), random_picture(2, 128, 70)], 128, 160)


@torch.no_grad()
@every_variant
def test_every_variant_names_its_stages_and_deploys(config: DeformableConfig) -> None:
    detector = random_detector(config)
    with recorded() as values:
        found = detector(*batch())
    assert found.logits.shape == (2, config.queries, 3)
    assert found.boxes.shape == (2, config.queries, 4)
    declared = [name for stage in DEFORMABLE.stages(config) for name in stage.value_names()]
    assert set(values) == set(declared)
    deployed = detector.deployed()
    for ours, theirs in zip(found[:2], deployed(*batch())[:2], strict=True):
        assert torch.equal(ours, theirs)
    left_out = sum(each.numel() for each in detector.parameters()) - sum(each.numel() for each in deployed.parameters())
    assert (left_out > 0) is config.head_per_layer


@torch.no_grad()
@every_variant
def test_a_batch_gives_what_its_images_give_alone(config: DeformableConfig) -> None:
    """Padded to the same size: the neck's norms and the scorer's mean count the padding."""
    detector = random_detector(config)
    images, sizes = batch()
    together = detector(images, sizes)
    for image in range(2):
        alone = detector(images[image : image + 1], sizes[image : image + 1])
        torch.testing.assert_close(together.logits[image : image + 1], alone.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.boxes[image : image + 1], alone.boxes, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_padding_holds_changes_nothing_but_the_norms() -> None:
    """With the statistics of an image's maps taken out, tokens of the padding reach no query."""
    detector = random_detector(small_config(PLAIN))
    _, sizes = batch()
    maps = [torch.randn(2, 32, height, width) for height, width in ((16, 20), (8, 10), (4, 5), (2, 3))]
    levels = Levels.of(tuple((m.shape[2], m.shape[3]) for m in maps), sizes, (128, 160))
    source = levels.flat(maps)
    other = torch.where(levels.padded.unsqueeze(-1), 7.0, source)
    position = levels.embedding(detector.level_embedding)
    ours, theirs = (detector.encoder(tokens, position, levels)[0] for tokens in (source, other))
    content = ~levels.padded
    torch.testing.assert_close(ours[content], theirs[content], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_clipped_boxes_end_at_the_edges() -> None:
    detector = random_detector(small_config(PLAIN, clip_boxes=True), seed=3)
    detector.head(0).box_deltas[-1].bias[2:] = 1.0  # large boxes
    found = detector(*batch()).boxes
    low, high = found[..., :2] - found[..., 2:] / 2, found[..., :2] + found[..., 2:] / 2
    assert low.min() >= -1e-6
    assert high.max() <= 1 + 1e-6
    free = dataclasses.replace(detector.config, clip_boxes=False)
    detector.config = free
    found = detector(*batch()).boxes
    assert (found[..., :2] + found[..., 2:] / 2).max() > 1


def levels_for(height: int, width: int, content: tuple[int, int]) -> Levels:
    shapes = tuple((-(-height // stride), -(-width // stride)) for stride in (8, 16, 32, 64))
    return Levels.of(shapes, torch.tensor([content], dtype=torch.float32), (height, width))


@given(st.integers(32, 400), st.integers(32, 400), st.data())
def test_proposals_lie_inside_the_content(height: int, width: int, data: st.DataObject) -> None:
    content = data.draw(st.tuples(st.integers(1, height), st.integers(1, width)))
    levels = levels_for(height, width, content)
    logits, usable = proposal_boxes(levels)
    assert not (usable & levels.padded).any()
    boxes = logits.sigmoid()
    assert (boxes[~usable] == 1).all()
    assert ((boxes[usable] > 0.009) & (boxes[usable] < 0.991)).all()
    assert (logits[~usable] == UNUSABLE).all()
    inside = ~levels.padded
    assert ((levels.centres[inside] > 0) & (levels.centres[inside] < 1)).all()
    assert (levels.centres[levels.padded].amax(-1) > 1).all()


@given(st.integers(1, 60000), st.floats(0.001, 0.999))
def test_no_image_keeps_more_tokens_than_there_are_places(tokens: int, ratio: float) -> None:
    padded = torch.zeros(2, tokens, dtype=torch.bool)
    padded[1, : tokens // 2] = True
    counts = kept_counts(padded, ratio)
    assert counts[1] <= counts[0]
    scores = torch.arange(2.0 * tokens).reshape(2, -1)
    kept = keep_best(scores, padded, ratio)
    assert kept.active.sum(1).tolist() == counts.clamp(max=tokens).tolist()


def test_content_is_kept_before_padding_of_the_same_score() -> None:
    """Padding has the smallest score of the batch, which here is a token's of the image itself."""
    padded = torch.tensor([[True, False, True, False]])
    kept = keep_best(torch.tensor([[-3.0, -3.0, -3.0, 1.0]]), padded, 0.75)
    assert kept.indices[kept.active].tolist() == [1, 3]


def test_kept_tokens_go_back_to_their_places() -> None:
    memory = torch.arange(5.0).reshape(1, 5, 1)
    kept = Kept(torch.tensor([[3, 1, 0]]), torch.tensor([[True, True, False]]))
    assert kept.of(memory).flatten().tolist() == [3, 1, 0]
    put = kept.put(memory, torch.tensor([30.0, 10.0, 99.0]).reshape(1, 3, 1))
    assert put.flatten().tolist() == [0, 10, 2, 30, 4]


@torch.no_grad()
def test_fewer_tokens_than_queries_are_told() -> None:
    detector = random_detector(small_config(queries=60))
    with pytest.raises(ValueError, match="an input of 22 cells has no room for 60 queries"):
        detector(torch.zeros(1, 3, 32, 32), torch.tensor([[32.0, 32.0]]))


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="backbone is 'vgg'; choose one of resnet10"):
        DeformableConfig("vgg")
    with pytest.raises(ValueError, match="queries is 0; a detector needs at least one"):
        DeformableConfig(queries=0)
    with pytest.raises(ValueError, match=r"keeping_ratio is 1\.5; it is a share between 0 and 1"):
        small_config(keeping_ratio=1.5)
    for changes, needed in (
        ({"two_stage": True}, "two_stage needs refine_boxes"),
        ({"content_from_memory": True}, "content_from_memory needs two_stage"),
        ({"rank_by_class": True}, "rank_by_class needs two_stage"),
        ({"keeping_ratio": 0.1}, "keeping_ratio needs two_stage"),
        ({"encoder_heads": True}, "encoder_heads needs keeping_ratio and head_per_layer"),
    ):
        with pytest.raises(ValueError, match=needed):
            DeformableConfig(**changes)  # type: ignore[arg-type]


def test_presets_are_what_was_published() -> None:
    found = {name: preset.published.ap for name, preset in PRESETS.items() if preset.published}
    for backbone, precisions in (
        ("r50", (45.3, 45.6, 46.0, 46.2, 46.3)),
        ("r50-scrl", (46.9, 47.2, 47.4, 47.7, 47.9)),
        ("swin-t", (48.2, 48.8, 49.1, 49.2, 49.3)),
    ):
        for percent, ap in zip((10, 20, 30, 40, 50), precisions, strict=True):
            name = f"sparse-detr-{backbone}-{percent}"
            assert found.pop(name) == ap
            assert PRESETS[name].config.keeping_ratio == percent / 100
    assert found == {
        "deformable-detr-r50": 43.9,
        "deformable-detr-r50-refine": 46.2,
        "deformable-detr-r50-two-stage": 46.9,
        "deformable-detr-swin-t": 45.7,
        "efficient-detr-r50": 46.0,
        "efficient-detr-swin-t": 48.0,
        "deformable-detr-r50-50e": 44.5,
        "sqr-deformable-detr-r50-50e": 45.8,
    }


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        ("deformable-detr-r50", 39.8),
        ("efficient-detr-r50", 40.8),
        ("sparse-detr-r50-10", 40.9),
        ("deformable-detr-swin-t", 40.3),
        ("efficient-detr-swin-t", 41.3),
        ("sparse-detr-swin-t-30", 41.4),
    ],
)
def test_as_many_parameters_as_published(preset: str, millions: float) -> None:
    """Those that train, with 91 rows of classes, without the heads that training alone hears."""
    with torch.device("meta"):
        detector = DEFORMABLE.build(dataclasses.replace(PRESETS[preset].config, num_classes=91))
    detector.backbone.freeze()
    for norm in detector.backbone.norms():
        norm.requires_grad_(False)
    named = detector.named_parameters()
    count = sum(each.numel() for name, each in named if each.requires_grad and not name.startswith("encoder_heads"))
    assert round(count / 1e6, 1) == pytest.approx(millions, abs=0.05)
