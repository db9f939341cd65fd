"""One interface over every backend: open a model file, detect objects in images."""

from __future__ import annotations

import abc
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from asag.runtime.image_source import Images, SourceImage, is_short, read_ahead, read_images
from asag.runtime.metadata import ModelMetadata
from asag.runtime.postprocessing import Detections, postprocess
from asag.runtime.preprocessing import ImageLike, as_image, prepare

if TYPE_CHECKING:
    from asag.runtime.backends.device_memory import DeviceArray
    from asag.runtime.stages.draw import SeenStages

INPUT_NAMES = ("images", "sizes")

_NO_STAGES = "{} gives detections only: stages are seen in a checkpoint (.safetensors) or an exported file (.onnx)"


class Pending(abc.ABC):
    """A batch that was handed to a session, see :meth:`Session.submit`."""

    @abc.abstractmethod
    def result(self) -> dict[str, NDArray]:
        """What :meth:`Session.run` returns; waits until it is there, and raises what running the batch raised."""


class _Finished(Pending):
    def __init__(self, outputs: dict[str, NDArray]) -> None:
        self._outputs = outputs

    def result(self) -> dict[str, NDArray]:
        return self._outputs


class Session(abc.ABC):
    """A model ready to run. Backends add only :meth:`run`; images go in and detections come out the same way.

    ``name`` is the file's name, ``backend`` and ``precision`` what a table shows, ``max_batch`` the largest batch the
    model takes (None: any). Several threads may use one session at a time; :meth:`close` comes when all are done.
    ``shows_stages``: whether :meth:`stages` works. ``batches_in_flight``: how many submitted batches a backend works on
    at once.
    """

    shows_stages = False
    batches_in_flight = 1

    def __init__(
        self,
        name: str,
        backend: str,
        precision: str,
        metadata: ModelMetadata,
        *,
        versions: Mapping[str, str],
        max_batch: int | None = None,
    ) -> None:
        self.name = name
        self.backend = backend
        self.precision = precision
        self.metadata = metadata
        self.versions = dict(versions)
        self.max_batch = max_batch

    @abc.abstractmethod
    def run(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Run one batch.

        Takes ``images`` [B, 3, H, W] (the metadata's type and size) and ``sizes`` [B, 2] float32 (height, width in
        pixels of the content). Returns ``boxes`` [B, N, 4] ``xyxy`` fractions of the content, ``scores`` [B, N],
        ``labels`` [B, N] category ids, ``overflow`` [B]. The arrays are the caller's own: no later run changes them.
        """

    def submit(self, tensors: Mapping[str, NDArray]) -> Pending:
        """Start a batch, which takes what :meth:`run` does, and return before it is done where the backend can.

        The tensors may be changed afterwards. Where nothing runs beside the caller, the batch runs at once.
        """
        return _Finished(self.run(tensors))

    def run_on_device(
        self, tensors: Mapping[str, Any], outputs: Mapping[str, Any] | None = None, stream: Any = 0
    ) -> dict[str, DeviceArray]:
        """Run one batch that lies on the GPU already, and leave the results there; nothing is copied.

        ``tensors`` are what :meth:`run` takes, as objects with ``__cuda_array_interface__`` (PyTorch, CuPy, pycuda).
        ``outputs`` are arrays of the same kind to write into, all four; without them memory is allocated, which belongs
        to the arrays that are returned. The inputs are read after what is on ``stream`` (a handle, or a stream of those
        libraries; 0 is the default stream), and what follows on it sees the results. Keep the inputs unchanged until
        then. Raises ValueError for arrays that do not fit, or where the model does not run on a GPU.
        """
        raise ValueError(f"{self.name} runs in {self.backend}, which takes no arrays on a GPU; use run instead")

    def stage_values(self, tensors: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """What the stages of one batch hand on, by the names of ``metadata.stages``, and what :meth:`run` gives.

        Takes what :meth:`run` does. Raises ValueError where the backend, or the file, holds the result alone.
        """
        raise ValueError(_NO_STAGES.format(self.name))

    def stages(self, image: ImageLike) -> SeenStages:
        """What the method did on one image, from the same run as its detections; as :meth:`stage_values` raises."""
        from asag.runtime.stages.draw import SeenStages

        self.check_stages()
        picture = as_image(image)
        tensors = prepare([picture], self.metadata)
        values = self.stage_values(tensors)
        (detections,) = postprocess(values, [(picture.height, picture.width)], self.metadata)
        return SeenStages({**values, "sizes": tensors["sizes"]}, detections, self.metadata)

    def check_stages(self) -> None:
        """Raise ValueError unless :meth:`stages` works."""
        if not self.shows_stages:
            raise ValueError(_NO_STAGES.format(self.name))

    def check_batch_size(self, batch_size: int) -> None:
        """Raise ValueError unless the model takes so many images at once."""
        if batch_size < 1:
            raise ValueError(f"the batch size must be at least 1, it is {batch_size}")
        if self.max_batch is not None and batch_size > self.max_batch:
            raise ValueError(f"{self.name} takes at most {self.max_batch} images at once, not {batch_size}")

    def close(self) -> None:  # noqa: B027 (nothing to release is the common case)
        """Release what the backend holds; the session cannot run afterwards."""

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def detect(
        self,
        images: Images,
        batch_size: int = 1,
        score_threshold: float = 0.0,
        on_error: Callable[[str, Exception], None] | None = None,
    ) -> list[Detections]:
        """Detections of each image, in order; see :meth:`stream`."""
        return list(self.stream(images, batch_size, score_threshold, on_error))

    def stream(
        self,
        images: Images,
        batch_size: int = 1,
        score_threshold: float = 0.0,
        on_error: Callable[[str, Exception], None] | None = None,
    ) -> Iterator[Detections]:
        """Detections of each image, in order, holding no more than the batches that run and the one after them.

        ``images`` is a path or an iterable of paths, uint8 RGB arrays [H, W, 3] and PIL images; a folder stands for its
        images by name, a video for its frames. The next batch is read on another thread while others run. An image that
        cannot be read raises what reading raised; with ``on_error`` it is called with the image's name and the error
        instead, and the image has no detections. Raises ValueError for a batch size that the model does not take.
        """
        if hasattr(images, "getbbox"):
            raise ValueError("detect takes a list of images; put a single one into a list")
        ahead = not is_short(images, batch_size)
        for source, found in self.detect_sources(read_images(images), batch_size, score_threshold, ahead=ahead):
            if found is not None:
                yield found
            elif on_error is None:
                assert source.error is not None
                raise source.error
            else:
                on_error(source.name, source.error or ValueError("no image"))
                yield _nothing_found()

    def detect_sources(
        self,
        sources: Iterator[SourceImage],
        batch_size: int = 1,
        score_threshold: float = 0.0,
        ahead: bool = True,
    ) -> Iterator[tuple[SourceImage, Detections | None]]:
        """Each source image with its detections, or None where it could not be read.

        With ``ahead`` the sources are read on another thread, one batch ahead. Up to ``batches_in_flight`` batches run
        before the results of the first are waited for.
        """
        self.check_batch_size(batch_size)
        batches = self._batches(sources, batch_size)
        running: deque[tuple[list[SourceImage], Pending | None]] = deque()
        for batch, tensors in read_ahead(batches) if ahead else batches:
            running.append((batch, self.submit(tensors) if tensors else None))
            if len(running) == self.batches_in_flight:
                yield from self._detections(*running.popleft(), score_threshold)
        while running:
            yield from self._detections(*running.popleft(), score_threshold)

    def _detections(
        self, batch: list[SourceImage], pending: Pending | None, score_threshold: float
    ) -> Iterator[tuple[SourceImage, Detections | None]]:
        """A batch's images with what was found in those that could be read."""
        sizes = [(source.image.height, source.image.width) for source in batch if source.image is not None]
        found = iter(postprocess(pending.result(), sizes, self.metadata, score_threshold) if pending else ())
        for source in batch:
            yield source, None if source.image is None else next(found)

    def _batches(
        self, sources: Iterator[SourceImage], batch_size: int
    ) -> Iterator[tuple[list[SourceImage], dict[str, NDArray]]]:
        """Batches with the model's inputs for the images that could be read."""
        while batch := list(islice(sources, batch_size)):
            images = [source.image for source in batch if source.image is not None]
            yield batch, prepare(images, self.metadata) if images else {}


def _nothing_found() -> Detections:
    """The detections of an image that could not be read."""
    empty = np.zeros(0, np.float32)
    return Detections(empty.reshape(0, 4), empty, np.zeros(0, np.int64), 0, (0, 0))


def check_device(device: str) -> tuple[str, int]:
    """Split ``cpu``, ``cuda`` or ``tensorrt``, the last two with or without ``:<index>``, into kind and index.

    Raises ValueError for anything else.
    """
    kind, _, index = device.partition(":")
    known = kind in ("cpu", "cuda", "tensorrt")
    if not known or (index and (kind == "cpu" or not index.isdecimal())) or device.endswith(":"):
        raise ValueError(f"unknown device {device!r}: use cpu, cuda, cuda:<index>, tensorrt or tensorrt:<index>")
    return kind, int(index or 0)
