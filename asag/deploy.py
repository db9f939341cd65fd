"""The detector as it is deployed: static shapes, pixels in, detections out.

What PyTorch evaluates and what is exported.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from asag.checkpoint import CheckpointInfo
from asag.detector import Detector, Predictions
from asag.families import family_of
from asag.family import Stage
from asag.normalization import IMAGE_MEAN, IMAGE_STD, ImageNormalization
from asag.parts.boxes import cxcywh_to_xyxy

INPUT_TYPES = ("uint8", "float32")


class DeployedDetector(nn.Module):
    """Images [B, 3, H, W] and sizes [B, 2] -> boxes, scores, labels and overflow; see :meth:`forward`.

    detector: copied, without what only training needs and with batch norm folded into the convolutions;
    input_size: (height, width) of the model's input, the checkpoint's by default;
    input_type: "uint8" takes RGB as stored in a picture and normalizes inside, "float32" takes normalized RGB;
    fold_norms: only a benchmark has a reason to leave the norms as they are.
    Raises ValueError on a size or type that cannot be.
    """

    category_ids: Tensor

    def __init__(
        self,
        detector: Detector,
        info: CheckpointInfo,
        input_size: tuple[int, int] | None = None,
        input_type: str = "uint8",
        *,
        fold_norms: bool = True,
    ) -> None:
        super().__init__()
        if input_type not in INPUT_TYPES:
            raise ValueError(f"input type is {input_type!r}; choose one of {', '.join(INPUT_TYPES)}")
        self.input_size: tuple[int, int] = input_size or info.input.size
        divisor = info.input.divisor
        if any(side < divisor or side % divisor for side in self.input_size):
            raise ValueError(f"input size is {self.input_size}; height and width must be multiples of {divisor}")
        self.info, self.input_type = info, input_type
        self.family = family_of(detector.config)
        self.digest = weights_digest(detector)
        self.parameters_trained = sum(parameter.numel() for parameter in detector.parameters())
        self.detector = detector.deployed()
        if fold_norms:
            self.detector.backbone.fold()
        # Convolutions are faster on a CPU where a cell's channels lie side by side; results differ by rounding only.
        for part in (self.detector.backbone, self.detector.neck):
            part.to(memory_format=torch.channels_last)
        self.normalize = ImageNormalization()
        self.register_buffer("category_ids", torch.tensor(info.category_ids, dtype=torch.int64), persistent=False)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """images: [B, 3, H, W] uint8 RGB or float32 normalized RGB, content top-left; sizes: [B, 2] float32 (height,
        width).

        Returns boxes [B, D, 4] (`xyxy`, fractions of the content), scores [B, D] (falling; 0 where there is no
        detection), labels [B, D] int64 (category ids of the dataset) and overflow [B] int32 (what a fixed capacity
        had no room for). Sizes are held within the input, so that what a caller sends cannot reach the rest of a batch.
        """
        sizes = within_input(sizes, images)
        if self.input_type == "uint8":
            images = self.normalize(images, sizes)
        found: Predictions = self.detector(images, sizes)
        overflow = found.overflow
        if overflow is None:
            overflow = torch.zeros_like(sizes[:, 0], dtype=torch.int32)
        return *self.best(found), overflow

    def best(self, found: Predictions) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and labels, as :meth:`forward` returns them, of the best (query, class) pairs."""
        scores = found.logits.sigmoid()
        if found.valid is not None:
            scores = torch.where(found.valid.unsqueeze(-1), scores, 0.0)
        classes = scores.shape[-1]
        scores, chosen = scores.flatten(1).topk(self.detector.config.max_detections, dim=1)
        boxes = cxcywh_to_xyxy(found.boxes).gather(1, (chosen // classes).unsqueeze(-1).expand(-1, -1, 4))
        return boxes, scores, self.category_ids[chosen % classes]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What the forward pass names, in order."""
        return self.family.stages(self.detector.config)

    def describe(self) -> dict[str, Any]:
        """The model's metadata as plain values, by the field names of `runtime.ModelMetadata`."""
        from asag import __version__

        config = self.detector.config
        return {
            "family": self.family.name,
            "preset": self.info.preset,
            "choices": self.family.choices_of(config),
            "stages": self.stages,
            "half_layers": self.family.half_layers,
            "precision": "fp32",
            "input_height": self.input_size[0],
            "input_width": self.input_size[1],
            "input_type": self.input_type,
            "shorter_side": self.info.input.shorter_side,
            "longer_side": self.info.input.longer_side,
            "interpolation": self.info.input.interpolation,
            "mean": IMAGE_MEAN,
            "std": IMAGE_STD,
            "category_ids": self.info.category_ids,
            "category_names": self.info.category_names,
            "nms_iou": config.nms_iou,
            "max_detections": config.max_detections,
            "package_version": __version__,
            "weights_digest": self.digest,
        }


def within_input(sizes: Tensor, images: Tensor) -> Tensor:
    """Sizes [B, 2] between one pixel and the input's own height and width; what is not a number becomes one pixel."""
    # Made where they are needed: numbers copied to a GPU would be waited for.
    limits = torch.cat([sizes.new_full((1,), float(side)) for side in images.shape[-2:]])
    return torch.where(sizes >= 1, sizes, 1.0).minimum(limits)


def weights_digest(detector: Detector) -> str:
    """SHA-256 over the names and bytes of all tensors, in name order, as hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(detector.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
