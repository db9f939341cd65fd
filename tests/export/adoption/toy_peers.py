"""Small detectors with deformable attention, exported as other tools export theirs: one for each layout, and traps."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Callable

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, QUERIES, HEADS, WIDTH, POINTS = 5, 24, 2, 16, 3
STRIDES = (8, 16, 32)

Samples = list[Tensor]
Sampling = Callable[[Tensor, Tensor], Tensor]


def sample(maps: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def concatenated(samples: Samples, weights: Tensor) -> Tensor:
    """As D-FINE and RT-DETRv2 sum."""
    return (torch.cat(samples, -1) * weights).sum(-1)


def stacked(samples: Samples, weights: Tensor) -> Tensor:
    """As Deformable DETR and its kin sum."""
    return (torch.stack(samples, -2).flatten(-2) * weights).sum(-1)


@dataclasses.dataclass(frozen=True)
class Attention:
    """How a peer samples and sums; the defaults are deformable attention."""

    sampling: Sampling = sample
    total: Callable[[Samples, Tensor], Tensor] = concatenated
    grid: Callable[[Tensor], Tensor] = lambda places: 2 * places - 1


class Toy(nn.Module):
    """images [B, 3, H, W] (and where the content is, [B, H, W]) -> logits [B, Q, C], boxes [B, Q, 4] cxcywh."""

    def __init__(self, attention: Attention, columns: int = CLASSES) -> None:
        super().__init__()
        self.attention = attention
        self.stem = nn.Conv2d(3, WIDTH, 8, stride=8)
        self.down = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, 2, 1) for _ in STRIDES[1:])
        self.value = nn.Linear(WIDTH, WIDTH)
        self.queries = nn.Parameter(torch.randn(QUERIES, WIDTH))
        self.references = nn.Parameter(torch.rand(QUERIES, 2))
        self.offsets = nn.Linear(WIDTH, HEADS * len(STRIDES) * POINTS * 2)
        self.weights = nn.Linear(WIDTH, HEADS * len(STRIDES) * POINTS)
        self.project = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.classify, self.locate = nn.Linear(WIDTH, columns), nn.Linear(WIDTH, 4)

    def forward(self, images: Tensor, inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        maps = [self.stem(images).relu()]
        for layer in self.down:
            maps.append(layer(maps[-1]).relu())
        shapes = [tuple(int(side) for side in level.shape[2:]) for level in maps]
        value = self.value(torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1))
        if inside is not None:
            masks = [F.interpolate(inside[:, None].to(value.dtype), shape) for shape in shapes]
            value = value * torch.cat([mask.flatten(2).transpose(1, 2) for mask in masks], 1)
        queries = self.queries.expand(images.shape[0], -1, -1)
        for layer in self.project:
            queries = queries + layer(self.attend(queries, value, shapes))
        shift = torch.cat((self.references, torch.zeros_like(self.references)), -1)
        return self.classify(queries), (self.locate(queries) + shift).sigmoid()

    def attend(self, queries: Tensor, value: Tensor, shapes: list[tuple[int, ...]]) -> Tensor:
        levels = len(shapes)
        value = value.unflatten(-1, (HEADS, -1))
        offsets = self.offsets(queries).unflatten(-1, (HEADS, levels, POINTS, 2))
        weights = self.weights(queries).unflatten(-1, (HEADS, levels * POINTS)).softmax(-1)
        grid = self.attention.grid(self.references[:, None, None, None] + offsets * 0.05)
        samples = []
        for level, rows in enumerate(value.split([height * width for height, width in shapes], 1)):
            level_maps = rows.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, shapes[level])
            samples.append(self.attention.sampling(level_maps, grid[:, :, :, level].transpose(1, 2).flatten(0, 1)))
        shares = weights.transpose(1, 2).flatten(0, 1).unsqueeze(1)
        attended = self.attention.total(samples, shares)
        return attended.unflatten(0, (-1, HEADS)).flatten(1, 2).transpose(1, 2)


def corners(boxes: Tensor) -> Tensor:
    return torch.cat((boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2), -1)


def best(logits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scores, index = logits.sigmoid().flatten(1).topk(QUERIES, 1)
    places = (index // logits.shape[2]).unsqueeze(-1).expand(-1, -1, 4)
    return boxes.gather(1, places), scores, index % logits.shape[2]


class Wrapped(nn.Module):
    """A toy with the inputs and outputs of a layout."""

    def __init__(self, toy: nn.Module, layout: str, size: tuple[int, int]) -> None:
        super().__init__()
        self.toy, self.layout = toy, layout
        self.register_buffer("sides", torch.tensor([size[1], size[0]] * 2, dtype=torch.float32))

    def forward(self, images: Tensor, more: Tensor | None = None) -> tuple[Tensor, ...] | Tensor:
        logits, boxes = self.toy(images, more) if self.layout == "masked" else self.toy(images)
        if self.layout in ("transformers", "masked"):
            return logits, boxes
        if self.layout == "rfdetr":
            return boxes, logits
        if self.layout == "ultralytics":
            return torch.cat((boxes, logits.sigmoid()), -1)
        chosen, scores, labels = best(logits, boxes)
        if self.layout == "ultralytics6":
            return torch.cat((chosen, scores[..., None], labels[..., None].float()), -1)
        if self.layout == "mmdeploy":
            return torch.cat((corners(chosen) * self.sides, scores[..., None]), -1), labels
        sides = self.sides if more is None else more.repeat(1, 2).unsqueeze(1)
        return labels, corners(chosen) * sides, scores


PORTS = {
    "rtdetr": (("images", "orig_target_sizes"), ("labels", "boxes", "scores")),
    "dfineseg": (("input",), ("labels", "boxes", "scores")),
    "transformers": (("pixel_values",), ("logits", "pred_boxes")),
    "masked": (("pixel_values", "pixel_mask"), ("logits", "pred_boxes")),
    "rfdetr": (("input",), ("dets", "labels")),
    "ultralytics": (("images",), ("output0",)),
    "ultralytics6": (("images",), ("output0",)),
    "mmdeploy": (("input",), ("dets", "labels")),
}
"""Names of inputs and outputs; "masked" is the layout transformers with a mask."""


def toy_of(attention: Attention | None = None, columns: int = CLASSES, same_queries: bool = False) -> Toy:
    """The same weights in every call; same_queries: all of an image begin and look alike."""
    torch.manual_seed(0)
    toy = Toy(attention or Attention(), columns).eval()
    with torch.no_grad():
        toy.classify.weight.mul_(3)
        toy.value.weight.mul_(3)
        if same_queries:
            toy.queries.copy_(toy.queries[:1].expand_as(toy.queries))
            toy.references.copy_(toy.references[:1].expand_as(toy.references))
    return toy


def make_toy(
    layout: str = "transformers",
    attention: Attention | None = None,
    *,
    size: tuple[int, int] = (64, 96),
    operator_set: int = 17,
    batch: int | None = None,
    columns: int = CLASSES,
    same_queries: bool = False,
    half: bool = False,
) -> onnx.ModelProto:
    """A toy as an exporter without constant folding of shapes leaves it; batch: None is an open one; half: all of it
    in float16.
    """
    toy = toy_of(attention, columns, same_queries)
    inputs, outputs = PORTS[layout]
    count = batch or 2
    images = torch.rand(count, 3, *size)
    second = {
        "orig_target_sizes": torch.tensor([[size[1], size[0]]] * count),
        "pixel_mask": torch.ones(count, *size, dtype=torch.int64),
    }
    wrapped = Wrapped(toy, layout, size)
    if half:
        wrapped, images = wrapped.half(), images.half()
    given = (images, *(second[name] for name in inputs[1:]))
    axes = {} if batch else {name: {0: "batch"} for name in (*inputs, *outputs)}
    buffer = io.BytesIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            wrapped,
            given,
            buffer,
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=operator_set,
            dynamic_axes=axes,
            dynamo=False,
        )
    return onnx.load_from_string(buffer.getvalue())
