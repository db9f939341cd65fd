import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train.denoising import (
    assign_slots,
    denoising_attention_mask,
    noise_scale,
    noised_queries,
    repetition_matches,
)


def targets_of(*counts: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(len(counts))
    return [{"boxes": torch.rand(count, 4, generator=generator) * 0.4 + 0.3} for count in counts]


def test_noise_scale_is_constant_or_falls() -> None:
    assert [noise_scale(epoch) for epoch in (0, 30)] == [0.4, 0.4]
    assert [noise_scale(epoch, start=0.8, fall=0.04) for epoch in (0, 10, 36)] == pytest.approx([0.8, 0.4, 0.0])


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(0, 25))
@settings(max_examples=60, deadline=None)
def test_slots_hold_whole_repetitions(counts: list[int], slots: int) -> None:
    objects, group = assign_slots(counts, slots)
    for count, own_objects, own_group in zip(counts, objects, group, strict=True):
        repetitions = slots // count if count else 0
        assert (own_group >= 0).sum() == repetitions * count
        for repetition in range(repetitions):
            assert own_objects[own_group == repetition].tolist() == list(range(count))


def test_noise_stays_within_its_reach_and_follows_its_object() -> None:
    targets = targets_of(3, 0, 7)
    scale = 0.4
    queries = noised_queries(targets, scale, torch.Generator().manual_seed(0), slots=200)
    valid, matches = repetition_matches([3, 0, 7], 200, torch.device("cpu"))
    assert torch.equal(valid, queries.valid)
    assert valid.sum(1).tolist() == [198, 0, 196]
    assert (queries.boxes >= 0).all()
    assert (queries.boxes <= 1).all()
    for image, slot, target in zip(matches.group, matches.query, matches.target, strict=True):
        clean = targets[image]["boxes"][target]
        moved = (queries.boxes[image, slot] - clean).abs()
        assert (moved[:2] <= scale * clean[2:] / 2 + 1e-6).all()
        assert (moved[2:] <= scale * clean[2:] + 1e-6).all()
    used = queries.boxes[2][valid[2]].reshape(28, 7, 4)
    reach = (used - targets[2]["boxes"]).abs().amax(0)
    assert (reach[:, 2:] > 0.5 * scale * targets[2]["boxes"][:, 2:]).all()


def test_the_generator_decides_the_noise() -> None:
    first, same, other = (noised_queries(targets_of(4), 0.4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.boxes, same.boxes)
    assert not torch.equal(first.boxes, other.boxes)


def test_attention_mask_separates_groups_and_keeps_noise_from_ordinary_queries() -> None:
    group = torch.tensor([[0, 0, 1, 1, -1]])
    valid = torch.tensor([[True, True, False]])
    seen = ~denoising_attention_mask(group, valid)[0]
    own, other = [1, 1, 0, 0, 0], [0, 0, 1, 1, 0]
    nothing, ordinary = [0] * 5, [1, 1, 0]
    expected = [own + ordinary] * 2 + [other + ordinary] * 2 + [nothing + ordinary] * 4
    assert seen.int().tolist() == expected


def test_no_slots_for_more_objects_than_slots() -> None:
    queries = noised_queries(targets_of(12), 0.4, slots=10)
    assert not queries.valid.any()
    assert queries.boxes.unique(dim=1).tolist() == [[[0.5, 0.5, 1.0, 1.0]]]
