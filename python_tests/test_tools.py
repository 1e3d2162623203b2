"""The tools that quote the sources find there what they quote."""

from __future__ import annotations

import runpy
from pathlib import Path

TOOLS = Path(__file__).resolve().parent.parent / "tools"


def test_every_mutation_applies():
    tool = runpy.run_path(str(TOOLS / "mutation_check.py"))
    stale = [mutation.name for mutation in tool["MUTATIONS"] if not tool["applies"](mutation)]
    assert not stale, f"the code that these mutations change is not there any more: {stale}"
