"""Dependencies between the rooms point one way (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("asag", "train", "export", "trt_plugins", "runtime", "asag_cli")

MAY_IMPORT = {
    "asag": {"trt_plugins"},  # its kernels, for ops on a GPU
    "runtime": {"asag", "trt_plugins"},  # in the PyTorch session; the plugins that TensorRT embeds
    "trt_plugins": set(),
    "train": {"asag", "runtime"},
    "export": {"asag", "runtime", "trt_plugins"},
    "asag_cli": {"asag", "train", "export", "trt_plugins", "runtime"},
}
"""Rooms that a room may import anywhere, inside functions included."""

ON_IMPORT = {**MAY_IMPORT, "asag": set(), "runtime": set(), "trt_plugins": set()}
"""Rooms that a room may import when its modules are imported."""


def imported_rooms(tree: ast.AST, room: str) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
    return {name.partition(".")[0] for name in names} & set(ROOMS) - {room}


def at_import(tree: ast.Module) -> ast.Module:
    """The module without the bodies of its functions and what is for type checkers alone."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
            node.body = [ast.Pass()]
            return node

        def visit_If(self, node: ast.If) -> ast.AST:
            return ast.Pass() if "TYPE_CHECKING" in ast.dump(node.test) else self.generic_visit(node)

    return Strip().visit(tree)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    for path in sorted((ROOT / room).rglob("*.py")):
        tree = ast.parse(path.read_text())
        assert imported_rooms(tree, room) <= MAY_IMPORT[room], path
        assert imported_rooms(at_import(tree), room) <= ON_IMPORT[room], path
