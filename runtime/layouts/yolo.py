"""YOLO's layouts: a text file of boxes for every picture, and a file that names folders and classes.

The layout is Ultralytics', https://docs.ultralytics.com/datasets/detect/: the labels of ``images/val/a.jpg`` are in
``labels/val/a.txt``, those of a picture whose path has no folder ``images`` beside it. A line is a class, counted from
0, and the centre, width and height of its box as fractions of the picture, or the corners of an outline.

Darknet's, https://github.com/AlexeyAB/darknet, which CVAT calls YOLO 1.1, has the same lines beside the pictures;
``obj.data`` names a list of the pictures of each split, and a file with the classes, one a line.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asag.runtime.coco_file import MOST_OUTSIDE
from asag.runtime.errors import one_line
from asag.runtime.layouts.split import Layout, LostPictures, Split, pictures_in, readable_size

FILES = ("data.yaml", "data.yml", "dataset.yaml", "obj.data")
SPLITS = ("train", "val", "valid", "test")

_BOX = 5
"""Values in the line of a box; that of an outline has more, and an odd number."""
_PIXELS = 2
"""A fraction above it is none."""


def yolo_splits(root: Path) -> dict[str, Split]:
    """The splits that ``data.yaml`` or ``obj.data`` in a folder names, or any such file that is `root` itself.

    Raises ValueError for a file that cannot be read or names no classes.
    """
    files = (root,) if root.suffix in (".yaml", ".yml", ".data") else tuple(root / name for name in FILES)
    file = next((path for path in files if path.is_file()), None)
    if file is None:
        return {}
    content = _read_darknet(file) if file.suffix == ".data" else _read_yaml(file)
    base = file.parent / (content.get("path") or "")
    # Files travel with the path of the machine they were made on.
    base = base if base.is_dir() else file.parent
    classes = _class_names(content, file)
    found = {}
    for name in SPLITS:
        named = content.get(name) or []
        sources = [_existing(base, text) for text in ([named] if isinstance(named, str) else named)]
        # Tools name a test split that was never made; one of the others is missed when it is read.
        if sources and (name != "test" or any(source.exists() for source in sources)):
            reader = _Reader(file, classes, base, tuple(sources))
            found[name] = Split(name, reader.folder, sources[0] if len(sources) == 1 else file, reader.entries)
    return found


YOLO = Layout("YOLO", "data.yaml or obj.data with folders and names (YOLO; or name another such file)", yolo_splits)


@dataclass(frozen=True)
class _Reader:
    """Reads one split: folders of pictures, or text files that list some."""

    file: Path
    classes: dict[int, str]
    base: Path
    sources: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        """What names of pictures are relative to."""
        return self.sources[0] if len(self.sources) == 1 and not self.sources[0].is_file() else self.base

    def entries(self, stored_pixels: bool, lost: LostPictures | None) -> dict[str, Any]:
        """The content of an annotation file in COCO's format; the classes keep YOLO's numbers as ids."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        pixels, labels = 0, set()
        for picture in self._pictures():
            name = _relative(picture, self.folder)
            if (size := readable_size(picture, stored_pixels, name, lost)) is None:
                continue
            label = label_file(picture)
            labels.add(label)
            images.append({"id": len(images) + 1, "file_name": name, "width": size[0], "height": size[1]})
            for category, fractions in self._lines(label):
                pixels += max(map(abs, fractions)) > _PIXELS
                x, y, width, height = (value * side for value, side in zip(fractions, size * 2, strict=True))
                box = [x - width / 2, y - height / 2, width, height]
                # One id for all, so that a line that is there twice counts once.
                annotations.append({"id": 0, "image_id": len(images), "category_id": category, "bbox": box})
        if pixels > MOST_OUTSIDE * len(annotations):
            raise ValueError(f"{self.file}: {pixels} boxes look like pixels, and YOLO's are fractions of the picture")
        folders = {label.parent for label in labels}
        if folders and not any(folder.is_dir() for folder in folders):
            raise FileNotFoundError(f"{self.file}: no labels: looked for {', '.join(map(str, sorted(folders)[:3]))}")
        annotations += self._without_picture(labels)
        categories = [{"id": number, "name": name} for number, name in self.classes.items()]
        return {"images": images, "annotations": annotations, "categories": categories}

    def _pictures(self) -> Iterator[Path]:
        for source in self.sources:
            if source.is_dir():
                yield from (source / name for name in pictures_in(source))
            elif source.is_file():
                for line in source.read_text(encoding="utf-8-sig").split("\n"):
                    if line.strip():
                        beside = source.parent / line.strip()
                        yield beside if beside.is_file() else _existing(self.base, line.strip())
            else:
                raise FileNotFoundError(f"{self.file} names {source}, and it is not there")

    def _lines(self, label: Path) -> Iterator[tuple[int, tuple[float, float, float, float]]]:
        """Class, and centre and sides of the box as fractions, of every line; none without the file."""
        if not label.is_file():
            return
        for number, line in enumerate(label.read_text(encoding="utf-8-sig").splitlines(), start=1):
            words = line.split()
            if not words:
                continue
            try:
                category, *values = map(float, words)
            except ValueError:
                raise ValueError(f"{label}, line {number}: {line[:60]!r} are no numbers") from None
            if category not in self.classes:
                raise ValueError(f"{label}, line {number}: {self.file.name} names no class {words[0]}")
            if len(words) == _BOX:
                x, y, width, height = values
                yield int(category), (x, y, width, height)
            elif len(words) > _BOX and len(words) % 2:
                yield int(category), _box_of_outline(values)
            else:
                raise ValueError(f"{label}, line {number}: {len(words)} values are neither a box nor an outline")

    def _without_picture(self, labels: set[Path]) -> Iterator[dict[str, Any]]:
        """A nameless object for every line of a file in the folders of labels that has no picture."""
        category = next(iter(self.classes))
        folders = {_label_folder(source) for source in self.sources if source.is_dir()} - set(self.sources)
        for folder in sorted(folders):
            for path in sorted(set(folder.rglob("*.txt")) - labels):
                if path.name != "classes.txt":
                    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
                    yield from ({"image_id": str(path), "category_id": category} for line in lines if line.strip())


