"""What was measured of the kernels, whether it keeps what they promise, and all of it as JSON and Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from asag.runtime.machine import Machine
from asag.runtime.speed.limits import Rates, StageLimit, stage_limit
from asag.runtime.speed.stage_work import StageWork
from asag.trt_plugins.launch import ITEM_SIZES
from asag.trt_plugins.operations import OPERATIONS
from benchmarks.kernel_cases import PUBLISHED, Case
from benchmarks.timing import Spread, ratio

KERNEL, DEFINITION, TORCHVISION, ONNX_BODY = "kernel", "PyTorch definition", "torchvision", "ONNX body"
PYTHON, GRAPH, COLD = "from Python", "in a graph", "in a graph, caches empty"


@dataclasses.dataclass(frozen=True)
class Timing:
    """One way to do an op: microseconds per call of every round, or the reason why there are none."""

    what: str
    how: str
    computes_in: str
    """The kernel's type, unless it has nothing for that."""
    case: Case | None = None
    """For a kernel: which of the op's kernels."""
    rounds: tuple[float, ...] = ()
    reason: str = ""


def least_work(case: Case) -> StageWork:
    """What one launch has to do: inputs and outputs once, of what is sampled what it reads at most, and arithmetic."""
    operation = OPERATIONS[case.name]
    work = operation.work(case.shapes, case.attributes)
    shapes = [*case.shapes, *operation.output_shapes(case.shapes, case.attributes)]
    tensors = [*operation.inputs, *operation.outputs]
    moved = work.map_values * ITEM_SIZES[case.element] + sum(
        float(np.prod(shape)) * ITEM_SIZES[tensor.resolve(case.element)]
        for tensor, shape in list(zip(tensors, shapes, strict=True))[operation.sampled :]
    )
    single, half = (work.operations, 0.0) if case.element == "float32" else (0.0, work.operations)
    return StageWork(case.name, single, half, moved)


@dataclasses.dataclass(frozen=True)
class Result:
    """An op at one size, batch and type: its kernels and what they are compared with, timed in the same rounds."""

    cases: tuple[Case, ...]
    timings: tuple[Timing, ...]

    @property
    def case(self) -> Case:
        """Any of the cases; layout and tensor cores apart they are the same."""
        return self.cases[0]

    def limit(self, rates: Rates) -> StageLimit:
        """The least time that a GPU of these rates takes."""
        return stage_limit(least_work(self.case), 1.0, rates)

    def fastest(self, what: str, *how: str) -> Timing | None:
        """Of the shortest median among those timed in one of these ways."""
        chosen = [timing for timing in self.timings if timing.what == what and timing.how in how and timing.rounds]
        return min(chosen, key=lambda timing: float(np.median(timing.rounds)), default=None)

    def faster_than(self, other: Timing) -> Spread | None:
        """How many times as long `other` takes as the fastest kernel in a graph, round by round."""
        kernel = self.fastest(KERNEL, GRAPH)
        return None if kernel is None or not other.rounds else ratio(other.rounds, kernel.rounds)

    def of_limit(self, timing: Timing, rates: Rates) -> Spread | None:
        """Time at the GPU's limit over the time taken: what of the possible speed it reaches."""
        times = timing.rounds
        return ratio([self.limit(rates).limit_ms * 1e3] * len(times), times) if times else None

    def rows(self, rates: Rates) -> Iterable[dict[str, Any]]:
        """Each timing as JSON values; spreads are median, 10th and 90th percentile over the rounds."""
        for timing in self.timings:
            yield {
                "what": timing.what,
                "kernel": timing.case and timing.case.kind,
                "how": timing.how,
                "computes_in": timing.computes_in,
                "microseconds": _as_dict(Spread.of(timing.rounds) if timing.rounds else None),
                "of_limit": _as_dict(self.of_limit(timing, rates) if timing.how == COLD else None),
                "kernel_in_a_graph_is_faster_by": _as_dict(None if timing.case else self.faster_than(timing)),
                "not_measured_because": timing.reason or None,
                "rounds": [round(value, 3) for value in timing.rounds],
            }


@dataclasses.dataclass(frozen=True)
class Finding:
    """An aim at one place; `value` is None where what it needs was not measured, `against` what it is compared with."""

    place: str
    value: Spread | None
    met: bool | None
    against: str


Measure = Callable[[Result, Rates], tuple[Spread | None, str] | None]
"""A number and what it is a comparison with; None where the aim says nothing about the result."""


@dataclasses.dataclass(frozen=True)
class Aim:
    """A promise about an op at the published sizes, by the median."""

    text: str
    op: str
    target: float
    at_most: bool
    measure: Measure

    def findings(self, results: Sequence[Result], rates: Rates) -> list[Finding]:
        """What was found at each place that it speaks of."""
        found = []
        for result in results:
            if (result.case.name, result.case.sizes.name) != (self.op, PUBLISHED.name):
                continue
            if (measured := self.measure(result, rates)) is None:
                continue
            value, against = measured
            sign = 1 if self.at_most else -1
            met = None if value is None else sign * value.median <= sign * self.target
            found.append(Finding(result.case.place, value, met, against))
        return found


