"""What a SAP-DETR detector is made of, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field

BACKBONES = ("resnet10", "resnet18", "resnet50", "resnet101")
FRAMES = ("padded", "content")


@dataclass(frozen=True)
class ModelSize:
    """Widths of the network. The defaults are the published detectors'; smaller ones make the tiny preset."""

    backbone_width: int = 64
    channels: int = 256
    norm_groups: int = 32
    """Groups of the norms of the map that queries begin with."""
    attention_heads: int = 8
    feed_forward: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6


@dataclass(frozen=True)
class SAPDETRConfig:
    """Everything that decides a detector's tensors and arithmetic. Raises ValueError for what cannot be."""

    backbone: str = "resnet50"
    dilation: bool = False
    """The backbone's last stage has C4's stride ("DC5")."""
    columns: int = 18
    rows: int = 17
    """Of the grid that the queries' points begin on."""
    num_classes: int = 80
    frame: str = "padded"
    """What the fractions of points and distances span where features are read: the padded map, as published, or the
    image's content alone."""
    size: ModelSize = field(default_factory=ModelSize)
    train_batch_statistics: bool = False
    """Learn the backbone norms' running statistics. Needed when the backbone starts from random weights."""

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone is {self.backbone!r}; choose one of {', '.join(BACKBONES)}")
        if self.frame not in FRAMES:
            raise ValueError(f"frame is {self.frame!r}; choose one of {', '.join(FRAMES)}")
        for name in ("columns", "rows", "num_classes"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; a detector needs at least one")
        size = self.size
        for what, divisor in (("attention_heads", size.attention_heads), ("norm_groups", size.norm_groups), ("4", 4)):
            if size.channels % divisor:
                raise ValueError(f"channels is {size.channels}; it must be a multiple of {what}, {divisor}")

    @property
    def queries(self) -> int:
        """One for every point of the grid."""
        return self.columns * self.rows

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.num_classes

    @property
    def max_detections(self) -> int:
        """Detections of one image, the best pairs of query and class."""
        return min(300, self.queries * self.num_classes)

    @property
    def nms_iou(self) -> None:
        """The method has no suppression."""
        return
