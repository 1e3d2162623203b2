#!/usr/bin/env python3
"""Forward and backward through every CUDA kernel, for compute-sanitizer; tools/gpu_check.py runs it so.

Inputs are made on the CPU and copied: what kernels read has then been written in a way that all tools see,
and few of torch's own kernels run. The first cases are small. Then come batches with the large forward tile,
walks over several tiles with several steps each, and rings of copies that wrap.

    compute-sanitizer --tool racecheck python3 tools/sanitizer_suite.py
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from clce_ext import backends, hard_negative_contrastive_loss

HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32, torch.float64)
LEARNABLE = 0.2  # a temperature that lies on the device


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    rows: int
    dim: int
    keys: int = 0  # 0: the batch against itself
    options: dict = field(default_factory=dict)
    learnable: bool = False
    engine: str | None = None
    tf32: bool = False


def cases() -> list[Case]:
    small = [
        Case(dtype, rows, dim, keys, options)
        for dtype in DTYPES
        for rows, dim, keys, options in (
            (70, 33, 0, {}),
            (20, 40, 300, {}),
            (130, 200, 0, {"temperature": 0.01}),
            (67, 300, 0, {"beta": 0.5}),
            (65, 600, 0, {"beta": 0.0}),
            (40, 900, 0, {"reduction": "none"}),
        )
    ]
    small += [Case(dtype, 33, 24, learnable=True) for dtype in DTYPES]
    small += [Case(dtype, 70, 33, keys, engine="panels") for dtype in DTYPES for keys in (0, 300)]
    small += [Case(torch.float32, 100, 96, tf32=True)]
    # More than one launch makes whole.
    small += [Case(dtype, 1100, 70) for dtype in DTYPES]
    # 17 rows of tiles: the large forward tile, with two steps of columns; backward the first shape.
    large = [Case(dtype, 2100, 70) for dtype in HALF]
    large += [Case(torch.float32, 2100, 70, tf32=tf32) for tf32 in (False, True)]
    # More rows of tiles than groups, so that walks have several; more tiles of the other side than stages.
    large += [Case(torch.bfloat16, 4264, 70), Case(torch.bfloat16, 4264, 70, options={"temperature": 0.01})]
    large += [Case(torch.float16, 300, 200, keys=4300), Case(torch.bfloat16, 2100, 300)]
    large += [Case(torch.float16, 4264, 70), Case(torch.bfloat16, 2100, 600)]
    return small + large


def run(case: Case, device: str) -> None:
    if device != "cpu":
        backends.use_engine(case.engine)
    torch.backends.cuda.matmul.allow_tf32 = case.tf32

    def rows(count: int) -> torch.Tensor:
        return torch.randn(count, case.dim).to(case.dtype).to(device).requires_grad_()

    def labels(count: int) -> torch.Tensor:
        return torch.randint(0, max(count // 8, 2), (count,)).to(device)

    z, options = rows(case.rows), dict(case.options)
    inputs = [z]
    if case.keys:
        options |= {"keys": rows(case.keys), "key_labels": labels(case.keys)}
        inputs.append(options["keys"])
    if case.learnable:
        options["temperature"] = torch.tensor(LEARNABLE).to(device).requires_grad_()
        inputs.append(options["temperature"])
    loss = hard_negative_contrastive_loss(z, labels(case.rows), **options)
    gradients = torch.autograd.grad(loss, inputs, torch.ones(loss.shape).to(loss))
    assert all(gradient.cpu().isfinite().all() for gradient in gradients), case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cpu: to see that the cases run")
    device = parser.parse_args().device
    torch.manual_seed(0)
    every = cases()
    for number, case in enumerate(every, 1):
        run(case, device)
        if device != "cpu":
            torch.cuda.synchronize()
        print(f"{number} of {len(every)} cases done", flush=True)


if __name__ == "__main__":
    main()
