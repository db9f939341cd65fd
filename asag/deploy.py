"""The detector as it is deployed: one head, static shapes, detections out.

What PyTorch evaluates and what is exported.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from asag.backbone import fold_batch_norm
from asag.checkpoint import CheckpointInfo
from asag.config import IMAGE_MEAN, IMAGE_STD
from asag.detector import Detector
from asag.geometry import cxcywh_to_xyxy
from asag.normalization import ImageNormalization

INPUT_TYPES = ("uint8", "float32")


class DeployedDetector(nn.Module):
    """Images [B, 3, H, W] and sizes [B, 2] -> boxes, scores, labels and overflow; see :meth:`forward`.

    detector: copied, without the heads that are not deployed and with batch norm folded into the convolutions;
    input_size: (height, width) of the model's input, the checkpoint's by default, each a multiple of 32;
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
        patch_capacity: tuple[int, int] | None = None,
        *,
        fold_norms: bool = True,
    ) -> None:
        super().__init__()
        if input_type not in INPUT_TYPES:
            raise ValueError(f"input type is {input_type!r}; choose one of {', '.join(INPUT_TYPES)}")
        self.input_size: tuple[int, int] = input_size or info.input_size
        if any(side < 32 or side % 32 for side in self.input_size):
            raise ValueError(f"input size is {self.input_size}; height and width must be multiples of 32")
        self.info, self.input_type = info, input_type
        self.patch_capacity: tuple[int, int] = patch_capacity or info.patch_capacity
        if any(capacity < 1 for capacity in self.patch_capacity):
            raise ValueError(f"patch capacity is {self.patch_capacity}; each level needs at least one place")
        self.digest = weights_digest(detector)
        self.left_out = [name for name in detector.heads if name != detector.config.head]
        kept = {name: detector.heads[name] for name in detector.heads if name == detector.config.head}
        heads = detector.heads
        try:
            detector.heads = nn.ModuleDict(kept)
            self.detector = copy.deepcopy(detector).eval().requires_grad_(False)
        finally:
            detector.heads = heads
        if fold_norms:
            fold_batch_norm(self.detector.backbone)
        # Convolutions are faster on a CPU where a cell's channels lie side by side; results differ by rounding only.
        for part in (self.detector.backbone, self.detector.neck):
            part.to(memory_format=torch.channels_last)
        self.normalize = ImageNormalization()
        self.register_buffer("category_ids", torch.tensor(info.category_ids, dtype=torch.int64), persistent=False)

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """images: [B, 3, H, W] uint8 RGB or float32 normalized RGB, content top-left; sizes: [B, 2] float32 (height,
        width).

        Returns boxes [B, D, 4] (`xyxy`, fractions of the content), scores [B, D] (falling; 0 where there is no
        detection), labels [B, D] int64 (category ids of the dataset) and overflow [B] int32 (probing candidates that
        found no place).
        """
        if self.input_type == "uint8":
            images = self.normalize(images, sizes)
        output, anchors = self.detector(images, sizes, self.patch_capacity)
        return *self.decode(output.logits, output.boxes, anchors.valid), anchors.overflow

    def decode(self, logits: Tensor, boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best (query, class) pairs (specification section 6, before suppression).

        logits: [B, N, classes]; boxes: [B, N, 4] `cxcywh`, fractions of the content; valid: [B, N]. Returns boxes,
        scores and labels as :meth:`forward` does.
        """
        scores = torch.where(valid.unsqueeze(-1), logits.sigmoid(), 0.0)
        classes = scores.shape[-1]
        scores, chosen = scores.flatten(1).topk(self.detector.config.max_detections, dim=1)
        boxes = cxcywh_to_xyxy(boxes).gather(1, (chosen // classes).unsqueeze(-1).expand(-1, -1, 4))
        return boxes, scores, self.category_ids[chosen % classes]

    @torch.no_grad()
    def stages(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """The detector's stages by name (:meth:`Detector.stages`), of this input, capacity and head, together with
        the results `boxes`, `scores`, `labels` and `overflow` of :meth:`forward`.
        """
        if self.input_type == "uint8":
            images = self.normalize(images, sizes)
        found = self.detector.stages(images, sizes, self.patch_capacity)
        head = self.detector.config.head
        boxes, scores, labels = self.decode(found[f"{head}_logits"], found[f"{head}_boxes"], found["valid"])
        return found | {"boxes": boxes, "scores": scores, "labels": labels}

    def describe(self) -> dict[str, Any]:
        """The model's metadata as plain values, by the field names of `runtime.ModelMetadata`."""
        from asag import __version__

        config = self.detector.config
        return {
            "preset": self.info.preset,
            "decoder": config.decoder,
            "backbone": config.backbone,
            "queries": config.queries,
            "head": config.head,
            "levels": config.levels,
            "precision": "fp32",
            "input_height": self.input_size[0],
            "input_width": self.input_size[1],
            "input_type": self.input_type,
            "shorter_side": self.info.shorter_side,
            "longer_side": self.info.longer_side,
            "mean": IMAGE_MEAN,
            "std": IMAGE_STD,
            "category_ids": self.info.category_ids,
            "category_names": self.info.category_names,
            "nms_iou": config.nms_iou,
            "max_detections": config.max_detections,
            "patch_capacity": self.patch_capacity,
            "package_version": __version__,
            "weights_digest": self.digest,
        }


def weights_digest(detector: Detector) -> str:
    """SHA-256 over the names and bytes of all tensors, in name order, as hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(detector.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
