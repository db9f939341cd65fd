"""int8 from calibration on the user's images, with a budget of accuracy that it may cost.

Where the budget does not hold with every convolution in int8, layers go back to float16, those first whose quantization
alone changes the scores most. How many is found by halving, so that a network of 60 layers takes about six evaluations.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from asag.export.calibration import largest_magnitudes
from asag.export.exported_file import read_exported
from asag.export.foreign_precision import measured_nodes
from asag.export.quantized_graph import quantizable_layers, quantize_layers
from asag.runtime.coco_dataset import CocoFolder
from asag.runtime.coco_evaluation import check_measurable, evaluate_session
from asag.runtime.coco_file import Id
from asag.runtime.errors import one_line
from asag.runtime.files import write_bytes
from asag.runtime.metadata import FOREIGN, ModelMetadata
from asag.runtime.onnx_file import write_metadata
from asag.runtime.opening import open_session
from asag.runtime.preprocessing import load_image, prepare

ProgressCallback = Callable[[str, float], None]

RANKING_IMAGES = 4
"""Calibration images on which the layers' costs are measured, each layer alone."""


@dataclass(frozen=True)
class QuantizedLayer:
    """A convolution by its parameters' name, "int8" or "fp16", and what its quantization costs.

    `cost` is the mean change of the scores (0..1) of an image's best detections when this layer alone is int8; None
    where it was not measured, because the budget held at once or there was none.
    """

    name: str
    precision: str
    cost: float | None = None


@dataclass(frozen=True)
class QuantizationAccuracy:
    """COCO AP (0..1) on `images` images: of the float32 file, with every layer in int8, and of the file written.

    `budget` is the drop that was allowed, None where it was only measured.
    """

    images: int
    float32: float
    all_int8: float
    written: float
    budget: float | None


@dataclass(frozen=True)
class QuantizationReport:
    """What :func:`quantize_int8` wrote. `accuracy` is None where no dataset was given to measure it on."""

    path: Path
    bytes: int
    calibration_images: int
    layers: tuple[QuantizedLayer, ...]
    accuracy: QuantizationAccuracy | None

    @property
    def taken_back(self) -> tuple[QuantizedLayer, ...]:
        """Layers in float16, the most expensive first."""
        back = [layer for layer in self.layers if layer.precision != "int8"]
        return tuple(sorted(back, key=lambda layer: layer.cost or 0.0, reverse=True))

    def summary(self) -> list[str]:
        """The report as sentences, one a line."""
        count = len(self.layers) - len(self.taken_back)
        lines = [
            f"{self.path.name}: {self.bytes / 1e6:.1f} MB, {count} of {len(self.layers)} convolutions of backbone and"
            f" neck in int8, calibrated on {self.calibration_images} images"
        ]
        if self.accuracy is None:
            return [*lines, "its accuracy is unknown until `asag parity` compares it with the checkpoint"]
        found = self.accuracy
        allowed = "" if found.budget is None else f"; it may fall by {found.budget:g}"
        lines.append(
            f"AP on {found.images} images: {found.float32:.4f} in fp32, {found.written:.4f} in this file"
            f" ({found.written - found.float32:+.4f}{allowed})"
        )
        if self.taken_back:
            lines.append(
                f"with every layer in int8 it is {found.all_int8:.4f} ({found.all_int8 - found.float32:+.4f}); back in"
                " fp16, with the mean change of the scores when the layer alone is int8:"
            )
            lines += [f"  {layer.name}: {layer.cost:.5f}" for layer in self.taken_back]
        return lines


def quantize_int8(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    calibration_images: Sequence[Path],
    dataset: CocoFolder | None = None,
    max_ap_drop: float | None = None,
    progress: ProgressCallback | None = None,
    evaluation_images: int | None = None,
    classes: Sequence[str] = (),
) -> QuantizationReport:
    """Write `model` (an export in float32) to `output` with the convolutions of backbone and neck in int8.

    calibration_images: image files that the activations' steps are measured on; dataset: of the model's classes, to
    measure AP on with ONNX Runtime's CPU backend, on its first `evaluation_images` images (None: all), of `classes`
    (names) only where there are any; max_ap_drop: AP (0..1) that int8 may cost there, for which layers go back to
    float16. `progress` is called with the phase's name and the fraction done (0..1). The file appears whole or not
    at all.

    Raises FileNotFoundError or ValueError for an input that is missing, damaged or no float32 export of this project,
    and ValueError where the budget does not hold although no layer is quantized.
    """
    path, target = Path(model), Path(output)
    report = progress or (lambda phase, fraction: None)
    if not calibration_images:
        raise ValueError("no calibration images were given; name some like those that the model will see")
    if max_ap_drop is not None and dataset is None:
        raise ValueError("a budget of AP needs a dataset to measure it on")
    proto, metadata = _read_float32_export(path)
    image_ids = () if dataset is None else dataset.image_ids[:evaluation_images]
    if dataset is not None:
        check_measurable(dataset.for_model(metadata, classes), image_ids)
    magnitudes = largest_magnitudes(
        proto,
        metadata,
        calibration_images,
        lambda fraction: report("calibrating", fraction),
        measured_nodes(proto.graph) if metadata.family == FOREIGN else None,
    )
    layers = tuple(quantizable_layers(proto.graph, metadata))
    with tempfile.TemporaryDirectory() as folder:
        trial = _Trial(proto, magnitudes, path, Path(folder, "model.onnx"), metadata, report, tuple(classes))
        kept = layers
        costs: dict[str, float] = {}
        accuracy = None
        if dataset is not None:
            kept, costs, accuracy = _within_budget(
                trial, layers, dataset, image_ids, max_ap_drop, calibration_images[:RANKING_IMAGES]
            )
        content = trial.content(kept)
    write_bytes(target, content)
    return QuantizationReport(
        path=target,
        bytes=len(content),
        calibration_images=len(calibration_images),
        layers=tuple(QuantizedLayer(name, "int8" if name in kept else "fp16", costs.get(name)) for name in layers),
        accuracy=accuracy,
    )


