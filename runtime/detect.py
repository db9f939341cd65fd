"""Detecting on image files and writing what was found: one JSON file, and a picture per image."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from runtime.coco_evaluation import coco_records
from runtime.drawing import draw_detections
from runtime.errors import one_line
from runtime.files import atomic_path, write_json
from runtime.postprocessing import Detections
from runtime.preprocessing import load_image
from runtime.session import Session
from runtime.stages import Stages, draw_stages

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")


@dataclasses.dataclass(frozen=True)
class DetectionSummary:
    """What a run wrote: the JSON file, the pictures, the number of detections, and (path, reason) of bad files."""

    json_path: Path
    pictures: tuple[Path, ...]
    images: int
    detections: int
    errors: tuple[tuple[Path, str], ...]


def expand_paths(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files as they are, folders as the images in them by name; ValueError for a folder without any."""
    expanded: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            expanded.append(path)
            continue
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        if not found:
            raise ValueError(f"no images in the folder {path}: looked for {', '.join(IMAGE_SUFFIXES)}")
        expanded.extend(found)
    return expanded


def detect_files(
    session: Session,
    paths: Iterable[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    score_threshold: float = 0.3,
    progress: Callable[[int, int], None] | None = None,
    batch_size: int = 1,
    stages: bool = False,
) -> DetectionSummary:
    """Detect on image files (or folders of them) and write ``detections.json`` and ``<name>.jpg`` to ``output_dir``.

    The JSON holds ``model``, ``images`` (``id``, ``file_name``, ``width``, ``height``, ``picture``, ``overflow``),
    ``detections`` (COCO results with ``category_name``; boxes x, y, width, height in pixels) and ``errors``. A file
    that cannot be read is reported there and in the summary, and does not stop the rest. ``progress`` gets
    (files done, all). With ``stages`` each picture is the method's stages side by side instead of the detections
    alone; ValueError where the session does not show them.
    """
    if stages:
        session.check_stages()
    files = expand_paths(paths)
    if not files:
        raise ValueError("no images were named")
    output = Path(output_dir)
    if output.exists() and not output.is_dir():
        raise ValueError(f"cannot write to {output}: it is a file; name a folder")
    writer = _Writer(session, output, score_threshold, files)
    for start in range(0, len(files), batch_size):
        loaded = writer.load(files[start : start + batch_size])
        if stages:
            for path, image in loaded:
                writer.add_stages(path, image, session.stages(image))
        else:
            found = session.detect([image for _, image in loaded], batch_size, score_threshold)
            for (path, image), detections in zip(loaded, found, strict=True):
                drawn = draw_detections(image, detections, session.metadata, score_threshold)
                writer.add(path, image, detections, drawn)
        if progress is not None:
            progress(min(start + batch_size, len(files)), len(files))
    return writer.finish()


class _Writer:
    """Collects the results of one run."""

    def __init__(self, session: Session, output: Path, score_threshold: float, inputs: Iterable[Path]) -> None:
        self._session = session
        self._output = output
        self._score_threshold = score_threshold
        self._images: list[dict[str, Any]] = []
        self._detections: list[dict[str, Any]] = []
        self._errors: list[tuple[Path, str]] = []
        self._pictures: list[Path] = []
        # Names that a picture must not take: those of earlier pictures and, in the input's own folder, of the inputs.
        self._taken = {path.resolve() for path in inputs}

    def load(self, paths: Sequence[Path]) -> list[tuple[Path, Image.Image]]:
        """The images of the files that can be read; the others are noted."""
        loaded = []
        for path in paths:
            try:
                loaded.append((path, load_image(path)))
            except (ValueError, FileNotFoundError) as error:
                self._errors.append((path, one_line(error)))
        return loaded

    def add_stages(self, path: Path, image: Image.Image, stages: Stages) -> None:
        drawn = draw_stages(image, stages, self._session.metadata, self._score_threshold)
        self.add(path, image, stages.detections.above(self._score_threshold), drawn, "-stages")

    def add(self, path: Path, image: Image.Image, detections: Detections, drawn: Image.Image, ending: str = "") -> None:
        picture = self._picture_path(path, ending)
        with atomic_path(picture) as temporary:
            drawn.save(temporary, "JPEG", quality=90)
        number = len(self._images) + 1
        self._images.append(
            {
                "id": number,
                "file_name": str(path),
                "width": image.width,
                "height": image.height,
                "picture": picture.name,
                "overflow": detections.overflow,
            }
        )
        for record in coco_records(number, detections):
            name = self._session.metadata.category_name(record["category_id"])
            self._detections.append({**record, "category_name": name})

    def _picture_path(self, path: Path, ending: str) -> Path:
        """A path in the output folder that no other picture of this run has, and no input."""
        number = 1
        picture = self._output / f"{path.stem}{ending}.jpg"
        while picture.resolve() in self._taken:
            number += 1
            picture = self._output / f"{path.stem}{ending}-{number}.jpg"
        self._taken.add(picture.resolve())
        self._pictures.append(picture)
        return picture

    def finish(self) -> DetectionSummary:
        session = self._session
        content = {
            "model": {"name": session.name, "backend": session.backend, "precision": session.precision},
            "score_threshold": self._score_threshold,
            "images": self._images,
            "detections": self._detections,
            "errors": [{"file_name": str(path), "reason": reason} for path, reason in self._errors],
        }
        json_path = self._output / "detections.json"
        write_json(json_path, content)
        return DetectionSummary(
            json_path, tuple(self._pictures), len(self._images), len(self._detections), tuple(self._errors)
        )
