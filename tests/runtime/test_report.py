from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.parity import Unavailable, compare
from runtime.report import write_report
from tests.runtime.toy_detector import ToySession, write_toy_dataset


class Page(HTMLParser):
    """Collects what the tests ask of a page, and checks that its elements are closed."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.links: list[str | None] = []
        self.rows = 0
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.rows += tag == "tr"
        if tag == "img":
            self.images.append(values)
        self.links += [values[name] for name in ("href", "src") if name in values]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def page(tmp_path: Path) -> Page:
    dataset = write_toy_dataset(tmp_path / "data", images=5)

    def brighten_one(outputs: dict[str, np.ndarray]) -> None:
        if outputs["scores"][0, 0] > 0.5:
            outputs["scores"][0, 0] += 0.01

    candidates = [
        ToySession(change=brighten_one, name="<script>alert(1)</script>"),
        Unavailable("toy.engine", "tensorrt-rtx", "fp32", "no NVIDIA driver & no GPU"),
    ]
    report = compare(ToySession(), candidates, dataset)
    path = write_report(tmp_path / "out" / "report.html", report, dataset, pictures=3, notes=["AP on 5 images"])
    return Page(path.read_text(encoding="utf-8"))


def test_every_picture_is_inside_the_file(page: Page) -> None:
    assert len(page.images) == 3 * 2
    assert all(link is not None and link.startswith("data:") for link in page.links)
    for image in page.images:
        source = image["src"] or ""
        with Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))) as picture:
            assert (str(picture.width), str(picture.height)) == (image["width"], image["height"])
        assert image["alt"]


def test_table_names_every_backend_and_reason(page: Page) -> None:
    assert page.rows == 1 + 3 + 1
    assert "Not run: no NVIDIA driver & no GPU" in page.text
    assert "<script>alert(1)</script>" in page.text, "a name is text, never markup"
    assert "AP on 5 images" in page.text
    assert "5 images" in page.text


def test_report_without_pictures(tmp_path: Path) -> None:
    dataset = write_toy_dataset(tmp_path / "data", images=1)
    report = compare(ToySession(), [], dataset)
    path = write_report(tmp_path / "report.html", report, dataset, pictures=0)
    assert Page(path.read_text()).images == []
