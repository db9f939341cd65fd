from __future__ import annotations

import pytest

from asag.runtime import captions
from asag.runtime.captions import caption

TEXTS = ["ring 0.93", "圆形", "квадрат", "삼각형", "נקודה", "गोल", "ring ünï"]


@pytest.mark.parametrize("text", TEXTS)
def test_no_letter_is_an_empty_square(text: str) -> None:
    shown, font = caption(text, 20)
    missing = bytes(font.getmask("\U0010ffff"))
    assert not any(bytes(font.getmask(letter)) == missing for letter in shown if letter != " ")
    assert shown == text or shown.isascii()


def test_without_fonts_of_the_system_letters_are_spelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "SYSTEM_FONTS", ("no such font.ttf",))
    assert [caption(text, 20)[0] for text in TEXTS[:3]] == ["ring 0.93", "YuanXing", "kvadrat"]
