"""What was measured, and whether it keeps what the kernels promise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from trt_plugins.benchmark.contenders import COLD, DEFINITION, GRAPH, KERNEL, TORCHVISION, Contender
from trt_plugins.benchmark.limits import Limits, Work
from trt_plugins.benchmark.timing import Spread, ratio
from trt_plugins.resources import PUBLISHED, Case


@dataclass(frozen=True)
class Timing:
    """A contender with the microseconds per call of every round, or why there are none."""

    what: str
    how: str
    element: str
    case: Case | None
    times: tuple[float, ...]
    reason: str

    @classmethod
    def of(cls, contender: Contender, times: Sequence[float]) -> Timing:
        """Of a contender and what its sampler gave."""
        return cls(contender.what, contender.how, contender.element, contender.case, tuple(times), contender.reason)

    @property
    def spread(self) -> Spread | None:
        """None where nothing was measured."""
        return Spread.of(self.times) if self.times else None


@dataclass(frozen=True)
class Result:
    """An op at one size, batch and type: its kernels and what they are compared with, timed in the same rounds."""

    cases: tuple[Case, ...]
    work: Work
    timings: tuple[Timing, ...]

    @property
    def case(self) -> Case:
        """Any of the cases; layout and tensor cores apart they are the same."""
        return self.cases[0]

    @property
    def place(self) -> str:
        """Op, size, batch and type in words."""
        level = f" {self.case.level}" if self.case.level else ""
        queries = f", {self.case.sizes.queries} queries" if self.case.name != "AdaptiveProbing" else ""
        return f"{self.case.name}{level}, {self.case.sizes.name}{queries}, batch {self.batch}, {self.case.element}"

    @property
    def batch(self) -> int:
        """Images per launch."""
        return int(self.case.shapes[0][0])

    def fastest(self, how: str) -> Timing | None:
        """The kernel of the shortest median when timed as `how` says."""
        return self._shortest(timing for timing in self.timings if timing.what == KERNEL and timing.how == how)

    def kernel(self, case: Case, how: str) -> Timing:
        """One kernel, timed in one way."""
        return next(t for t in self.timings if t.case == case and t.how == how)

    def comparisons(self) -> list[Timing]:
        """What is no kernel of ours."""
        return [timing for timing in self.timings if timing.what != KERNEL]

    def best(self, what: str) -> Timing | None:
        """The faster of from Python and in a graph."""
        return self._shortest(timing for timing in self.timings if timing.what == what)

    def faster_than(self, other: Timing | None, how: str = GRAPH) -> Spread | None:
        """How many times as long `other` takes as the fastest kernel, timed as `how` says, round by round."""
        kernel = self.fastest(how)
        if other is None or kernel is None or not other.times:
            return None
        return ratio(other.times, kernel.times)

    def of_limit(self, case: Case, limits: Limits) -> Spread | None:
        """Time at the GPU's limit over the kernel's with empty caches: what of the possible speed it reaches."""
        timing = self.kernel(case, COLD)
        if not timing.times:
            return None
        return ratio([self.work.microseconds(limits)] * len(timing.times), timing.times)

    @staticmethod
    def _shortest(timings: Iterable[Timing]) -> Timing | None:
        measured = [timing for timing in timings if timing.times]
        return min(measured, key=lambda timing: Spread.of(timing.times).median, default=None)


@dataclass(frozen=True)
class Finding:
    """One aim at one place; `value` is None where what it needs was not measured."""

    place: str
    value: Spread | None
    met: bool | None
    against: str = ""
    """What the value is a comparison with, and in which type that computes."""


@dataclass(frozen=True)
class Aim:
    """A promise about an op at the published sizes, and what was found, by the median."""

    text: str
    op: str
    target: float
    at_most: bool
    findings: tuple[Finding, ...]

    @property
    def met(self) -> bool | None:
        """Met everywhere; None where nothing was measured or something is missing without anything being missed."""
        verdicts = [finding.met for finding in self.findings]
        if False in verdicts:
            return False
        return None if not verdicts or None in verdicts else True

    @property
    def worst(self) -> Finding | None:
        """The measured finding farthest from the aim."""
        measured = [finding for finding in self.findings if finding.value is not None]
        sign = 1 if self.at_most else -1
        return max(measured, key=lambda finding: sign * finding.value.median, default=None)  # type: ignore[union-attr]


Measure = Callable[[Result], tuple[Spread | None, str] | None]
"""A number and what it is a comparison with; None where the aim says nothing about the result."""


def check_aims(results: Sequence[Result], limits: Limits) -> list[Aim]:
    """The aims for the kernels: times with empty caches, comparisons with the fastest form of the other side.

    A kernel is held against a comparison in its own type only.
    """

    def share(result: Result) -> tuple[Spread | None, str]:
        spreads = [result.of_limit(case, limits) for case in result.cases]
        return max((s for s in spreads if s is not None), key=lambda s: s.median, default=None), ""

    def found(op: str, target: float, at_most: bool, text: str, measure: Measure) -> Aim:
        findings = []
        for result in results:
            if result.case.name != op or result.case.sizes.name != PUBLISHED.name:
                continue
            if (measured := measure(result)) is None:
                continue
            value, against = measured
            met = None if value is None else value.median <= target if at_most else value.median >= target
            findings.append(Finding(result.place, value, met, against))
        return Aim(text, op, target, at_most, tuple(findings))

    return [
        found("AdaptiveProbing", 20, True, "AdaptiveProbing takes at most 20 us", _cold),
        found("AdaptiveProbing", 20, False, "AdaptiveProbing is 20 times faster than PyTorch", _than(DEFINITION)),
        found("PyramidRoIAlign", 3, False, "PyramidRoIAlign is 3 times faster than torchvision", _than(TORCHVISION)),
        found("SamplingMixing", 5, False, "SamplingMixing is 5 times faster than its steps", _than(DEFINITION)),
        found("SamplingMixing", 0.5, False, "SamplingMixing reaches half of the GPU's limit", share),
    ]


def _cold(result: Result) -> tuple[Spread | None, str]:
    kernel = result.fastest(COLD)
    return (kernel.spread if kernel else None), ""


def _than(what: str) -> Measure:
    def measure(result: Result) -> tuple[Spread | None, str] | None:
        other = result.best(what)
        if other is None:
            return None, ""
        like_with_like = other.element.startswith(result.case.element)
        return (result.faster_than(other), f"{other.what} {other.how}, {other.element}") if like_with_like else None

    return measure
