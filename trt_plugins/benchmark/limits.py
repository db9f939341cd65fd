"""What the GPU can do at best, and what an op must do at least: the benchmark's yardstick."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_plugins.benchmark.timing import Timer, interleave
from trt_plugins.operations import OPERATIONS
from trt_plugins.operations.adaptive_probing import PATCH_SIDE
from trt_plugins.operations.pyramid_roi_align import ROI_SIDE
from trt_plugins.resources import Case

FLOAT_LANES = {75: 64, 80: 64, 86: 128, 87: 128, 89: 128, 90: 128, 100: 128, 103: 128, 120: 128}
"""Float32 multiply-adds per clock and multiprocessor, by compute capability times ten.

CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions".
"""

ROUNDS = 10
COPIED = 1 << 30
"""Bytes of the copy; far more than any cache holds."""
SIDE = 8192
"""Rows and columns of the matrix products."""


@dataclass(frozen=True)
class Limits:
    """Rates of this device, the best of several rounds."""

    bytes_per_second: float
    """Read and written while copying."""
    float_measured: float
    """Float32 operations per second of a large matrix product, without tensor cores."""
    half_operations: float
    """Operations per second of a large float16 matrix product, on tensor cores where there are any."""
    float_nominal: float | None = None
    """Float32 operations per second from the highest clock and the number of lanes; None where these are unknown."""

    @property
    def float_operations(self) -> float:
        """The higher of both: a library's product may stay below the hardware, the hardware below its highest clock."""
        return max(self.float_measured, self.float_nominal or 0.0)


@dataclass(frozen=True)
class Work:
    """What one launch must do at least."""

    moved_bytes: float
    operations: float
    uses_tensor_cores: bool

    def microseconds(self, limits: Limits) -> float:
        """The longer of moving and computing."""
        return max(self._moving(limits), self._computing(limits))

    def bound(self, limits: Limits) -> str:
        """Which of the two: "memory" or "arithmetic"."""
        return "memory" if self._moving(limits) >= self._computing(limits) else "arithmetic"

    def _moving(self, limits: Limits) -> float:
        return self.moved_bytes / limits.bytes_per_second * 1e6

    def _computing(self, limits: Limits) -> float:
        return self.operations / (limits.half_operations if self.uses_tensor_cores else limits.float_operations) * 1e6


def measure_limits(device: str, timer: Timer, copied: int = COPIED, side: int = SIDE) -> Limits:
    """Rates of `device` ("cuda" or "cpu") by a copy of `copied` bytes and products of matrices of `side` rows."""
    import torch

    torch.set_float32_matmul_precision("highest")  # no TF32
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # Not zeros: on those a GPU draws less power and clocks higher.
    single = torch.randn((side, side), device=device)
    half = single.half()
    samplers = {
        # In a graph, since half a millisecond is short enough for the start from Python to show.
        "copy": timer.in_graph(lambda: target.copy_(source)),
        "float32": timer.from_python(lambda: single @ single),
        "float16": timer.from_python(lambda: half @ half),
    }
    best = {name: min(times) / 1e6 for name, times in interleave(samplers, ROUNDS).items()}
    return Limits(
        bytes_per_second=2 * copied / best["copy"],
        float_measured=2.0 * side**3 / best["float32"],
        half_operations=2.0 * side**3 / best["float16"],
        float_nominal=_nominal_rate() if device == "cuda" else None,
    )


def float_rate(capability: int, multiprocessors: int, megahertz: float) -> float | None:
    """Float32 operations per second of a GPU, a multiply-add counting twice; None for an unknown `capability`."""
    lanes = FLOAT_LANES.get(capability)
    return None if lanes is None else 2.0 * lanes * multiprocessors * megahertz * 1e6


def least_work(case: Case, inputs: Sequence[NDArray[Any]]) -> Work:
    """What one launch on `inputs`, arrays in the order of the op's signature, must do in the case's type.

    Bytes: inputs once, of feature maps only the cells that these boxes or points touch, and outputs once. Operations:
    interpolation and matrix products; 16-bit products at the rate of tensor cores, whether the kernel uses them or not.
    """
    operation, size = OPERATIONS[case.name], 4 if case.element == "float32" else 2
    sizes = {"element": size, "float32": 4, "bool": 1, "int32": 4, "int64": 8}
    outputs = operation.output_shapes(case.shapes, case.attributes)
    written = sum(float(np.prod(shape)) * sizes[t.type] for t, shape in zip(operation.outputs, outputs, strict=True))
    read = sum(
        float(np.prod(shape)) * sizes[tensor.type]
        for tensor, shape in zip(operation.inputs, case.shapes, strict=True)
        if not tensor.pyramid and tensor.name != "feature"
    )
    moved = read + written + touched_values(case, inputs) * size
    if case.name == "PyramidRoIAlign":
        # 7 x 7 places of 2 x 2 samples of 4 cells, a multiplication and an addition each.
        operations = float(np.prod(outputs[0])) * 4 * 4 * 2
        return Work(moved, operations, False)
    if case.name == "SamplingMixing":
        groups, points = case.shapes[4][2:4]
        channels, mixed = case.shapes[0][1] // groups, case.attributes["mixed_points"]
        places = float(np.prod(case.shapes[4][:3]))
        products = 2.0 * places * (points * channels * channels + mixed * points * channels)
        return Work(moved, products + places * points * channels * 4 * 4 * 2, case.element != "float32")
    return Work(moved, 0.0, False)


