"""Dependencies between the rooms point one way (CONTRIBUTING.md), file by file, and modules import in no circle."""

from __future__ import annotations

import ast
import graphlib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALL = ("asag", "train", "export", "trt_plugins", "runtime", "asag_cli", "benchmarks")


@dataclass(frozen=True)
class Rule:
    """What a file may import of other rooms: rooms, or single modules with a dot in their names."""

    at_import: tuple[str, ...] = ()
    in_functions: tuple[str, ...] = ()
    """Beside those, and for type checkers alone."""


ROOMS = {
    "asag": Rule(),
    "trt_plugins": Rule(),
    "runtime": Rule(at_import=("asag.family",)),  # a description of a family, without PyTorch
    "export": Rule(at_import=("asag", "runtime", "trt_plugins")),
    "train": Rule(at_import=("asag", "runtime")),
    "asag_cli": Rule(in_functions=("asag", "train", "export", "trt_plugins", "runtime")),
    "benchmarks": Rule(at_import=ALL),
}

FILES = {
    "asag/ops/cuda.py": Rule(in_functions=("trt_plugins",)),  # the kernels, for ops on a GPU
    "runtime/backends/pytorch_session.py": Rule(in_functions=("asag",)),  # runs the detector itself
    "runtime/engines/build.py": Rule(in_functions=("trt_plugins",)),  # the plugins that TensorRT embeds
    "runtime/engines/network.py": Rule(in_functions=("trt_plugins",)),
    "runtime/speed/stage_work.py": Rule(in_functions=("trt_plugins",)),  # the work of an op
}
"""What these files may import beside what their room may."""

PATHS = [str(path.relative_to(ROOT)) for room in ALL for path in sorted((ROOT / room).rglob("*.py"))]


def module_of(path: str) -> str:
    return ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")


MODULES = frozenset(map(module_of, PATHS))


class ImportTime(ast.NodeTransformer):
    """Leaves what runs when a module is imported: no bodies of functions, nothing for type checkers alone."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return ast.Pass()

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return ast.Pass()

    def visit_If(self, node: ast.If) -> ast.AST:
        return ast.Pass() if "TYPE_CHECKING" in ast.dump(node.test) else self.generic_visit(node)


def imported(source: str, everywhere: bool) -> set[str]:
    """Modules of the rooms that a source imports: everywhere, or while it is imported."""
    tree = ast.parse(source)
    names: set[str] = set()
    for node in ast.walk(tree if everywhere else ImportTime().visit(tree)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inner}
    return {name for name in names if name.partition(".")[0] in ALL}


def refused(path: str, source: str) -> set[str]:
    """Modules that the file of this path must not import as this source does."""
    room = path.partition("/")[0]
    rules = [ROOMS[room], FILES.get(path, Rule())]
    at_import = {room, *(name for rule in rules for name in rule.at_import)}
    anywhere = at_import | {name for rule in rules for name in rule.in_functions}

    def beyond(names: set[str], allowed: set[str]) -> set[str]:
        return {name for name in names if not any(f"{name}.".startswith(f"{room}.") for room in allowed)}

    return beyond(imported(source, False), at_import) | beyond(imported(source, True), anywhere)


@pytest.mark.parametrize("path", PATHS)
def test_a_file_imports_only_what_it_may(path: str) -> None:
    assert not refused(path, (ROOT / path).read_text())


@pytest.mark.parametrize("path", FILES)
def test_every_exception_is_needed(path: str) -> None:
    allowed = {name.partition(".")[0] for name in (*FILES[path].at_import, *FILES[path].in_functions)}
    assert allowed <= {name.partition(".")[0] for name in imported((ROOT / path).read_text(), True)}


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("runtime/one.py", "import asag.family", set()),
        ("runtime/one.py", "from asag.detector import build_detector", {"asag.detector"}),
        ("runtime/one.py", "from asag import detector", {"asag.detector"}),
        ("runtime/one.py", "def f():\n    import asag.detector", {"asag.detector"}),
        ("runtime/backends/pytorch_session.py", "def f():\n    import asag.detector", set()),
        ("runtime/backends/pytorch_session.py", "import asag.detector", {"asag.detector"}),
        ("asag/ops/cuda.py", "class A:\n    async def f(self):\n        import trt_plugins.plan", set()),
        ("asag/ops/cuda.py", "class A:\n    import trt_plugins.plan", {"trt_plugins.plan"}),
        ("asag/one.py", "if TYPE_CHECKING:\n    import trt_plugins", {"trt_plugins"}),
        ("train/one.py", "import benchmarks.timing, asag, torch", {"benchmarks.timing"}),
        ("asag_cli/one.py", "import runtime", {"runtime"}),
    ],
)
def test_what_is_not_allowed_is_found(path: str, source: str, found: set[str]) -> None:
    assert refused(path, source) == found


def test_modules_import_in_no_circle() -> None:
    graph = {module_of(path): imported((ROOT / path).read_text(), False) - {module_of(path)} for path in PATHS}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) >= MODULES
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter({**graph, "runtime.errors": {"runtime.session"}}).static_order())
