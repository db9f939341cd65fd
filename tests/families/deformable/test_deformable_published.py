"""Files of the authors, of MMDetection and of Hugging Face: every tensor has its place, the switches are read off."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asag import build_detector, load_published
from asag.checkpoint import load_detector
from asag.datasets import COCO_CATEGORIES
from asag.families.deformable.config import DeformableConfig
from asag.families.deformable.detector import DeformableDetector
from asag.families.deformable.presets import PRESETS
from asag.families.deformable.published import PublishedDeformable, authors_name
from asag.published import convert_published, identify
from tests.families.deformable.golden_cases import RECOLLECTED, SPARSE, golden_state, published_shapes

FILES = {
    "deformable-detr-r50": (SPARSE, "deformable_detr_r50", True),
    "deformable-detr-r50-refine": (SPARSE, "deformable_detr_r50", False),
    "deformable-detr-r50-two-stage": (SPARSE, "deformable_detr_r50_two_stage", False),
    "deformable-detr-swin-t": (SPARSE, "deformable_detr_swint", True),
    "efficient-detr-r50": (SPARSE, "efficient_detr_r50", False),
    "efficient-detr-swin-t": (SPARSE, "efficient_detr_swint", False),
    "sparse-detr-r50-10": (SPARSE, "sparse_detr_r50", False),
    "sparse-detr-swin-t-10": (SPARSE, "sparse_detr_swint", False),
    "deformable-detr-r50-50e": (RECOLLECTED, "deformable_r50_300", True),
}
every_file = pytest.mark.parametrize("preset", FILES)


def thin(shapes: dict[str, list[int]], shared_heads: bool) -> dict[str, Tensor]:
    """Tensors without memory of their own; heads are told apart by their numbers."""
    made = {}
    for name, shape in shapes.items():
        number = 0 if shared_heads or "_embed." not in name else int("".join(filter(str.isdigit, name)) or 0)
        made[name] = torch.tensor(float(number)).expand(shape)
    return made


@every_file
def test_the_configuration_is_read_off_the_tensors_and_every_tensor_has_its_place(goldens: Path, preset: str) -> None:
    folder, shapes, shared_heads = FILES[preset]
    state = thin(published_shapes(folder, shapes, 300), shared_heads)
    state |= {"transformer.encoder.total_ops": torch.zeros(1)}  # a profiler's
    family, config = identify(state)
    assert family.name == "deformable"
    assert config == PRESETS[preset].config
    with torch.device("meta"):
        ours = {name: value.shape for name, value in DeformableDetector(config).state_dict().items()}
    found: dict[str, torch.Size] = {}
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        translated = PublishedDeformable().translate(name, value, config)
        assert translated is not None, name
        found |= {target: part.shape for target, part in translated}
    assert found == {name: shape for name, shape in ours.items() if not name.endswith("num_batches_tracked")}


def test_what_is_no_known_variant_is_said(goldens: Path) -> None:
    state = thin(published_shapes(SPARSE, "efficient_detr_r50", 300), False)
    known = PublishedDeformable()
    assert known.identify({"class_embed.0.weight": torch.zeros(1, 1)}, {}) is None
    with pytest.raises(ValueError, match="of 1 levels is not known here; those of 4 are"):
        known.identify(state | {"transformer.level_embed": torch.zeros(1, 256)}, {})
    with pytest.raises(ValueError, match="with one head for all layers was never published"):
        known.identify({name: torch.zeros_like(value) for name, value in state.items()}, {})
    without = {name: value for name, value in state.items() if ".layer3.1." not in name}
    with pytest.raises(ValueError, match="the backbone is none that is known here"):
        known.identify(without, {})
    assert known.identify(state, {"num_queries": 100}).queries == 100  # type: ignore[union-attr]
    for name in ("optimizer.state", "transformer.unheard", "class_embed.0.scale", ""):
        assert known.translate(name, torch.zeros(1), DeformableConfig()) is None


def test_what_no_tensor_shows_is_taken_from_the_description_or_refused(goldens: Path) -> None:
    state = thin(published_shapes(SPARSE, "deformable_detr_r50", 300), True)
    known = PublishedDeformable()
    for told in ({"nheads": 4}, {"encoder_attention_heads": 4, "decoder_attention_heads": 4}):
        config = known.identify(state, told)
        assert config is not None
        assert (config.size.attention_heads, config.size.points) == (4, 8)
    assert known.identify(state, {"dilation": False, "position_embedding": "sine"}) is not None
    for unknown in (
        {"dilation": True},
        {"activation_function": "gelu"},
        {"position_embedding": "learned"},
        {"encoder_attention_heads": 8, "decoder_attention_heads": 4},
    ):
        with pytest.raises(ValueError, match="is not known here"):
            known.identify(state, unknown)


def test_heads_that_transformers_leaves_out(goldens: Path) -> None:
    """Of equal ones it keeps one; the boxes of a refining decoder stand in the decoder alone."""
    state = {
        name.replace("bbox_embed", "model.decoder.bbox_embed"): value
        for name, value in thin(published_shapes(SPARSE, "deformable_detr_r50", 300), False).items()
        if not name.startswith("class_embed") or name.startswith("class_embed.0")
    }
    known, refined = PublishedDeformable(), PRESETS["deformable-detr-r50-refine"].config
    assert known.identify(state, {}) == refined
    (box,) = known.translate("model.decoder.bbox_embed.3.layers.1.bias", torch.ones(2), refined) or ()
    assert box[0] == "heads.3.box_deltas.2.bias"
    found = dict(known.translate("class_embed.0.bias", torch.ones(91), refined) or ())
    assert list(found) == [f"heads.{layer}.class_logits.bias" for layer in range(6)]
    with pytest.raises(ValueError, match="2 class layers for 6 decoder layers; is the file whole"):
        known.identify(state | {"class_embed.1.weight": state["class_embed.0.weight"]}, {})


@pytest.mark.slow
def test_files_become_checkpoints(goldens: Path, tmp_path: Path) -> None:
    """Arguments beside the tensors tell the share of kept tokens; 91 rows of classes become 80."""
    arrays = golden_state(SPARSE, "sparse_detr_r50", 0, False)
    state = {name: torch.from_numpy(value) for name, value in arrays.items()}
    file, ours = tmp_path / "file.pth", tmp_path / "ours.safetensors"
    torch.save({"model": state, "args": argparse.Namespace(rho=0.3, num_queries=300), "epoch": 49}, file)
    converted = convert_published(file, ours)
    assert converted.preset == "sparse-detr-r50-30"
    assert len(converted.alternatives) == 10
    detector, info = load_detector(ours)
    assert detector.config == PRESETS["sparse-detr-r50-30"].config
    assert info.category_ids == tuple(COCO_CATEGORIES)
    head = detector.heads[2]  # type: ignore[index]
    assert torch.equal(head.class_logits.bias, state["class_embed.2.bias"][list(COCO_CATEGORIES)])
    assert not converted.overruled
    assert convert_published(file, ours, "sparse-detr-r50-20").overruled == {"keeping_ratio": (0.3, 0.2)}
    torch.save({"model": state}, file)
    assert convert_published(file, ours).preset == "sparse-detr-r50-10"
    assert convert_published(file, ours, "sparse-detr-r50-scrl-50").config.keeping_ratio == 0.5


def test_the_logit_that_says_object_or_not_survives() -> None:
    """Row 0 of 91, which no category has."""
    config = PRESETS["deformable-detr-r50-two-stage"].config
    rows = torch.arange(91.0)
    found = {}
    for number in (0, 6):
        found |= dict(PublishedDeformable().translate(f"class_embed.{number}.bias", rows, config) or ())
    assert found["heads.0.class_logits.bias"].tolist() == list(COCO_CATEGORIES)
    assert found["proposal_head.class_logits.bias"].tolist()[:3] == [0, 2, 3]


def test_names_of_other_programs() -> None:
    for theirs, authors in {
        "backbone.layer2.0.conv1.weight": "backbone.0.body.layer2.0.conv1.weight",
        "backbone.0.body.layer2.0.conv1.weight": "backbone.0.body.layer2.0.conv1.weight",
        "model.backbone.conv_encoder.model.layer2.0.conv1.weight": "backbone.0.body.layer2.0.conv1.weight",
        "neck.extra_convs.0.gn.bias": "input_proj.3.1.bias",
        "bbox_head.reg_branches.3.2.weight": "bbox_embed.3.layers.1.weight",
        "bbox_head.transformer.decoder.layers.1.norms.0.bias": "transformer.decoder.layers.1.norm2.bias",
        "bbox_head.transformer.decoder.layers.1.norms.1.bias": "transformer.decoder.layers.1.norm1.bias",
        "model.decoder.layers.1.self_attn_layer_norm.bias": "transformer.decoder.layers.1.norm2.bias",
        "model.decoder.layers.1.self_attn.q_proj.bias": "transformer.decoder.layers.1.self_attn.q_proj.bias",
        "model.encoder.layers.1.final_layer_norm.bias": "transformer.encoder.layers.1.norm2.bias",
        "model.encoder.layers.0.fc2.bias": "transformer.encoder.layers.0.linear2.bias",
        "model.query_position_embeddings.weight": "query_embed.weight",
    }.items():
        assert authors_name(theirs) == authors


def third_version(name: str) -> str:
    """MMDetection's name of a tensor since its third version."""
    for second, third in {
        "bbox_head.transformer.level_embeds": "level_embed",
        "bbox_head.query_embedding.": "query_embedding.",
        "bbox_head.transformer.reference_points.": "reference_points_fc.",
        "bbox_head.transformer.enc_output_norm.": "memory_trans_norm.",
        "bbox_head.transformer.enc_output.": "memory_trans_fc.",
        "bbox_head.transformer.pos_trans_norm.": "pos_trans_norm.",
        "bbox_head.transformer.pos_trans.": "pos_trans_fc.",
        "bbox_head.transformer.": "",
        ".ffns.0.": ".ffn.",
    }.items():
        name = name.replace(second, third)
    name = re.sub(r"^(encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn.", name)
    name = re.sub(r"^(decoder\.layers\.\d+)\.attentions\.0\.attn\.", r"\1.self_attn.attn.", name)
    return re.sub(r"^(decoder\.layers\.\d+)\.attentions\.1\.", r"\1.cross_attn.", name)