def touched_values(case: Case, inputs: Sequence[NDArray[Any]]) -> int:
    """Values of the feature maps that the op needs on `inputs`, each counted once."""
    if case.name == "AdaptiveProbing":
        return _probed_values(case, inputs)
    if case.name == "PyramidRoIAlign":
        return _aligned_values(inputs)
    return _sampled_values(inputs) if case.name == "SamplingMixing" else 0


def _probed_values(case: Case, inputs: Sequence[NDArray[Any]]) -> int:
    import torch

    from asag.ops import adaptive_probing_definition

    anchors, valid, feature, sizes = (torch.from_numpy(array) for array in inputs)
    found = adaptive_probing_definition(anchors, valid, feature, sizes, **case.attributes)
    batch, channels, height, width = inputs[2].shape
    touched = np.zeros((batch, height, width), np.bool_)
    for image, place in found.valid.nonzero().tolist():
        x, y = found.corners[image, place].tolist()
        touched[image, y : y + PATCH_SIDE, x : x + PATCH_SIDE] = True
    return int(touched.sum()) * channels


def _aligned_values(inputs: Sequence[NDArray[Any]]) -> int:
    boxes = inputs[4].astype(np.float64)
    levels = np.floor(4 + np.log2(np.sqrt(boxes[..., 2] * boxes[..., 3]) / 224) + 1e-6).clip(2, 5)
    samples = (np.arange(2 * ROI_SIDE) + 0.5) / (2 * ROI_SIDE) - 0.5
    count = 0
    for level, map_ in enumerate(inputs[:4], start=2):
        image, query = np.nonzero(levels == level)
        x, y = (
            (boxes[image, query, axis, None] + boxes[image, query, 2 + axis, None] * samples) / 2**level
            for axis in (0, 1)
        )
        x, y = np.broadcast_arrays(x[:, None, :], y[:, :, None])
        count += _touched_cells(map_.shape, image[:, None, None], x, y) * map_.shape[1]
    return count


def _sampled_values(inputs: Sequence[NDArray[Any]]) -> int:
    points = inputs[4].astype(np.float64)
    batch, _, groups = points.shape[:3]
    # A group has channels of its own.
    owner = np.arange(batch * groups).reshape(batch, 1, groups, 1)
    count = 0
    for level, map_ in enumerate(inputs[:4]):
        shape = (batch * groups, *map_.shape[1:])
        x, y = (points[..., axis] / 2**level - 0.5 for axis in (0, 1))
        count += _touched_cells(shape, owner, x, y) * (map_.shape[1] // groups)
    return count


def _touched_cells(shape: Sequence[int], owner: NDArray[Any], x: NDArray[np.float64], y: NDArray[np.float64]) -> int:
    """Cells of maps [owners, ..., H, W] that bilinear samples at `x`, `y` (cells) of map `owner` read, each once."""
    owners, height, width = shape[0], *shape[-2:]
    touched = np.zeros((owners, height, width), np.bool_)
    owner = np.broadcast_to(owner, x.shape)
    for right in (0, 1):
        for below in (0, 1):
            column, row = np.floor(x).astype(int) + right, np.floor(y).astype(int) + below
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            touched[owner[inside], row[inside], column[inside]] = True
    return int(touched.sum())


def nvidia_smi(*fields: str) -> list[str] | None:
    """What the driver says of PyTorch's current GPU, or else of the first; None where there is no answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, f"--query-gpu=uuid,{','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        listing = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [[value.strip() for value in line.split(",")] for line in listing.splitlines()]
    rows = [row[1:] for row in sorted(rows, key=lambda row: _identity() not in row[0]) if len(row) == len(fields) + 1]
    return rows[0] if rows else None


def _identity() -> str:
    """The current GPU's, since its number may be another than the driver's; empty where it is not known."""
    import torch

    if not torch.cuda.is_available():
        return ""
    return str(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", ""))


def _nominal_rate() -> float | None:
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    answer = nvidia_smi("clocks.max.sm")
    try:
        megahertz = float(answer[0]) if answer else None
    except ValueError:  # "[N/A]"
        megahertz = None
    if megahertz is None:
        return None
    return float_rate(10 * properties.major + properties.minor, properties.multi_processor_count, megahertz)
