"""The windowed transformer as a backbone (Liu et al., "Swin Transformer", ICCV 2021, section 3).

Parameter names are the authors', so their ImageNet weights load as they are. Windows, shifts and masks follow from the
shape of the maps alone, so nothing depends on the data.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

DEPTHS = {"swin-t": (2, 2, 6, 2)}
"""Blocks of every stage, by name."""

HEAD_CHANNELS = 32
WINDOW = 7
"""Cells along each side."""
SHIFT = WINDOW // 2
DROP_PATH = 0.2
"""Chance that the last block of all is left out of an image's training; it rises linearly from the first."""


class WindowAttention(nn.Module):
    """Attention among the 49 cells of a window, with a learned bias for each offset: [B, n, 49, C] -> the same."""

    relative_position_index: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = channels // HEAD_CHANNELS
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        offsets = 2 * WINDOW - 1
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets**2, self.heads))
        row, column = torch.arange(WINDOW**2) // WINDOW, torch.arange(WINDOW**2) % WINDOW
        down, right = (place[:, None] - place[None] + WINDOW - 1 for place in (row, column))
        self.register_buffer("relative_position_index", down * offsets + right, persistent=False)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """windows: [B, n, 49, C]; mask: [n, 49, 49], added to the scores."""
        query, key, value = self.qkv(windows).unflatten(-1, (3, self.heads, HEAD_CHANNELS)).permute(3, 0, 1, 4, 2, 5)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            bias = bias + mask.unsqueeze(1)
        scores = (query * HEAD_CHANNELS**-0.5) @ key.transpose(-2, -1) + bias
        return self.proj((scores.softmax(-1) @ value).transpose(2, 3).flatten(3))


class Perceptron(nn.Module):
    """Two linear layers with a GELU between them: [..., C] -> [..., C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as in the class."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention within windows, then a perceptron; [B, H, W, C] -> the same. Every second one shifts its windows."""

    def __init__(self, channels: int, shifted: bool, drop_path: float) -> None:
        super().__init__()
        self.shift = SHIFT if shifted else 0
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Perceptron(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as in the class."""
        x = x + self._drop(self._attend(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        """Windows lie on the map padded with zeros, whose cells are keys like all others."""
        height, width = x.shape[1:3]
        rows, columns = -(-height // WINDOW), -(-width // WINDOW)
        x = F.pad(x, (0, 0, 0, columns * WINDOW - width, 0, rows * WINDOW - height))
        mask = None
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
            mask = _mask_between_regions(rows, columns).to(x)
        windows = x.unflatten(2, (columns, WINDOW)).unflatten(1, (rows, WINDOW)).transpose(2, 3)
        attended = self.attn(windows.flatten(1, 2).flatten(2, 3), mask)
        x = attended.unflatten(2, (WINDOW, WINDOW)).unflatten(1, (rows, columns)).transpose(2, 3)
        x = x.flatten(3, 4).flatten(1, 2)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), (1, 2))
        return x[:, :height, :width]

    def _drop(self, x: Tensor) -> Tensor:
        return stochastic_depth(x, self.drop_path, "row", self.training)


def _mask_between_regions(rows: int, columns: int) -> Tensor:
    """[rows * columns, 49, 49]: -100 between cells that only a map's wrapped-around edge has made neighbours."""

    def regions(windows: int) -> Tensor:
        place = torch.arange(windows * WINDOW)
        size = windows * WINDOW
        return ((place >= size - WINDOW).long() + (place >= size - SHIFT).long()).unflatten(0, (windows, WINDOW))

    region = 3 * regions(rows)[:, None, :, None] + regions(columns)[None, :, None, :]
    region = region.flatten(0, 1).flatten(1)
    return (region[:, :, None] != region[:, None]).float() * -100.0


class Merging(nn.Module):
    """Four neighbours become one cell of twice the channels: [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes as in the class."""
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        neighbours = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(neighbours, dim=-1)))


class Stage(nn.Module):
    """Blocks on maps of one size, then the merging to the next; the last stage has none."""

    def __init__(self, channels: int, drop_paths: Sequence[float], merges: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(channels, i % 2 == 1, drop) for i, drop in enumerate(drop_paths)))
        self.downsample = Merging(channels) if merges else None


class PatchEmbedding(nn.Module):
    """Images [B, 3, H, W] -> [B, ceil(H/4), ceil(W/4), C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, 4, stride=4)
        self.norm = nn.LayerNorm(channels)

    def forward(self, images: Tensor) -> Tensor:
        """Shapes as in the class."""
        height, width = images.shape[-2:]
        patches = self.proj(F.pad(images, (0, -width % 4, 0, -height % 4)))
        return self.norm(patches.permute(0, 2, 3, 1))


class Swin(nn.Module):
    """Images [B, 3, H, W] (normalized) -> C3, C4, C5 at strides 8, 16, 32.

    It has no batch norms. `width`: channels after the embedding, 32 for each head of the first stage;
    `train_statistics` says no more than that all of it trains.
    """

    own_layers: tuple[str, ...] = ("norm1.", "norm2.", "norm3.")

    def __init__(self, name: str, width: int = 96, train_statistics: bool = False) -> None:
        super().__init__()
        self.train_statistics = train_statistics
        self.patch_embed = PatchEmbedding(width)
        depths = DEPTHS[name]
        drops = iter([DROP_PATH * block / (sum(depths) - 1) for block in range(sum(depths))])
        widths = [width * 2**stage for stage in range(len(depths))]
        self.layers = nn.ModuleList(
            Stage(channels, list(itertools.islice(drops, depth)), channels < widths[-1])
            for channels, depth in zip(widths, depths, strict=True)
        )
        self.channels: list[int] = widths[1:]
        for number, channels in enumerate(self.channels, start=1):
            self.add_module(f"norm{number}", nn.LayerNorm(channels))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images -> [C3, C4, C5], each [B, channels[l - 3], ceil(H / 2^l), ceil(W / 2^l)]."""
        x = self.patch_embed(images)
        maps = []
        for number, stage in enumerate(self.layers):
            assert isinstance(stage, Stage)
            x = stage.blocks(x)
            if number > 0:
                maps.append(self.get_submodule(f"norm{number}")(x).permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

    def norms(self) -> Iterator[nn.Module]:
        """Every batch norm: none."""
        return iter(())

    def freeze(self) -> None:
        """Exclude the patch embedding and the first stage from training."""
        for part in (self.patch_embed, self.layers[0]):
            part.requires_grad_(False)

    def fold(self) -> None:
        """Nothing: a layer norm has no constant scale that a layer before it could take."""
