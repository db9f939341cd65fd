"""A family written here, in fewer than 120 lines, goes the whole way with no edit anywhere else."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asag import families
from asag.cli.main import main
from asag.detector import Detector, Predictions, stage
from asag.family import Choice, Family, InputSpec, Preset, Stage, Value
from asag.parts.backbones.resnet import ResNet
from asag.parts.boxes import content_scale
from asag.training.protocol import Batch, ParameterGroup, Step, Target, rates_of

# The family begins here.


@dataclass(frozen=True)
class GridConfig:
    backbone: str = "resnet10"
    num_classes: int = 80
    train_batch_statistics: bool = True
    spread: float = 1.0
    max_detections: int = 9
    nms_iou: float | None = 0.7

    @property
    def classes(self) -> int:
        return self.num_classes


@dataclass(frozen=True)
class GridSettings:
    box_weight: float = 1.0


class GridDetector(Detector):
    """Every cell of the coarsest map is a query: the box around it, and its classes."""

    config: GridConfig

    def __init__(self, config: GridConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ResNet(config.backbone, 8, config.train_batch_statistics)
        self.neck = nn.Conv2d(self.backbone.channels[-1], 32, 1)
        self.mix_cells = nn.Linear(32, 32)
        self.class_logits = nn.Linear(32, config.classes)
        self.box_deltas = nn.Linear(32, 4)

    def features(self, images: Tensor) -> list[Tensor]:
        return [self.neck(self.backbone(images)[-1]).float()]

    def forward(self, images: Tensor, sizes: Tensor) -> Predictions:
        (grid,) = stage("features", grid=self.features(images)[0])
        height, width = grid.shape[-2:]
        (cells,) = stage("cells", queries=self.mix_cells(grid.flatten(2).transpose(1, 2)).relu())
        rows, columns = torch.arange(height, device=grid.device), torch.arange(width, device=grid.device)
        centres = torch.stack((columns.repeat(height), rows.repeat_interleave(width)), dim=-1) + 0.5
        deltas = self.box_deltas(cells) * self.config.spread
        pixels = torch.cat((centres * 32 + deltas[..., :2] * 16, 48 * deltas[..., 2:].exp()), dim=-1)
        logits, boxes = stage("head", logits=self.class_logits(cells), boxes=pixels / content_scale(sizes))
        return Predictions(logits, boxes)

    def deployed(self) -> Self:
        return copy.deepcopy(self).eval().requires_grad_(False)


class PublishedGrid:
    looked_for = "grid.neck.weight"

    def identify(self, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> GridConfig | None:
        if self.looked_for not in state:
            return None
        return GridConfig(num_classes=len(state["grid.class_logits.bias"]))

    def translate(self, name: str, value: Tensor, config: GridConfig) -> Iterator[tuple[str, Tensor]] | None:
        return iter([(name.removeprefix("grid."), value)]) if name.startswith("grid.") else None


class GridTraining:
    parts: ClassVar[Mapping[str, str]] = {"loss_class": "classes", "loss_box": "boxes"}
    remarks = ("cells learn the objects nearest to them",)

    def __init__(self, detector: GridDetector, settings: GridSettings) -> None:
        self.detector, self.weights = detector, {"loss_class": 1.0, "loss_box": settings.box_weight}

    def outputs(self, batch: Batch, step: Step) -> Predictions:
        return self.detector(batch.images, batch.sizes.to(batch.images.device))

    def counts(self, batch: Batch, step: Step, outputs: Any = None) -> Tensor:
        return torch.tensor([float(sum(len(target["labels"]) for target in batch.targets))])

    def losses(self, outputs: Predictions, targets: Sequence[Target], totals: Tensor) -> dict[str, Tensor]:
        wanted, box_loss = torch.zeros_like(outputs.logits), outputs.boxes.sum() * 0
        for image, target in enumerate(targets):
            nearest = torch.cdist(target["boxes"][:, :2], outputs.boxes[image, :, :2].detach()).argmin(dim=1)
            wanted[image, nearest, target["labels"]] = 1
            box_loss = box_loss + (outputs.boxes[image, nearest] - target["boxes"]).abs().sum()
        class_loss = F.binary_cross_entropy_with_logits(outputs.logits, wanted, reduction="sum")
        return {"loss_class": class_loss / totals[0], "loss_box": box_loss / totals[0]}

    def parameter_groups(self) -> list[ParameterGroup]:
        return rates_of(self.detector)


STAGES = (
    Stage("features", (Value("grid", "maps"),)),
    Stage("cells", (Value("queries", "queries"),)),
    Stage("head", (Value("logits", "scores"), Value("boxes", "boxes", frame="content"))),
)
RECIPE = {"batch_size": 4, "learning_rate": 1e-3, "backbone_learning_rate": 1e-3, "warmup_steps": 5, "workers": 0}
GRID = Family(
    name="grid",
    title="Grid",
    config=GridConfig,
    settings=GridSettings,
    presets={"grid-tiny": Preset(config=GridConfig(), input=InputSpec(96, 96, (96, 96)), recipe=RECIPE)},
    choices=(Choice("spread", "How far boxes may go."),),
    half_layers=("mix_cells",),
    stages=lambda config: STAGES,
    build=GridDetector,
    published=PublishedGrid,
    training=GridTraining,  # type: ignore[arg-type]
)

# The family ends here.


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, GRID))


def asag(*arguments: object) -> int:
    """The exit code of a command, run in this process."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_family_is_short() -> None:
    lines = Path(__file__).read_text().splitlines()
    ends = [number for number, line in enumerate(lines) if line.startswith("# The family")]
    assert len(ends) == 2
    assert ends[1] - ends[0] <= 120


