"""The benchmark's results for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from asag.runtime.speed.benchmark import STAGES, BenchmarkReport, Latency, Throughput
from asag.runtime.speed.limits import ModelLimits
from asag.runtime.speed.stage_times import AFTER, StageTimes

_HEADINGS = {"pre-processing": "pre-\nproc.", "post-processing": "post-\nproc."}


def benchmark_table(report: BenchmarkReport) -> Group:
    """Everything that the report holds; times in milliseconds per batch."""
    parts: list[RenderableType] = [_latency_table(report)]
    if report.throughput:
        parts.append(throughput_table(report))
    if report.stage_times:
        parts.append(stage_times_table(report.stage_times))
    said = {row.reason for row in report.stage_times if row.reason is not None}
    parts += [limit_table(limits) for limits in report.limits if limits.reason not in said]
    versions = ", ".join(f"{name} {text}" for name, text in report.versions.items())
    return Group(*parts, *_notes(report), Text(f"{report.machine.summary()}; {versions}", style="dim"))


def _latency_table(report: BenchmarkReport) -> Table:
    names_needed = _names_needed(report.latencies)
    table = _empty_table(f"Latency of a batch of {report.batch_size}, ms, {report.rounds} rounds")
    for heading in ("p50", "p90", "p99", "images\n/s", "time / first\n(10..90 %)", "pre-\npare", "run", "post-\nproc."):
        table.add_column(heading, justify="right", no_wrap=True)
    for latency in report.latencies:
        times = (latency.p50_ms, latency.p90_ms, latency.p99_ms)
        table.add_row(
            f"{latency.backend}\n{latency.name}" if names_needed else latency.backend,
            latency.precision,
            *map(milliseconds, times),
            f"{latency.images_per_second:.1f}",
            _ratio_text(latency),
            *(milliseconds(latency.stages_p50_ms[stage]) for stage in STAGES),
        )
    return table


def _notes(report: BenchmarkReport) -> Iterator[Text]:
    for latency in report.latencies:
        if latency.ratio is not None and not latency.differs:
            yield Text(f"{latency.name} ({latency.backend}): no difference to the first beyond the noise")
    for model in report.unavailable:
        yield Text(f"{model.name} ({model.backend}) was not run: {model.reason}", style="yellow")
    for latency, memory in zip(report.latencies, report.peak_memory_mib, strict=False):
        if memory is not None:
            yield Text(f"{latency.name} ({latency.backend}): a process of its own takes {memory:.0f} MiB at most")
    for latency in report.latencies:
        if latency.device_p50_ms is not None:
            by_device = f"{milliseconds(latency.device_p50_ms)} ms by the GPU's clock, without copies"
            yield Text(f"{latency.name} ({latency.backend}): the network takes {by_device}")


def _names_needed(rows: Sequence[Latency | StageTimes]) -> bool:
    """Whether backend and precision do not tell the models apart."""
    return len({(row.backend, row.precision) for row in rows}) < len(rows)


def _empty_table(title: str) -> Table:
    """A table whose first columns name the model."""
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("backend", overflow="fold")
    table.add_column("prec.", no_wrap=True)
    return table


def stage_times_table(rows: Sequence[StageTimes]) -> Group:
    """A row for each session and a column for each stage, with its share of the whole below the time."""
    measured = [row for row in rows if row.reason is None]
    named = list(dict.fromkeys(stage for row in measured for stage in row.p50_ms))
    shown = [stage for stage in named if stage not in AFTER] + [stage for stage in AFTER if stage in named]
    table = _empty_table("Time per stage, ms, and share of the whole")
    for stage in shown:
        table.add_column(_HEADINGS.get(stage, stage), justify="right", no_wrap=True)
    notes = []
    for row in measured:
        cells = [
            f"{milliseconds(row.p50_ms[stage])}\n{row.share(stage):.1%}" if stage in row.p50_ms else ""
            for stage in shown
        ]
        table.add_row(f"{row.backend}\n{row.name}" if _names_needed(measured) else row.backend, row.precision, *cells)
        share = row.share("pre-processing", "post-processing")
        notes.append(Text(f"{row.name} ({row.backend}): pre- and post-processing take {share:.1%} of the whole"))
    notes += [Text(f"{r.name} ({r.backend}): no stages, {r.reason}", style="yellow") for r in rows if r.reason]
    return Group(*([table] if measured else []), *notes)


def limit_table(found: ModelLimits) -> Group:
    """The stages of one model beside what the machine could do."""
    name = f"{found.name} ({found.backend} {found.precision})"
    if found.rates is None:
        return Group(Text(f"{name} has no limits: {found.reason}", style="yellow"))
    table = Table(title=f"Limits of {name}", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    for heading in ("time ms", "limit ms", "limit / time", "GFLOP", "MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("bound by", no_wrap=True)
    for stage in found.stages:
        numbers = (f"{stage.time_ms:.2f}", f"{stage.limit_ms:.2f}", f"{stage.fraction:.0%}")
        work = (f"{stage.operations / 1e9:.2f}", f"{stage.bytes / 1e6:.1f}")
        table.add_row(stage.stage, *numbers, *work, stage.bound_by)
    notes = [Text(found.rates.sentence(), style="dim")]
    if any(stage.fraction > 1.1 for stage in found.stages):
        notes.append(Text("A stage beat its limit: was the machine busy when its rates were measured?", style="yellow"))
    return Group(table, *notes)


def throughput_table(report: BenchmarkReport) -> Table:
    """Images per second, a row for each session and a column for each batch size, with the spread below."""
    sizes = list(dict.fromkeys(row.batch_size for row in report.throughput))
    table = _empty_table("Images per second by batch size (10..90 %)")
    for size in sizes:
        table.add_column(str(size), justify="right", no_wrap=True)
    energy = any(row.joules_per_image is not None for row in report.throughput)
    count = len(report.throughput) // len(sizes)
    for place in range(count):
        rows = report.throughput[place::count]
        table.add_row(rows[0].backend, rows[0].precision, *(_throughput_text(row, energy) for row in rows))
    return table


def _throughput_text(row: Throughput, energy: bool) -> str:
    if row.images_per_second is None:
        return "not taken"
    text = f"{row.images_per_second:.1f}\n({row.low:.1f}..{row.high:.1f})"
    if energy:
        text += "\n" + ("" if row.joules_per_image is None else f"{row.joules_per_image:.2f} J/image")
    return text


def milliseconds(value: float) -> str:
    """A time in milliseconds as text of at most five characters up to 100 seconds."""
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _ratio_text(latency: Latency) -> str:
    if latency.ratio is None:
        return "1"
    return f"{latency.ratio:.2f}\n({latency.ratio_low:.2f}..{latency.ratio_high:.2f})"
