from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from asag.cli.report import published_levels
from asag.cli.report import report as report_command
from asag.runtime.files import write_json
from asag.runtime.parity.comparison import Unavailable, compare
from asag.runtime.parity.stage_comparison import StageDifference, StageReport
from asag.runtime.records import read_json
from asag.runtime.reports.charts import Level, Point, accuracy_latency, colours_of, score_histogram, stage_bars
from asag.runtime.reports.document import make_document, read_document
from asag.runtime.reports.page import find_reports, write_page
from asag.runtime.speed.benchmark import measure
from tests.cli.damage import damage_json
from tests.runtime.toy_detector import ToySession, write_toy_dataset


class Page(HTMLParser):
    """Collects what the tests ask of a page, and checks that its elements are closed."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.links: list[str | None] = []
        self.rows = self.charts = 0
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.rows += tag == "tr"
        self.charts += tag == "svg"
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
    document = make_document(report, dataset, pictures=3)
    path = write_page(tmp_path / "out" / "report.html", [document])
    return Page(path.read_text(encoding="utf-8"))


def test_every_picture_is_inside_the_file(page: Page) -> None:
    assert len(page.images) == 3 * 3, "what is annotated, and two models that ran"
    assert all(link is not None and link.startswith("data:") for link in page.links)
    for image in page.images:
        source = image["src"] or ""
        with Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))) as picture:
            assert (str(picture.width), str(picture.height)) == (image["width"], image["height"])
        assert image["alt"]


def test_pictures_show_what_is_annotated_and_what_differs(tmp_path: Path) -> None:
    dataset = write_toy_dataset(tmp_path / "data", images=3)

    def lose_one(outputs: dict[str, np.ndarray]) -> None:
        best = outputs["scores"].argmax(axis=1)
        outputs["boxes"][np.arange(len(best)), best, :2] = 0
        outputs["scores"] -= 0.03

    report = compare(ToySession(), [ToySession(change=lose_one, name="worse")], dataset)
    assert report.detections[0] is not None
    for group in make_document(report, dataset, pictures=1).pictures:
        annotated, reference, candidate = group.pictures
        assert annotated.caption.startswith("annotated: ")
        assert "differ" not in reference.caption
        assert candidate.caption.endswith(" differ, 1 missing")


def test_table_names_every_backend_and_reason(page: Page) -> None:
    assert page.rows == (1 + 3 + 1) + (1 + 2), "every backend and a reason; then the two that ran"
    assert "Not run: no NVIDIA driver & no GPU" in page.text
    assert "<script>alert(1)</script>" in page.text, "a name is text, never markup"
    assert "5 images" in page.text
    assert page.charts == 2, "AP over latency, score differences"
    assert "toy of toys, head main, capacity [8, 16], 3 classes" in page.text


def test_report_without_pictures(tmp_path: Path) -> None:
    dataset = write_toy_dataset(tmp_path / "data", images=1)
    report = compare(ToySession(), [], dataset)
    path = write_page(tmp_path / "report.html", [make_document(report, dataset, pictures=0)])
    assert Page(path.read_text()).images == []


def changed(outputs: dict[str, np.ndarray]) -> None:
    outputs["scores"][:, 3] += 0.02


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with a parity run, a benchmark, and JSON files of something else."""
    folder = tmp_path / "run"
    dataset = write_toy_dataset(tmp_path / "data", images=5)
    sessions = [ToySession(), ToySession(change=changed, name="changed")]
    report = compare(sessions[0], [*sessions[1:], Unavailable("a.engine", "tensorrt-rtx", "fp16", "no GPU")], dataset)
    broken = StageDifference("head", float("inf"), 0.1, 0, 1e-3, (2,))
    stages = StageReport("changed", "numpy", "fp32", (broken,), (1, 2))
    document = make_document(dataclasses.replace(report, stages=(stages,)), dataset, pictures=2)
    write_json(folder / "parity.json", document.to_json())
    write_json(folder / "bench.json", measure(sessions, [dataset.load(1)], rounds=3).to_json())
    write_json(folder / "config.json", {"steps": 3})
    write_json(folder / "model.engine.json", {"format": 3})
    (folder / "damaged.json").write_text("{")
    return folder


def test_a_document_survives_its_file(run: Path) -> None:
    (document,), (benchmark,) = find_reports([run])
    path = run / "again.json"
    write_json(path, document.to_json())
    assert read_document(path, read_json(path)) == document
    assert path.read_text() == (run / "parity.json").read_text()
    assert [item.name for item in benchmark.latencies] == ["toy", "changed"]


