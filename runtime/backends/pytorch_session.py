"""Running a checkpoint with PyTorch, the reference that other backends are compared with."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from asag.runtime.errors import BackendUnavailableError, one_line
from asag.runtime.metadata import ModelMetadata
from asag.runtime.postprocessing import OUTPUT_NAMES
from asag.runtime.preprocessing import as_image, prepare
from asag.runtime.session import INPUT_NAMES, Session, check_device
from asag.runtime.stages.graph import DETECTIONS

if TYPE_CHECKING:
    from torch import Tensor

    from asag.deploy import DeployedDetector


class PyTorchSession(Session):
    """A deployed detector (``asag.deploy.DeployedDetector``) run eagerly, on the CPU or a CUDA GPU.

    ``deployed`` is put into evaluation mode on ``device``; its ``describe()`` gives the metadata. With ``compiled``,
    :meth:`run` goes through ``torch.compile``, which compiles when it first meets a batch size.
    """

    shows_stages = True

    def __init__(self, deployed: DeployedDetector, name: str, device: str = "cpu", compiled: bool = False) -> None:
        import torch

        metadata = ModelMetadata(**deployed.describe())
        self._device = torch.device(device)
        self._deployed: Any = deployed.to(self._device).eval()
        self._forward: Any = torch.compile(self._deployed, dynamic=False) if compiled else self._deployed
        backend = "torch-compile" if compiled else "pytorch"
        super().__init__(
            name=name,
            backend=backend if self._device.type == "cpu" else f"{backend}-{self._device.type}",
            precision=metadata.precision,
            metadata=metadata,
            versions={"torch": torch.__version__},
        )

    def run(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one batch; see :meth:`runtime.session.Session.run`."""
        import torch

        with torch.inference_mode():
            outputs = self._forward(*self._inputs(tensors))
        return _on_host(outputs)

    def device_seconds(self, tensors: Mapping[str, NDArray]) -> float | None:
        """Run one batch and return what the network took between CUDA events, without copies; None on the CPU."""
        import torch

        if self._device.type == "cpu":
            return None
        with torch.inference_mode():
            inputs = self._inputs(tensors)
            began = self._now()
            self._forward(*inputs)
            return self._seconds(began, self._now())

    def timed_run(self, tensors: Mapping[str, NDArray]) -> tuple[dict[str, NDArray], dict[str, float]]:
        """What :meth:`run` gives, eagerly, and the seconds of each part of the network and of ``copies``.

        Parts are those of :func:`runtime.stages.graph.network_parts`; each ends where the forward pass names its last
        stage. On a GPU their times are those between CUDA events.
        """
        import torch

        from asag.detector import listening

        part_of = {stage.name: stage.timed_as for stage in self.metadata.stages}
        marks: list[tuple[str, Any]] = []

        def mark(part: str) -> None:
            marks.append((part, self._now()))

        with torch.inference_mode(), listening(lambda name, values: mark(part_of[name])):
            mark("")
            inputs = self._inputs(tensors)
            mark("copies")
            outputs = self._deployed(*inputs)
            mark(DETECTIONS)
            found = _on_host(outputs)
            mark("copies")
        seconds: dict[str, float] = {}
        for (_, earlier), (part, later) in pairwise(marks):
            seconds[part] = seconds.get(part, 0.0) + self._seconds(earlier, later)
        return found, seconds

    def _now(self) -> Any:
        """This moment in the device's work: an event on a GPU, else the clock."""
        if self._device.type == "cpu":
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _seconds(self, earlier: Any, later: Any) -> float:
        """Between two moments, once the device has passed both."""
        if self._device.type == "cpu":
            return later - earlier
        later.synchronize()
        return earlier.elapsed_time(later) / 1e3

    def stage_values(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """What every stage hands on; see :meth:`runtime.session.Session.stage_values`."""
        import torch

        from asag.detector import recorded

        with torch.inference_mode(), recorded() as values:
            outputs = self._deployed(*self._inputs(tensors))
        return {name: value.cpu().numpy() for name, value in values.items()} | _on_host(outputs)

    def _inputs(self, tensors: Mapping[str, NDArray]) -> list[Tensor]:
        import torch

        return [torch.from_numpy(np.ascontiguousarray(tensors[name])).to(self._device) for name in INPUT_NAMES]

    def close(self) -> None:
        """Release the model and its memory."""
        self._deployed = self._forward = None


def _on_host(outputs: Sequence[Tensor]) -> dict[str, NDArray]:
    return {name: value.cpu().numpy() for name, value in zip(OUTPUT_NAMES, outputs, strict=True)}


def open_compiled(path: Path, device: str = "cpu", threads: int | None = None) -> PyTorchSession:
    """A checkpoint run through ``torch.compile``, compiled for one image before this returns.

    Raises what :func:`runtime.opening.open_session` does, and BackendUnavailableError where nothing can be compiled.
    """
    kind, device_index = check_device(device)
    session = open_pytorch(path, kind, device_index, threads, compiled=True)
    blank = prepare([as_image(np.zeros((64, 64, 3), np.uint8))], session.metadata)
    try:
        session.run(blank)
    except Exception as error:  # the compiler's own errors, a missing C++ compiler, an unsupported operation
        raise BackendUnavailableError(f"torch.compile cannot compile the model here: {one_line(error)}") from None
    return session


def open_pytorch(
    path: Path,
    kind: str,
    device_index: int,
    threads: int | None,
    input_size: tuple[int, int] | None = None,
    choices: Mapping[str, Any] | None = None,
    compiled: bool = False,
) -> PyTorchSession:
    """Load a safetensors checkpoint and deploy it as an export would.

    ``threads`` sets PyTorch's number of CPU threads, which holds for the whole process; ``choices`` as in
    :func:`asag.checkpoint.load_detector`, ``compiled`` as in :class:`PyTorchSession`.
    """
    try:
        import torch

        from asag.checkpoint import load_detector
        from asag.deploy import DeployedDetector
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"{path} needs PyTorch, which is not installed here ({error.name}): pip install torch torchvision,"
            " or use an exported .onnx file"
        ) from None

    if kind != "cpu" and not torch.cuda.is_available():
        raise BackendUnavailableError("PyTorch sees no CUDA GPU on this machine")
    if kind != "cpu":
        # The reference is true float32; by default convolutions round their inputs to TF32.
        torch.backends.cudnn.allow_tf32 = False
    if threads is not None:
        torch.set_num_threads(threads)
    deployed = DeployedDetector(*load_detector(path, choices), input_size)
    return PyTorchSession(deployed, path.name, "cpu" if kind == "cpu" else f"cuda:{device_index}", compiled)
