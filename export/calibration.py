"""How large the values of a model become on the user's images, which decides the steps of its int8 activations."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from PIL import Image

from asag.runtime.errors import one_line
from asag.runtime.metadata import ModelMetadata
from asag.runtime.preprocessing import as_image, prepare


def largest_magnitudes(
    proto: onnx.ModelProto,
    metadata: ModelMetadata,
    images: Sequence[Path | Image.Image],
    progress: Callable[[float], None] = lambda fraction: None,
    nodes: Sequence[onnx.NodeProto] | None = None,
) -> dict[str, float]:
    """The largest magnitude over all `images` of every value that `nodes` of `proto` (float32) read or give; None: its
    convolutions.

    Images are prepared as for detection, one at a time, and run on ONNX Runtime's CPU backend. `progress` is called
    with the fraction done. Raises what reading an image raises, and ValueError naming a value that is not finite.
    """
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator

    class Reader(CalibrationDataReader):
        def __init__(self, batches: Iterator[dict]) -> None:
            self.batches = batches

        def get_next(self) -> dict | None:
            return next(self.batches, None)

    def batches() -> Iterator[dict]:
        for number, image in enumerate(images):
            progress(number / len(images))
            yield prepare([as_image(image)], metadata)
        progress(1.0)

    if nodes is None:
        nodes = [node for node in proto.graph.node if node.op_type == "Conv"]
    wanted = {name for node in nodes for name in (*node.input, *node.output)}
    # The calibrator works on files, and puts one more beside the file that it is given.
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "model.onnx")
        onnx.save(proto, source)
        try:
            calibrator = create_calibrator(
                source,
                sorted({node.op_type for node in nodes}),
                augmented_model_path=str(Path(folder, "augmented.onnx")),
                calibrate_method=CalibrationMethod.MinMax,
            )
            with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of what is not finite, see below
                calibrator.collect_data(Reader(batches()))
        except (ValueError, OSError):  # of an image
            raise
        except Exception as error:  # the runtime has a family of exception classes without a common public base
            raise ValueError(f"ONNX Runtime cannot run the model (is it damaged?): {one_line(error)}") from None
        ranges = calibrator.compute_data()
        del calibrator
    magnitudes = {name: float(np.abs(found.range_value).max()) for name, found in ranges.items() if name in wanted}
    broken = sorted(name for name, largest in magnitudes.items() if not math.isfinite(largest))
    if broken:
        raise ValueError(f"the value {broken[0]} is not finite on the calibration images; the model is damaged")
    return magnitudes