def test_page_of_a_folder(run: Path) -> None:
    published = [Level("a published model", 0.45)]
    documents, benchmarks = find_reports([run])
    page = Page(write_page(run / "report.html", documents, benchmarks, published=published).read_text())
    assert page.charts == 3
    assert len(page.images) == 2 * 3
    assert "differences start at head on 1 of 2 images (2)" in page.text
    assert "Latency of a batch of 1" in page.text
    assert "Not run: no GPU" in page.text
    assert "a published model" not in page.text, "the toy's dataset is not COCO"


def test_latency_by_stage_of_the_network_where_it_was_measured(run: Path) -> None:
    content = read_json(run / "bench.json")
    row = {"name": "toy", "backend": "numpy", "precision": "fp32", "reason": None}
    measured = row | {"p50_ms": {"features": 30.0, "head": 12.5}}
    content["stage_times"] = [measured, row | {"p50_ms": {}, "reason": "one program"}]
    write_json(run / "bench.json", content)
    documents, benchmarks = find_reports([run])
    page = Page(write_page(run / "report.html", documents, benchmarks).read_text())
    assert "features: 30.00 ms" in page.text
    assert "42.5 ms" in page.text
    assert "prepare" not in page.text


def test_published_results_are_drawn_beside_models_of_coco(run: Path) -> None:
    (document,), _ = find_reports([run / "parity.json"])
    names = tuple(f"class {number}" for number in range(80))
    coco = dataclasses.replace(document.report.metadata, category_ids=tuple(range(1, 81)), category_names=names)
    document = dataclasses.replace(document, report=dataclasses.replace(document.report, metadata=coco))
    levels = published_levels()
    assert {"asag-a-r50-1x-100", "asag-s-r50-3x-300"} <= {level.name for level in levels}
    assert all(0.4 < level.ap < 0.5 for level in levels)
    page = Page(write_page(run / "report.html", [document], published=levels).read_text())
    assert all(level.name in page.text for level in levels)


def test_what_is_no_report(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="report not found"):
        find_reports([tmp_path / "none"])
    with pytest.raises(ValueError, match="holds no parity report; write it with"):
        find_reports([run / "config.json"])
    for written, message in (
        ("0", "of format 0, this version reads 1"),
        ("2", "by a newer version of asag .*update asag"),
    ):
        (run / "other.json").write_text(json.dumps({"format": f"asag parity {written}"}))
        with pytest.raises(ValueError, match=message):
            find_reports([run])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no reports in"):
        find_reports([tmp_path / "empty"])


DAMAGES = [
    ("parity.json", ("rows",), None, "rows must be a list"),
    ("parity.json", ("rows", 1, "result", "ap"), "high", r"rows\[1\]\.result\.ap must be a number"),
    ("parity.json", ("rows", 1, "result"), None, r"rows\[1\]: a row has either a result or the reason"),
    ("parity.json", ("rows", 1, "agreement", "images"), True, r"rows\[1\]\.agreement\.images must be a whole number"),
    ("parity.json", ("metadata", "mean", 1), None, r"metadata\.mean\[1\] must be a number"),
    ("parity.json", ("machine", "cores"), 1.5, r"machine\.cores must be a whole number"),
    ("parity.json", ("stages", 0, "stages", 0, "tolerance"), "x", r"stages\[0\]\.stages\[0\]\.tolerance must be"),
    ("parity.json", ("pictures", 0, "pictures", 0, "width"), "640", r"pictures\[0\]\.pictures\[0\]\.width must be"),
    ("bench.json", ("latencies",), [3], r"latencies\[0\] must be an object"),
    ("bench.json", ("latencies", 0, "p50_ms"), None, r"latencies\[0\]\.p50_ms must be a number"),
    ("bench.json", ("latencies", 1, "ratio_low"), None, r"latencies\[1\]: a ratio needs both ends of its spread"),
    ("bench.json", ("machine", "gpus"), "one", r"machine\.gpus must be a list"),
]


@pytest.mark.parametrize(("name", "place", "value", "message"), DAMAGES)
def test_a_damaged_report_names_file_and_field(
    run: Path, name: str, place: tuple[str | int, ...], value: object, message: str
) -> None:
    content = read_json(run / name)
    owner = content
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = value
    write_json(run / name, content)
    with pytest.raises(ValueError, match=f"{name} holds no .* that can be read: {message}") as caught:
        find_reports([run])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["parity.json", "bench.json"])
def test_a_damaged_report_is_shown_or_refused_in_one_line(run: Path, name: str) -> None:
    content = (run / name).read_bytes()
    refusals = []
    for seed in range(300):
        (run / name).write_bytes(damage_json(content, np.random.default_rng(seed)))
        try:
            documents, benchmarks = find_reports([run / name])
        except ValueError as error:
            refusals.append(str(error))
        else:
            write_page(run / "report.html", documents, benchmarks)
    assert len(refusals) > 150
    assert all("\n" not in text and len(text) < 700 for text in refusals)


