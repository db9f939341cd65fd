from __future__ import annotations

import dataclasses
import io
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from asag.runtime.preprocessing import (
    GREY_BITS,
    _warn_of_bits,
    as_image,
    load_image,
    prepare,
    resize,
    resized_size,
)
from tests.runtime.toy_detector import toy_metadata

SIDE = st.integers(1, 5000)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (800, 1066)),  # 800*640/480 = 1066.67
        (640, 480, (1066, 800)),
        (400, 1000, (533, 1332)),  # round(1333*0.4) = 533, int(533*2.5) = 1332
        (500, 500, (800, 800)),
        (800, 1333, (800, 1333)),
    ],
)
def test_resized_size_examples(height: int, width: int, expected: tuple[int, int]) -> None:
    assert resized_size(height, width, 800, 1333) == expected


@given(SIDE, SIDE)
def test_resized_size_is_symmetric_and_bounded(height: int, width: int) -> None:
    resized = resized_size(height, width, 800, 1333)
    assert resized_size(width, height, 800, 1333) == resized[::-1]
    assert min(resized) >= 1
    shorter, longer = min(height, width), max(height, width)
    if longer / shorter * 800 <= 1333:
        assert min(resized) == 800
    # Rounding the shorter side moves the longer one by at most half a step of the aspect.
    assert max(resized) <= 1333 + math.ceil(longer / shorter / 2)


@given(SIDE, SIDE, st.integers(32, 1400), st.integers(32, 1400))
def test_limit_is_kept_and_filled(height: int, width: int, limit_height: int, limit_width: int) -> None:
    limit = (limit_height, limit_width)
    free = resized_size(height, width, 800, 1333)
    fitted = resized_size(height, width, 800, 1333, limit)
    assert 1 <= fitted[0] <= limit_height
    assert 1 <= fitted[1] <= limit_width
    if free[0] <= limit_height and free[1] <= limit_width:
        assert fitted == free
    else:
        assert fitted[0] == limit_height or fitted[1] == limit_width


def test_resized_size_refuses_an_empty_image() -> None:
    with pytest.raises(ValueError, match="must have pixels"):
        resized_size(0, 5, 800, 1333)


def test_resize_is_pillow_bilinear() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8))
    resized = resize(image, (20, 31))
    assert (resized.height, resized.width) == (20, 31)
    assert np.array_equal(np.asarray(resized), np.asarray(image.resize((31, 20), Image.Resampling.BILINEAR)))
    assert resize(image, (37, 53)) is image


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=1, max_size=4))
def test_prepare_batches_like_single_images(sizes: list[tuple[int, int]]) -> None:
    generator = np.random.default_rng(1)
    images = [Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]
    for input_type, dtype in (("uint8", np.uint8), ("float32", np.float32)):
        metadata = toy_metadata(input_type=input_type)
        batch = prepare(images, metadata)
        assert batch["images"].dtype == dtype
        assert batch["images"].shape == (len(images), 3, 64, 96)
        assert batch["sizes"].dtype == np.float32
        for index, image in enumerate(images):
            single = prepare([image], metadata)
            assert np.array_equal(single["images"][0], batch["images"][index])
            assert np.array_equal(single["sizes"][0], batch["sizes"][index])
            height, width = batch["sizes"][index].astype(int)
            assert not batch["images"][index, :, height:].any()
            assert not batch["images"][index, :, :, width:].any()


def test_prepare_places_and_normalizes() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (64, 80, 3), np.uint8)
    image = Image.fromarray(pixels)
    whole = prepare([image], toy_metadata())
    assert whole["sizes"].tolist() == [[64, 80]]
    assert np.array_equal(whole["images"][0, :, :, :80], pixels.transpose(2, 0, 1))
    metadata = toy_metadata(input_type="float32")
    normalized = prepare([image], metadata)["images"][0, :, :, :80].transpose(1, 2, 0)
    expected = (pixels.astype(np.float64) / 255 - metadata.mean) / metadata.std
    assert np.abs(normalized - expected).max() < 1e-6


def gradient(height: int = 8, width: int = 12) -> np.ndarray:
    return np.linspace(0, 255, height * width).astype(np.uint8).reshape(height, width)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK"])
def test_load_image_of_every_mode(mode: str, tmp_path: Path) -> None:
    source = Image.fromarray(gradient()).convert("RGB").convert(mode)
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    source.save(path)
    loaded = load_image(path)
    assert loaded.mode == "RGB"
    assert loaded.size == (12, 8)
    if mode not in ("P", "1", "CMYK"):
        assert np.array_equal(np.asarray(loaded)[..., 1], gradient())


