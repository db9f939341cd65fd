"""CrowdHuman's annotations (ODGT: one JSON object per line) as a dataset in COCO's layout."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asag.runtime.errors import one_line
from asag.runtime.files import write_json
from asag.runtime.preprocessing import picture_size

PERSON = 1
SPLITS = {"train": "train2017", "val": "val2017", "test": "test2017"}
"""What a file's name holds, and the split that it becomes."""
_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class ConvertedSplit:
    """What one annotation file became."""

    annotations: Path
    images: int
    persons: int
    ignored: int
    """Regions to ignore: boxes that are no person, and persons marked so."""


def convert_crowdhuman(
    files: Sequence[str | Path],
    output: str | Path,
    images: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[ConvertedSplit]:
    """Write ``output/annotations/instances_<split>.json`` and a link ``output/<split>`` to the images for each file.

    files: ODGT files, each with ``train`` or ``val`` in its name; images: folder of the ``<ID>.jpg``, by default
    ``Images`` beside the annotation file or that folder itself; progress: gets (lines done, all). The box of a person
    is the whole one (``fbox``); it may reach over the image's edge. What is to be ignored becomes ``iscrowd`` and
    ``ignore``, so that training leaves it out and evaluation ignores it. Image sizes are read from the files' headers.

    Raises FileNotFoundError for a missing file or image, and ValueError naming file and line for what cannot be read.
    """
    sources = [(Path(file), split_of(Path(file))) for file in files]
    splits = [split for _, split in sources]
    if len(set(splits)) != len(splits):
        raise ValueError(f"two annotation files would become one split: {', '.join(str(file) for file, _ in sources)}")
    lines = {file: _read_lines(file) for file, _ in sources}
    total, done = sum(map(len, lines.values())), 0
    results = []
    for file, split in sources:
        folder = _images_folder(file, images)

        def advance(count: int, before: int = done) -> None:
            if progress is not None:
                progress(before + count, total)

        content = _convert(file, lines[file], folder, advance)
        done += len(lines[file])
        path = Path(output) / "annotations" / f"instances_{split}.json"
        write_json(path, content, indent=None)
        _link(Path(output) / split, folder)
        ignored = sum(annotation["ignore"] for annotation in content["annotations"])
        results.append(ConvertedSplit(path, len(content["images"]), len(content["annotations"]) - ignored, ignored))
    return results


def split_of(file: Path) -> str:
    """The split that an annotation file's name stands for. ValueError when it names none."""
    for word, split in SPLITS.items():
        if word in file.stem.lower():
            return split
    raise ValueError(f"{file}: its name must hold one of {', '.join(SPLITS)}, to tell which split it is")


def _read_lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"annotation file not found: {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {file}: {one_line(error)}") from None
    if not any(line.strip() for line in lines):
        raise ValueError(f"{file} is empty")
    return lines


def _images_folder(file: Path, images: str | Path | None) -> Path:
    if images is not None:
        if not Path(images).is_dir():
            raise FileNotFoundError(f"no folder {images} with images")
        return Path(images)
    beside = file.parent / "Images"
    return beside if beside.is_dir() else file.parent


def _convert(file: Path, lines: Sequence[str], folder: Path, advance: Callable[[int], None]) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            name, boxes = _parse(line, f"{file}, line {number}")
            path = _image_file(folder, name, file)
            width, height = picture_size(path)
            images.append({"id": len(images) + 1, "file_name": path.name, "width": width, "height": height})
            for box, ignored in boxes:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": len(images),
                        "category_id": PERSON,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": int(ignored),
                        "ignore": int(ignored),
                    }
                )
        advance(number)
    return {"images": images, "annotations": annotations, "categories": [{"id": PERSON, "name": "person"}]}


def _parse(line: str, place: str) -> tuple[str, list[tuple[list[float], bool]]]:
    """Name of the image, and its boxes (x, y, width, height) with whether they are to be ignored."""
    try:
        record = json.loads(line)
        boxes = []
        for entry in record.get("gtboxes", []):
            box = [float(value) for value in entry["fbox"]]
            if len(box) != 4 or not all(map(math.isfinite, box)):
                raise ValueError("a box is not four numbers")
            marked = (entry.get("extra") or {}).get("ignore", 0) != 0
            boxes.append((box, marked or entry.get("tag") != "person"))
        return str(record["ID"]), boxes
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{place} is not a CrowdHuman record: {one_line(error)}") from None


def _image_file(folder: Path, name: str, file: Path) -> Path:
    for suffix in _SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return path
    raise FileNotFoundError(f"no image {name}.jpg in {folder}, named by {file}; say where the images are with --images")


def _link(link: Path, folder: Path) -> None:
    """Make `link` stand for the folder of the images; they are copied where links cannot be made."""
    target = folder.resolve()
    if link.is_symlink() or link.exists():
        if link.resolve() == target:
            return
        if not link.is_symlink():
            raise ValueError(f"{link} exists and is another folder: name another output")
        link.unlink()
    try:
        link.symlink_to(os.path.relpath(target, link.parent.resolve()), target_is_directory=True)
    except OSError:
        shutil.copytree(target, link)
