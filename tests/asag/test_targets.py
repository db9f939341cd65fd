"""What families share of comparing predictions with objects."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from asag.training.assignment import pad_targets
from asag.training.boxes import iou_and_giou


def boxes_of(count: int, generator: torch.Generator) -> Tensor:
    size = torch.rand(count, 2, generator=generator) * 0.5 + 0.01
    return torch.cat([torch.rand(count, 2, generator=generator), size], -1)


def test_pairwise_giou_agrees_with_torchvision() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = boxes_of(30, generator), boxes_of(20, generator)
    expected = generalized_box_iou(box_convert(first, "cxcywh", "xyxy"), box_convert(second, "cxcywh", "xyxy"))
    torch.testing.assert_close(iou_and_giou(first[:, None], second)[1], expected)
    torch.testing.assert_close(iou_and_giou(first[:20], second)[1], expected[:20].diagonal())


def test_boxes_without_area_give_finite_overlap_and_gradient() -> None:
    point = torch.tensor([[0.5, 0.5, 0.0, 0.0]], requires_grad=True)
    iou, giou = iou_and_giou(point, point.detach().clone())
    (iou + giou).sum().backward()
    assert iou.isfinite().all()
    assert giou.isfinite().all()
    assert point.grad is not None
    assert point.grad.isfinite().all()


def test_targets_of_disagreeing_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target 0: boxes must be \[n, 4\]"):
        pad_targets([{"boxes": torch.zeros(2, 4), "labels": torch.zeros(3)}], torch.device("cpu"))
