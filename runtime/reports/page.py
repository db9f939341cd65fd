"""Self-contained HTML pages: tables, charts, detections drawn on images, and how they came about."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asag.runtime.errors import one_line
from asag.runtime.files import write_text
from asag.runtime.parity.results import SCORE_BINS, ParityReport, ParityRow
from asag.runtime.parity.table import ACCURACY_HEADINGS, HEADINGS, accuracy_cells, row_cells
from asag.runtime.records import convert, read_json
from asag.runtime.reports.charts import Level, Point, accuracy_latency, colours_of, score_histogram, stage_bars
from asag.runtime.reports.document import KIND, ReportDocument, read_document
from asag.runtime.speed.benchmark import BenchmarkReport, Latency
from asag.runtime.speed.stage_times import StageTimes

if TYPE_CHECKING:
    import jinja2

_COCO_CLASSES = 80


def find_reports(paths: Sequence[str | os.PathLike[str]]) -> tuple[list[ReportDocument], list[BenchmarkReport]]:
    """Parity documents and benchmarks of JSON files, or of all such files in folders.

    Raises FileNotFoundError or ValueError when a file named is neither, or there is nothing to show; other JSON files
    in a folder are passed over.
    """
    documents, benchmarks = [], []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"report not found: {path}")
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            try:
                content = read_json(file)
            except ValueError:
                if not path.is_dir():
                    raise
                continue
            content = content if isinstance(content, dict) else {}
            if "latencies" in content:
                benchmarks.append(_read_benchmark(file, content))
            elif str(content.get("format")).startswith(KIND) or not path.is_dir():
                documents.append(read_document(file, content))
    if not documents and not benchmarks:
        raise ValueError(
            f"no reports in {', '.join(map(str, paths))}: looked for the files of `asag parity --json` and"
            " `asag bench --json`"
        )
    return documents, benchmarks


def _read_benchmark(path: Path, content: Mapping[str, Any]) -> BenchmarkReport:
    try:
        return convert(content, BenchmarkReport)
    except ValueError as error:
        reason = f"{one_line(error)}; write it with `asag bench --json`"
        raise ValueError(f"{path} holds no benchmark that can be read: {reason}") from None


def write_page(
    path: str | os.PathLike[str],
    documents: Sequence[ReportDocument],
    benchmarks: Sequence[BenchmarkReport] = (),
    *,
    title: str = "Parity report",
    published: Sequence[Level] = (),
) -> Path:
    """Write one page of several runs and benchmarks.

    ``published`` APs are drawn into the plot when a run was on COCO's 80 classes, the only ones they can be compared
    with.
    """
    comparable = any(len(document.report.metadata.category_ids) == _COCO_CLASSES for document in documents)
    colours = colours_of(_model_name(row) for document in documents for row in document.report.rows)
    page = _template().render(
        title=title,
        headings=HEADINGS,
        accuracy_headings=ACCURACY_HEADINGS,
        plot=accuracy_latency(_points(documents), colours, published if comparable else ()),
        published=bool(published) and comparable,
        sections=[_section(document, colours) for document in documents],
        benchmarks=[_benchmark_section(benchmark) for benchmark in benchmarks],
    )
    write_text(path, page)
    return Path(path)


def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("asag.runtime.reports", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


def _model_name(row: ParityRow) -> str:
    """What a model is called on the page."""
    return f"{row.name}, {row.backend} {row.precision}"


def _section(document: ReportDocument, colours: Mapping[str, str]) -> dict[str, Any]:
    report = document.report
    series = [(_model_name(row), row.agreement.score_histogram) for row in report.rows if row.agreement is not None]
    return {
        "dataset": Path(report.dataset).name,
        "image_count": len(report.image_ids),
        "metadata": report.metadata,
        "rows": [(row_cells(row), row.reason) for row in report.rows],
        "accuracy": [[_model_name(row), *accuracy_cells(row)[1:]] for row in report.rows if row.result is not None],
        "verdicts": _verdicts(report),
        "batches": [check.sentence() for check in report.batch_checks if check.reason or not check.agrees],
        "batches_agree": bool(report.batch_checks) and report.batches_agree,
        "histogram": score_histogram(SCORE_BINS, series, colours),
        "stages": report.stages,
        "groups": document.pictures,
        "stage_groups": document.stage_pictures,
        "start_groups": document.start_pictures,
        "score_threshold": document.score_threshold,
        "machine": report.machine,
        "versions": ", ".join(f"{name} {text}" for name, text in report.machine.versions.items()),
    }


def _benchmark_section(benchmark: BenchmarkReport) -> dict[str, Any]:
    machine = benchmark.machine
    # The network's stages where they were measured, else preparing, running and reading the outputs.
    timed: list[tuple[StageTimes | Latency, dict[str, float]]] = [
        (times, times.p50_ms) for times in benchmark.stage_times if times.p50_ms
    ]
    bars = timed or [(latency, latency.stages_p50_ms) for latency in benchmark.latencies]
    return {
        "batch_size": benchmark.batch_size,
        "rounds": benchmark.rounds,
        "latencies": benchmark.latencies,
        "bars": stage_bars([(f"{item.backend} {item.precision}", stages) for item, stages in bars]),
        "machine": machine.summary(),
        "versions": ", ".join(f"{name} {text}" for name, text in benchmark.versions.items()),
    }


def _points(documents: Sequence[ReportDocument]) -> list[Point]:
    points = []
    for document in documents:
        for row in document.report.rows:
            if row.result is None or row.latency_p50_ms is None or math.isnan(row.result.ap):
                continue
            ends = (row.ap_interval.low, row.ap_interval.high) if row.ap_interval else (row.result.ap,) * 2
            points.append(Point(_model_name(row), row.latency_p50_ms, row.result.ap, *ends))
    return points


def _verdicts(report: ParityReport) -> list[str]:
    """A sentence per compared backend."""
    sentences = []
    for row in report.rows:
        if row.agreement is None:
            continue
        sentences.append(
            f"{row.name} ({row.backend}): the same detections as the reference on {row.agreement.images_within} of"
            f" {row.agreement.images} images, within {report.score_tolerance:g} in score and"
            f" {report.box_tolerance:g} pixels in boxes, apart from ties."
        )
    return sentences
