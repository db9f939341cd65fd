"""The decoder heads by their formulas."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from asag.detector import recorded
from asag.families.asag.detector import ASAGDetector as Detector
from asag.families.asag.geometry import decode_xyzr, encode_xyzr
from asag.families.asag.heads.sparse_rcnn import DynamicConvolution, apply_deltas
from asag.families.asag.proposals import Proposals, normalized_boxes
from asag.families.asag.pyramid import Pyramid
from asag.ops import pyramid_roi_align, sampling_mixing
from asag.parts.levels import levels_of
from asag.parts.positions import sine_embedding
from tests.builders import random_detector, small_config

SIZES = torch.tensor([[60.0, 120.0], [128.0, 90.0]])


def pyramid(channels: int, first: int = 2) -> Pyramid:
    torch.manual_seed(4)
    maps = [torch.randn(2, channels, 128 >> level, 128 >> level) for level in range(first, first + 4)]
    return Pyramid(maps, first, levels_of(maps, SIZES, torch.zeros(2, 3, 128, 128)))


def anchors() -> Tensor:
    """[2, 3, 4] `cxcywh` in pixels."""
    return torch.tensor([[30.0, 30.0, 20.0, 40.0], [60.0, 20.0, 90.0, 15.0], [5.0, 50.0, 8.0, 8.0]]).repeat(2, 1, 1)


def proposals_of(detector: Detector) -> Proposals:
    torch.manual_seed(5)
    xyzr = encode_xyzr(anchors())
    channels = detector.config.size.channels
    return Proposals(torch.randn(2, 3, channels), torch.zeros(2, 3, 3), normalized_boxes(xyzr, SIZES), xyzr)


def test_normalized_boxes_are_fractions_of_each_content() -> None:
    found = normalized_boxes(encode_xyzr(anchors()), SIZES)
    scale = torch.tensor([[120.0, 60.0, 120.0, 60.0], [90.0, 128.0, 90.0, 128.0]]).unsqueeze(1)
    torch.testing.assert_close(found, anchors() / scale, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_proposals_refine_their_anchors() -> None:
    """README of the family, section 4: `xy += d_xy * 2^z`, `(z, r) += (d_z, d_r)`, over the content's own size."""
    detector = random_detector()
    features, allowed = pyramid(detector.config.size.channels), torch.ones(2, 1, 1, 3, dtype=torch.bool)
    found = detector.proposals(features, anchors(), allowed, SIZES)
    branches = detector.proposals.branches
    deltas = branches.box_deltas(branches.box_branch(found.queries))
    x, y, z, r = encode_xyzr(anchors()).unbind(-1)
    centre = torch.stack((x + deltas[..., 0] * 2**z, y + deltas[..., 1] * 2**z), dim=-1) * 4
    z, r = z + deltas[..., 2], r + deltas[..., 3]
    size = torch.stack((2 ** (z - r), 2 ** (z + r)), dim=-1) * 4
    expected = torch.cat((centre, size), dim=-1) / SIZES.flip(-1).repeat(1, 2).unsqueeze(1)
    torch.testing.assert_close(found.boxes, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, branches.class_logits(branches.class_branch(found.queries)))


@torch.no_grad()
def test_sampling_points_lie_around_the_box() -> None:
    """`xy = centre + d_xy * (w, h)` of the decoded box, `z = box z + dz`; offsets in the order group, point, axis."""
    detector = random_detector()
    layer, size = detector.heads["main"].sample_and_mix, detector.config.size
    proposals = proposals_of(detector)
    points = layer.sampling_points(proposals.queries, decode_xyzr(proposals.xyzr), proposals.xyzr[..., 2:3])
    assert points.shape == (2, 3, size.sampling_groups, size.sampling_points, 3)
    offsets = layer.offsets(proposals.queries)[1, 1]
    box, z = decode_xyzr(proposals.xyzr)[1, 1], proposals.xyzr[1, 1, 2]
    for group, point in ((0, 0), (1, 5), (3, 15)):
        dx, dy, dz = offsets[(group * size.sampling_points + point) * 3 :][:3]
        expected = torch.stack((box[0] + dx * box[2], box[1] + dy * box[3], z + dz))
        torch.testing.assert_close(points[1, 1, group, point], expected)


@torch.no_grad()
def test_sample_and_mix_adds_to_the_query() -> None:
    detector = random_detector()
    layer, features = detector.heads["main"].sample_and_mix, pyramid(detector.config.size.channels)
    queries, _, _, xyzr = proposals_of(detector)
    points = layer.sampling_points(queries, decode_xyzr(xyzr), xyzr[..., 2:3])
    parameters = layer.parameters_of_query(queries)
    mixed = sampling_mixing(features.maps, points, parameters, detector.config.size.mixed_points)
    expected = F.layer_norm(queries + layer.out_projection(mixed), (queries.shape[-1],))
    torch.testing.assert_close(layer(features.maps, queries, points), expected)


def test_deltas_of_sparse_rcnn() -> None:
    """Deltas over (2, 2, 1, 1); the size's exponent is held at log(100000/16) (README of the family, section 5)."""
    box = (0.5, 0.4, 0.2, 0.1)
    found = apply_deltas(torch.tensor(box), torch.tensor((1.0, -0.5, 0.3, -0.7)))
    expected = (0.5 + 0.5 * 0.2, 0.4 - 0.25 * 0.1, 0.2 * math.exp(0.3), 0.1 * math.exp(-0.7))
    torch.testing.assert_close(found, torch.tensor(expected))
    largest = apply_deltas(torch.tensor(box), torch.tensor((0.0, 0.0, 50.0, 0.0)))
    torch.testing.assert_close(largest[2], torch.tensor(0.2 * 100000 / 16))


