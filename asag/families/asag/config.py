"""What an ASAG detector is made of, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field

DECODERS = ("adamixer", "sparse_rcnn", "deformable")
BACKBONES = ("resnet10", "resnet18", "resnet50", "resnet101")
LEVELS = ("P3P6", "P4P6", "P5P6")
DATASETS = ("coco", "crowdhuman")
HEADS = ("aux_0", "aux_1", "aux_2", "main")


@dataclass(frozen=True)
class AnchorBudget:
    """How many anchors are predicted and how many survive."""

    fixed_anchors: int
    """Anchors per patch of P5 and P6."""
    probed_anchors: int
    """Anchors per patch of P4 and P3."""
    keep_threshold: float
    """An anchor is a query only when its confidence is above this."""
    fewest: int
    """Queries taken from P5 and P6 when fewer pass the threshold."""
    most: int
    """Queries of one image at most; the most confident stay."""
    patch_limit: int | None = None
    """Patches of one image that a level explores at most, or no limit."""


ANCHOR_BUDGETS: dict[tuple[str, int], AnchorBudget] = {
    ("coco", 50): AnchorBudget(20, 10, 0.10, 5, 100),  # not from the paper: for few objects and little time
    ("coco", 100): AnchorBudget(50, 20, 0.10, 5, 200),
    ("coco", 300): AnchorBudget(150, 50, 0.05, 50, 500),
    ("crowdhuman", 300): AnchorBudget(150, 50, 0.05, 50, 600, patch_limit=60),
}


@dataclass(frozen=True)
class ModelSize:
    """Widths of the network. The defaults are the published detectors'; smaller ones make the demo's preset."""

    backbone_width: int = 64
    channels: int = 256
    compressed_channels: int = 128
    patch_channels: int = 8
    anchor_hidden: int = 1000
    feed_forward: int = 2048
    attention_heads: int = 8
    sampling_groups: int = 4
    sampling_points: int = 32
    mixed_points: int = 128
    dynamic_channels: int = 64
    """Inner width of the dynamic convolution (Sparse R-CNN head only)."""
    norm_groups: int = 32
    """Groups of the norms that end the neck; this and what follows with the deformable head only."""
    encoder_layers: int = 6
    attended_points: int = 4
    """Places on each level that a head of deformable attention looks at."""
    deformable_feed_forward: int = 1024
    """Width of the perceptrons after deformable attention."""


@dataclass(frozen=True)
class ASAGConfig:
    """Everything that decides a detector's tensors and arithmetic.

    Raises ValueError when a choice does not exist or two choices exclude each other.
    """

    decoder: str = "adamixer"
    backbone: str = "resnet50"
    queries: int = 100
    levels: str = "P3P6"
    dataset: str = "coco"
    head: str = "main"
    """The head that is deployed; all four are trained."""
    patch_capacity: tuple[int, int] = (64, 128)
    """Patches per image that the deployed model has room for on P4 and P3."""
    num_classes: int | None = None
    """Classes of the data; None takes the dataset's (80 or 1)."""
    size: ModelSize = field(default_factory=ModelSize)
    train_batch_statistics: bool = False
    """Learn the backbone norms' running statistics. Needed when the backbone starts from random weights."""

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("decoder", self.decoder, DECODERS),
            ("backbone", self.backbone, BACKBONES),
            ("levels", self.levels, LEVELS),
            ("dataset", self.dataset, DATASETS),
            ("head", self.head, HEADS),
        ):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
        if (self.dataset, self.queries) not in ANCHOR_BUDGETS:
            known = ", ".join(str(queries) for dataset, queries in ANCHOR_BUDGETS if dataset == self.dataset)
            raise ValueError(f"queries is {self.queries}; dataset {self.dataset!r} is defined for {known}")
        if any(places < 1 for places in self.patch_capacity):
            raise ValueError(f"patch_capacity is {self.patch_capacity}; each level needs at least one place")
        if self.num_classes is None:
            object.__setattr__(self, "num_classes", {"coco": 80, "crowdhuman": 1}[self.dataset])
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes}; a detector needs at least one class")

    @property
    def budget(self) -> AnchorBudget:
        """Numbers of anchors and queries of this variant."""
        return ANCHOR_BUDGETS[self.dataset, self.queries]

    @property
    def classes(self) -> int:
        """Number of classes, resolved."""
        assert self.num_classes is not None
        return self.num_classes

    @property
    def max_detections(self) -> int:
        """Detections of one image before suppression: 100, or every query for CrowdHuman."""
        return self.budget.most if self.dataset == "crowdhuman" else 100

    @property
    def nms_iou(self) -> float | None:
        """IoU threshold of the class-wise suppression after decoding, or None where the method has none."""
        if self.dataset == "crowdhuman":
            return 0.8
        return 0.7 if self.queries == 300 else None

    @property
    def encoded(self) -> bool:
        """Whether an encoder works on the maps before anchors, proposals and heads look at them."""
        return self.decoder == "deformable"

    @property
    def first_level(self) -> int:
        """Of the finest of the four maps: its stride is 2 to this power."""
        return 3 if self.encoded else 2

    @property
    def probed_levels(self) -> tuple[str, ...]:
        """The levels explored by probing, coarse to fine: a prefix of ("P4", "P3")."""
        return {"P3P6": ("P4", "P3"), "P4P6": ("P4",), "P5P6": ()}[self.levels]
