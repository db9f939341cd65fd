"""The kernels' PTX, executed on the CPU, against the ops' PyTorch definitions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asag.ops import (
    adaptive_probing_definition,
    deformable_attention_definition,
    gather_anchors_definition,
    pyramid_roi_align_definition,
    sample_grid_definition,
    sampling_mixing_definition,
    select_tokens_definition,
)
from tests.ptx_machine.launch import run_ptx
from tests.trt_plugins.kernel_cases import (
    DEMO,
    LEVELS,
    PUBLISHED,
    RELU_IN_PIXELS,
    SAMPLINGS,
    TOLERANCE,
    Array,
    attention_inputs,
    grid_inputs,
    mixing_inputs,
    probing_inputs,
    pyramid,
    roi_boxes,
    scores_with_ties,
    tensors,
    to_element,
    to_float,
)

HALF_TYPES = ("float16", "bfloat16")

Run = Callable[..., list[Array]]
on_every_machine = pytest.mark.parametrize(
    "run",
    [
        # The first has neither tensor cores of the kernels' kind nor asynchronous copies.
        pytest.param(partial(run_ptx, capability=75), id="PTX 7.5"),
        pytest.param(run_ptx, id="PTX 9.0"),
        # From 10.0 on NVRTC writes PTX with another compiler.
        pytest.param(partial(run_ptx, capability=120), id="PTX 12.0"),
    ],
)
"""For what the compiler could get wrong; values and sizes that the source could get wrong are tried on one."""


def assert_close(actual: Array, expected: Array, tolerance: float) -> None:
    assert np.isfinite(actual).all()
    assert np.abs(actual - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-3)


def check_probing(run: Run, inputs: list[Array], capacity: int, **options: bool) -> list[Array]:
    outputs = run("AdaptiveProbing", inputs, {"stride": 16, "capacity": capacity}, **options)
    expected = adaptive_probing_definition(*tensors(*inputs), 16, capacity)
    for name, actual, wanted in zip(expected._fields, outputs, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted.numpy(), err_msg=name)
    return outputs


@on_every_machine
@pytest.mark.parametrize("capacity", [1, 3, 40])
@pytest.mark.parametrize("coarse", [False, True])
def test_probing_equals_definition(run: Run, capacity: int, coarse: bool) -> None:
    _, _, taken, _, overflow = check_probing(run, probing_inputs(count=300, coarse=coarse), capacity)
    assert taken.any()
    assert (overflow > 0).all() == (capacity < 40)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), height=st.integers(1, 30), width=st.integers(1, 30), coarse=st.booleans())
def test_probing_of_any_map(seed: int, height: int, width: int, coarse: bool) -> None:
    check_probing(run_ptx, probing_inputs(seed, count=40, cells=(height, width), coarse=coarse), capacity=5)


def test_probing_without_candidates_gives_zeros() -> None:
    anchors, valid, feature, sizes = probing_inputs()
    patches, _, taken, candidate, overflow = check_probing(run_ptx, [anchors, np.zeros_like(valid), feature, sizes], 3)
    assert not patches.any()
    assert not taken.any()
    assert not candidate.any()
    assert not overflow.any()


def test_probing_never_selects_nan() -> None:
    anchors, valid, feature, sizes = probing_inputs()
    anchors[:, ::3, 4] = np.nan
    anchors[:, 1::7, 2] = np.nan
    candidate = check_probing(run_ptx, [anchors, valid, feature, sizes], 6)[3]
    assert not candidate[:, ::3].any()


def test_probing_suppresses_at_exactly_the_threshold() -> None:
    # Equal squares of side 240 shifted by 144 along one axis share exactly a quarter of their union: kept.
    anchors, _, feature, sizes = probing_inputs(batch=1, count=40)
    anchors[...] = 0
    anchors[0, :3] = [(200, 200, 9, 9, 0.6), (344, 200, 9, 9, 0.5), (343.99, 200, 9, 9, 0.4)]
    valid = np.ones((1, 40), bool)
    assert check_probing(run_ptx, [anchors, valid, feature, sizes], 5)[2].sum() == 2


@on_every_machine
@pytest.mark.parametrize("element", HALF_TYPES)
def test_probing_crops_any_type(run: Run, element: str) -> None:
    anchors, valid, feature, sizes = probing_inputs()
    expected = adaptive_probing_definition(*tensors(anchors, valid, feature, sizes), 16, 6)
    inputs = [anchors, valid, to_element(feature, element), sizes]
    outputs = run("AdaptiveProbing", inputs, {"stride": 16, "capacity": 6}, element)
    np.testing.assert_array_equal(outputs[0], to_element(expected.patches.numpy(), element))
    np.testing.assert_array_equal(outputs[1], expected.corners.numpy())


def check_gather(
    run: Run, anchors: Array, selectable: Array, first: int, threshold: float, fewest: int, most: int
) -> Array:
    attributes = {"first": first, "keep_threshold": threshold, "fewest": fewest, "most": most}
    boxes, valid = run("GatherAnchors", [anchors, selectable], attributes)
    wanted_boxes, wanted_valid = gather_anchors_definition(*tensors(anchors, selectable), *attributes.values())
    found = wanted_valid.shape[1]  # fewer than `most` where there are fewer anchors
    np.testing.assert_array_equal(valid[:, :found], wanted_valid.numpy())
    np.testing.assert_array_equal(boxes[:, :found], wanted_boxes.numpy())
    assert not valid[:, found:].any()
    assert not boxes[:, found:].any()
    return valid


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31), coarse=st.booleans(), share=st.sampled_from([0.0, 0.05, 0.3, 1.0]), nan=st.booleans()
)
@pytest.mark.parametrize(
    ("first", "threshold", "fewest", "most"),
    [(60, 0.1, 5, 20), (60, 0.6, 40, 100), (60, 0.05, 70, 100), (0, 0.5, 5, 7)],
)
def test_gather_equals_definition(
    first: int, threshold: float, fewest: int, most: int, seed: int, coarse: bool, share: float, nan: bool
) -> None:
    anchors, _, _, _ = probing_inputs(seed, count=160, coarse=coarse)
    random = np.random.default_rng(seed)
    if nan:
        anchors[random.random((2, 160)) < 0.3, 4] = np.nan
    anchors[random.random((2, 160)) < 0.1, 4] = 0.0
    check_gather(run_ptx, anchors, random.random((2, 160)) < share, first, threshold, fewest, most)


@on_every_machine
def test_gather_with_a_negative_threshold_and_negative_confidences(run: Run) -> None:
    anchors, valid, _, _ = probing_inputs(count=160)
    anchors[..., 4] -= 0.5
    check_gather(run, anchors, valid, 60, -0.2, 5, 100)
    check_gather(run, anchors, valid, 60, -0.2, 5, 20)


def test_gather_of_fewer_anchors_than_places() -> None:
    anchors, valid, _, _ = probing_inputs(count=20)
    assert check_gather(run_ptx, anchors, valid, 20, 0.1, 5, 50).any()


@on_every_machine
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("element", TOLERANCE)
def test_align_equals_definition(run: Run, element: str, channels_last: bool) -> None:
    random = np.random.default_rng(3)
    maps = [to_element(map_, element) for map_ in pyramid(random, 2, 12, (40, 56))]
    boxes = roi_boxes(random, 2, 24, 224)
    expected = pyramid_roi_align_definition(*tensors(*(to_float(map_, element) for map_ in maps), boxes)).numpy()
    (rois,) = run("PyramidRoIAlign", [*maps, boxes], element=element, channels_last=channels_last)
    assert_close(to_float(rois, element), expected, TOLERANCE[element])


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**31),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    given=st.sampled_from([(4, 4), (3, 8), (1, 32)]),
)
def test_align_of_any_map(seed: int, height: int, width: int, given: tuple[int, int]) -> None:
    random = np.random.default_rng(seed)
    inputs = [*pyramid(random, 1, 4, (height, width)), roi_boxes(random, 1, 10, 300)]
    expected = pyramid_roi_align_definition(*tensors(*inputs), *given).numpy()
    attributes = dict(zip(("maps", "first_stride"), given, strict=True))
    assert_close(run_ptx("PyramidRoIAlign", inputs, attributes)[0], expected, 1e-4)


@pytest.mark.parametrize(("maps", "stride"), [(0, 4), (5, 4), (4, 12), (4, 0)])
def test_align_has_no_kernel_for_other_pyramids(maps: int, stride: int) -> None:
    inputs = [*pyramid(np.random.default_rng(0), 1, 4, (8, 8)), np.zeros((1, 1, 4), np.float32)]
    with pytest.raises(ValueError, match=f"1 to 4 maps and a power of two as stride, not {maps} and {stride}"):
        run_ptx("PyramidRoIAlign", inputs, {"maps": maps, "first_stride": stride})


def test_align_counts_nan_boxes_as_the_finest_level() -> None:
    random = np.random.default_rng(0)
    boxes = roi_boxes(random, 1, 8, 100)
    boxes[0, 6, 0] = boxes[0, 7, 2] = np.nan
    rois = run_ptx("PyramidRoIAlign", [*pyramid(random, 1, 4, (8, 8)), boxes])[0]
    assert not rois[0, 6].any()
    assert np.isfinite(rois).all()


def mixing_definition(inputs: list[Array], mixed: int, element: str, **attributes: int) -> Array:
    *maps, points, parameters = inputs
    as_float = [to_float(array, element) for array in maps], to_float(parameters, element)
    return sampling_mixing_definition(*tensors(*as_float[0], points, as_float[1]), mixed, **attributes).numpy()


def check_mixing(
    run: Run,
    seed: int,
    sizes: tuple[int, int, int, int],
    finest: tuple[int, int],
    element: str,
    *layout: bool,
    **attributes: int,
) -> None:
    """layout: whether the maps are channels-last, and whether tensor cores may be used."""
    *maps, points, parameters = mixing_inputs(seed, 2, 1, sizes, finest, attributes.get("point_unit", 4))
    inputs = [*(to_element(map_, element) for map_ in maps), points, to_element(parameters, element)]
    (mixed,) = run("SamplingMixing", inputs, {"mixed_points": sizes[3], **attributes}, element, *layout)
    expected = mixing_definition(inputs, sizes[3], element, **attributes)
    assert_close(to_float(mixed, element), expected, TOLERANCE[element])


@on_every_machine
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("element", TOLERANCE)
def test_mixing_equals_definition(run: Run, element: str, channels_last: bool) -> None:
    check_mixing(run, 1, PUBLISHED, (16, 24), element, channels_last, False)


@pytest.mark.parametrize("capability", [90, 120])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("element", HALF_TYPES)
def test_mixing_on_tensor_cores_equals_definition(element: str, channels_last: bool, capability: int) -> None:
    check_mixing(partial(run_ptx, capability=capability), 1, PUBLISHED, (16, 24), element, channels_last, True)


@on_every_machine
@pytest.mark.parametrize(
    ("element", "cores"), [("float32", False), ("float16", False), ("float16", True), ("bfloat16", True)]
)
def test_mixing_with_another_activation_and_unit(run: Run, element: str, cores: bool) -> None:
    check_mixing(run, 3, DEMO, (16, 24), element, True, cores, **RELU_IN_PIXELS)


@pytest.mark.parametrize("element", HALF_TYPES)
def test_mixing_keeps_values_far_from_the_rest(element: str) -> None:
    """Where one point alone finds something, what it finds is many standard deviations from the mean."""
    *maps, points, parameters = mixing_inputs(0, 1, 1, PUBLISHED, (16, 24))
    points[..., 5:, :2] = 1e7
    inputs = [*(to_element(map_, element) for map_ in maps), points, to_element(parameters, element)]
    (mixed,) = run_ptx("SamplingMixing", inputs, {"mixed_points": PUBLISHED[3]}, element, True, True)
    expected = mixing_definition(inputs, PUBLISHED[3], element)
    assert_close(to_float(mixed, element), expected, TOLERANCE[element])


@pytest.mark.parametrize("attributes", [{"activation": 1}, {"point_unit": 1}, {"point_unit": 8}, {"point_unit": 3}])
def test_mixing_takes_each_attribute_by_itself(attributes: dict[str, int]) -> None:
    check_mixing(run_ptx, 4, DEMO, (16, 24), "float32", False, False, **attributes)


def test_mixing_with_relu_keeps_what_is_no_number() -> None:
    *maps, points, parameters = mixing_inputs(0, 1, 1, DEMO, (8, 8), 1)
    parameters[...] = np.nan
    attributes = {"mixed_points": DEMO[3], **RELU_IN_PIXELS}
    assert np.isnan(run_ptx("SamplingMixing", [*maps, points, parameters], attributes)[0]).all()


@pytest.mark.parametrize("attributes", [{"activation": 2}, {"activation": -1}, {"point_unit": 0}])
def test_mixing_of_unknown_kinds_is_refused(attributes: dict[str, int]) -> None:
    inputs = mixing_inputs(0, 1, 1, DEMO, (8, 8))
    with pytest.raises(ValueError, match="SamplingMixing has no activation"):
        run_ptx("SamplingMixing", inputs, {"mixed_points": DEMO[3], **attributes})


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("sizes", "cores"),
    [((2, 8, 8, 16), False), ((1, 24, 16, 24), False), ((3, 48, 16, 48), True), ((8, 16, 32, 64), True), (DEMO, True)],
)
@pytest.mark.parametrize("element", ["float32", "float16"])
def test_mixing_of_other_sizes(
    element: str, sizes: tuple[int, int, int, int], cores: bool, channels_last: bool
) -> None:
    check_mixing(run_ptx, 2, sizes, (5, 9), element, channels_last, cores)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31), height=st.integers(1, 12), width=st.integers(1, 12))
def test_mixing_of_any_map(seed: int, height: int, width: int) -> None:
    inputs = mixing_inputs(seed, 1, 2, DEMO, (height, width))
    (mixed,) = run_ptx("SamplingMixing", inputs, {"mixed_points": DEMO[3]})
    assert_close(mixed, mixing_definition(inputs, DEMO[3], "float32"), 1e-4)


def test_mixing_of_points_outside_every_map_is_zero() -> None:
    *maps, points, parameters = mixing_inputs(0, 1, 2, DEMO, (8, 8))
    points[..., :2] = -50
    (mixed,) = run_ptx("SamplingMixing", [*maps, points, parameters], {"mixed_points": DEMO[3]})
    assert not mixed.any()


def test_mixing_reads_no_cell_outside() -> None:
    # Weights of cells outside are zero, but zero times infinity would show.
    *maps, points, parameters = mixing_inputs(0, 1, 2, DEMO, (8, 8))
    for map_ in maps:
        map_[..., 0, 0] = np.inf
    points[..., :2] = points[..., :2].clip(2, 6)  # away from P2's first cell
    points[..., 2] = 0
    maps[1:] = [np.zeros_like(map_) for map_ in maps[1:]]
    (mixed,) = run_ptx("SamplingMixing", [*maps, points, parameters], {"mixed_points": DEMO[3]})
    assert np.isfinite(mixed).all()


def check_attention(run: Run, inputs: list[Array], element: str = "float32", **levels: tuple[int, ...]) -> Array:
    value, locations, weights = inputs
    levels = levels or LEVELS
    given = [to_element(value, element), locations, to_element(weights, element)]
    (attended,) = run("MultiScaleDeformableAttention", given, levels, element)
    exact = to_float(given[0], element), locations, to_float(given[2], element)
    expected = deformable_attention_definition(*tensors(*exact), **levels).numpy()
    # Sums are float32: what differs is the rounding of the result.
    assert_close(to_float(attended, element), expected, {"float32": 1e-5, "float16": 6e-4, "bfloat16": 5e-3}[element])
    return attended


@on_every_machine
@pytest.mark.parametrize("element", TOLERANCE)
def test_attention_equals_definition(run: Run, element: str) -> None:
    check_attention(run, attention_inputs(heads=8, channels=32), element)


@pytest.mark.parametrize("element", TOLERANCE)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 8, 12, 24, 48, 64, 128])
def test_attention_of_other_numbers_of_channels(channels: int, element: str) -> None:
    """One to sixteen threads a head, some of them idle, and loads of all sizes."""
    check_attention(run_ptx, attention_inputs(channels=channels, queries=3), element)


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**31),
    queries=st.integers(1, 40),
    levels=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=5),
)
def test_attention_of_any_levels(seed: int, queries: int, levels: list[tuple[int, int, int]]) -> None:
    shapes = tuple(side for height, width, _ in levels for side in (height, width))
    points = tuple(count for _, _, count in levels)
    inputs = attention_inputs(seed, 1, queries, 2, 8, shapes, points)
    check_attention(run_ptx, inputs, level_shapes=shapes, level_points=points)


def test_attention_of_large_blocks() -> None:
    """Many queries run in larger blocks than few do."""
    levels = {"level_shapes": (2, 3), "level_points": (1,)}
    check_attention(run_ptx, attention_inputs(0, 1, 260, 8, 256, *levels.values()), **levels)


@pytest.mark.parametrize("element", TOLERANCE)
def test_the_order_of_threads_does_not_show_in_attention(element: str) -> None:
    runs = [check_attention(partial(run_ptx, backwards=way), attention_inputs(), element) for way in (False, True)]
    assert runs[0].tobytes() == runs[1].tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level_points": (4, 2, 1, 2)}, "not those of its levels"),
        ({"level_shapes": LEVELS["level_shapes"][:6], "level_points": (4, 2, 4)}, "not those of its levels"),
    ],
)
def test_attention_of_levels_that_do_not_fit_is_refused(change: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_ptx("MultiScaleDeformableAttention", attention_inputs(), {**LEVELS, **change})


def test_attention_of_too_many_channels_is_refused() -> None:
    with pytest.raises(
        ValueError, match="no kernel for 157 cells with 3 heads of 129 channels; use the op's ONNX body"
    ):
        run_ptx("MultiScaleDeformableAttention", attention_inputs(channels=129), LEVELS)


def check_samples(run: Run, inputs: list[Array], attributes: dict[str, int], element: str = "float32") -> None:
    value, grid = inputs
    given = to_element(value, element)
    (samples,) = run("SampleGrid", [given, grid], attributes, element)
    expected = sample_grid_definition(*tensors(to_float(given, element), grid), **attributes).numpy()
    assert_close(to_float(samples, element), expected, {"float32": 1e-5, "float16": 6e-4, "bfloat16": 5e-3}[element])


@on_every_machine
@pytest.mark.parametrize("attributes", SAMPLINGS)
def test_samples_equal_definition(run: Run, attributes: dict[str, int]) -> None:
    check_samples(run, grid_inputs(), attributes)


@pytest.mark.parametrize("element", HALF_TYPES)
def test_samples_of_half_precision(element: str) -> None:
    check_samples(run_ptx, grid_inputs(1), SAMPLINGS[0], element)


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**31),
    value=st.tuples(st.integers(1, 2), st.integers(1, 20), st.integers(1, 4), st.integers(1, 4)),
    attributes=st.sampled_from(SAMPLINGS),
)
def test_samples_of_small_maps(seed: int, value: tuple[int, int, int, int], attributes: dict[str, int]) -> None:
    check_samples(run_ptx, grid_inputs(seed, value, (3, 50)), attributes)


def test_samples_with_another_padding_are_refused() -> None:
    with pytest.raises(ValueError, match="SampleGrid has no padding 2 or alignment 0; each is 0 or 1"):
        run_ptx("SampleGrid", grid_inputs(), {"padding": 2, "align_corners": 0})


def check_selection(run: Run, scores: Array, counts: tuple[int, ...], capacity: int) -> None:
    inputs = [scores, np.array(counts)]
    expected = select_tokens_definition(*tensors(*inputs), capacity)
    for actual, wanted in zip(run("SelectTokens", inputs, {"capacity": capacity}), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted.numpy())


@on_every_machine
@pytest.mark.parametrize("ties", [False, True])
def test_selection_equals_definition(run: Run, ties: bool) -> None:
    scores = np.random.default_rng(0).normal(size=(2, 700)).astype(np.float32)
    check_selection(run, scores_with_ties(0, 2, 700) if ties else scores, (200, 77), 200)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 300), data=st.data())
def test_selection_of_any_number(seed: int, tokens: int, data: st.DataObject) -> None:
    """Equal scores, infinities and what is no number; no token, all, and more than there are places."""
    capacity = data.draw(st.integers(1, tokens))
    counts = data.draw(st.tuples(*[st.integers(-1, tokens + 2)] * 2))
    check_selection(run_ptx, scores_with_ties(seed, 2, tokens), counts, capacity)


def test_selection_of_more_tokens_than_registers_hold() -> None:
    scores = np.random.default_rng(0).normal(size=(1, 34_000)).astype(np.float32)
    check_selection(run_ptx, np.round(scores, 2), (5000,), 6000)


def test_the_order_of_threads_does_not_show_in_a_selection() -> None:
    check_selection(partial(run_ptx, backwards=True), scores_with_ties(0, 2, 300), (50, 7), 60)


@pytest.mark.parametrize("cores", [False, True])
def test_the_order_of_threads_does_not_show_in_mixing(cores: bool) -> None:
    *maps, points, parameters = mixing_inputs(5, 1, 2, PUBLISHED, (16, 16))
    element = "float16" if cores else "float32"
    inputs = [*(to_element(map_, element) for map_ in maps), points, to_element(parameters, element)]
    forwards, back = (
        run_ptx("SamplingMixing", inputs, {"mixed_points": 128}, element, True, cores, backwards=way)[0]
        for way in (False, True)
    )
    assert forwards.tobytes() == back.tobytes()


def test_the_order_of_threads_does_not_show_in_what_is_chosen() -> None:
    check_probing(partial(run_ptx, backwards=True), probing_inputs(count=300), 7)
    anchors, valid, _, _ = probing_inputs(count=300, coarse=True)
    check_gather(partial(run_ptx, backwards=True), anchors, valid, 60, 0.1, 50, 40)


@on_every_machine
def test_16_bit_floats_pass_through_unchanged(run: Run) -> None:
    # A one-cell map gives its own value, exactly: four equal samples, weights that add up to 1.
    values = np.array([0, 6e-8, 1e-7, 5.9e-5, 6.2e-5, 1.0009765, 0.3333, 2049, 65504, -7.7], np.float32)
    for element in HALF_TYPES:
        maps = [to_element(values.reshape(1, -1, 1, 1), element)] * 4
        boxes = np.array([[(2, 2, 4, 4)]], np.float32)
        (rois,) = run("PyramidRoIAlign", [*maps, boxes], element=element)
        np.testing.assert_array_equal(rois[0, 0, :, 3, 3], maps[0].reshape(-1))