def test_both_versions_of_mmdetection_are_read_alike(goldens: Path) -> None:
    second = thin(published_shapes(RECOLLECTED, "deformable_r50_300", 300), True)
    third = {third_version(name): value for name, value in second.items()}
    assert len(third) == len(second)
    assert not any("transformer" in name or "attentions" in name for name in third)
    assert identify(third) == identify(second)
    assert [authors_name(third_version(name)) for name in second] == [authors_name(name) for name in second]
    for kind in ("enc_output.weight", "enc_output_norm.bias", "pos_trans.bias", "pos_trans_norm.weight"):
        assert authors_name(third_version(f"bbox_head.transformer.{kind}")) == f"transformer.{kind}"


def hugging_face_model(options: dict[str, Any]) -> Any:
    """Random weights that all matter, on a backbone of random statistics."""
    transformers = pytest.importorskip("transformers", reason="the extra `reference` is not installed")
    pytest.importorskip("timm", reason="the extra `reference` is not installed")
    config = transformers.DeformableDetrConfig(
        use_pretrained_backbone=False, num_queries=40, two_stage_num_proposals=60, num_labels=91, **options
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.DeformableDetrForObjectDetection(config).eval()
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if any(part in name for part in ("sampling_offsets.w", "attention_weights.w", "layers.2.weight")):
                value.normal_(std=0.1)
            elif "class_embed" in name and name.endswith("bias"):
                value.normal_(-2, 0.5)
            elif name.endswith("running_mean"):
                value.normal_(std=0.1)
            elif name.endswith("running_var"):
                value.uniform_(0.8, 1.2)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"with_box_refine": True}, {"with_box_refine": True, "two_stage": True}], ids=str
)
def test_hugging_face_says_the_same_of_a_padded_batch(options: dict[str, Any], tmp_path: Path) -> None:
    model = hugging_face_model(options)
    model.save_pretrained(tmp_path)
    converted = convert_published(tmp_path, tmp_path / "ours.safetensors")
    assert converted.config.queries == (60 if "two_stage" in options else 40)
    detector, _ = load_detector(tmp_path / "ours.safetensors")
    sizes = torch.tensor([[150.0, 224.0], [160.0, 101.0]])
    mask = torch.zeros(2, 160, 224, dtype=torch.int64)
    mask[0, :150], mask[1, :, :101] = 1, 1
    images = torch.randn(2, 3, 160, 224, generator=torch.Generator().manual_seed(1)) * mask.unsqueeze(1)
    with torch.no_grad():
        ours, theirs = detector(images, sizes), model(pixel_values=images, pixel_mask=mask)
    logits = theirs.logits[..., list(COCO_CATEGORIES)]
    # Tokens of the padding tie, so queries of two stages may stand in another order.
    distance = torch.cdist(torch.cat(ours[:2], -1), torch.cat((logits, theirs.pred_boxes), -1), p=torch.inf)
    assert distance.amin(1).max() < 1e-4
    assert distance.amin(2).max() < 1e-4
    assert theirs.pred_boxes.std() > 1e-2


def test_a_detector_of_other_classes_keeps_its_rows(goldens: Path) -> None:
    """Only 91 rows are COCO's ids."""
    shapes = published_shapes(SPARSE, "deformable_detr_r50", 12)
    state = thin(shapes, True)
    state |= {name: torch.zeros(5, *value.shape[1:]) for name, value in state.items() if "class_embed" in name}
    _, config = identify(state)
    assert dataclasses.replace(PRESETS["deformable-detr-r50"].config, num_classes=5, queries=12) == config
    load_published(build_detector(config), state)