@pytest.mark.parametrize("name", ["parity.json", "bench.json"])
def test_what_a_report_must_hold(run: Path, name: str) -> None:
    content = read_json(run / name)
    computed = {"images", "score_bins", "format"}  # of other fields; without the format it is no report at all
    optional = (
        {"unavailable", "throughput", "peak_memory_mib", "stage_times", "limits"} if name == "bench.json" else set()
    )
    for left_out in content.keys() - computed - optional - {"latencies"}:
        write_json(run / name, {key: value for key, value in content.items() if key != left_out})
        with pytest.raises(ValueError, match=f"{name} holds no .*: {left_out} is missing"):
            find_reports([run])


def test_what_is_not_a_number_is_null_in_a_file(run: Path) -> None:
    (document,), _ = find_reports([run / "parity.json"])
    (row, *others), (stages,) = document.report.rows, document.report.stages
    assert row.result is not None
    empty = dataclasses.replace(row, result=dataclasses.replace(row.result, apl=float("nan")))
    report = dataclasses.replace(document.report, rows=(empty, *others))
    write_json(run / "parity.json", dataclasses.replace(document, report=report).to_json())
    content = read_json(run / "parity.json")
    assert content["rows"][0]["result"]["apl"] is None
    assert content["stages"][0]["stages"][0]["largest"] is None
    (document,), _ = find_reports([run / "parity.json"])
    assert document.report.rows[0].result is not None
    assert math.isnan(document.report.rows[0].result.apl)
    assert document.report.stages == (stages,)
    assert stages.stages[0].largest == math.inf


def test_the_command(run: Path) -> None:
    done = CliRunner().invoke(report_command, [str(run), "--title", "Two models"])
    assert done.exit_code == 0, done.output
    assert "<title>Two models</title>" in (run / "report.html").read_text()


def test_ticks_and_ranges_of_a_chart() -> None:
    one = accuracy_latency([Point("model", 3.0, 1.0, 1.0, 1.0)], {"model": "#123456"})
    assert one.count("<circle") == 1
    assert accuracy_latency([], {}) == ""
    assert score_histogram((1e-4, 1e-2), [("nothing matched", (0, 0, 0))], {}) == ""
    assert "12.0 ms" in stage_bars([("a & b", {"prepare": 2.0, "run": 10.0})])


def test_a_browser_opens_the_page(run: Path) -> None:
    """Images load, and neither an error nor a request leaves the page; on a wide and on a narrow screen."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium or Chrome on this machine")
    documents, benchmarks = find_reports([run])
    page = write_page(run / "report.html", documents, benchmarks)
    # What the page cannot say of itself is written into its title by a script that only this copy has.
    probe = """<script>
    const problems = []; addEventListener("error", e => problems.push(e.message || e.target.src), true);
    addEventListener("load", () => {
      const images = [...document.images];
      const loaded = images.filter(i => i.complete && i.naturalWidth > 0).length;
      const wide = document.documentElement.scrollWidth > innerWidth;
      const requests = performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:")).length;
      document.title = JSON.stringify({images: images.length, loaded, wide, requests, problems});
    });</script>"""
    copy = run / "probe.html"
    copy.write_text(page.read_text().replace("<head>", f"<head>{probe}"))
    for size in ("1280,900", "500,900"):  # headless Chromium makes no window narrower than 500
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={size}"]
        options = ["--enable-logging=stderr", f"--user-data-dir={run / 'profile'}", "--dump-dom", copy.as_uri()]
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=True)
        title = re.search(r"<title>(.*?)</title>", done.stdout)
        assert title is not None, done.stderr
        found = json.loads(html.unescape(title[1]))
        assert found == {"images": 6, "loaded": 6, "wide": False, "requests": 0, "problems": []}
        assert ":CONSOLE" not in done.stderr


def test_a_model_has_one_colour_on_a_page() -> None:
    colours = colours_of(["reference", "first", "second", "first"])
    assert len(set(colours.values())) == len(colours) == 3
    points = [Point(name, 3.0, 0.5, 0.4, 0.6) for name in colours]
    plot = accuracy_latency(points, colours)
    bars = score_histogram((1e-4, 1e-2), [("first", (1, 2, 3)), ("second", (1, 2, 3))], colours)
    for name in ("first", "second"):
        marked = f'fill="{colours[name]}"><title>{name}'
        assert marked in plot
        assert marked in bars
