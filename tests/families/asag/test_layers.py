"""Attention and branches by their formulas."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asag.families.asag.geometry import position_embedding
from asag.families.asag.layers import MLP, Branches, FeedForward, GeometryAttention, SelfAttention, exclude


def everything(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[0], 1, 1, tokens.shape[1], dtype=torch.bool)


@torch.no_grad()
def test_self_attention_equals_torch_s() -> None:
    torch.manual_seed(0)
    ours = SelfAttention(32, 4)
    reference = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    reference.in_proj_weight.copy_(ours.in_projection.weight)
    reference.in_proj_bias.copy_(ours.in_projection.bias)
    reference.out_proj.load_state_dict(ours.out_projection.state_dict())
    tokens, bias = torch.randn(2, 6, 32), torch.randn(2, 4, 6, 6)
    expected, _ = reference(tokens, tokens, tokens, attn_mask=bias.flatten(0, 1), need_weights=False)
    torch.testing.assert_close(ours(tokens, bias), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_geometry_attention_by_the_formula() -> None:
    """`a = q + pe`, scores plus `tau * log(iof + 1e-7)`, `LN(attention(a) + a)` (README of the family, section 4)."""
    torch.manual_seed(1)
    layer = GeometryAttention(32, 4)
    queries, xyzr = torch.randn(1, 5, 32), torch.rand(1, 5, 4) * torch.tensor((20.0, 20.0, 4.0, 1.0))
    x, y, z, r = xyzr[0].unbind(-1)
    width, height = 2 ** (z - r), 2 ** (z + r)
    bias = torch.empty(4, 5, 5)
    for i in range(5):
        for j in range(5):
            overlap_x = min(x[i] + width[i] / 2, x[j] + width[j] / 2) - max(x[i] - width[i] / 2, x[j] - width[j] / 2)
            overlap_y = min(y[i] + height[i] / 2, y[j] + height[j] / 2) - max(
                y[i] - height[i] / 2, y[j] - height[j] / 2
            )
            share = max(0.0, float(overlap_x)) * max(0.0, float(overlap_y)) / float(width[i] * height[i])
            bias[:, i, j] = layer.tau * math.log(share + 1e-7)
    tokens = queries + position_embedding(xyzr, 32)
    expected = F.layer_norm(layer.attention(tokens, bias[None]) + tokens, (32,))
    torch.testing.assert_close(layer(queries, xyzr, everything(queries)), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_excluded_queries_change_nothing() -> None:
    torch.manual_seed(2)
    layer = GeometryAttention(32, 4)
    queries, xyzr = torch.randn(1, 6, 32), torch.rand(1, 6, 4) * 3
    allowed = everything(queries)
    allowed[..., 4:] = False
    padded = layer(queries, xyzr, allowed)
    alone = layer(queries[:, :4], xyzr[:, :4], allowed[..., :4])
    torch.testing.assert_close(padded[:, :4], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_query_without_anyone_to_attend_to_stays_a_number() -> None:
    layer = GeometryAttention(32, 4)
    queries, xyzr = torch.randn(1, 3, 32), torch.rand(1, 3, 4)
    assert layer(queries, xyzr, ~everything(queries)).isfinite().all()
    assert exclude(torch.zeros(1, 1, 3, 3), ~everything(queries)).isfinite().all()


@torch.no_grad()
def test_feed_forward_and_mlp_by_the_formula() -> None:
    torch.manual_seed(3)
    layer, x = FeedForward(8, 16), torch.randn(2, 3, 8)
    first, last = layer.mlp[0], layer.mlp[2]
    expected = F.layer_norm(x + last(F.gelu(first(x))), (8,))
    torch.testing.assert_close(layer(x), expected)
    assert [type(part).__name__ for part in MLP((4, 5, 6, 7))] == ["Linear", "GELU", "Linear", "GELU", "Linear"]


@torch.no_grad()
def test_untrained_branches_keep_the_box_and_doubt_every_class() -> None:
    logits, deltas = Branches(16, 5)(torch.randn(2, 3, 16))
    assert not deltas.any()
    assert logits.shape == (2, 3, 5)
    assert 0.001 < float(logits.sigmoid().mean()) < 0.05
