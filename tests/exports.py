"""Small detectors, each exported once in a process for the tests of several rooms: an export takes many seconds."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import onnx
import pytest
import torch

from asag.deploy import DeployedDetector
from asag.detector import Detector
from asag.export.model import build_onnx
from asag.export.precision import convert_precision
from asag.runtime.metadata import ModelMetadata
from asag.runtime.onnx_file import write_metadata
from tests.builders import random_detector, small_config, small_info, write_checkpoint


@dataclasses.dataclass(frozen=True)
class SmallExport:
    """A detector with the sizes of `small_config` and `small_info`, as PyTorch runs it, and its export in float32.

    All tests of a process share it: change copies alone.
    """

    detector: Detector
    """As it is in a checkpoint."""
    deployed: DeployedDetector
    metadata: ModelMetadata
    proto: onnx.ModelProto

    def model(self) -> onnx.ModelProto:
        """The exported model, to change."""
        copy = onnx.ModelProto()
        copy.CopyFrom(self.proto)
        return copy

    def checkpoint(self, path: Path) -> Path:
        """The checkpoint that it was exported from."""
        return write_checkpoint(path, self.detector, self.deployed.info)

    def instead_of_exporting(self, patch: pytest.MonkeyPatch) -> None:
        """Let whatever exports the checkpoint have its graph at once."""

        def build(model: DeployedDetector) -> onnx.ModelProto:
            assert model.describe() == self.deployed.describe(), "another model is exported"
            return self.model()

        patch.setattr("asag.export.model.build_onnx", build)

    def write(self, path: Path, precision: str = "fp32") -> Path:
        """The file that `export_onnx` would write."""
        proto = convert_precision(self.proto, precision, self.metadata)
        write_metadata(proto, dataclasses.replace(self.metadata, precision=precision))
        onnx.save(proto, path)
        return path


def small_export(decoder: str = "adamixer", levels: str = "P3P6") -> SmallExport:
    """The export of a small random detector."""
    return _made(decoder, levels)


@functools.cache
def _made(decoder: str, levels: str) -> SmallExport:
    detector = random_detector(small_config(decoder=decoder, levels=levels), seed=1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        for parameter in detector.parameters():  # the exporter makes equal constants one
            parameter.add_(torch.randn_like(parameter) * 0.01)
    deployed = DeployedDetector(detector, small_info()).eval()
    metadata = ModelMetadata(**deployed.describe())
    proto = build_onnx(deployed)
    write_metadata(proto, metadata)
    return SmallExport(detector, deployed, metadata, proto)
