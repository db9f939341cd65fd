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


def caption(text: str, size: int) -> tuple[str, Font]:
    """The text, or its letters spelled in ASCII, and a font of `size` pixels that has all of it."""
    for name in (None, *SYSTEM_FONTS):
        font = _font(name, size)
        if font is not None and _has_all(name, text):
            return text, font
    own = _font(None, size)
    assert own is not None
    return anyascii(text), own


@cache
def _font(name: str | None, size: int) -> Font | None:
    """The font of that file name, or Pillow's own; None where the system has no such file."""
    if name is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@cache
def _has_all(name: str | None, text: str) -> bool:
    font = _font(name, 16)
    assert font is not None
    missing = bytes(font.getmask(_NO_LETTER))
    return all(letter.isspace() or bytes(font.getmask(letter)) != missing for letter in text)
