"""A synthetic detection dataset in COCO's layout, written from a seed.

Coloured shapes of six classes lie on textured backgrounds. Half of the objects are 12 to 40 pixels long, so that
adaptive probing looks at P4 and P3 in most images, and COCO's small, medium and large areas are all there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asag.runtime.files import atomic_folder
from asag.train.synthetic_images import CATEGORIES, SMALLEST_OBJECT, paint_image

SETTINGS_FILE = "synthetic.json"
_FORMAT = 1
_SPLITS = ("train2017", "val2017")
_JPEG_OPTIONS: dict[str, Any] = {"quality": 92, "subsampling": 0}  # full chroma: small objects keep their colour

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SyntheticSettings:
    """What a synthetic dataset is made from; two datasets with equal settings are the same.

    ``image_size`` is the longer side in pixels; the shorter one is 75 to 100 percent of it. ``objects`` are the
    fewest and the most of one image.
    """

    train_images: int
    val_images: int
    image_size: int
    seed: int
    objects: tuple[int, int] = (3, 12)
    format: int = _FORMAT

    def __post_init__(self) -> None:
        if self.train_images < 1 or self.val_images < 1:
            raise ValueError(
                f"a synthetic dataset needs at least 1 image per split, not {self.train_images} and {self.val_images}"
            )
        if not 64 <= self.image_size <= 4096:
            raise ValueError(f"the synthetic image size must be 64 to 4096 pixels, not {self.image_size}")
        if self.seed < 0:
            raise ValueError(f"the seed must not be negative, it is {self.seed}")
        if not 1 <= self.objects[0] <= self.objects[1]:
            raise ValueError(f"the fewest and most objects must be ordered and positive, they are {self.objects}")

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON types, as they are recorded in the dataset's folder."""
        return json.loads(json.dumps(asdict(self)))


def _image_shape(settings: SyntheticSettings, generator: np.random.Generator) -> tuple[int, int]:
    longer = settings.image_size
    shorter = round(longer * generator.uniform(0.75, 1.0))
    portrait = generator.random() < 0.3
    return (longer, shorter) if portrait else (shorter, longer)


def _write_split(
    folder: Path, split_index: int, settings: SyntheticSettings, advance: Callable[[], None]
) -> dict[str, Any]:
    """Paint one split's images into ``folder`` and return its COCO annotations."""
    split = _SPLITS[split_index]
    count = (settings.train_images, settings.val_images)[split_index]
    (folder / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, count + 1):
        # A generator of its own for every image: its picture does not depend on how many others are made.
        generator = np.random.default_rng([settings.seed, split_index, image_id])
        height, width = _image_shape(settings, generator)
        picture, objects = paint_image(height, width, settings.objects, generator)
        name = f"{image_id:012d}.jpg"
        picture.save(folder / split / name, **_JPEG_OPTIONS)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for painted in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": painted.category_id,
                    "bbox": [round(value, 3) for value in painted.box],
                    "area": round(painted.area, 2),
                    "iscrowd": 0,
                }
            )
        advance()
    return {
        "info": {"description": f"asag synthetic shapes, {split}", "version": str(settings.format)},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": key, "name": name, "supercategory": "shape"} for key, name in CATEGORIES.items()],
    }


def _recorded_settings(root: Path) -> dict[str, Any] | None:
    try:
        recorded = json.loads((root / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return recorded if isinstance(recorded, dict) else None


def _is_already_there(root: Path, settings: SyntheticSettings) -> bool:
    """Whether ``root`` holds this dataset; ValueError when it holds anything else."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise ValueError(f"{root} is a file: name a folder for the synthetic dataset")
    if not any(root.iterdir()):
        return False
    recorded = _recorded_settings(root)
    if recorded is None:
        raise ValueError(
            f"{root} holds something else than a synthetic dataset: name another folder, it stays as it is"
        )
    if recorded != settings.as_json():
        raise ValueError(f"{root} holds a synthetic dataset with other settings: remove it or name another folder")
    return True


def write_synthetic_dataset(
    root: str | os.PathLike[str],
    *,
    train_images: int = 1600,
    val_images: int = 200,
    image_size: int = 320,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write the synthetic dataset and return its folder.

    The folder gets ``annotations/instances_{train2017,val2017}.json``, the JPEG files in ``train2017/`` and
    ``val2017/``, and ``synthetic.json`` with the settings. Boxes are ``(x, y, width, height)`` in pixels, tight to
    the shape; ``area`` is the covered area. The same settings give the same bytes. Nothing is done when the folder
    already holds the dataset with these settings.

    ``image_size`` is the longer side in pixels. ``progress(done, total)`` is called after every image.

    Raises ValueError when a setting is out of range, or when the folder holds anything else: it is left as it is.
    """
    root = Path(root)
    settings = SyntheticSettings(train_images, val_images, image_size, seed)
    if _is_already_there(root, settings):
        return root
    total, done = train_images + val_images, 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    # An interrupted run leaves no half dataset under the real name.
    with atomic_folder(root) as partial:
        (partial / "annotations").mkdir()
        for split_index, split in enumerate(_SPLITS):
            content = _write_split(partial, split_index, settings, advance)
            (partial / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
        (partial / SETTINGS_FILE).write_text(json.dumps(settings.as_json(), indent=2) + "\n", encoding="utf-8")
    return root


__all__ = ["CATEGORIES", "SMALLEST_OBJECT", "SyntheticSettings", "write_synthetic_dataset"]
