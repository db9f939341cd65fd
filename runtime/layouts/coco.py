"""COCO's own layout, and those in which CVAT and Roboflow export COCO's format."""

from __future__ import annotations

from pathlib import Path

from asag.runtime.layouts.split import Layout, Split, first_folder


def coco_splits(root: Path) -> dict[str, Split]:
    """Splits with ``annotations/instances_NAME.json``, pictures in ``NAME/``, ``images/NAME/`` or ``images/``."""
    found = {}
    for file in sorted((root / "annotations").glob("instances_*.json")):
        name = file.stem.removeprefix("instances_")
        images = first_folder((root / name, root / "images" / name, root / "images"))
        if images is not None:
            found[name] = Split(name, images, file)
    return found


def beside_splits(root: Path) -> dict[str, Split]:
    """Splits with ``NAME/_annotations.coco.json`` beside the pictures."""
    files = sorted(root.glob("*/_annotations.coco.json"))
    return {file.parent.name: Split(file.parent.name, file.parent, file) for file in files}


COCO = Layout("COCO", "annotations/instances_SPLIT.json with SPLIT/, images/SPLIT/ or images/", coco_splits)
BESIDE = Layout("COCO beside the images", "SPLIT/_annotations.coco.json", beside_splits)