def test_pictures_of_12_bit_cameras_are_said_to_be_dark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values = np.linspace(0, 4095, 600, dtype=np.uint16).reshape(20, 30)
    Image.fromarray(values).save(tmp_path / "grey.png")

    def read() -> np.ndarray:
        return np.asarray(load_image(tmp_path / "grey.png"))[..., 0]

    monkeypatch.delenv(GREY_BITS, raising=False)
    _warn_of_bits.cache_clear()
    for _ in range(2):
        np.testing.assert_array_equal(read(), values >> 8)
    assert [record.getMessage() for record in caplog.records] == [
        "a 16-bit grey picture uses 12 bits alone, as of a 12-bit camera: read as 16 bits it is dark. Set"
        " ASAG_GREY_BITS=12 to read such pictures so, or to 16 to hear no more of it"
    ]
    for bits in (12, 14, 16):
        monkeypatch.setenv(GREY_BITS, str(bits))
        np.testing.assert_array_equal(read(), values >> (bits - 8))
    for wrong, complaint in (("10", "says 10 bits, but a value is 4095"), ("8", "must be one of 10, 12, 14, 16")):
        monkeypatch.setenv(GREY_BITS, wrong)
        with pytest.raises(ValueError, match=complaint):
            read()
    assert len(caplog.records) == 1


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray((gradient().astype(np.uint16) << 8) + 17).save(path)
    assert np.array_equal(np.asarray(load_image(path))[..., 0], gradient())


def test_palette_with_transparency(tmp_path: Path) -> None:
    path = tmp_path / "palette.png"
    source = Image.fromarray(gradient()).convert("P")
    source.save(path, transparency=3)
    assert np.array_equal(np.asarray(load_image(path)), np.asarray(source.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    upright = gradient()
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(np.ascontiguousarray(turned)).save(path, exif=exif)
    assert np.array_equal(np.asarray(load_image(path))[..., 0], upright)


def test_missing_image(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"image not found: .*none\.jpg"):
        load_image(tmp_path / "none.jpg")
    with pytest.raises(ValueError, match="is a folder"):
        load_image(tmp_path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
def test_truncated_image_is_one_clear_line(kind: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(3).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    path = tmp_path / "cut"
    for share in (0.1, 0.5, 0.9):
        path.write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * share)])
        with pytest.raises(ValueError, match="cut") as caught:
            load_image(path)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(deadline=None, max_examples=150)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "WEBP"]), st.data())
def test_damaged_images_load_or_raise_value_error(kind: str, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    Image.fromarray(gradient()).convert("RGB").save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        message = ""
        try:
            assert load_image(file.name).mode == "RGB"
        except ValueError as error:
            message = str(error)
        assert "\n" not in message


def test_text_file_is_not_an_image(tmp_path: Path) -> None:
    path = tmp_path / "notes.jpg"
    path.write_text("not pixels")
    with pytest.raises(ValueError, match=r"notes.jpg is not an image"):
        load_image(path)


def test_floating_point_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "depth.tiff"
    Image.fromarray(gradient().astype(np.float32)).save(path)
    with pytest.raises(ValueError, match="floating-point"):
        load_image(path)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_arrays_must_be_rgb_bytes(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8 RGB of shape"):
        as_image(array)


def test_as_image_takes_arrays_images_and_paths(tmp_path: Path) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (5, 7, 3), np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    for source in (pixels, Image.fromarray(pixels), Image.fromarray(pixels).convert("RGBA"), path, str(path)):
        assert np.array_equal(np.asarray(as_image(source)), pixels)


def test_stretched_images_fill_the_input() -> None:
    metadata = dataclasses.replace(toy_metadata(), resize="stretch")
    tensors = prepare([Image.new("RGB", (300, 40), (9, 9, 9))], metadata)
    assert tensors["sizes"].tolist() == [list(metadata.input_size)]
    assert (tensors["images"] == tensors["images"][0, 0, 0, 0]).all()


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(0, 9),
)
def test_two_taps_are_bilinear_interpolation_of_arrays(
    before: tuple[int, int], after: tuple[int, int], seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (*before, 3), np.uint8)
    maps = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(maps, after, mode="bilinear", align_corners=False)
    found = np.asarray(resize(Image.fromarray(pixels), after, "bilinear"), np.float32)
    assert np.abs(found - expected[0].permute(1, 2, 0).numpy()).max() <= 0.51
