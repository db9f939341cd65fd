"""Files that are no ordinary photographs, from the file to detections: the right result or one clear line."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from asag.runtime import Detections, Session, open_session
from asag.runtime.detect import detect_files
from asag.runtime.parity.agreement import compare_detections
from tests.builders import random_picture
from tests.exports import small_export


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Session]:
    """The same small random detector in PyTorch and as an ONNX file."""
    folder = tmp_path_factory.mktemp("odd")
    exported = small_export()
    exported.checkpoint(folder / "small.safetensors")
    exported.write(folder / "small.onnx")
    return {name: open_session(folder / name) for name in ("small.safetensors", "small.onnx")}


@pytest.fixture(params=["small.safetensors", "small.onnx"])
def session(request: pytest.FixtureRequest, sessions: dict[str, Session]) -> Session:
    return sessions[request.param]


def assert_same(found: Detections, expected: Detections) -> None:
    assert len(expected) > 0
    assert found.image_size == expected.image_size
    assert np.array_equal(found.labels, expected.labels)
    assert np.array_equal(found.scores, expected.scores)
    assert np.array_equal(found.boxes, expected.boxes)


def deep_png(samples: NDArray[np.uint16]) -> bytes:
    """A PNG of 16 bits per sample, of grey [H, W], RGB [H, W, 3] or RGBA [H, W, 4]; Pillow writes only grey ones."""
    height, width = samples.shape[:2]
    colour_type = {2: 0, 3: {3: 2, 4: 6}.get(samples.shape[-1], 0)}[samples.ndim]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned_by_exif(picture: NDArray[np.uint8]) -> bytes:
    """Stored lying on its side with the note to turn it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(np.ascontiguousarray(np.rot90(picture))), exif=exif)


def noisy_low_bytes(picture: NDArray[np.uint8]) -> NDArray[np.uint16]:
    noise = np.random.default_rng(5).integers(0, 256, picture.shape)
    return ((picture.astype(np.uint32) << 8) + noise).astype(np.uint16)


PICTURE = random_picture(3, 141, 173)
GREY = PICTURE[..., 1]
GREY_AS_RGB = np.repeat(GREY[..., None], 3, axis=2)
ALPHA = np.random.default_rng(4).integers(0, 256, GREY.shape, np.uint8)
PALETTE = Image.fromarray(PICTURE).quantize(200)
CMYK = Image.fromarray(PICTURE).convert("CMYK")
BINARY = Image.fromarray(GREY).point(lambda value: 255 * (value > 127)).convert("1")

FILES: dict[str, tuple[Callable[[], bytes], NDArray[np.uint8]]] = {
    "grey": (lambda: saved(Image.fromarray(GREY)), GREY_AS_RGB),
    "grey with alpha": (lambda: saved(Image.fromarray(np.dstack((GREY, ALPHA)))), GREY_AS_RGB),
    "black and white": (lambda: saved(BINARY), np.asarray(BINARY.convert("RGB"))),
    "rgba": (lambda: saved(Image.fromarray(np.dstack((PICTURE, ALPHA)))), PICTURE),
    "palette": (lambda: saved(PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "palette with transparency": (lambda: saved(PALETTE, transparency=3), np.asarray(PALETTE.convert("RGB"))),
    "turned by exif": (lambda: turned_by_exif(PICTURE), PICTURE),
    "16-bit grey": (lambda: deep_png(noisy_low_bytes(GREY)), GREY_AS_RGB),
    "16-bit rgb": (lambda: deep_png(noisy_low_bytes(PICTURE)), PICTURE),
    "16-bit rgba": (lambda: deep_png(noisy_low_bytes(np.dstack((PICTURE, ALPHA)))), PICTURE),
    "cmyk": (lambda: saved(CMYK, "TIFF"), np.asarray(CMYK.convert("RGB"))),
    "lossless webp": (lambda: saved(Image.fromarray(PICTURE), "WEBP", lossless=True), PICTURE),
}


@pytest.mark.parametrize("kind", list(FILES))
def test_every_kind_of_file_gives_what_its_rgb_gives(kind: str, session: Session, tmp_path: Path) -> None:
    content, as_rgb = FILES[kind]
    path = tmp_path / "file"
    path.write_bytes(content())
    found, expected = session.detect([path, as_rgb])
    assert_same(found, expected)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_files_give_what_their_decoded_pixels_give(mode: str, session: Session, tmp_path: Path) -> None:
    path = tmp_path / "file.jpg"
    path.write_bytes(saved(Image.fromarray(PICTURE).convert(mode), "JPEG", quality=90))
    with Image.open(path) as image:
        assert image.mode == mode
        decoded = np.asarray(image.convert("RGB"))
    found, expected = session.detect([path, decoded])
    assert_same(found, expected)


@pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 2), (7, 5), (14, 14), (100, 37), (31, 33), (159, 191), (1, 500), (500, 1), (2, 700), (1, 5000)],
    ids="{0[0]}x{0[1]}".format,
)
def test_odd_sizes_agree_between_backends(size: tuple[int, int], sessions: dict[str, Session]) -> None:
    height, width = size
    picture = random_picture(height * 7 + width, height, width)
    expected, found = (session.detect([picture])[0] for session in sessions.values())
    assert expected.image_size == found.image_size == size
    assert len(expected) > 0
    assert np.isfinite(expected.boxes).all()
    assert compare_detections(0, expected, found, 100).within()


def test_odd_sizes_share_a_batch(session: Session) -> None:
    pictures = [random_picture(seed, *size) for seed, size in enumerate([(1, 90), (160, 192), (8, 8), (77, 20)])]
    together, alone = session.detect(pictures, batch_size=4), session.detect(pictures)
    for number, (one, other) in enumerate(zip(alone, together, strict=True)):
        assert compare_detections(number, one, other, 100).within()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (saved(Image.fromarray(PICTURE), "JPEG")[:-900], "damaged or unsupported"),
        (saved(Image.fromarray(PICTURE))[:-900], "damaged or unsupported"),
        (saved(Image.fromarray(PICTURE), "JPEG")[:100], "file"),
        (b"", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "floating-point"),
    ],
    ids=["cut JPEG", "cut PNG", "JPEG header alone", "empty", "drawing", "floating point"],
)
def test_unreadable_files_are_one_line_and_do_not_stop_the_rest(
    content: bytes, message: str, session: Session, tmp_path: Path
) -> None:
    path, good = tmp_path / "odd.jpg", tmp_path / "good.png"
    path.write_bytes(content)
    good.write_bytes(saved(Image.fromarray(PICTURE)))
    with pytest.raises(ValueError, match=r"odd\.jpg") as caught:
        session.detect([path])
    assert "\n" not in str(caught.value)
    assert message in str(caught.value)
    summary = detect_files(session, [path, good], tmp_path / "out", score_threshold=0.0)
    assert (summary.images, len(summary.errors)) == (1, 1)
    assert summary.detections > 0
