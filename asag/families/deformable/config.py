"""What a detector of this family is made of, as frozen data: one network with switches."""

from __future__ import annotations

from dataclasses import dataclass, field

RESNETS = ("resnet10", "resnet18", "resnet50", "resnet101")
SWINS = ("swin-t",)
BACKBONES = RESNETS + SWINS

LEVELS = 4
"""Maps: C3, C4, C5 and one that is made of C5."""


@dataclass(frozen=True)
class ModelSize:
    """Widths of the network. The defaults are the published detectors'; smaller ones make the tiny presets."""

    backbone_width: int = 64
    """Channels after the backbone's first layer; a Swin has a head for every 32 of them."""
    channels: int = 256
    norm_groups: int = 32
    """Groups of the norms that end the neck."""
    attention_heads: int = 8
    points: int = 4
    """Places on each level that a head looks at."""
    feed_forward: int = 1024
    encoder_layers: int = 6
    decoder_layers: int = 6


@dataclass(frozen=True)
class DeformableConfig:
    """Everything that decides a detector's tensors and arithmetic. Raises ValueError for what cannot be.

    The defaults are Deformable DETR. The further switches build on one another: box refinement, two stages, Efficient
    DETR, Sparse DETR.
    """

    backbone: str = "resnet50"
    queries: int = 300
    num_classes: int = 80
    head_per_layer: bool = False
    """Every decoder layer, and the encoder, tells classes and boxes with weights of its own."""
    refine_boxes: bool = False
    """A layer looks where the box of the layer before it is, and changes that box."""
    two_stage: bool = False
    """The queries are the encoder's most promising tokens instead of learned vectors."""
    content_from_memory: bool = False
    """A query of two stages begins with its token's features; else with an embedding of its box."""
    rank_by_class: bool = False
    """The most promising tokens are those with the largest score of any class; else of "object or not", which is what
    the first logit of the encoder's head then says."""
    keeping_ratio: float | None = None
    """Share of an image's tokens that the encoder refines (Sparse DETR); None: all of them."""
    encoder_heads: bool = False
    """Every layer of a sparse encoder but the last has a head, for training."""
    projection_bias: bool = True
    """The neck's convolutions have a bias. MMDetection's have none."""
    clip_boxes: bool = False
    """Boxes end at the edges of the image, as MMDetection's do."""
    dropout: float = 0.1
    """Of encoder and decoder, in training."""
    size: ModelSize = field(default_factory=ModelSize)
    train_batch_statistics: bool = False
    """Learn the backbone norms' running statistics. Needed when the backbone starts from random weights."""

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone is {self.backbone!r}; choose one of {', '.join(BACKBONES)}")
        for name in ("queries", "num_classes"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; a detector needs at least one")
        if self.keeping_ratio is not None and not 0 < self.keeping_ratio < 1:
            raise ValueError(f"keeping_ratio is {self.keeping_ratio:g}; it is a share between 0 and 1")
        needs = {
            "two_stage": ("refine_boxes", self.two_stage and not self.refine_boxes),
            "content_from_memory": ("two_stage", self.content_from_memory and not self.two_stage),
            "rank_by_class": ("two_stage", self.rank_by_class and not self.two_stage),
            "keeping_ratio": ("two_stage", self.sparse and not self.two_stage),
            "encoder_heads": ("keeping_ratio and head_per_layer", self.encoder_heads and not self._can_have_heads),
        }
        for name, (needed, is_missing) in needs.items():
            if is_missing:
                raise ValueError(f"{name} needs {needed}")

    @property
    def sparse(self) -> bool:
        """Whether the encoder refines some of the tokens alone."""
        return self.keeping_ratio is not None

    @property
    def _can_have_heads(self) -> bool:
        return self.sparse and self.head_per_layer

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.num_classes

    @property
    def max_detections(self) -> int:
        """Detections of one image, the best pairs of query and class."""
        return min(100, self.queries * self.num_classes)

    @property
    def nms_iou(self) -> None:
        """The method has no suppression."""
        return
