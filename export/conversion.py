"""An exported file in float32 becomes one of another precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from asag.export.adoption.pictures import verification_pictures
from asag.export.calibration import largest_magnitudes
from asag.export.exported_file import read_exported
from asag.export.foreign_precision import measured_nodes, too_large
from asag.export.precision import convert_precision
from asag.runtime.files import write_bytes
from asag.runtime.metadata import FOREIGN
from asag.runtime.onnx_file import write_metadata


def needs_conversion(model: Path, precision: str) -> bool:
    """Whether the exported file `model` must be converted to be in `precision`, rather than being so already.

    Raises FileNotFoundError for a missing file, and ValueError for one that is damaged, no asag model, or in neither
    this precision nor float32.
    """
    return _differs(model, read_exported(model)[1].precision, precision)


def _differs(model: Path, found: str, precision: str) -> bool:
    if found not in (precision, "fp32"):
        raise ValueError(f"{model} is in {found}; only a file in fp32 becomes another precision, so export it in fp32")
    return found != precision


def convert_file(model: Path, output: Path, precision: str, images: Sequence[Path] = ()) -> tuple[str, ...] | None:
    """Write the float32 file `model` to `output` in `precision`, one of :data:`export.precision.PRECISIONS`.

    images: of an adopted file, whose values that are large on these, else on made-up pictures, stay float32 in "fp16".
    Their names are given back, None where nothing was measured. The metadata of `output` name its precision. Raises
    what :func:`needs_conversion` raises, what reading an image raises, and ValueError when a weight does not fit.
    """
    proto, metadata = read_exported(model)
    _differs(model, metadata.precision, precision)
    kept = None
    if images and metadata.family != FOREIGN:
        raise ValueError(
            f"{model} is of family {metadata.family}, which knows what bears {precision}: leave images out"
        )
    if precision == "fp16" and metadata.family == FOREIGN:
        made_up = verification_pictures(metadata.input_size, None)
        pictures: Sequence[Path | Image.Image] = images or [picture for _, picture in made_up]
        nodes = measured_nodes(proto.graph)
        kept = too_large(proto.graph, largest_magnitudes(proto, metadata, pictures, nodes=nodes))
    converted = convert_precision(proto, precision, metadata, kept or ())
    write_metadata(converted, dataclasses.replace(metadata, precision=precision))
    write_bytes(output, converted.SerializeToString())
    return kept
