"""Images one at a time from whatever names them: paths, arrays, folders, videos; and reading ahead of their use."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from asag.runtime.errors import BackendUnavailableError, one_line
from asag.runtime.preprocessing import ImageLike, as_image

logger = logging.getLogger(__name__)

RESULTS_FILE, IMAGES_FILE = "detections.json", "images.json"
"""What detecting on files writes beside its pictures."""

_NAMED_ONLY = frozenset({".bufr", ".grib", ".h5", ".hdf", ".wmf", ".emf"})
"""Pillow knows these formats by name and cannot read their pixels."""
_HEIF_SUFFIXES = (".heic", ".heif", ".hif")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg")

Images = Iterable[ImageLike] | str | os.PathLike[str]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class SourceImage:
    """One image of a source, or why it could not be read.

    ``path`` is None for an image that never was a file; ``frame`` counts the frames of a video from 0, else None.
    Exactly one of ``image`` (RGB) and ``error`` is set.
    """

    path: Path | None
    frame: int | None = None
    image: Image.Image | None = None
    error: Exception | None = None

    @property
    def name(self) -> str:
        """What to call it in a message."""
        name = "image" if self.path is None else str(self.path)
        return name if self.frame is None else f"{name}, frame {self.frame}"


def is_video(path: Path) -> bool:
    """Whether the suffix is that of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of image files that Pillow reads here, those of HEIC with the package pillow-heif."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    readable = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return frozenset(readable - _NAMED_ONLY - set(VIDEO_SUFFIXES))


def is_image(path: Path) -> bool:
    """Whether the suffix is that of an image file that can be read here."""
    return path.suffix.lower() in image_suffixes()


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder and the folders below it, by name; not those of folders that an earlier run wrote.

    Other files are skipped, which a warning tells; hidden ones silently. Raises ValueError where there are no images.
    """
    written = {path.parent for path in folder.rglob(RESULTS_FILE) if (path.parent / IMAGES_FILE).is_file()} - {folder}
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and written.isdisjoint(file.parents)
    ]
    found = [file for file in files if is_image(file)]
    skipped = [file for file in files if not is_image(file)]
    told = ", ".join(str(file.relative_to(folder)) for file in skipped[:5]) + (", ..." if len(skipped) > 5 else "")
    if any(file.suffix.lower() in _HEIF_SUFFIXES for file in skipped):
        told += "; for HEIC: pip install pillow-heif"
    if not found:
        raise ValueError(f"no images in the folder {folder}" + (f", only {told}" if skipped else ""))
    if skipped:
        logger.warning("%s: skipped %d files that are no images: %s", folder, len(skipped), told)
    return found


def read_images(images: Images) -> Iterator[SourceImage]:
    """Read images in order, one at a time as they are asked for.

    ``images`` is a path or an iterable of paths, arrays and PIL images. A folder stands for the images in it by name,
    a video for its frames. An image that cannot be read becomes an entry with its error. Raises ValueError for a folder
    without images and BackendUnavailableError for a video without the library to read it.
    """
    for image in [images] if isinstance(images, str | os.PathLike) else images:
        if not isinstance(image, str | os.PathLike):
            yield _read(image, None)
            continue
        path = Path(image)
        if path.is_dir():
            yield from (_read(file, file) for file in images_in(path))
        elif is_video(path):
            yield from read_video(path)
        else:
            yield _read(path, path)


def _read(image: ImageLike, path: Path | None) -> SourceImage:
    try:
        return SourceImage(path, image=as_image(image))
    except (ValueError, OSError) as error:
        return SourceImage(path, error=error)


def _import_av() -> Any:
    try:
        import av
    except ImportError:
        raise BackendUnavailableError("reading a video needs PyAV: pip install av") from None
    # Its messages would repeat on the terminal what the exceptions say.
    av.logging.set_level(None)
    return av


def read_video(path: Path) -> Iterator[SourceImage]:
    """The frames of a video's first picture stream, upright; what cannot be decoded ends it with an error entry."""
    av = _import_av()
    if not path.exists():
        yield SourceImage(path, error=FileNotFoundError(f"video not found: {path}"))
        return
    number = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("there are no pictures in it")
            for frame in container.decode(container.streams.video[0]):
                turned = frame.to_image().rotate(getattr(frame, "rotation", 0), expand=True)
                yield SourceImage(path, number, image=turned)
                number += 1
        if number == 0:
            raise ValueError("there are no pictures in it")
    except (av.error.FFmpegError, ValueError, OSError, ArithmeticError, UnicodeDecodeError) as error:
        reason = f"cannot read the video {path}, it is damaged or unsupported after {number} frames: {one_line(error)}"
        yield SourceImage(path, number, error=ValueError(reason))


def video_length(path: Path) -> int:
    """Frames that a video's header promises; 0 where it does not say or cannot be read."""
    av = _import_av()
    try:
        with av.open(str(path)) as container:
            return max(0, container.streams.video[0].frames)
    except (av.error.FFmpegError, IndexError, ValueError, OSError):
        return 0


def is_short(images: Images, batch_size: int) -> bool:
    """Whether all images fit one batch, so that nothing is gained by reading ahead."""
    if isinstance(images, str | os.PathLike) or not isinstance(images, Sized) or len(images) > batch_size:
        return False
    named = [Path(image) for image in images if isinstance(image, str | os.PathLike)]
    return not any(path.is_dir() or is_video(path) for path in named)


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items in order; while one is in use, the next is made on another thread. Never more than one ahead."""
    end = object()
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        pending = pool.submit(next, items, end)
        while (item := pending.result()) is not end:
            pending = pool.submit(next, items, end)
            yield item  # type: ignore[misc]  # `end` ends the loop
            del item
