from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou
from train.matching import TargetGroups, assign, iou_and_giou, matching_costs, object_area_factor, pad_targets


def boxes_of(count: int, generator: torch.Generator) -> Tensor:
    size = torch.rand(count, 2, generator=generator) * 0.5 + 0.01
    return torch.cat([torch.rand(count, 2, generator=generator), size], -1)


def groups_of(counts: list[int], classes: int, generator: torch.Generator) -> TargetGroups:
    targets = [
        {"boxes": boxes_of(n, generator), "labels": torch.randint(0, classes, (n,), generator=generator)}
        for n in counts
    ]
    return pad_targets(targets, torch.device("cpu"))


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


def test_cost_of_a_pair_by_hand() -> None:
    logits = torch.tensor([[[0.3, -1.2]]])
    box = torch.tensor([[[0.5, 0.5, 0.2, 0.2]]])
    wanted = torch.tensor([[[0.6, 0.5, 0.2, 0.2]]])
    groups = TargetGroups(wanted, torch.tensor([[1]]), torch.tensor([[True]]), object_area_factor(wanted))
    p = torch.sigmoid(torch.tensor(-1.2))
    focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
    # Overlap 0.1 x 0.2 of a union of 0.06, and the hull (0.3 x 0.2) holds nothing else.
    expected = (2 * focal + 5 * 0.1 - 2 * (0.02 / 0.06)) * (4 - 3 * 0.2)
    cost, iou = matching_costs(logits, box, None, groups)
    torch.testing.assert_close(cost[0, 0, 0], expected)
    torch.testing.assert_close(iou[0, 0, 0], torch.tensor(1 / 3))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 2**20))
def test_assignment_is_optimal_one_to_one_and_leaves_padding_out(counts: list[int], queries: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = groups_of(counts, 3, generator)
    logits = torch.randn(len(counts), queries, 3, generator=generator)
    boxes = boxes_of(len(counts) * queries, generator).reshape(len(counts), queries, 4)
    valid = torch.rand(len(counts), queries, generator=generator) < 0.7
    cost, _ = matching_costs(logits, boxes, valid, groups)
    matches, again = assign([cost, cost])
    assert torch.equal(matches.query, again.query)
    assert valid[matches.group, matches.query].all()
    assert groups.valid[matches.group, matches.target].all()
    for group, count in enumerate(counts):
        chosen = matches.group == group
        query, target = matches.query[chosen].tolist(), matches.target[chosen].tolist()
        rows = valid[group].nonzero().flatten().tolist()
        assert len(set(query)) == len(set(target)) == len(query) == min(count, len(rows))
        best = cheapest(cost[group], rows, list(range(count)))
        assert cost[group, query, target].sum().item() == pytest.approx(best, abs=1e-4)


def cheapest(cost: Tensor, rows: list[int], columns: list[int]) -> float:
    if len(rows) < len(columns):
        cost, rows, columns = cost.T, columns, rows
    options = permutations(rows, len(columns))
    return min(sum(cost[row, column].item() for row, column in zip(option, columns, strict=True)) for option in options)


def test_targets_of_disagreeing_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target 0: boxes must be \[n, 4\]"):
        pad_targets([{"boxes": torch.zeros(2, 4), "labels": torch.zeros(3)}], torch.device("cpu"))
