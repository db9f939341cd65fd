"""Pascal VOC's layout, and the one in which labelling tools write its files beside the pictures.

The format: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from asag.runtime.errors import one_line
from asag.runtime.layouts.split import Layout, LostPictures, Split, pictures_in, readable_size

_COUNTED_FROM_ONE = "The VOC"
"""Sources whose name begins so count pixels from 1, both ends included; what tools write are edges, from 0."""

_FLAG = re.compile(r"\s+-?[01]$")
"""Lists may say behind an image whether it holds a class."""


def voc_splits(root: Path) -> dict[str, Split]:
    """The splits of ``ImageSets/Main/NAME.txt``, with ``Annotations/*.xml`` and pictures in ``JPEGImages/``."""
    pictures, annotations = root / "JPEGImages", root / "Annotations"
    lists = {path.stem: path for path in sorted((root / "ImageSets" / "Main").glob("*.txt"))}
    if not annotations.is_dir() or not pictures.is_dir():
        return {}
    # Beside the splits' are lists of the images of each class, such as dog_train.txt.
    own = {name: path for name, path in lists.items() if "_" not in name or name.rpartition("_")[2] not in lists}
    classes = _classes(root / "labelmap.txt")
    return {
        name: Split(
            name,
            pictures,
            path,
            partial(_entries, partial(_listed, path, annotations), (annotations,), pictures, classes),
        )
        for name, path in own.items()
    }


def beside_splits(root: Path) -> dict[str, Split]:
    """Folders with XML files of Pascal VOC's kind beside the pictures."""
    if not root.is_dir():
        return {}
    folders = [path for path in sorted(root.iterdir()) if path.name != "Annotations" and path.is_dir()]
    folders = [path for path in folders if any(_is_file(file) for file in path.iterdir())]
    return {
        folder.name: Split(
            folder.name, folder, folder, partial(_entries, partial(_beside, folder), tuple(folders), folder, ())
        )
        for folder in folders
    }


VOC = Layout("Pascal VOC", "ImageSets/Main/SPLIT.txt with Annotations/ and JPEGImages/ (Pascal VOC)", voc_splits)
VOC_BESIDE = Layout("Pascal VOC beside the images", "SPLIT/*.xml (Pascal VOC's, beside the images)", beside_splits)


def _entries(
    documents: Callable[[], Iterable[tuple[Path, Path]]],
    folders: Sequence[Path],
    pictures: Path,
    classes: Sequence[str],
    stored_pixels: bool,
    lost: LostPictures | None,
) -> dict[str, Any]:
    """The content of an annotation file in COCO's format.

    `documents` gives the images' XML files, which need not be there, and their names without suffixes. The classes are
    those of all files in `folders`, so that every split has the same ones, numbered from 1: first `classes` in their
    order, then others in alphabetic order.
    """
    read = {path: _Document.read(path) for folder in folders for path in _files(folder)}
    used = {one.name for document in read.values() for one in document.objects}
    names = [*classes, *sorted(used - set(classes))]
    numbers = {name: number for number, name in enumerate(names, start=1)}
    picture_of = {Path(name).with_suffix(""): name for name in pictures_in(pictures)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for path, place in documents():
        document = read.get(path, _Document())
        name = picture_of.get(place) or document.file_name or f"{place.as_posix()}.jpg"
        size = document.size or readable_size(pictures / name, stored_pixels, name, lost)
        if size is None:
            continue
        images.append({"id": len(images) + 1, "file_name": name, "width": size[0], "height": size[1]})
        for one in document.objects:
            box = {"bbox": one.box, "ignore": int(one.difficult)}
            annotations.append({"image_id": len(images), "category_id": numbers[one.name], **box})
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _classes(labels: Path) -> list[str]:
    """Classes of CVAT's ``labelmap.txt``, lines of ``name:colour:parts:actions``, the background left out; or none."""
    if not labels.is_file():
        return []
    lines = labels.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    names = [line.partition(":")[0].strip() for line in lines if not line.startswith("#")]
    return list(dict.fromkeys(name for name in names if name and name != "background"))


def _listed(names: Path, annotations: Path) -> Iterator[tuple[Path, Path]]:
    """The XML files of a list of images, and the images' names without their suffixes. Raises FileNotFoundError."""
    for line in names.read_text(encoding="utf-8-sig").splitlines():
        candidates = [Path(text) for text in (line.strip(), _FLAG.sub("", line.strip())) if text]
        if not candidates:
            continue
        found = next((one for one in candidates if (annotations / f"{one}.xml").is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"{names} lists {candidates[-1]}, and {annotations / f'{candidates[-1]}.xml'} is missing"
            )
        yield annotations / f"{found}.xml", found


def _beside(folder: Path) -> Iterator[tuple[Path, Path]]:
    """The XML files of a folder and where those of its other pictures would be, likewise."""
    places = {Path(name).with_suffix("") for name in pictures_in(folder)}
    places |= {path.relative_to(folder).with_suffix("") for path in _files(folder)}
    yield from ((folder / f"{place}.xml", place) for place in sorted(places))


def _files(folder: Path) -> list[Path]:
    return sorted(filter(_is_file, folder.rglob("*.xml")))


def _is_file(path: Path) -> bool:
    return path.suffix == ".xml" and not path.name.startswith(".")


@dataclass(frozen=True)
class _Object:
    """An object of a file."""

    name: str
    box: list[float] | None
    """COCO's x, y, width, height; None where it is none."""
    difficult: bool
    """Pascal VOC's evaluation counts nothing there."""


@dataclass(frozen=True)
class _Document:
    """An XML file, or what stands for one of a picture without objects."""

    file_name: str = ""
    size: tuple[int, int] | None = None
    """(width, height); None where the file does not say."""
    objects: tuple[_Object, ...] = ()

    @classmethod
    def read(cls, path: Path) -> _Document:
        """Raises ValueError where the file is not one of Pascal VOC's kind."""
        try:
            root = ElementTree.parse(path).getroot()
        except (OSError, ValueError, ElementTree.ParseError) as error:
            raise ValueError(f"cannot read {path} as XML: {one_line(error)}") from None
        if root.tag != "annotation":
            raise ValueError(f"{path} is no annotation of Pascal VOC's kind: it begins with <{root.tag}>")
        first = 1 if _text(root, "source/database").startswith(_COUNTED_FROM_ONE) else 0
        objects = []
        for number, one in enumerate(root.findall("object"), start=1):
            name = _text(one, "name")
            if not name:
                raise ValueError(f"{path}: object {number} has no name")
            objects.append(_Object(name, _box(one, first), _text(one, "difficult") == "1"))
        sides = [_text(root, f"size/{side}") for side in ("width", "height")]
        known = all(side.isdecimal() and int(side) > 0 for side in sides)
        return cls(_text(root, "filename"), (int(sides[0]), int(sides[1])) if known else None, tuple(objects))


def _box(element: ElementTree.Element, first: int) -> list[float] | None:
    """The box of an object, whose first pixel is number `first`."""
    try:
        left, top, right, bottom = (
            float(_text(element, f"bndbox/{name}")) for name in ("xmin", "ymin", "xmax", "ymax")
        )
    except ValueError:
        return None
    return [left - first, top - first, right - left + first, bottom - top + first]


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()