def verdict(findings: Sequence[Finding]) -> bool | None:
    """Met everywhere; None where nothing was measured or something is missing without anything being missed."""
    verdicts = [finding.met for finding in findings]
    if False in verdicts:
        return False
    return None if not verdicts or None in verdicts else True


def _cold(result: Result, rates: Rates) -> tuple[Spread | None, str]:
    kernel = result.fastest(KERNEL, COLD)
    return (Spread.of(kernel.rounds) if kernel else None), ""


def _share_of_limit(result: Result, rates: Rates) -> tuple[Spread | None, str]:
    kernel = result.fastest(KERNEL, COLD)
    return (result.of_limit(kernel, rates) if kernel else None), ""


def _than(what: str) -> Measure:
    """Against the fastest form of the other side, in the kernel's own type only."""

    def measure(result: Result, rates: Rates) -> tuple[Spread | None, str] | None:
        other = result.fastest(what, PYTHON, GRAPH)
        if other is None:
            return None, ""
        like_with_like = other.computes_in.startswith(result.case.element)
        return (result.faster_than(other), f"{other.what} {other.how}, {other.computes_in}") if like_with_like else None

    return measure


_ATTENTION = "MultiScaleDeformableAttention"

AIMS = (
    Aim("AdaptiveProbing takes at most 20 us", "AdaptiveProbing", 20, True, _cold),
    Aim("AdaptiveProbing is 20 times faster than PyTorch", "AdaptiveProbing", 20, False, _than(DEFINITION)),
    Aim("PyramidRoIAlign is 3 times faster than torchvision", "PyramidRoIAlign", 3, False, _than(TORCHVISION)),
    Aim("SamplingMixing is 5 times faster than its steps", "SamplingMixing", 5, False, _than(DEFINITION)),
    Aim("SamplingMixing reaches half of the GPU's limit", "SamplingMixing", 0.5, False, _share_of_limit),
    Aim(f"{_ATTENTION} is 3 times faster than grid_sample", _ATTENTION, 3, False, _than(DEFINITION)),
    Aim(f"{_ATTENTION} reaches half of its limit", _ATTENTION, 0.5, False, _share_of_limit),
)


def to_json(results: Sequence[Result], rates: Rates, machine: Machine, rounds: int, complete: bool) -> dict[str, Any]:
    """All of it as JSON values."""
    aims = [(aim, aim.findings(results, rates)) for aim in AIMS]
    return {
        "machine": machine.to_json(),
        "rounds": rounds,
        "complete": complete,
        "rates": dataclasses.asdict(rates),
        "aims": [
            {"text": aim.text, "met": verdict(found), "findings": [dataclasses.asdict(finding) for finding in found]}
            for aim, found in aims
        ],
        "results": [
            {
                "op": result.case.name,
                "place": result.case.place,
                "queries": result.case.queries,
                "element": result.case.element,
                "limit": dataclasses.asdict(result.limit(rates)),
                "timings": list(result.rows(rates)),
            }
            for result in results
        ],
    }


def to_markdown(content: Mapping[str, Any], machine: Machine, rates: Rates) -> str:
    """What :func:`to_json` gives, as text: machine and date, the aims, and a table."""
    lines = [
        f"{machine.summary()}. {rates.sentence()}.",
        f"Microseconds, median (10th..90th percentile) of {content['rounds']} rounds; a place's rows take turns.",
        "",
        *map(_aim_line, content["aims"]),
        "",
        "| place | limit | what | how | computes in | us | of the limit | kernel in a graph faster by |",
        "|" + " --- |" * 8,
    ]
    for result in content["results"]:
        limit = f"{result['limit']['limit_ms'] * 1e3:.1f} ({result['limit']['bound_by']})"
        for row in result["timings"]:
            what = f"{row['what']} {row['kernel']}" if row["kernel"] else row["what"]
            numbers = _range(row["microseconds"]), _range(row["of_limit"], ".2f")
            faster = _range(row["kernel_in_a_graph_is_faster_by"])
            cells = [result["place"], limit, what, row["how"], row["computes_in"], *numbers, faster]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _aim_line(aim: Mapping[str, Any]) -> str:
    said = {True: "met", False: "missed", None: "not decided"}[aim["met"]]
    missed = [finding for finding in aim["findings"] if finding["met"] is not True]
    count = f"{len(aim['findings']) - len(missed)} of {len(aim['findings'])}"
    places = "".join(f"; {_range(it['value'], '.2f')} {it['against']}: {it['place']}" for it in missed)
    return f"- {aim['text']}: {said} ({count}){places}"


def _range(spread: Mapping[str, float] | None, form: str = ".1f") -> str:
    return "-" if spread is None else f"{spread['median']:{form}} ({spread['low']:{form}}..{spread['high']:{form}})"


def _as_dict(spread: Spread | None) -> dict[str, float] | None:
    return None if spread is None else dataclasses.asdict(spread)
