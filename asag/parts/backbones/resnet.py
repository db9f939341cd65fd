"""The residual backbone. Parameter names are torchvision's, so ImageNet weights load as they are.

Written here because the demo's preset needs half the usual width and one block per stage, which torchvision's class
cannot build; the tests compare ResNet-18/50/101 with torchvision's, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Self

import torch
from torch import Tensor, nn

BLOCKS_PER_STAGE = {
    "resnet10": (1, 1, 1, 1),
    "resnet18": (2, 2, 2, 2),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
}
BASIC = ("resnet10", "resnet18")
"""Those of blocks of two convolutions."""


def resnet_of(names: Iterable[str], prefix: str) -> str | None:
    """Which ResNet has tensors of these names behind `prefix`; None where none has."""
    known = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    blocks = tuple(sum(f"layer{stage}.{i}.conv1.weight" in known for i in range(len(known))) for stage in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in known
    fitting = [name for name, depths in BLOCKS_PER_STAGE.items() if depths == blocks]
    return next((name for name in fitting if (name not in BASIC) is bottleneck), None)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2 * dilation, dilation=dilation, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [B, inputs, H, W] -> [B, width, H/stride, W/stride]."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, width, 3, stride, dilation)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as in the class."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided) and 1x1 convolutions: [B, inputs, H, W] -> [B, 4*width, H/stride, W/stride]."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, dilation: int = 1) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = _convolution(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3, stride, dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _convolution(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as in the class."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if inputs == outputs and stride == 1:
        return None
    return nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """Images [B, 3, H, W] (normalized) -> C2..C5 at strides 4, 8, 16, 32.

    dilation: C5 keeps C4's stride; its blocks but the first look as far with dilated convolutions ("DC5" in DETR).

    Batch norm runs on its stored statistics even while training, as published detectors train, so that a small batch
    does not move them; `train_statistics` lets it learn them, for a backbone that starts from random weights.
    """

    own_layers: tuple[str, ...] = ()

    def __init__(self, name: str, width: int = 64, train_statistics: bool = False, *, dilation: bool = False) -> None:
        super().__init__()
        self.train_statistics = train_statistics
        block = BasicBlock if name in BASIC else Bottleneck
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = width
        self.channels: list[int] = []
        for stage, blocks in enumerate(BLOCKS_PER_STAGE[name]):
            stage_width = width * 2**stage
            dilated = dilation and stage == len(BLOCKS_PER_STAGE[name]) - 1
            layers: list[nn.Module] = []
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 and not dilated else 1
                layers.append(block(inputs, stage_width, stride, dilation=2 if dilated and index > 0 else 1))
                inputs = stage_width * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
            self.channels.append(inputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images -> [C2, C3, C4, C5], C_l of shape [B, channels[l - 2], H / 2^l, W / 2^l]; a dilated C5 like C4."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = []
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
            maps.append(x)
        return maps

    def train(self, mode: bool = True) -> Self:
        """Switch to training or evaluation; norms stay in evaluation unless they learn their statistics."""
        super().train(mode)
        if not self.train_statistics:
            for norm in self.norms():
                norm.eval()
        return self

    def norms(self) -> Iterator[nn.BatchNorm2d | nn.SyncBatchNorm]:
        """Every batch norm of the backbone."""
        return (module for module in self.modules() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm))

    def freeze(self) -> None:
        """Exclude the stem and layer1 from training."""
        for part in (self.conv1, self.bn1, self.layer1):
            part.requires_grad_(False)

    def fold(self) -> None:
        """Fold every batch norm into the convolution before it, in place.

        For inference only; call after loading weights.
        """
        pairs: list[tuple[nn.Module, str, str]] = [(self, "conv1", "bn1")]
        for module in self.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                names = ("1", "2", "3") if isinstance(module, Bottleneck) else ("1", "2")
                pairs += [(module, f"conv{n}", f"bn{n}") for n in names]
                if module.downsample is not None:
                    pairs.append((module.downsample, "0", "1"))
        for owner, convolution_name, norm_name in pairs:
            convolution, norm = getattr(owner, convolution_name), getattr(owner, norm_name)
            fused = torch.nn.utils.fusion.fuse_conv_bn_eval(convolution.eval(), norm.eval())
            setattr(owner, convolution_name, fused)
            setattr(owner, norm_name, nn.Identity())
