"""Running a checkpoint with PyTorch, the reference that other backends are compared with."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BackendUnavailableError, one_line
from runtime.graph_stages import NETWORK_STAGES
from runtime.metadata import ModelMetadata
from runtime.postprocessing import OUTPUT_NAMES
from runtime.preprocessing import ImageLike, as_image, prepare
from runtime.session import INPUT_NAMES, Session, Variant, check_device
from runtime.stages import Stages, read_stages

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
        """What :meth:`run` gives, eagerly, and the seconds of each stage of the network and of ``copies``.

        Stages are those of :mod:`runtime.graph_stages`; on a GPU their times are those between CUDA events. No other
        thread may use the session meanwhile.
        """
        import torch

        detector = self._deployed.detector
        marks: list[Any] = []

        def mark(*_: object) -> None:
            marks.append(self._now())

        hooks = [
            detector.anchor_generator.register_forward_pre_hook(mark),
            detector.anchor_generator.register_forward_hook(mark),
            detector.proposals.register_forward_hook(mark),
        ]
        try:
            with torch.inference_mode():
                mark()
                inputs = self._inputs(tensors)
                mark()
                outputs = self._deployed(*inputs)
                mark()
                found = _on_host(outputs)
                mark()
        finally:
            for hook in hooks:
                hook.remove()
        copied_in, *network, copied_out = (self._seconds(*pair) for pair in pairwise(marks))
        return found, {"copies": copied_in + copied_out, **dict(zip(NETWORK_STAGES, network, strict=True))}

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

    def stages(self, image: ImageLike) -> Stages:
        """Run one image and keep what the method did; see :meth:`runtime.session.Session.stages`."""
        picture = as_image(image)
        tensors = prepare([picture], self.metadata)
        found = {name: value.cpu().numpy() for name, value in self._deployed.stages(*self._inputs(tensors)).items()}
        return read_stages({**found, "sizes": tensors["sizes"]}, self.metadata, (picture.height, picture.width))

    def stage_values(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """What every stage hands to the next, by the names of :mod:`runtime.onnx_stages`; takes what :meth:`run` does.

        Valid places come as bool arrays. The queries are those that the deployed head's first parameters meet: with
        the head's embedding, and for AdaMixer the position embedding.
        """
        import torch

        from asag.config import HEADS
        from asag.geometry import cxcywh_to_xyxy, position_embedding

        detector, images_and_sizes = self._deployed.detector, self._inputs(tensors)
        with torch.inference_mode():
            images, sizes = images_and_sizes
            if self._deployed.input_type == "uint8":
                images = self._deployed.normalize(images, sizes)
            features = detector.features(images)
            anchors = detector.anchor_generator(features, sizes, self._deployed.patch_capacity)
            allowed = anchors.valid[:, None, None, :]
            proposals = detector.proposals(features, anchors.boxes, allowed, sizes)
            head = detector.config.head
            output = detector.run_head(head, features, proposals, allowed, sizes)
            found = dict(zip(("p2", "p3", "p4", "p5"), features, strict=True))
            found |= {"fixed_anchors": anchors.fixed.anchors, "anchors": anchors.boxes, "valid": anchors.valid}
            for level, probed in anchors.probed.items():
                name = level.lower()
                found |= {
                    f"{name}_map": detector.anchor_generator.compressed(level, features),
                    f"{name}_corners": probed.corners,
                    f"{name}_valid": probed.valid,
                    f"{name}_anchors": probed.anchors,
                }
            queries = proposals.queries + detector.head_embedding.weight[HEADS.index(head)]
            if detector.config.decoder == "adamixer":
                queries = queries + position_embedding(proposals.xyzr, queries.shape[-1])
            found |= {
                "queries": queries,
                "proposal_xyzr": proposals.xyzr,
                "proposal_pixels": proposals.boxes * sizes.flip(-1).repeat(1, 2).unsqueeze(1),
                "head_scores": torch.where(anchors.valid.unsqueeze(-1), output.logits.sigmoid(), 0.0),
                "head_boxes": cxcywh_to_xyxy(output.boxes),
            }
            decoded = self._deployed.decode(output.logits, output.boxes, anchors.valid)
            found |= dict(zip(OUTPUT_NAMES, (*decoded, anchors.overflow), strict=True))
        return {name: value.cpu().numpy() for name, value in found.items()}

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
    session = open_pytorch(path, kind, device_index, threads, Variant(), compiled=True)
    blank = prepare([as_image(np.zeros((64, 64, 3), np.uint8))], session.metadata)
    try:
        session.run(blank)
    except Exception as error:  # the compiler's own errors, a missing C++ compiler, an unsupported operation
        raise BackendUnavailableError(f"torch.compile cannot compile the model here: {one_line(error)}") from None
    return session


def open_pytorch(
    path: Path, kind: str, device_index: int, threads: int | None, variant: Variant, compiled: bool = False
) -> PyTorchSession:
    """Load a safetensors checkpoint and deploy it as an export would, with the choices of ``variant``.

    ``threads`` sets PyTorch's number of CPU threads, which holds for the whole process; ``compiled`` as in
    :class:`PyTorchSession`.
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
    detector, info = load_detector(path)
    detector.choose(variant.head, variant.levels)
    deployed = DeployedDetector(detector, info, variant.input_size, "uint8", variant.patch_capacity)
    return PyTorchSession(deployed, path.name, "cpu" if kind == "cpu" else f"cuda:{device_index}", compiled)
