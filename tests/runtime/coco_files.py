"""Annotation files for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

CATEGORIES = ({"id": 2, "name": "cat"}, {"id": 7, "name": "dog"})


def entry(image_id: Any = 1, box: Any = (1, 2, 10, 20), category_id: Any = 2, **more: Any) -> dict[str, Any]:
    """An annotation."""
    return {"image_id": image_id, "category_id": category_id, "bbox": list(box), **more}


def image_entry(identifier: Any = 1, file_name: str | None = None, height: Any = 40, width: Any = 60) -> dict[str, Any]:
    """An image of the file."""
    return {"id": identifier, "file_name": file_name or f"{identifier}.png", "height": height, "width": width}


def write_split(
    root: Path,
    annotations: Sequence[Any],
    images: Sequence[dict[str, Any]] = (image_entry(),),
    categories: Sequence[Any] = CATEGORIES,
    split: str = "val2017",
    encoding: str = "utf-8",
) -> Path:
    """A data set folder with that split, pictures included; the annotation file."""
    folder = root / split
    folder.mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    for image in images:
        Image.new("RGB", (int(image["width"]), int(image["height"]))).save(folder / image["file_name"])
    path = root / "annotations" / f"instances_{split}.json"
    content = {"images": list(images), "annotations": list(annotations), "categories": list(categories)}
    path.write_text(json.dumps(content), encoding=encoding)
    return path
