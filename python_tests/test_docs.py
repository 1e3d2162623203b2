"""The Python in README, docs and examples runs: blocks of a file one after the other, in one namespace."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import clce_ext

ROOT = Path(clce_ext.__file__).parent.parent
# docs/your-loop.md needs images and weights, which test_your_loop.py makes.
FILES = [
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "your-loop.md"),
]
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.+) -->\n)?```python\n(?P<code>.*?)^```$", re.M | re.S)

pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="an installation, no sources")


def batch(classes: int = 4) -> dict:
    """What blocks take for granted."""
    embeddings = torch.randn(16, 8, requires_grad=True)
    labels = torch.arange(16) % classes
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    return {
        "torch": torch,
        "clce_ext": clce_ext,
        "logits": torch.randn(16, classes, requires_grad=True),
        "embeddings": embeddings,
        "labels": labels,
        "queue": torch.randn(32, 8),
        "queue_labels": torch.arange(32) % classes,
        "images": torch.randn(16, 8),
        "model": model,
        "criterion": clce_ext.SupConLoss(),
    }


def blocks() -> list:
    found = []
    for path in FILES:
        codes = [match["code"] for match in BLOCK.finditer(path.read_text()) if not match["reason"]]
        if codes:
            found.append(pytest.param(path, codes, id=path.name))
    return found


@pytest.fixture
def group():
    """One process, for blocks about several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("path", "codes"), blocks())
def test_blocks_run(path, codes, tmp_path, monkeypatch, group):
    monkeypatch.chdir(tmp_path)
    names = batch()
    for code in codes:
        exec(compile(code, str(path), "exec"), names)


def test_every_block_is_seen():
    """None escapes by its indentation or another name for the language."""
    for path in FILES:
        text = path.read_text()
        fences = re.findall(r"^\s*```+\s*(?:python|py|python3|pycon)\b.*$", text, re.M | re.I)
        assert len(fences) == len(list(BLOCK.finditer(text))), path


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_learn(path):
    if path.name == "finetune.py":
        pytest.skip("has a test of its own")
    for module in re.findall(r"^(?:import|from) (lightning|transformers)\b", path.read_text(), re.M):
        pytest.importorskip(module)
    first, last = runpy.run_path(str(path))["main"]()
    assert last < first


def test_readme_repeats_what_the_study_found():
    """Its sentence on photographs has the figures of docs/study.md, which tools/study.py writes."""
    table = re.search(r"<!-- study photographs -->(.*?)<!-- /study -->", _text("docs/study.md"), re.S)[1]
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", table, re.M))
    top1, knn = ([rows[name].split(" | ")[column] for name in ("`clce`", "`ce`")] for column in (0, 1))
    differences = [rows["`clce` − `ce`"].split(" | ")[column].strip("+* ") for column in (1, 0)]
    readme = " ".join(_text("README.md").split())
    for (ours, other), said in ((knn, "neighbours are right in {} % of the test photographs instead of {} %"),
                                (top1, "the classifier in {} % instead of {} %")):  # fmt: skip
        assert said.format(*(figure.split(" ± ")[0] for figure in (ours, other))) in readme
    assert "differences are {} and {} points".format(*differences) in readme


def _text(path: str) -> str:
    return (ROOT / path).read_text()
