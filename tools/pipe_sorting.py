#!/usr/bin/env python3
"""Predicts what sorting the rows by label would gain: tiles with positives are dear, and would be few then.

Nothing is sorted today. Assumed is a radix sort of 64-bit labels with 32-bit row numbers, 8 bits a pass: one
launch per pass, one for all histograms and one for their prefix sums. prepare and prepare_backward, which
read and write whole rows in any case, would take them through the row numbers.

    python tools/pipe_sorting.py --batch 8192 32768 131072 --dim 128 256
"""

from __future__ import annotations

import argparse
import dataclasses

import sass
from gpu_table import GPUS, Gpu
from pipe_model import Case, Model
from pipe_shapes import Shape

PASSES = 64 // 8
PAIR_BYTES = 8 + 4  # a label and its row's number


def sort_seconds(batch: int, gpu: Gpu) -> float:
    moved = batch * (8 + 2 * PASSES * PAIR_BYTES)  # the histograms read labels; a pass reads and writes pairs
    numbers = batch * 4 * 2  # read by prepare and by prepare_backward
    return (moved + numbers) / gpu.memory + (PASSES + 2) * gpu.launch


def sorted_share(shape: Shape, case: Case) -> float:
    """Of warps' tiles that hold a positive pair if a class lies side by side: those that the diagonal's
    neighbourhood of one class to each side goes through."""
    rows, columns = shape.logits.m // shape.logits.warps_m, shape.chunk // shape.logits.warps_n
    return min(1.0, (rows + columns + 2 * (case.per_class - 1)) / case.batch)


def seconds(model: Model, case: Case, gpu: Gpu, is_sorted: bool) -> float:
    total = 0.0
    for which in ("forward", "backward"):
        planned = getattr(model, which)(case, gpu)
        if is_sorted:
            share = sorted_share(planned.counts.shape, case)
            planned = getattr(model, which)(dataclasses.replace(case, positives=share), gpu)
        total += planned.seconds
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--dim", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--per-class", type=int, default=8)
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--jobs", type=int)
    args = parser.parse_args()

    gpu = GPUS[args.gpu]
    model = Model(sass.kernels([gpu.arch], "bfloat16", args.jobs))
    print("| B | D | forward + backward | sorted | sorting costs | gain |\n" + "|---" * 6 + "|")
    for batch in args.batch:
        for dim in args.dim:
            case = Case(batch, dim, per_class=args.per_class)
            before, after = (seconds(model, case, gpu, is_sorted) for is_sorted in (False, True))
            cost = sort_seconds(batch, gpu)
            cells = [f"{x * 1e3:.3f} ms" for x in (before, after, cost)]
            cells.append(f"{(before - after - cost) / before:+.1%}")
            print("| " + " | ".join([str(batch), str(dim), *cells]) + " |")


if __name__ == "__main__":
    main()