def label_file(picture: Path) -> Path:
    """Where a picture's boxes are."""
    return (_label_folder(picture.parent) / picture.name).with_suffix(".txt")


def _label_folder(pictures: Path) -> Path:
    """The folder of the labels of a folder's pictures: the last ``images`` of its path becomes ``labels``."""
    parts = list(pictures.parts)
    if "images" not in parts:
        return pictures
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts)


def _box_of_outline(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Corners x, y, x, y, ... -> centre and sides of the box around them; not finite where one is not."""
    if not all(map(math.isfinite, values)):
        return (math.nan,) * 4
    left, right, top, bottom = min(values[::2]), max(values[::2]), min(values[1::2]), max(values[1::2])
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top


def _existing(base: Path, text: str) -> Path:
    """What a file calls `text`. Roboflow's are written as if in a folder beside those they name, CVAT's as if above."""
    tried = [base / text, *(base / text.removeprefix(prefix) for prefix in ("../", "data/"))]
    return next((path for path in tried if path.exists()), tried[0])


def _relative(picture: Path, folder: Path) -> str:
    return (picture.relative_to(folder) if picture.is_relative_to(folder) else picture.absolute()).as_posix()


def _read_yaml(file: Path) -> dict[str, Any]:
    """The file's content, every value a text, so that a class may be called `no`."""
    try:
        import yaml
    except ImportError:
        raise ValueError(f"reading {file} needs PyYAML: pip install pyyaml") from None
    try:
        content = yaml.load(file.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {file} as YAML: {one_line(error)}") from None
    known = isinstance(content, dict) and any(name in content for name in SPLITS)
    if not known or not isinstance(content.get("path", ""), str):
        raise ValueError(f"{file} is no YOLO data set: it names none of {', '.join(SPLITS)}")
    for name in SPLITS:
        value = content.get(name, "")
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(one, str) for one in value)):
            raise ValueError(f"{file}: {name} must be a path or a list of paths")
    return content


def _read_darknet(file: Path) -> dict[str, Any]:
    """``obj.data`` as the YAML file would say it: lines of ``name = value``."""
    lines = [line.partition("=") for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
    content: dict[str, Any] = {name.strip(): value.strip() for name, _, value in lines if value.strip()}
    names = _existing(file.parent, content.get("names", "obj.names"))
    if not names.is_file():
        raise ValueError(f"{file}: no names of the classes: looked for {names}")
    classes = [line.strip() for line in names.read_text(encoding="utf-8-sig", errors="replace").splitlines()]
    splits = {name: content[name] for name in SPLITS if name in content}
    if not splits:
        raise ValueError(f"{file} is no YOLO data set: it names none of {', '.join(SPLITS)}")
    return {**splits, "names": [name for name in classes if name], "nc": content.get("classes", "")}


def _class_names(content: dict[str, Any], file: Path) -> dict[int, str]:
    """Names by class number."""
    names = content.get("names")
    if isinstance(names, list):
        names = {str(number): name for number, name in enumerate(names)}
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) and name for name in names.values()):
        raise ValueError(f"{file} has no proper names of the classes")
    if not all(isinstance(number, str) and number.isdecimal() for number in names):
        raise ValueError(f"{file}: classes must be numbered, not {', '.join(map(str, list(names)[:3]))}")
    count = content.get("nc") or str(len(names))
    if count != str(len(names)):
        raise ValueError(f"{file} has nc: {count}, but {len(names)} names")
    return {int(number): name for number, name in names.items()}
