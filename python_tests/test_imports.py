"""The modules of clce_ext import one another in one direction only, inside functions too."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import clce_ext

ROOT = Path(clce_ext.__file__).parent


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path, known: set[str]) -> set[str]:
    """The modules of clce_ext that ``module`` imports anywhere in its text."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:  # a name is a module below, or something in the module itself
                below = f"{base}.{alias.name}"
                found.add(below if below in known else base)
    return (found & known) - {module}


def graph() -> dict[str, set[str]]:
    known = modules()
    return {module: imports(module, path, set(known)) for module, path in known.items()}


def test_no_import_cycle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_distributed_and_queue_meet_in_functional():
    """A queue needs the ranks; what is computed across ranks knows of no queue, and a queue of no loss."""
    edges = graph()
    package = {module for module in edges if module.startswith("clce_ext.distributed")}
    assert not any("clce_ext.queue" in edges[module] for module in package)
    assert edges["clce_ext.queue"] & package <= {"clce_ext.distributed.ranks"}
    assert {"clce_ext.queue", "clce_ext.distributed.loss"} <= edges["clce_ext.functional"]