@pytest.mark.slow
def test_the_whole_way(grid: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    options = ["--train-images", 8, "--val-images", 3, "--image-size", 96]
    assert asag("data", "synthetic", data, *options) == 0
    train = ["train", "--preset", "grid-tiny", "--data", data, "-o", run, "--steps", 20, "--device", "cpu", "--quiet"]
    assert asag(*train, "--set", "box_weight=5") == 0
    checkpoint = run / "weights.safetensors"
    record = json.loads((run / "config.json").read_text())["training"]
    assert (record["preset"], record["box_weight"]) == ("grid-tiny", 5.0)
    assert "loss_box" in (run / "losses.csv").read_text().splitlines()[0]

    # What was trained, as its authors would publish it, becomes the same detector.
    from asag.checkpoint import load_detector

    detector, info = load_detector(checkpoint)
    assert isinstance(detector, GridDetector)
    assert info.preset == "grid-tiny"
    state = {f"grid.{name}": value for name, value in detector.state_dict().items()}
    torch.save({"model": state}, tmp_path / "published.pth")
    assert asag("zoo", "convert", tmp_path / "published.pth", "-o", tmp_path / "converted.safetensors") == 0
    converted, _ = load_detector(tmp_path / "converted.safetensors", {"spread": 1.0})
    weights = {name: value for name, value in converted.state_dict().items() if "num_batches" not in name}
    assert all(torch.equal(value, state[f"grid.{name}"]) for name, value in weights.items())

    model, half, int8 = (tmp_path / name for name in ("model.onnx", "half.onnx", "int8.onnx"))
    assert asag("export", checkpoint, "-o", model) == 0
    assert asag("export", checkpoint, "-o", half, "--precision", "fp16") == 0
    check_parity = ["--check", "--json", tmp_path / "parity.json", "--report", tmp_path / "parity.html"]
    assert asag("parity", checkpoint, model, "--data", data, *check_parity) == 0
    (stages,) = json.loads((tmp_path / "parity.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages["stages"]] == ["features", "cells", "head", "detections"]
    assert stages["first"] is None
    assert asag("parity", model, half, "--data", data, "--no-batch-check") == 0
    assert asag("detect", data / "val2017", "--model", model, "--stages", "-o", tmp_path / "pictures") == 0
    assert len(list((tmp_path / "pictures").glob("*-stages.jpg"))) == 3

    measured = ["--rounds", 2, "--stages", "--limit", "--json", tmp_path / "bench.json"]
    assert asag("bench", checkpoint, model, "--images", data / "val2017", *measured) == 0
    bench = json.loads((tmp_path / "bench.json").read_text())
    for times in bench["stage_times"]:
        assert {"features", "cells", "head", "detections"} <= set(times["p50_ms"])
    assert all(found["stages"][0]["operations"] > 1e6 for found in bench["limits"])
    assert asag("report", tmp_path / "parity.json", tmp_path / "bench.json", "-o", tmp_path / "report.html") == 0
    assert "cells" in (tmp_path / "report.html").read_text()

    assert asag("quantize", model, "-o", int8, "--calibration", data / "val2017", "--data", data) == 0
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    assert asag("build", model, "-o", tmp_path / "model.engine", "--precision", "fp16", "--batch", "1") == 0
    assert asag("inspect", tmp_path / "model.engine") == 0
    assert "grid" in capsys.readouterr().out
    assert asag("serve-repository", model, "-o", tmp_path / "served") == 0
    assert asag("serve-repository", tmp_path / "model.engine", "-o", tmp_path / "served", "--name", "engine") == 0
    assert (tmp_path / "served" / "grid-tiny" / "config.pbtxt").is_file()
