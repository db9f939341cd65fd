"""What an AdaMixer detector is made of, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field

BACKBONES = ("resnet10", "resnet18", "resnet50", "resnet101")


@dataclass(frozen=True)
class ModelSize:
    """Widths of the network. The defaults are the published detectors'; smaller ones make the tiny preset."""

    backbone_width: int = 64
    channels: int = 256
    norm_groups: int = 32
    """Groups of the norm that ends the neck."""
    feed_forward: int = 2048
    attention_heads: int = 8
    sampling_groups: int = 4
    sampling_points: int = 32
    mixed_points: int = 128


@dataclass(frozen=True)
class AdaMixerConfig:
    """Everything that decides a detector's tensors and arithmetic. Raises ValueError for what cannot be."""

    backbone: str = "resnet50"
    queries: int = 100
    stages: int = 6
    """Decoder layers, each with weights of its own."""
    num_classes: int = 80
    size: ModelSize = field(default_factory=ModelSize)
    train_batch_statistics: bool = False
    """Learn the backbone norms' running statistics. Needed when the backbone starts from random weights."""

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone is {self.backbone!r}; choose one of {', '.join(BACKBONES)}")
        for name, value in (("queries", self.queries), ("stages", self.stages), ("num_classes", self.num_classes)):
            if value < 1:
                raise ValueError(f"{name} is {value}; a detector needs at least one")

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.num_classes

    @property
    def max_detections(self) -> int:
        """Detections of one image: as many (query, class) pairs as there are queries."""
        return self.queries

    @property
    def nms_iou(self) -> None:
        """The method has no suppression."""
        return
