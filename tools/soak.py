"""Random calls of the loss against float64, and a training run killed again and again: a table of what held.

    make soak                                             8,000 calls, 15 kills
    python tools/soak.py --calls 100 --kills 0            a part, as the tests run it
    python tools/soak.py --first 4711 --calls 1           one call again: each has a seed of its own

A call is judged as in the tests (python_tests/oracle.py): the errors of its loss and gradients against those
of plain PyTorch in the same dtype. It must give the same bits twice, and for another number of threads. The
run is killed with SIGKILL at moments drawn with the seed and resumed by the same command; it must come to the
figures and weights of an unbroken one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import clce_ext  # noqa: E402
from python_tests import oracle  # noqa: E402

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TRAINING = [
    "--shots", "8", "--batch-size", "20", "--images-per-class", "2", "--epochs", "6", "--lr", "1e-3",
    "--objective", "clce", "--mixup", "0.5", "--checkpoint-steps", "1", "--eval-embeddings", "never",
    "--no-tensorboard", "--no-progress", "--device", "cpu",
]  # fmt: skip


def draw(seed: int) -> tuple[oracle.Case, torch.dtype]:
    """A call: sizes, labels, keys, options and dtype, by its seed alone."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = chance.choice(DTYPES)

    def embeddings(*shape):
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * 10 ** chance.uniform(-2, 2)
        if chance.random() < 0.1:
            x[: len(x) // 3] = x[:1]  # duplicates
        # float16 cannot hold the gradient of a zero row, which is then the largest number that there is.
        if chance.random() < 0.05 and len(x) > 3 and dtype != torch.float16:
            x[2] = 0
        return x

    def labels(count):
        found = torch.randint(chance.choice((1, 2, 5, 1000)), (count,), generator=generator)
        if chance.random() < 0.2:
            found[torch.rand(count, generator=generator) < 0.3] = -100
        return found

    # Of 16 bits and one or two anchors, plain PyTorch's error is a matter of luck: no measure.
    least = 8 if torch.finfo(dtype).bits == 16 else 1
    rows = round(math.exp(chance.uniform(math.log(least), math.log(150))))
    dim = round(math.exp(chance.uniform(math.log(2), math.log(900))))
    with_labels, with_keys = chance.random() < 0.8, chance.random() < 0.3
    views = chance.choice((None, 1, 2, 3) if with_labels or with_keys else (2, 3))
    anchors = rows * (views or 1)
    shape = (rows, dim) if views is None else (rows, views, dim)
    case = oracle.Case(embeddings(*shape), labels(rows) if with_labels else None)
    case.temperature = math.exp(chance.uniform(math.log(0.02), math.log(2)))
    case.options = {
        "beta": chance.choice((0.0, 1.0, 0.5, 2.0, round(chance.uniform(0, 3), 3))),
        "summation": chance.choice(("in", "out")),
        "denominator": chance.choice(("all", "all", "negatives")),
        "detach_weights": chance.random() < 0.2,
        "reduction": chance.choice(("mean", "sum", "none")),
    }
    if with_keys:
        keys = round(math.exp(chance.uniform(0, math.log(300)))) if with_labels else rows
        case.keys = embeddings(keys, dim)
        case.key_labels = labels(keys) if with_labels else None
    if case.options["reduction"] == "none":
        case.grad = torch.randn(anchors, generator=generator, dtype=torch.float64)
    return case, dtype


def judge(seed: int) -> Counter:
    """Runs the call; counts what was compared."""
    case, dtype = draw(seed)
    oracle.check(case, dtype, luck=True)
    held = oracle.rounded_to(case, dtype)
    runs = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        runs.append(oracle.run(clce_ext.hard_negative_contrastive_loss, held, dtype, "cpu"))
    for other in runs[1:]:
        for name, value in other.items():
            assert torch.equal(value, runs[0][name]), f"{name}: other bits with other threads: {case}"
    return Counter(calls=1, compared=len(runs[0]), **{str(dtype).removeprefix("torch."): 1})


def fuzz(first: int, calls: int) -> tuple[Counter, list[str]]:
    """(what was done, what failed)"""
    before, done, failed = torch.get_num_threads(), Counter(), []
    try:
        for seed in range(first, first + calls):
            try:
                done += judge(seed)
            except Exception as error:
                failed.append(f"call {seed}: {type(error).__name__}: {error}")
    finally:
        torch.set_num_threads(before)
    return done, failed


def kill_loop(kills: int, seed: int, folder: Path) -> tuple[Counter, list[str]]:
    """Kills a run ``kills`` times, each time after at least one more step, and compares what it comes to."""
    command = [sys.executable, "-m", "clce_ext.train", *TRAINING, "--resume", "--output"]
    whole, broken = folder / "whole", folder / "broken"
    subprocess.run([*command, whole], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    chance, done = random.Random(seed), Counter()
    steps = 6 * (80 // 20)
    for kill in range(kills):
        process = subprocess.Popen([*command, broken], cwd=ROOT, stdout=subprocess.DEVNULL)
        # Steps are spread over the kills, so that the last one still has something to kill.
        wanted = max(1, round((kill + 1) * (steps - 1) / kills))
        while process.poll() is None and _newest(broken) < wanted:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        done["kills"] += process.returncode == -signal.SIGKILL
    subprocess.run([*command, broken], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return done, _other_figures(whole, broken)


def _newest(folder: Path) -> int:
    return max((int(p.name.split("-")[1]) for p in (folder / "checkpoints").glob("step-*")), default=0)


def _other_figures(whole: Path, broken: Path) -> list[str]:
    from safetensors.torch import load_file

    one, other = (json.loads((f / "results.json").read_text()) for f in (whole, broken))
    failed = [
        f"killed run: {name} is {other[name]}, unbroken {one[name]}"
        for name in one
        if "second" not in name and one[name] != other[name]
    ]
    weights, others = (load_file(f / "model.safetensors") for f in (whole, broken))
    failed += [f"killed run: other {n}" for n in weights if not torch.equal(weights[n], others[n])]
    return failed


def table(rows: list[tuple[str, object]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=8000, help="random calls of the loss")
    parser.add_argument("--kills", type=int, default=15, help="times that a training run is killed")
    parser.add_argument("--first", type=int, default=0, help="seed of the first call, and of the kills")
    asked = parser.parse_args()
    start = time.perf_counter()
    done, failed = fuzz(asked.first, asked.calls)
    calls = time.perf_counter() - start
    rows: list[tuple[str, object]] = [
        ("random calls of the loss", f"{done['calls'] + len(failed)}, seeds from {asked.first}"),
        ("  of dtypes", ", ".join(f"{name} {done[name]}" for name in map(_name, DTYPES))),
        ("  losses and gradients against float64", done["compared"]),
        ("  that failed", len(failed)),
        ("  seconds", f"{calls:.0f}"),
    ]
    if asked.kills:
        with tempfile.TemporaryDirectory() as folder:
            killed, wrong = kill_loop(asked.kills, asked.first, Path(folder))
        failed += wrong
        rows += [
            ("kills of a run by SIGKILL", killed["kills"]),
            ("  figures and weights that differ from the unbroken run", len(wrong)),
            ("  seconds", f"{time.perf_counter() - start - calls:.0f}"),
        ]
    print(table(rows))
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
