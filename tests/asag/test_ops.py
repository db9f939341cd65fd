"""The custom ops as PyTorch sees them: schemas, shape rules, and that each op is its definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from asag.ops import (
    adaptive_probing,
    adaptive_probing_definition,
    deformable_attention_definition,
    gather_anchors_definition,
    pyramid_roi_align_definition,
    sample_grid_definition,
    sampling_mixing_definition,
    select_tokens_definition,
)


def features(batch: int, channels: int = 4) -> list[Tensor]:
    return [torch.randn(batch, channels, 32 // stride, 64 // stride) for stride in (4, 8, 16, 32)]


def anchors(batch: int, count: int) -> Tensor:
    return torch.rand(batch, count, 5) * torch.tensor((256.0, 256.0, 60.0, 60.0, 1.0))


def arguments(name: str, batch: int) -> tuple[Any, ...]:
    torch.manual_seed(7)
    everything = torch.ones(batch, 12, dtype=torch.bool)
    sizes = torch.full((batch, 2), 256.0)
    return {
        "adaptive_probing": (anchors(batch, 12), everything, torch.randn(batch, 8, 20, 16), sizes, 16, 3),
        "deformable_attention": (
            torch.randn(batch, 14, 2, 4),
            torch.rand(batch, 5, 2, 5, 2),
            torch.rand(batch, 5, 2, 5),
            [3, 4, 1, 2],
            [3, 2],
        ),
        "gather_anchors": (anchors(batch, 12), everything, 7, 0.1, 2, 6),
        "pyramid_roi_align": (*features(batch), anchors(batch, 5)[..., :4], 3, 8),
        "sampling_mixing": (
            *features(batch),
            torch.rand(batch, 4, 2, 3, 3) * 8,
            torch.randn(batch, 4, 2 * 19),
            5,
            1,
            1,
        ),
        "sample_grid": (torch.randn(batch, 3, 4, 6), torch.rand(batch, 5, 2, 2) * 3 - 1.5, 1, 0),
        "select_tokens": (torch.randn(batch, 12), torch.arange(batch) + 2, 5),
    }[name]


DEFINITIONS: dict[str, Callable[..., Any]] = {
    "adaptive_probing": adaptive_probing_definition,
    "deformable_attention": deformable_attention_definition,
    "gather_anchors": gather_anchors_definition,
    "pyramid_roi_align": pyramid_roi_align_definition,
    "sampling_mixing": sampling_mixing_definition,
    "sample_grid": sample_grid_definition,
    "select_tokens": select_tokens_definition,
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_opcheck(name: str) -> None:
    """Schema without aliasing, and a shape rule that agrees with the result, also for symbolic shapes."""
    torch.library.opcheck(getattr(torch.ops.asag, name).default, arguments(name, 2))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_op_is_its_definition(name: str, batch: int) -> None:
    given = arguments(name, batch)
    found, expected = getattr(torch.ops.asag, name)(*given), DEFINITIONS[name](*given)
    if isinstance(expected, Tensor):
        found, expected = (found,), (expected,)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_probing_uses_the_definition_where_gradients_are_needed() -> None:
    given = list(arguments("adaptive_probing", 2))
    expected = adaptive_probing(*given)
    given[2] = given[2].requires_grad_()
    found = adaptive_probing(*given)
    assert expected.patches.grad_fn is None
    found.patches.sum().backward()
    assert given[2].grad.abs().sum() > 0
    assert all(torch.equal(one.detach(), other) for one, other in zip(found, expected, strict=True))
    with torch.no_grad():
        assert adaptive_probing(*given).patches.grad_fn is None


def test_a_generous_capacity_changes_nothing() -> None:
    *given, _ = arguments("adaptive_probing", 3)
    exact, roomy = adaptive_probing(*given, None), adaptive_probing(*given, 12)
    places = exact.valid.shape[1]
    assert 0 < places < 12
    for name in ("patches", "corners", "valid"):
        assert torch.equal(getattr(roomy, name)[:, :places], getattr(exact, name))
        assert not getattr(roomy, name)[:, places:].any()
    assert torch.equal(roomy.candidate, exact.candidate)
    assert roomy.overflow.tolist() == exact.overflow.tolist() == [0, 0, 0]
