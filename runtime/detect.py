"""Detecting on image files and writing what was found: one JSON file, and a picture per image."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from asag.runtime.coco_dataset import CocoFolder
from asag.runtime.coco_evaluation import coco_records
from asag.runtime.coco_file import Id
from asag.runtime.drawing import draw_detections
from asag.runtime.errors import one_line
from asag.runtime.files import atomic_path, write_bytes
from asag.runtime.image_source import (
    IMAGES_FILE,
    RESULTS_FILE,
    SourceImage,
    images_in,
    is_video,
    read_images,
    video_length,
)
from asag.runtime.postprocessing import Detections
from asag.runtime.session import Session
from asag.runtime.stages.draw import draw_stages


@dataclasses.dataclass(frozen=True)
class DetectionSummary:
    """What a run wrote: the JSON file, the pictures, the number of detections, and (path, reason) of bad files."""

    json_path: Path
    pictures: tuple[Path, ...]
    images: int
    detections: int
    errors: tuple[tuple[Path, str], ...]


def expand_paths(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Files as they are, folders as the images in them and below by name; ValueError for a folder without any."""
    expanded: list[Path] = []
    for path in map(Path, paths):
        expanded.extend(images_in(path) if path.is_dir() else [path])
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
    annotations: CocoFolder | None = None,
) -> DetectionSummary:
    """Detect on images, folders of them and videos; write two JSON files and a picture each to ``output_dir``.

    ``detections.json`` is a list in COCO's results format with ``category_name`` (boxes x, y, width, height in pixels);
    ``images.json`` holds ``model``, ``images`` (``id``, ``file_name``, ``width``, ``height``, ``picture``,
    ``overflow``, and ``frame`` from 0 for a video), ``errors``, and whether the run was ``interrupted``: what was done
    until then is written. Image ids are those of `annotations`, found by file name, or count from 1. A file that cannot
    be read or is not in `annotations` is reported and does not stop the rest.
    Pixels of the batches that run and the next one are held and results go to disk, so memory does not grow with the
    number of images but for their names. ``progress`` gets (images done, all as far as known). With ``stages`` each
    picture is the method's stages side by side instead of the detections alone; ValueError where the session does not
    show them.
    """
    if stages:
        session.check_stages()
    output = Path(output_dir)
    files = expand_paths(paths)
    if not files:
        raise ValueError("no images were named")
    if not any(path.is_file() for path in files):
        raise FileNotFoundError(f"{files[0]} is no file{', nor are the others' if len(files) > 1 else ''}")
    ids = None if annotations is None else _ids_by_name(annotations.for_model(session.metadata))
    if output.exists() and not output.is_dir():
        raise ValueError(f"cannot write to {output}: it is a file; name a folder")
    total = sum((video_length(path) or 1) if is_video(path) and path.is_file() else 1 for path in files)
    done = 0
    with _Writer(session, output, score_threshold, files, ids) as writer:
        found = _with_stages(session, files) if stages else _plain(session, files, batch_size, score_threshold)
        try:
            for source, detections, drawn in found:
                if detections is None or drawn is None:
                    writer.add_error(source)
                else:
                    writer.add(source, detections, drawn, "-stages" if stages else "")
                done += 1
                if progress is not None:
                    progress(done, max(done, total))
        except KeyboardInterrupt:
            writer.finish(interrupted=True)
            raise
        return writer.finish()


def _ids_by_name(annotations: CocoFolder) -> dict[str, Id]:
    return {image.file_name: image_id for image_id, image in annotations.images.items()}


Found = tuple[SourceImage, Detections | None, Callable[[float], Image.Image] | None]


def _plain(session: Session, files: list[Path], batch_size: int, score_threshold: float) -> Iterator[Found]:
    """Each source with its detections and what draws them."""
    for source, detections in session.detect_sources(read_images(files), batch_size, score_threshold):
        if source.image is None or detections is None:
            yield source, None, None
        else:
            yield source, detections, partial(draw_detections, source.image, detections, session.metadata)


