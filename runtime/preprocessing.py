"""Images to model input: reading, resizing, padding.

Training uses the same functions, so that a detector sees the same pixels in every room.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from asag.runtime.errors import one_line
from asag.runtime.metadata import ModelMetadata

logger = logging.getLogger(__name__)

_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height

ImageLike = str | os.PathLike[str] | NDArray[np.uint8] | Image.Image


PIXEL_LIMIT = "ASAG_MAX_IMAGE_PIXELS"
"""Environment variable: pictures of more than twice so many pixels are refused; Pillow's own is 89,478,485."""


GREY_BITS = "ASAG_GREY_BITS"
"""Environment variable: how many bits of a 16-bit grey picture's pixels count, 10, 12, 14 or 16; 16 where not set."""
_BITS = ("10", "12", "14", "16")


def load_image(path: str | os.PathLike[str], stored_pixels: bool = False) -> Image.Image:
    """Read an image file as 8-bit RGB, turned upright as its EXIF orientation says, or with its pixels as stored.

    Grey, palette, CMYK and 16-bit images are converted; transparency is dropped. Raises FileNotFoundError when there
    is no such file, and ValueError when it cannot be read whole as an image.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name an image file")
    return _decode(path, str(path), stored_pixels)


def decode_image(content: bytes, name: str) -> Image.Image:
    """The image that ``content`` is the file of, as :func:`load_image` reads it; ``name`` is for ValueErrors."""
    return _decode(BytesIO(content), name)


def picture_size(path: Path, stored_pixels: bool = False) -> tuple[int, int]:
    """(width, height) of what :func:`load_image` would give; only the file's header is read. Raises what it raises."""
    with _opened(path, str(path)) as image:
        turned = not stored_pixels and image.getexif().get(ExifTags.Base.Orientation, 1) in _TURNED
        return (image.height, image.width) if turned else image.size


def _decode(file: Path | BytesIO, name: str, stored_pixels: bool = False) -> Image.Image:
    with _opened(file, name) as image:
        image.load()
        return to_rgb(image if stored_pixels else ImageOps.exif_transpose(image))


