"""Detectors of the transformers package, exported as their users do it, adopted."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")  # checks of values that no exporter takes
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'asag[reference]'"
)

from asag.export.adoption.adopt import adopt  # noqa: E402
from asag.export.adoption.plan import AdoptionOptions  # noqa: E402
from asag.runtime.opening import open_session  # noqa: E402

LABELS = {"id2label": {place: str(place) for place in range(4)}, "label2id": {str(place): place for place in range(4)}}
STAGES = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "layer_type": "basic"}
DECODER = {"num_queries": 20, "decoder_layers": 2, "d_model": 32, "decoder_attention_heads": 4, "decoder_ffn_dim": 32}


def rtdetr(version: str) -> nn.Module:
    backbone = transformers.RTDetrResNetConfig(**STAGES, out_features=["stage2", "stage3", "stage4"])
    config = getattr(transformers, f"{version}Config")(
        backbone_config=backbone,
        encoder_hidden_dim=32,
        encoder_in_channels=[24, 32, 48],
        encoder_ffn_dim=32,
        encoder_attention_heads=4,
        decoder_in_channels=[32, 32, 32],
        **DECODER,
        **LABELS,
    )
    return getattr(transformers, f"{version}ForObjectDetection")(config)


def detr(name: str, **more: Any) -> nn.Module:
    features = ["stage2", "stage3", "stage4"] if name == "DeformableDetr" else ["stage4"]
    config = getattr(transformers, f"{name}Config")(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(**STAGES, out_features=features),
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=4,
        **DECODER,
        **LABELS,
        **more,
    )
    return getattr(transformers, f"{name}ForObjectDetection")(config)


class Outputs(nn.Module):
    """What users put around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model(*inputs)
        return found.logits, found.pred_boxes


PEERS: dict[str, tuple[Callable[[], nn.Module], bool, int, str]] = {
    "RT-DETR": (lambda: rtdetr("RTDetr"), False, 2, "sigmoid"),
    "RT-DETRv2": (lambda: rtdetr("RTDetrV2"), False, 2, "sigmoid"),
    "Deformable DETR, two stages": (
        lambda: detr("DeformableDetr", two_stage=True, with_box_refine=True, two_stage_num_proposals=20),
        True,
        3,
        "sigmoid",
    ),
    "DETR": (lambda: detr("Detr"), True, 0, "softmax"),
}
"""The model, whether it takes a mask, its deformable attentions, and what its logits are for."""


def spread(model: nn.Module) -> None:
    """Weights whose scores differ from query to query."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "sampling_offsets" not in name:
            nn.init.normal_(parameter, std=1.2 / parameter[0].numel() ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_a_peer(name: str, tmp_path: Path) -> None:
    build, masked, attentions, activation = PEERS[name]
    torch.manual_seed(1)
    model = Outputs(build()).eval()
    spread(model)
    size = (96, 128)
    inputs = (torch.rand(2, 3, *size), *([torch.ones(2, *size, dtype=torch.int64)] if masked else []))
    names = ["pixel_values", "pixel_mask"][: len(inputs)]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            inputs,
            str(tmp_path / "foreign.onnx"),
            input_names=names,
            output_names=["logits", "pred_boxes"],
            dynamic_axes={key: {0: "batch"} for key in (*names, "logits", "pred_boxes")},
            opset_version=17,
            dynamo=False,
        )
    report = adopt(tmp_path / "foreign.onnx", tmp_path / "adopted.onnx", AdoptionOptions(activation=activation))
    assert report.attentions == attentions
    assert report.metadata.replaced == ({"MultiScaleDeformableAttention": attentions} if attentions else {})
    assert report.comparison.found == report.comparison.detections > 0
    assert all(node.op_type != "GridSample" for node in onnx.load(report.path).graph.node)
    with open_session(report.path, threads=1) as session:
        assert session.metadata.resize == ("fit" if masked else "stretch")