def _with_stages(session: Session, files: list[Path]) -> Iterator[Found]:
    """Each source with its detections and what draws the stages; one image at a time."""
    for source in read_images(files):
        if source.image is None:
            yield source, None, None
        else:
            stages = session.stages(source.image)
            yield source, stages.detections, partial(draw_stages, source.image, stages)


class _Writer:
    """Collects the results of one run: records in temporary files until all are there, then as JSON files."""

    def __init__(
        self,
        session: Session,
        output: Path,
        score_threshold: float,
        inputs: Iterable[Path],
        ids: Mapping[str, Id] | None = None,
    ) -> None:
        self._session = session
        self._ids = ids
        self._output = output
        self._score_threshold = score_threshold
        self._images = _Records()
        self._detections = _Records()
        self._errors: list[tuple[Path, str]] = []
        self._pictures: list[Path] = []
        # Names that a picture must not take: those of earlier pictures and, in the input's own folder, of the inputs.
        self._taken = {path.resolve() for path in inputs}

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._images.close()
        self._detections.close()

    def add_error(self, source: SourceImage) -> None:
        assert source.path is not None
        assert source.error is not None
        self._errors.append((source.path, one_line(source.error)))

    def _image_id(self, path: Path) -> Id | None:
        """The data set's id of a file, whose name may stand there with some of its folders; a number without one."""
        if self._ids is None:
            return self._images.count + 1
        names = ("/".join(path.parts[start:]) for start in range(len(path.parts)))
        return next((self._ids[name] for name in names if name in self._ids), None)

    def add(
        self, source: SourceImage, detections: Detections, draw: Callable[[float], Image.Image], ending: str
    ) -> None:
        assert source.path is not None
        assert source.image is not None
        image_id = self._image_id(source.path)
        if image_id is None:
            self._errors.append((source.path, "no image of the annotations has this name"))
            return
        frame = "" if source.frame is None else f"-{source.frame:06d}"
        picture = self._picture_path(source.path, frame + ending)
        encoded = io.BytesIO()  # written by Pillow, a picture would end early on a full disk, without an error
        draw(self._score_threshold).save(encoded, "JPEG", quality=90)
        write_bytes(picture, encoded.getvalue())
        record = {
            "id": image_id,
            "file_name": str(source.path),
            "width": source.image.width,
            "height": source.image.height,
            "picture": picture.name,
            "overflow": detections.overflow,
        }
        self._images.add(record if source.frame is None else record | {"frame": source.frame})
        for found in coco_records(image_id, detections.above(self._score_threshold)):
            name = self._session.metadata.category_name(found["category_id"])
            self._detections.add({**found, "category_name": name})

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

    def finish(self, interrupted: bool = False) -> DetectionSummary:
        session = self._session
        model = {"name": session.name, "backend": session.backend, "precision": session.precision}
        errors = [{"file_name": str(path), "reason": reason} for path, reason in self._errors]
        json_path = self._output / RESULTS_FILE
        with atomic_path(self._output / IMAGES_FILE) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(f'{{\n"model": {_json(model)},\n"score_threshold": {_json(self._score_threshold)},\n')
            file.write(f'"interrupted": {_json(interrupted)},\n"images": [')
            self._images.copy_to(file)
            file.write(f'],\n"errors": {_json(errors)}\n}}\n')
        with atomic_path(json_path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write("[")
            self._detections.copy_to(file)
            file.write("]\n")
        return DetectionSummary(
            json_path, tuple(self._pictures), self._images.count, self._detections.count, tuple(self._errors)
        )


class _Records:
    """JSON values, one a line, in a temporary file."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (closed with the writer)
        self.count = 0

    def add(self, record: dict[str, Any]) -> None:
        self._file.write(f"{',' if self.count else ''}\n{_json(record)}")
        self.count += 1

    def copy_to(self, file: TextIO) -> None:
        self._file.seek(0)
        shutil.copyfileobj(self._file, file)

    def close(self) -> None:
        self._file.close()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