@contextmanager
def _opened(file: Path | BytesIO, name: str) -> Iterator[Image.Image]:
    """An open picture; whatever a decoder raises, then or later, becomes one line."""
    limit = os.environ.get(PIXEL_LIMIT)
    if limit is not None:
        if not limit.isdecimal():
            raise ValueError(f"{PIXEL_LIMIT} must be a number of pixels, it is {limit!r}")
        Image.MAX_IMAGE_PIXELS = int(limit)
    try:
        with Image.open(file) as image:
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"image not found: {name}") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name} is not an image in a known format") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {one_line(error)} Set {PIXEL_LIMIT} to read larger ones") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise anything: SyntaxError, struct.error, IndexError, ...
        raise ValueError(f"cannot read image {name}, it is damaged or unsupported: {one_line(error)}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a PIL image of any mode to 8-bit RGB; grey values of 16 bits are scaled to 8 bits, not clipped.

    Where :data:`GREY_BITS` says that they come from 10 or 12 bits, these are scaled. Raises ValueError for a
    floating-point image, whose range nothing tells.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ValueError("images of floating-point pixels are not supported; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise ValueError("images of 32-bit pixels are not supported; save it with 8 or 16 bits")
        return Image.fromarray(_scaled_to_8_bits(values)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _scaled_to_8_bits(values: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Grey values 0..65535 as 0..255; a picture that looks like one of fewer bits is warned of, once."""
    text = os.environ.get(GREY_BITS, "16")
    if text not in _BITS:
        raise ValueError(f"{GREY_BITS} must be one of {', '.join(_BITS)}, it is {text!r}")
    most = int(values.max(initial=0))
    if text == "16" and GREY_BITS not in os.environ:
        likely = next((bits for bits in _BITS if 255 < most < 1 << int(bits)), "16")
        if likely != "16":
            _warn_of_bits(likely)
    elif most >= 1 << int(text):
        raise ValueError(f"{GREY_BITS} says {text} bits, but a value is {most}")
    return (values >> (int(text) - 8)).astype(np.uint8)


@functools.cache
def _warn_of_bits(bits: str) -> None:
    logger.warning(
        "a 16-bit grey picture uses %s bits alone, as of a %s-bit camera: read as 16 bits it is dark. Set %s=%s to read"
        " such pictures so, or to 16 to hear no more of it",
        bits,
        bits,
        GREY_BITS,
        bits,
    )


def as_image(image: ImageLike) -> Image.Image:
    """An RGB PIL image of a path, a PIL image, or an array [H, W, 3] of uint8 RGB values.

    Raises ValueError for an array of another shape or type, or an empty one, and what :func:`load_image` raises.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(
                f"an image array must be uint8 RGB of shape [height, width, 3], not {image.dtype} {list(image.shape)}"
            )
        return Image.fromarray(image)
    return load_image(image)


def resized_size(
    height: int, width: int, shorter_side: int, longer_side: int, limit: tuple[int, int] | None = None
) -> tuple[int, int]:
    """(height, width) in pixels that an image of ``height`` x ``width`` is resized to.

    The shorter side becomes ``shorter_side`` unless the longer one would exceed ``longer_side``. With ``limit`` =
    (height, width) of a fixed input, an image that would not fit is shrunk until it does, keeping its aspect. No side
    falls under 1 pixel.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image must have pixels, its size is {height} x {width}")
    shorter, longer = min(height, width), max(height, width)
    size = shorter_side
    if longer / shorter * size > longer_side:
        size = round(longer_side * shorter / longer)
    # An image so thin that its shorter side rounds to nothing keeps one pixel of it.
    other = int(size * longer / shorter) if size else longer_side
    size = max(1, size)
    resized = (other, size) if height > width else (size, other)
    if limit is not None and (resized[0] > limit[0] or resized[1] > limit[1]):
        return _fit(height, width, limit)
    return resized


def _fit(height: int, width: int, limit: tuple[int, int]) -> tuple[int, int]:
    """Largest (height, width) of the image's aspect inside ``limit``."""
    if limit[0] * width <= limit[1] * height:
        return limit[0], max(1, limit[0] * width // height)
    return max(1, limit[1] * height // width), limit[1]


def resize(image: Image.Image, size: tuple[int, int], interpolation: str = "antialias") -> Image.Image:
    """Resize to ``size`` = (height, width) pixels.

    ``interpolation``: "antialias", PIL's bilinear filter, or "bilinear", the two rows and columns next to a pixel's
    centre alone, as OpenCV and MMDetection do it: centres are at halves, the border is repeated, the result is rounded
    to 8 bits.
    """
    if image.size == size[::-1]:
        return image
    if interpolation == "antialias":
        return image.resize(size[::-1], Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    for axis, count in enumerate(size):
        first, second, share = _taps(pixels.shape[axis], count)
        weight = share.reshape((-1,) + (1,) * (2 - axis))
        before, after = pixels.take(first, axis), pixels.take(second, axis)
        pixels = before + (after.astype(np.float32) - before) * weight
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def _taps(before: int, after: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Of ``after`` places along ``before`` pixels: the two pixels next to each, and the second's share."""
    centre = np.clip((np.arange(after) + 0.5) * (before / after) - 0.5, 0, before - 1)
    first = np.floor(centre).astype(np.int64)
    return first, np.minimum(first + 1, before - 1), (centre - first).astype(np.float32)


def normalize(pixels: NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> NDArray[np.float32]:
    """Scale uint8 RGB ``pixels`` [..., 3] to 0..1, subtract ``mean`` and divide by ``std``, in float32."""
    scaled = pixels.astype(np.float32)
    scaled /= np.float32(255)
    scaled -= np.asarray(mean, np.float32)
    scaled /= np.asarray(std, np.float32)
    return scaled


def prepare(images: Sequence[Image.Image], metadata: ModelMetadata) -> dict[str, NDArray]:
    """Model inputs of a batch: ``images`` [B, 3, H, W] (uint8 or float32) and ``sizes`` [B, 2] float32.

    Each image is resized as the metadata say, placed at the top left and padded with zeros; ``sizes`` are its (height,
    width) in pixels of the input. ``images`` must be RGB.
    """
    dtype = np.uint8 if metadata.input_type == "uint8" else np.float32
    batch = np.zeros((len(images), 3, *metadata.input_size), dtype)
    sizes = np.zeros((len(images), 2), np.float32)
    for index, image in enumerate(images):
        size = _size_in_input(image, metadata)
        pixels = np.asarray(resize(image, size, metadata.interpolation))
        if metadata.input_type == "float32":
            pixels = normalize(pixels, metadata.mean, metadata.std)
        batch[index, :, : size[0], : size[1]] = pixels.transpose(2, 0, 1)
        sizes[index] = size
    return {"images": batch, "sizes": sizes}


def _size_in_input(image: Image.Image, metadata: ModelMetadata) -> tuple[int, int]:
    if metadata.resize == "stretch":
        return metadata.input_size
    return resized_size(
        image.height, image.width, metadata.shorter_side, metadata.longer_side, limit=metadata.input_size
    )
