"""ASAG-D's maps: the neck by its formula, the encoder against that of Deformable DETR, which has golden cases."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from asag.detector import build_detector
from asag.families.asag.detector import ASAGDetector
from asag.families.deformable.detector import DeformableDetector
from asag.families.deformable.presets import PRESETS
from asag.parts.levels import levels_of
from tests.builders import normalized_batch, random_detector, random_picture, small_config


def detector() -> ASAGDetector:
    return random_detector(small_config(decoder="deformable"))


@torch.no_grad()
def test_neck_is_the_pyramid_of_c3_to_c5_and_a_half_of_c5_each_with_a_norm() -> None:
    model = detector()
    images, _ = normalized_batch([random_picture(1, 128, 192)], 128, 192)
    c3, c4, c5 = model.backbone(images)[1:]
    neck = model.neck
    inner, outer = neck.top_down.inner_blocks, neck.top_down.layer_blocks
    l5 = inner[2](c5)
    l4 = inner[1](c4) + F.interpolate(l5, scale_factor=2)
    l3 = inner[0](c3) + F.interpolate(l4, scale_factor=2)
    maps = [outer[0](l3), outer[1](l4), outer[2](l5), neck.coarsest(c5)]
    for found, map_, norm in zip(model.features(images), maps, neck.norms, strict=True):
        torch.testing.assert_close(found, F.group_norm(map_, norm.num_groups, norm.weight, norm.bias))
    assert [tuple(map_.shape[2:]) for map_ in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]


@torch.no_grad()
def test_encoder_is_that_of_deformable_detr() -> None:
    """With its weights, the maps of two images that differ in size."""
    model = detector()
    size = model.config.size
    other = PRESETS["deformable-detr-tiny"].config
    same = {
        "channels": size.channels,
        "attention_heads": size.attention_heads,
        "encoder_layers": size.encoder_layers,
        "feed_forward": size.deformable_feed_forward,
        "points": size.attended_points,
    }
    reference = build_detector(dataclasses.replace(other, size=dataclasses.replace(other.size, **same)))
    assert isinstance(reference, DeformableDetector)
    reference.encoder.load_state_dict(
        {name: value for name, value in model.encoder.state_dict().items() if name != "level_embedding"}
    )
    reference.level_embedding.copy_(model.encoder.level_embedding)
    images, sizes = normalized_batch([random_picture(1, 128, 192), random_picture(2, 100, 70)], 128, 192)
    maps = model.features(images)
    levels = levels_of(maps, sizes, images)
    memory, _ = reference.encoder(levels.flat(maps), levels.embedding(reference.level_embedding), levels)
    pyramid = model.encode(maps, sizes, images)
    assert pyramid.first == 3
    for found, expected in zip(pyramid.maps, levels.maps(memory), strict=True):
        torch.testing.assert_close(found, expected)
    assert not torch.allclose(pyramid.maps[0], maps[0], atol=0.1)
