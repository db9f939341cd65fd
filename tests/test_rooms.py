"""Dependencies between the rooms point one way (CONTRIBUTING.md), file by file, and modules import in no circle."""

from __future__ import annotations

import ast
import graphlib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("asag", "train", "export", "trt_plugins", "runtime", "cli", "benchmarks")
ALL = ("asag", "asag.train", "asag.export", "asag.trt_plugins", "asag.runtime", "asag.cli", "benchmarks")


@dataclass(frozen=True)
class Rule:
    """What a file may import of other rooms: rooms, or single modules with a dot in their names."""

    at_import: tuple[str, ...] = ()
    in_functions: tuple[str, ...] = ()
    """Beside those, and for type checkers alone."""


ROOMS = {
    "asag": Rule(),
    "asag.trt_plugins": Rule(),
    "asag.runtime": Rule(at_import=("asag.family",)),  # a description of a family, without PyTorch
    "asag.export": Rule(at_import=("asag", "asag.runtime", "asag.trt_plugins")),
    "asag.train": Rule(at_import=("asag", "asag.runtime")),
    "asag.cli": Rule(in_functions=("asag", "asag.train", "asag.export", "asag.trt_plugins", "asag.runtime")),
    "benchmarks": Rule(at_import=ALL),
}

FILES = {
    "asag/ops/cuda.py": Rule(in_functions=("asag.trt_plugins",)),  # the kernels, for ops on a GPU
    "runtime/backends/pytorch_session.py": Rule(in_functions=("asag",)),  # runs the detector itself
    "runtime/engines/build.py": Rule(in_functions=("asag.trt_plugins",)),  # the plugins that TensorRT embeds
    "runtime/engines/network.py": Rule(in_functions=("asag.trt_plugins",)),
    "runtime/speed/stage_work.py": Rule(in_functions=("asag.trt_plugins",)),  # the work of an op
}
"""What these files may import beside what their room may."""

PATHS = [str(path.relative_to(ROOT)) for room in FOLDERS for path in sorted((ROOT / room).rglob("*.py"))]


def module_of(path: str) -> str:
    """Every folder but the benchmarks is a package inside `asag` once installed, and by a link in a checkout."""
    name = ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")
    return name if name.partition(".")[0] in ("asag", "benchmarks") else f"asag.{name}"


def room_of(module: str) -> str | None:
    first, _, rest = module.partition(".")
    inner = f"{first}.{rest.partition('.')[0]}"
    return next((room for room in (inner, first) if room in ALL), None)


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
    return {name for name in names if room_of(name)}


def refused(path: str, source: str) -> set[str]:
    """Modules that the file of this path must not import as this source does."""
    room = room_of(module_of(path))
    assert room is not None
    rules = [ROOMS[room], FILES.get(path, Rule())]
    at_import = {room, *(name for rule in rules for name in rule.at_import)}
    anywhere = at_import | {name for rule in rules for name in rule.in_functions}

    def beyond(names: set[str], allowed: set[str]) -> set[str]:
        return {name for name in names if not {name, room_of(name)} & allowed}

    return beyond(imported(source, False), at_import) | beyond(imported(source, True), anywhere)


@pytest.mark.parametrize("path", PATHS)
def test_a_file_imports_only_what_it_may(path: str) -> None:
    assert not refused(path, (ROOT / path).read_text())


@pytest.mark.parametrize("path", FILES)
def test_every_exception_is_needed(path: str) -> None:
    allowed = {room_of(name) for name in (*FILES[path].at_import, *FILES[path].in_functions)}
    assert allowed <= {room_of(name) for name in imported((ROOT / path).read_text(), True)}


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("runtime/one.py", "import asag.family", set()),
        ("runtime/one.py", "from asag.detector import build_detector", {"asag.detector"}),
        ("runtime/one.py", "from asag import detector", {"asag.detector"}),
        ("runtime/one.py", "def f():\n    import asag.detector", {"asag.detector"}),
        ("runtime/backends/pytorch_session.py", "def f():\n    import asag.detector", set()),
        ("runtime/backends/pytorch_session.py", "import asag.detector", {"asag.detector"}),
        ("asag/ops/cuda.py", "class A:\n    async def f(self):\n        import asag.trt_plugins.plan", set()),
        ("asag/ops/cuda.py", "class A:\n    import asag.trt_plugins.plan", {"asag.trt_plugins.plan"}),
        ("asag/one.py", "if TYPE_CHECKING:\n    import asag.trt_plugins", {"asag.trt_plugins"}),
        ("train/one.py", "import benchmarks.timing, asag, torch", {"benchmarks.timing"}),
        ("cli/one.py", "import asag.runtime", {"asag.runtime"}),
    ],
)
def test_what_is_not_allowed_is_found(path: str, source: str, found: set[str]) -> None:
    assert refused(path, source) == found


def test_modules_import_in_no_circle() -> None:
    graph = {module_of(path): imported((ROOT / path).read_text(), False) - {module_of(path)} for path in PATHS}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) >= MODULES
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter({**graph, "asag.runtime.errors": {"asag.runtime.session"}}).static_order())