@torch.no_grad()
def test_dynamic_convolution_by_the_formula() -> None:
    """Per query `relu(LN(x P1))`, `relu(LN(. P2))`, position-major, then linear, LN, relu."""
    torch.manual_seed(6)
    channels, inner = 6, 3
    layer = DynamicConvolution(channels, inner)
    queries, rois = torch.randn(2, 4, channels), torch.randn(2, 4, channels, 7, 7)
    found = layer(queries, rois)
    for image in range(2):
        for query in range(4):
            parameters = layer.parameters_of_query(queries[image, query])
            first = parameters[: channels * inner].reshape(channels, inner)
            second = parameters[channels * inner :].reshape(inner, channels)
            x = rois[image, query].permute(1, 2, 0).reshape(49, channels)
            x = F.relu(F.layer_norm(x @ first, (inner,)))
            x = F.relu(F.layer_norm(x @ second, (channels,)))
            expected = F.relu(F.layer_norm(layer.out_projection(x.flatten()), (channels,)))
            torch.testing.assert_close(found[image, query], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_sparse_rcnn_head_looks_at_the_proposal() -> None:
    """Its features are those of the proposal's box in pixels of its own content."""
    detector = random_detector(small_config(decoder="sparse_rcnn"))
    head, features = detector.heads["main"], pyramid(detector.config.size.channels)
    proposals = proposals_of(detector)
    rois = pyramid_roi_align(features.maps, anchors())
    seen: list[Tensor] = []
    head.dynamic_convolution.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    head(features, proposals.queries, proposals, torch.ones(2, 1, 1, 3, dtype=torch.bool), SIZES)
    torch.testing.assert_close(seen[0], rois, rtol=1e-3, atol=1e-3)


def test_boxes_take_their_features_from_p3_to_p5_where_there_is_no_p2() -> None:
    features, boxes = pyramid(4, first=3), torch.tensor([[[60.0, 60.0, side, side] for side in (9, 300, 900)]])
    boxes = boxes.repeat(2, 1, 1)
    assert torch.equal(features.rois(boxes), pyramid_roi_align(features.maps[:3], boxes, 8))
    assert torch.equal(features.level("P3"), features.maps[0])
    assert torch.equal(pyramid(4).level("P3"), pyramid(4).maps[1])


@torch.no_grad()
def test_deformable_head_looks_around_the_proposal() -> None:
    """Places `centre + offset / points * half the box` on each level's padded map, boxes from the proposal's logits."""
    detector = random_detector(small_config(decoder="deformable"))
    head, size = detector.heads["main"], detector.config.size
    features, proposals = pyramid(size.channels, first=3), proposals_of(detector)
    seen: list[Tensor] = []
    head.branches.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    allowed = torch.ones(2, 1, 1, 3, dtype=torch.bool)
    with recorded() as values:
        logits, boxes = head(features, proposals.queries, proposals, allowed, SIZES)
    sines = sine_embedding(proposals.boxes * 2 * math.pi, size.channels // 2).flatten(-2)
    position = head.box_embedding.norm(head.box_embedding.projection(sines))
    layer, attention = head.layer, head.layer.cross_attention
    queries = layer.self_attention_norm(proposals.queries + layer.self_attention(proposals.queries, position))
    shape = (2, 3, size.attention_heads, 4, size.attended_points, 2)
    offsets = attention.offsets(queries + position).reshape(shape)
    levels = features.levels
    assert levels is not None
    for image, query, number, level, point in ((0, 0, 0, 0, 0), (1, 2, 1, 3, 2), (1, 1, 3, 2, 1)):
        box = proposals.boxes[image, query] * levels.ratios[image, level].repeat(2)
        expected = box[:2] + offsets[image, query, number, level, point] / size.attended_points * box[2:] / 2
        place = values["head/points"][image, query, number, level * size.attended_points + point]
        torch.testing.assert_close(place, expected)
    torch.testing.assert_close(logits, head.branches.logits(seen[0]))
    expected = (torch.logit(proposals.boxes) + head.branches.deltas(seen[0])).sigmoid()
    torch.testing.assert_close(boxes, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_deformable_head_takes_proposals_that_reach_beyond_the_image() -> None:
    """They count as what of them can be a fraction; queries that are not there change nothing."""
    detector = random_detector(small_config(decoder="deformable"))
    head, features = detector.heads["main"], pyramid(detector.config.size.channels, first=3)
    proposals, allowed = proposals_of(detector), torch.tensor([True, True, False])[None, None, None]
    wild = proposals._replace(boxes=torch.tensor([-0.2, 1.4, 0.0, 3.0]).expand(2, 3, 4))
    held = proposals._replace(boxes=torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(2, 3, 4))
    found = head(features, proposals.queries, wild, allowed, SIZES)
    assert all(value.isfinite().all() for value in found)
    for one, other in zip(found, head(features, proposals.queries, held, allowed, SIZES), strict=True):
        assert torch.equal(one, other)
    queries = proposals.queries.clone()
    queries[:, 2] += 1
    for one, other in zip(found, head(features, queries, wild, allowed, SIZES), strict=True):
        torch.testing.assert_close(one[:, :2], other[:, :2])
