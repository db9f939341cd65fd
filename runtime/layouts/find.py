"""Finds a split of a data set folder, in whatever layout it is."""

from __future__ import annotations

import os
from pathlib import Path

from asag.runtime.layouts.coco import BESIDE, COCO
from asag.runtime.layouts.split import Split
from asag.runtime.layouts.voc import VOC, VOC_BESIDE
from asag.runtime.layouts.yolo import YOLO

LAYOUTS = (COCO, BESIDE, YOLO, VOC, VOC_BESIDE)

OTHER_NAMES = {"train2017": ("train",), "val2017": ("valid", "val")}
"""What labelling tools call the splits that commands ask for by default."""

ONLY_SPLIT = "default"
"""What CVAT calls the split of a data set that has one: it stands for whichever split is asked for."""


def find_splits(path: str | os.PathLike[str]) -> dict[str, Split]:
    """All splits of a data set, by name.

    `path` is the folder or, for YOLO, may be the file that names its folders. Raises FileNotFoundError without a split,
    with what was looked for, and ValueError where several layouts have a split of one name.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"dataset not found: {root} is not a folder")
    found: dict[str, Split] = {}
    layout_of: dict[str, str] = {}
    for layout in LAYOUTS:
        for name, split in layout.splits(root).items():
            if name in found:
                raise ValueError(
                    f"{root} has the split {name} in two layouts, {layout_of[name]} ({found[name].annotations}) and"
                    f" {layout.name} ({split.annotations}), and nobody can tell which counts: keep one of them"
                )
            found[name], layout_of[name] = split, layout.name
    if not found:
        raise FileNotFoundError(f"no data set in {root}: looked for {_looked_for('SPLIT')}")
    return found


def find_split(path: str | os.PathLike[str], split: str) -> Split:
    """A split of a data set, by its name or by what labelling tools call it: ``train`` and ``valid`` or ``val`` stand
    for ``train2017`` and ``val2017``, and CVAT's only one for all.

    Raises what :func:`find_splits` raises, and FileNotFoundError where it has no such split.
    """
    names = (split, *OTHER_NAMES.get(split, ()))
    try:
        found = find_splits(path)
    except FileNotFoundError as error:
        if not Path(path).exists():
            raise
        raise FileNotFoundError(f"no split {split} in {path}: looked for {_looked_for(split)}") from error
    name = next((name for name in (*names, ONLY_SPLIT) if name in found), None)
    if name is None:
        raise FileNotFoundError(
            f"no split {' or '.join(names)} in {path}, only {', '.join(found)}: looked for {_looked_for(split)}"
        )
    return found[name]


def _looked_for(split: str) -> str:
    return "; ".join(layout.looks_for.replace("SPLIT", split) for layout in LAYOUTS)
