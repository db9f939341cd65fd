"""The presets: published detectors with their published numbers, and the small one of the demo."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from asag.config import DetectorConfig, ModelSize


@dataclass(frozen=True)
class Preset:
    """A named detector, how its images are resized, and what the paper reports for it."""

    config: DetectorConfig
    shorter_side: int = 800
    longer_side: int = 1333
    input_size: tuple[int, int] = (800, 1344)
    """Height and width of the exported model's input, in pixels."""
    patch_capacity: tuple[int, int] = (64, 128)
    """Patches per image that the exported model has room for on P4 and P3."""
    epochs: int | None = None
    published: str | None = None
    """Published accuracy; None for presets that are not from the paper."""
    published_queries: str | None = None

    @property
    def head(self) -> str:
        """The deployed head."""
        return self.config.head


_TINY = ModelSize(
    backbone_width=32,
    channels=64,
    compressed_channels=32,
    anchor_hidden=256,
    feed_forward=256,
    attention_heads=4,
    sampling_groups=4,
    sampling_points=16,
    mixed_points=32,
    dynamic_channels=16,
)

_A_R50_100 = DetectorConfig("adamixer", "resnet50", 100, head="aux_2")
_A_R50_300 = DetectorConfig("adamixer", "resnet50", 300, head="aux_2")
_S_R50_100 = DetectorConfig("sparse_rcnn", "resnet50", 100, head="aux_2")

PRESETS: dict[str, Preset] = {
    "asag-a-tiny": Preset(
        DetectorConfig("adamixer", "resnet10", 50, size=_TINY, train_batch_statistics=True),
        shorter_side=320,
        longer_side=320,
        input_size=(320, 320),
        patch_capacity=(16, 32),
    ),
    "asag-a-r50-1x-100": Preset(_A_R50_100, epochs=12, published="AP 42.6", published_queries="107"),
    "asag-a-r50-1x-300": Preset(_A_R50_300, epochs=12, published="AP 43.6", published_queries="329"),
    "asag-a-r50-3x-100": Preset(
        dataclasses.replace(_A_R50_100, head="main"), epochs=36, published="AP 45.3", published_queries="102"
    ),
    "asag-a-r50-3x-300": Preset(_A_R50_300, epochs=36, published="AP 46.3", published_queries="312"),
    "asag-a-r101-3x-300": Preset(
        dataclasses.replace(_A_R50_300, backbone="resnet101"), epochs=36, published="AP 47.5", published_queries="296"
    ),
    "asag-s-r50-3x-100": Preset(_S_R50_100, epochs=36, published="AP 43.9", published_queries="100"),
    "asag-s-r50-3x-300": Preset(
        dataclasses.replace(_S_R50_100, queries=300), epochs=36, published="AP 45.0", published_queries="312"
    ),
    "asag-a-dn-r50-1x-100": Preset(_A_R50_100, epochs=12, published="AP 43.1", published_queries="106"),
    "asag-a-crosscl-r50-1x-100": Preset(_A_R50_100, epochs=12, published="AP 43.8", published_queries="103"),
    "asag-s-crowdhuman": Preset(
        DetectorConfig("sparse_rcnn", "resnet50", 300, dataset="crowdhuman", head="aux_0"),
        longer_side=1500,
        input_size=(800, 1504),
        patch_capacity=(60, 60),
        epochs=50,
        published="AP 91.3, mMR 43.5, recall 96.9",
        published_queries="<=500",
    ),
}


def find_preset(name: str) -> Preset:
    """Return the preset called `name`. Raises ValueError naming the known ones."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]
