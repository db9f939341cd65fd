"""How large the values of a model become on the user's images, which decides the steps of its int8 activations."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx

from asag.runtime.errors import one_line
from asag.runtime.metadata import ModelMetadata
from asag.runtime.preprocessing import load_image, prepare


def largest_magnitudes(
    proto: onnx.ModelProto,
    metadata: ModelMetadata,
    images: Sequence[Path],
    progress: Callable[[float], None] = lambda fraction: None,
    operators: Sequence[str] = ("Conv",),
) -> dict[str, float]:
    """The largest magnitude over all `images` of every value that an operator of `proto` (float32) reads or gives,
    of those types.

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
        for number, path in enumerate(images):
            progress(number / len(images))
            yield prepare([load_image(path)], metadata)
        progress(1.0)

    # The calibrator works on files, and puts one more beside the file that it is given.
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "model.onnx")
        onnx.save(proto, source)
        try:
            calibrator = create_calibrator(
                source,
                list(operators),
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
    magnitudes = {name: float(np.abs(found.range_value).max()) for name, found in ranges.items()}
    broken = sorted(name for name, largest in magnitudes.items() if not math.isfinite(largest))
    if broken:
        raise ValueError(f"the value {broken[0]} is not finite on the calibration images; the model is damaged")
    return magnitudes
