"""The windowed transformer: sizes that fit no window, windows against a plain loop, and torchvision's Swin-T."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.models.swin_transformer import SwinTransformer

from asag.parts.backbones.swin import DEPTHS, Block, Swin


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (33, 61), (224, 96)])
def test_maps_of_any_input(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEPTHS, "swin-t", (1, 2, 2, 1))
    backbone = Swin("swin-t", width=32).eval()
    found = backbone(torch.randn(2, 3, *size))
    assert [map_.shape[1] for map_ in found] == backbone.channels == [64, 128, 256]
    sides = [math.ceil(side / 4) for side in size]
    for map_ in found:
        sides = [math.ceil(side / 2) for side in sides]
        assert list(map_.shape[2:]) == sides


@torch.no_grad()
def test_torchvision_s_swin_says_the_same() -> None:
    """On a map of whole windows throughout, where both pad and shift alike: 448 pixels have 112, 56, 28, 14 cells."""
    theirs = SwinTransformer([4, 4], 32, list(DEPTHS["swin-t"]), [1, 2, 4, 8], [7, 7]).eval()
    ours = Swin("swin-t", width=32).eval()
    state = {}
    for name, value in theirs.features.state_dict().items():
        number, _, rest = name.partition(".")
        if number == "0":
            convolution, _, leaf = rest.partition(".")
            state[f"patch_embed.{'proj' if convolution == '0' else 'norm'}.{leaf}"] = value
        elif int(number) % 2:
            part = f"layers.{int(number) // 2}.blocks.{rest}"
            state[part.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")] = value
        else:
            state[f"layers.{int(number) // 2 - 1}.downsample.{rest}"] = value
    state = {name: value for name, value in state.items() if not name.endswith("relative_position_index")}
    missing, left_over = ours.load_state_dict(state, strict=False)
    assert all(name.startswith(ours.own_layers) for name in missing)
    assert not left_over
    images = torch.randn(1, 3, 448, 448, generator=torch.Generator().manual_seed(0))
    x, expected = images, []
    for number, part in enumerate(theirs.features):
        x = part(x)
        if number in (3, 5, 7):
            norm = ours.get_submodule(f"norm{number // 2}")
            expected.append(norm(x).permute(0, 3, 1, 2))
    for found, wanted in zip(ours(images), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_window_sees_itself_alone() -> None:
    """Without a shift a change reaches its window of 7 x 7 cells; with one the corner
    that is cut off, three cells wide.
    """
    torch.manual_seed(0)
    x = torch.randn(1, 14, 14, 32)
    other = x.clone()
    other[0, 0, 0] += 1
    for shifted, reached in ((False, (7, 7)), (True, (3, 3))):
        block = Block(32, shifted, 0.0).eval()
        changed = (block(x) != block(other)).any(-1)[0].nonzero()
        assert tuple((changed.amax(0) + 1).tolist()) == reached


def test_what_is_frozen_and_left_out() -> None:
    backbone = Swin("swin-t", width=32)
    backbone.freeze()
    frozen = {name.split(".")[0] + name.split(".")[1] for name, p in backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"patch_embedproj", "patch_embednorm", "layers0"}
    rates = [block.drop_path for stage in backbone.layers for block in stage.blocks]  # type: ignore[union-attr]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0.0, 0.2)
    assert list(backbone.norms()) == []
