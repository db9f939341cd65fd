"""Text in pictures, in any script: a font that has its letters, or the text in Latin letters.

Pillow brings one font, of a few hundred Latin letters. Others are looked for among those of the system by their usual
file names; where none has the letters, they are spelled in ASCII, which a reader of the script can still tell apart.
"""

from __future__ import annotations

from functools import cache

from anyascii import anyascii
from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

SYSTEM_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf"),
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-zenhei.ttc", "wqy-microhei.ttc"),
    *("DroidSansFallbackFull.ttf", "NanumGothic.ttf", "PingFang.ttc", "AppleSDGothicNeo.ttc"),
    *("msyh.ttc", "malgun.ttf", "meiryo.ttc", "Arial Unicode.ttf", "arialuni.ttf"),
    *("NotoSansHebrew-Regular.ttf", "NotoSansArabic-Regular.ttf", "NotoSansThai-Regular.ttf"),
    *("NotoSansDevanagari-Regular.ttf", "Lohit-Devanagari.ttf", "Nirmala.ttf", "mangal.ttf"),
)
"""File names as Linux, macOS and Windows have them; Pillow searches the folders of the system for them."""

_NO_LETTER = "\U0010ffff"
"""A character that no font has: how it is drawn is how any missing one is."""


_PROBED_SIZE = 16
"""Pixels at which fonts are asked for their letters, which do not depend on it."""


def caption(text: str, size: int) -> tuple[str, Font]:
    """The text, or its letters spelled in ASCII, and a font of `size` pixels that has all of it."""
    letters = {letter for letter in text if not letter.isspace()}
    if all(_draws(plain_font(_PROBED_SIZE), letter) for letter in letters):
        return text, plain_font(size)
    for name in SYSTEM_FONTS:
        probe, font = _system_font(name, _PROBED_SIZE), _system_font(name, size)
        if probe is not None and font is not None and all(_draws(probe, letter) for letter in letters):
            return text, font
    return anyascii(text), plain_font(size)


@cache
def plain_font(size: int) -> Font:
    """Pillow's own font at a size in pixels."""
    return ImageFont.load_default(size)


@cache
def _system_font(name: str, size: int) -> Font | None:
    """The font of that file name; None where the system has no such file."""
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@cache
def _draws(font: Font, letter: str) -> bool:
    """Whether a font has a letter."""
    return bytes(font.getmask(letter)) != bytes(font.getmask(_NO_LETTER))