@dataclass(frozen=True)
class _Trial:
    """Tries a choice of layers: `file` is where the quantized model lies while it runs, `source` the float32 one."""

    proto: onnx.ModelProto
    magnitudes: Mapping[str, float]
    source: Path
    file: Path
    metadata: ModelMetadata
    report: ProgressCallback
    classes: tuple[str, ...]

    def content(self, layers: Sequence[str]) -> bytes:
        """The file with these layers in int8."""
        quantized = quantize_layers(self.proto, self.metadata, self.magnitudes, layers)
        write_metadata(quantized, dataclasses.replace(self.metadata, precision="int8" if layers else "fp16"))
        try:
            onnx.checker.check_model(quantized)
        except onnx.checker.ValidationError as error:
            raise ValueError(f"the quantized model is not valid ONNX: {one_line(error)}") from None
        return quantized.SerializeToString()

    def average_precision(
        self, layers: Sequence[str] | None, dataset: CocoFolder, image_ids: Sequence[Id], phase: str
    ) -> float:
        """COCO AP with these layers in int8; None is the float32 file."""
        if layers is not None:
            self.file.write_bytes(self.content(layers))
        with open_session(self.source if layers is None else self.file) as session:
            result, _ = evaluate_session(
                session,
                dataset,
                image_ids,
                progress=lambda done, number: self.report(phase, done / number),
                classes=self.classes,
            )
        return result.ap

    def scores(self, layers: Sequence[str], images: Sequence[Path]) -> np.ndarray:
        """Scores [images, detections] with these layers in int8, falling in each row."""
        self.file.write_bytes(self.content(layers))
        with open_session(self.file) as session:
            rows = [session.run(prepare([load_image(image)], self.metadata))["scores"] for image in images]
        return np.concatenate(rows)


def _within_budget(
    trial: _Trial,
    layers: Sequence[str],
    dataset: CocoFolder,
    image_ids: Sequence[Id],
    max_ap_drop: float | None,
    ranking_images: Sequence[Path],
) -> tuple[tuple[str, ...], dict[str, float], QuantizationAccuracy]:
    """Layers that stay int8 within the budget, the measured costs, and the accuracy reached."""
    float32 = trial.average_precision(None, dataset, image_ids, "evaluating fp32")
    all_int8 = trial.average_precision(layers, dataset, image_ids, "evaluating int8")

    def accuracy(written: float) -> QuantizationAccuracy:
        return QuantizationAccuracy(len(image_ids), float32, all_int8, written, max_ap_drop)

    if max_ap_drop is None or float32 - all_int8 <= max_ap_drop:
        return tuple(layers), {}, accuracy(all_int8)
    written = trial.average_precision((), dataset, image_ids, "evaluating fp16")
    if float32 - written > max_ap_drop:
        raise ValueError(
            f"{trial.source}: AP falls from {float32:.4f} to {written:.4f} with no layer in int8, from fp16 alone, by"
            f" more than the {max_ap_drop:g} allowed; allow more, or stay with fp32 or bf16"
        )
    costs = _costs(trial, layers, ranking_images)
    ranked = sorted(layers, key=lambda name: costs[name], reverse=True)
    # Taking back `enough` of the worst layers holds the budget, `too_few` does not.
    too_few, enough = 0, len(ranked)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        phase = f"evaluating with {middle} of {len(ranked)} layers back in fp16"
        found = trial.average_precision(ranked[middle:], dataset, image_ids, phase)
        if float32 - found <= max_ap_drop:
            enough, written = middle, found
        else:
            too_few = middle
    return tuple(name for name in layers if name in ranked[enough:]), costs, accuracy(written)


def _costs(trial: _Trial, layers: Sequence[str], images: Sequence[Path]) -> dict[str, float]:
    unquantized = trial.scores((), images)
    found = {}
    for number, name in enumerate(layers):
        trial.report("measuring layers", number / len(layers))
        found[name] = float(np.abs(trial.scores((name,), images) - unquantized).mean())
    trial.report("measuring layers", 1.0)
    return found


def _read_float32_export(path: Path) -> tuple[onnx.ModelProto, ModelMetadata]:
    proto, metadata = read_exported(path)
    if metadata.precision != "fp32":
        raise ValueError(
            f"{path}: it is {metadata.precision} already; quantize the file of `asag export` without --precision"
        )
    if not quantizable_layers(proto.graph, metadata):
        raise ValueError(f"{path}: it has no convolutions of a backbone; export it again with `asag export`")
    return proto, metadata
