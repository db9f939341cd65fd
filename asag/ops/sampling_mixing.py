"""SamplingMixing: 3D feature sampling and adaptive mixing of an AdaMixer layer.

Gao et al., "AdaMixer: A Fast-Converging Query-Based Object Detector", sections 3.2 and 3.3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from asag.ops.pyramid_roi_align import STRIDES

POINT_UNIT = 4
"""Pixels per unit of a point, unless an attribute says otherwise: the stride of P2."""

ACTIVATIONS = ("gelu", "relu")
"""What may follow the norms: the exact GELU or the ReLU. The op's attribute `activation` is a place in this tuple."""


def sample_pyramid(features: tuple[Tensor, ...], points: Tensor, point_unit: int = POINT_UNIT) -> Tensor:
    """Bilinear samples of each group's channels, the four levels summed with weights from z.

    features: P2..P5, each [B, G*C, H, W]; points: [B, Q, G, P, 3]: x, y and 2^z in units of `point_unit` pixels
    -> [B, Q, G, P, C]. A level's weight is the softmax of `-(z - log2(stride))^2 / 2`, the stride in the same unit. A
    map of W x H cells at stride s spans W*s x H*s pixels; zeros outside.
    """
    batch, queries, groups, count = points.shape[:4]
    # Made where it is needed: numbers copied to a GPU would be waited for. Each stride is twice the one before.
    first = math.log2(STRIDES[0] / point_unit)
    levels = torch.arange(len(STRIDES), device=points.device, dtype=points.dtype) + first
    weights = torch.softmax(-((points[..., 2:] - levels) ** 2) / 2, dim=-1)
    weights = weights.transpose(1, 2).reshape(batch * groups, 1, queries, count, len(features))
    places = (points[..., :2] * (2 * point_unit)).transpose(1, 2).reshape(batch * groups, queries, count, 2)
    total = None
    for level, (feature, stride) in enumerate(zip(features, STRIDES, strict=True)):
        height, width = feature.shape[-2:]
        # grid_sample wants -1..1 over the map's whole extent.
        grid = torch.stack((places[..., 0] / (width * stride), places[..., 1] / (height * stride)), dim=-1) - 1
        grouped = feature.reshape(batch * groups, -1, height, width)
        sampled = F.grid_sample(grouped, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        weighted = sampled * weights[..., level]
        total = weighted if total is None else total + weighted
    assert total is not None
    return total.unflatten(0, (batch, groups)).permute(0, 3, 1, 4, 2)


def adaptive_mixing(samples: Tensor, parameters: Tensor, mixed_points: int, activation: int = 0) -> Tensor:
    """`o = act(LN(x M))`, `o = act(LN(S o))`, both norms over the last two axes, without parameters.

    samples: [B, Q, G, P, C]; parameters: [B, Q, G*(C*C + mixed_points*P)], per group M then S, row-major
    -> [B, Q, G*mixed_points*C], flattened (group, point, channel). activation: a place in :data:`ACTIVATIONS`.
    """
    act = getattr(F, ACTIVATIONS[activation])
    count, channels = samples.shape[-2:]
    per_group = parameters.unflatten(2, (samples.shape[2], -1))
    channel_matrix = per_group[..., : channels * channels].unflatten(-1, (channels, channels))
    point_matrix = per_group[..., channels * channels :].unflatten(-1, (mixed_points, count))
    mixed = act(F.layer_norm(samples @ channel_matrix, (count, channels)))
    mixed = act(F.layer_norm(point_matrix @ mixed, (mixed_points, channels)))
    return mixed.flatten(2)


def sampling_mixing_definition(
    p2: Tensor,
    p3: Tensor,
    p4: Tensor,
    p5: Tensor,
    points: Tensor,
    parameters: Tensor,
    mixed_points: int,
    activation: int = 0,
    point_unit: int = POINT_UNIT,
) -> Tensor:
    """:func:`sample_pyramid` followed by :func:`adaptive_mixing`; shapes as there."""
    return adaptive_mixing(sample_pyramid((p2, p3, p4, p5), points, point_unit), parameters, mixed_points, activation)


@torch.library.custom_op("asag::sampling_mixing", mutates_args=())
def _sampling_mixing(
    p2: Tensor,
    p3: Tensor,
    p4: Tensor,
    p5: Tensor,
    points: Tensor,
    parameters: Tensor,
    mixed_points: int,
    activation: int,
    point_unit: int,
) -> Tensor:
    return sampling_mixing_definition(p2, p3, p4, p5, points, parameters, mixed_points, activation, point_unit)


@_sampling_mixing.register_fake
def _(
    p2: Tensor,
    p3: Tensor,
    p4: Tensor,
    p5: Tensor,
    points: Tensor,
    parameters: Tensor,
    mixed_points: int,
    activation: int,
    point_unit: int,
) -> Tensor:
    return parameters.new_empty((*points.shape[:2], p2.shape[1] * mixed_points))


def sampling_mixing(
    features: list[Tensor],
    points: Tensor,
    parameters: Tensor,
    mixed_points: int,
    activation: str = "gelu",
    point_unit: int = POINT_UNIT,
) -> Tensor:
    """:func:`sampling_mixing_definition` of P2..P5, as one op where no gradient is needed.

    activation: its name, one of :data:`ACTIVATIONS`.
    """
    p2, p3, p4, p5 = features
    attributes = mixed_points, ACTIVATIONS.index(activation), point_unit
    if torch.is_grad_enabled() and (p2.requires_grad or points.requires_grad or parameters.requires_grad):
        return sampling_mixing_definition(p2, p3, p4, p5, points, parameters, *attributes)
    return torch.ops.asag.sampling_mixing(p2, p3, p4, p5, points, parameters, *attributes)
