#!/usr/bin/env python3
"""Predicts the time of the loss's kernels from their machine code; needs nvcc, but no GPU.

For each kernel the instructions that a warp issues per tile are counted per pipe, on the paths that are
really taken; a multiprocessor's slowest pipe gives the time. Latencies, barriers and bank conflicts are not
in it: a kernel is hardly faster than this, and how much slower only a measurement tells. Assumptions about
the device: gpu_table.py. What is known about the kernels' branches: pipe_rules.py.

    python tools/pipe_model.py                              docs/performance.md's cases, on an H100
    python tools/pipe_model.py --batch 8192 --dim 128 --gpu a100 --positives 0
    python tools/pipe_model.py --hot forward --dim 128      where the instructions come from
    python tools/pipe_model.py --check                      fails where a kernel has grown over its entry
    python tools/pipe_model.py --write                      writes pipe_table.json and docs/performance.md
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass

import pipe_rules
import pipe_whole
import sass
import sass_flow
from gpu_table import GPUS, H100, Gpu
from pipe_shapes import ELEMENT_BYTES, Shape, parse_shape
from sass_pipes import cycles_of, pipes_of

TABLE = sass.ROOT / "tools/pipe_table.json"
PAGE = sass.ROOT / "docs/performance.md"
GROWTH = 1.05  # beyond it --check fails


@dataclass(frozen=True)
class Case:
    """Self-contrast of one batch."""

    batch: int
    dim: int
    dtype: str = "bfloat16"
    beta: float = 1.0
    per_class: int = 8
    # The share of warps' tiles that hold a positive pair; None: as labels in any order give.
    positives: float | None = None
    bounded: bool = True
    # The temperature lies on the device and gets a gradient; it is one for which logits are bounded.
    learnable: bool = False

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @property
    def acc_bytes(self) -> int:
        return max(4, self.element_bytes)

    @property
    def columns(self) -> int:
        """Of a row, padded to 16 bytes."""
        per_16 = 16 // self.element_bytes
        return -(-self.dim // per_16) * per_16

    def share_with_positives(self, shape: Shape) -> float:
        if self.positives is not None:
            return self.positives
        pairs = shape.logits.m * shape.chunk / shape.logits.warps
        return 1 - math.exp(-pairs * (self.per_class - 1) / max(self.batch - 1, 1))

    def columns_with_positives(self, shape: Shape) -> float:
        """In a warp's tile that holds a positive pair: how many of a lane's columns hold one for any lane.

        A lane has two columns in each piece. In any order positives are so few that most have none.
        """
        return self._share_of_parts(shape, 1, 2 * shape.logits.pieces_n)

    def rows_with_positives(self, shape: Shape) -> float:
        """The same of a lane's rows in such a column."""
        columns, rows = 2 * shape.logits.pieces_n, shape.logits.m // shape.logits.warps_m // 8
        return self._share_of_parts(shape, columns, columns * rows)

    def _share_of_parts(self, shape: Shape, of: int, parts: int) -> float:
        """Of `parts` equal parts of a warp's tile, in those of its `of` parts that hold a positive pair."""
        pairs = shape.logits.m * shape.logits.n / shape.logits.warps
        expected = max(pairs * (self.per_class - 1) / max(self.batch - 1, 1), 1e-9)
        return (1 - math.exp(-expected / parts)) / (1 - math.exp(-expected / of))


@dataclass
class Counts:
    """Of one tile, all warps of a block together, in the units of PIPES."""

    shape: Shape
    total: Counter
    constructs: Counter  # issue slots by source construct

    @property
    def slots_per_warp(self) -> float:
        return self.total["issue"] / self.shape.logits.warps

    def cycles(self, gpu: Gpu) -> dict[str, float]:
        """Of a multiprocessor, per pipe."""
        return cycles_of(self.total, gpu)


def construct_of(source: tuple[tuple[str, int], ...]) -> str:
    """The line of the kernel's run(), and the line of what it calls."""
    texts = [sass_flow.text_at(place) for place in reversed(source[:-1])]
    texts = [text for text in texts if text]
    return " > ".join(text[:64] for text in texts[:2])


def count(kernel: sass.Kernel, shape: Shape, case: Case, tiles: float = 64) -> Counts:
    flow = sass_flow.flow_of(kernel)
    rules = pipe_rules.rules_for(shape, case, tiles)
    frequencies = flow.frequencies(rules).tolist()
    total: Counter = Counter()
    constructs: Counter = Counter()
    for i in flow.walk(rules):
        block = flow.blocks[i]
        often = frequencies[i] / tiles * shape.logits.warps
        if often < 1e-9:
            continue
        for instruction in kernel.code.instructions[block.first : block.end]:
            for pipe, cost in pipes_of(instruction).items():
                total[pipe] += cost * often
            constructs[construct_of(instruction.source)] += often
    counts = Counts(shape, total, constructs)
    # The products are known: a loop that turns more or less often than its rule says is found out.
    expected = shape.flop(case.columns)
    on_tensor_cores = counts.total["tensor"] + counts.total["tf32"]
    flop = on_tensor_cores or 64 * counts.total["fma"]
    if not expected * 0.999 <= flop <= expected * (1.001 if on_tensor_cores else 1.5):
        raise sass_flow.UnknownBranch(f"{kernel.name}: {flop:.0f} FLOP per tile counted, {expected} expected")
    return counts


@dataclass(frozen=True)
class Pass:
    """The tiles of one direction."""

    counts: Counts
    tiles: float  # of all blocks
    blocks: int
    memory_bytes: float
    gpu: Gpu
    launches: int = 1  # with those of kernels that leave at once

    @property
    def cycles(self) -> dict[str, float]:
        return self.counts.cycles(self.gpu)

    @property
    def binds(self) -> str:
        return max(self.cycles, key=self.cycles.__getitem__)

    @property
    def seconds(self) -> float:
        """Blocks that one multiprocessor more than another walks make all wait."""
        per_tile = max(self.cycles.values())
        per_block = self.tiles / self.blocks
        busiest = max(
            self.tiles / self.gpu.multiprocessors,
            math.ceil(self.blocks / self.gpu.multiprocessors) * per_block,
        )
        work = busiest * per_tile / self.gpu.clock
        return max(work, self.memory_bytes / self.gpu.memory) + self.launches * self.gpu.launch


class Model:
    def __init__(self, kernels: list[sass.Kernel]):
        self.kernels: list[tuple[sass.Kernel, Shape]] = []
        self.wholes: list[tuple[sass.Kernel, Shape]] = []  # the forward pass in one launch
        for kernel in kernels:
            shape = parse_shape(kernel.name)
            # Double precision is there for gradcheck: nobody waits for it.
            if shape is not None and shape.dtype != "float64":
                self.kernels.append((kernel, shape))
            elif (shape := pipe_whole.parse_whole(kernel.name)) is not None:
                self.wholes.append((kernel, shape))

    def _of(self, which: str, case: Case) -> list[tuple[sass.Kernel, Shape]]:
        both = [
            (kernel, shape)
            for kernel, shape in self.kernels
            if shape.kernel == which and shape.dtype == case.dtype
        ]
        # Where the device decides, the plan takes tiles that are compiled for both kinds of logits.
        unbounded = {shape.dims for _, shape in both if shape.unbounded}
        found = [
            (kernel, shape)
            for kernel, shape in both
            if shape.unbounded != case.bounded and (shape.dims in unbounded or not case.learnable)
        ]
        if not found:
            raise SystemExit(f"no {which} kernel for {case.dtype}")
        return found

    def whole(self, case: Case) -> pipe_whole.WholeForward:
        kernel, shape = next(pair for pair in self.wholes if pair[1].dtype == case.dtype)
        return pipe_whole.count_whole(kernel, shape, case)

    def forward(self, case: Case, gpu: Gpu) -> Pass:
        """As csrc/cuda plans it: large tiles where they fill the device."""
        found = sorted(self._of("forward", case), key=lambda pair: pair[1].logits.m)
        kernel, shape = found[-1]
        tiles = -(-case.batch // shape.logits.m)
        if tiles * (tiles + 1) // 2 < 128:
            kernel, shape = found[0]
            tiles = -(-case.batch // shape.logits.m)
        groups = min(tiles, 32)
        blocks = groups * (groups + 1) // 2
        total = tiles * (tiles + 1) / 2
        # Embeddings and labels once; slots written and read by the merge.
        slots = 2 * 6 * case.acc_bytes * groups
        memory = case.batch * (case.columns * case.element_bytes + 8 + slots)
        counts = count(kernel, shape, case, max(total / blocks, 2))
        return Pass(counts, total, blocks, memory, gpu, 1 + case.learnable)

    def backward(self, case: Case, gpu: Gpu) -> Pass:
        """The narrowest shape that makes the fewest chunks."""
        found = sorted(self._of("backward", case), key=lambda pair: pair[1].dims)
        fewest = -(-case.columns // found[-1][1].dims)
        kernel, shape = next(pair for pair in found if -(-case.columns // pair[1].dims) <= fewest)
        chunks = -(-case.columns // shape.dims)
        rows, others = -(-case.batch // shape.logits.m), -(-case.batch // shape.logits.n)
        blocks = rows * chunks
        splits = max(1, min(128 * kernel.blocks // blocks, others, 16)) if others >= 4 else 1
        row = case.columns * (case.element_bytes + case.acc_bytes) + 8 + 14 * case.acc_bytes
        memory = case.batch * row
        counts = count(kernel, shape, case, max(others / splits, 2))
        return Pass(counts, rows * chunks * others, blocks * splits, memory, gpu, 1 + case.learnable)

    def around(self, case: Case, gpu: Gpu) -> tuple[float, float]:
        """prepare and merge_loss; prepare_backward: device memory alone."""
        prepare = case.batch * case.columns * 2 * case.element_bytes
        merge = case.batch * 20 * case.acc_bytes
        back = case.batch * case.columns * (2 * case.element_bytes + case.acc_bytes)
        return (prepare + merge) / gpu.memory, back / gpu.memory

    def small(self, case: Case, gpu: Gpu) -> float:
        """The same and its three launches; and the temperature's gradient."""
        return sum(self.around(case, gpu)) + 3 * gpu.launch + self.temperature_gradient(case, gpu)

    def temperature_gradient(self, case: Case, gpu: Gpu) -> float:
        """One block adds two numbers a row in double precision; it waits for their conversion to that."""
        return 2 * case.batch / gpu.half_alu / gpu.clock + gpu.launch if case.learnable else 0.0


def effective_tflops(case: Case, seconds: float) -> float:
    """As bench/cases.py counts: 2 B^2 D forward and 4 B^2 D backward, symmetry not subtracted."""
    return 6 * case.batch**2 * case.dim / seconds * 1e-12


# bfloat16, B 32768, beta 1, 8 images a class, in any order: what the page shows, and what is aimed at.
CASES = [Case(32768, dim) for dim in (128, 256, 512, 768, 1024)]
GOAL_TFLOPS = {128: 450, 256: 450}
GOAL_FORWARD_MS = {128: 0.45}


SHOWN = ("issue", "tensor", "fma", "alu", "mufu", "shared", "fill")


def report(model: Model, cases: list[Case], gpu: Gpu) -> list[str]:
    """Two markdown tables: cycles per tile, and times."""
    heads = ["D", "pass", "tile", "positives", "slots per warp", *SHOWN, "binds", "time"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    totals = []
    for case in cases:
        passes = {"forward": model.forward(case, gpu), "backward": model.backward(case, gpu)}
        for name, p in passes.items():
            logits, cycles = p.counts.shape.logits, p.cycles
            cells = [
                case.dim,
                name,
                f"{logits.m} × {logits.n}",
                f"{case.share_with_positives(p.counts.shape):.0%}",
            ]
            cells += [f"{p.counts.slots_per_warp:,.0f}", *(f"{cycles[pipe]:,.0f}" for pipe in SHOWN)]
            cells += [p.binds, f"{p.seconds * 1e3:.2f} ms"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        forward, backward, small = (
            passes["forward"].seconds,
            passes["backward"].seconds,
            model.small(case, gpu),
        )
        totals.append((case, forward, backward, small))
    lines += [
        "",
        "| B | D | forward | backward | the rest | effective TFLOP/s | aimed at |",
        "|---" * 7 + "|",
    ]
    for case, forward, backward, small in totals:
        aimed = case.batch == 32768 and case.dtype == "bfloat16"
        goal = GOAL_TFLOPS.get(case.dim) if aimed else None
        aim = f"≥ {goal}" if goal else "–"
        if aimed and case.dim in GOAL_FORWARD_MS:
            aim += f", forward ≤ {GOAL_FORWARD_MS[case.dim]} ms"
        times = " | ".join(f"{seconds * 1e3:.2f} ms" for seconds in (forward, backward, small))
        tflops = effective_tflops(case, forward + backward + small)
        lines.append(f"| {case.batch} | {case.dim} | {times} | {tflops:.0f} | {aim} |")
    return lines


# Where launches are what counts.
SMALL_CASES = [Case(batch, 128) for batch in (64, 256, 1024)]


def report_learnable(model: Model, cases: list[Case], gpu: Gpu) -> list[str]:
    """A markdown table: all of a step, with a temperature that is fixed and one that is learnt."""
    lines = ["| B | D | fixed temperature | learnable | times |", "|---" * 5 + "|"]
    for case in cases:
        seconds = []
        for learnable in (False, True):
            one = dataclasses.replace(case, learnable=learnable)
            passes = model.forward(one, gpu).seconds + model.backward(one, gpu).seconds
            seconds.append(passes + model.small(one, gpu))
        shown = " | ".join(f"{x * 1e3:.2f} ms" for x in seconds)
        lines.append(f"| {case.batch} | {case.dim} | {shown} | {seconds[1] / seconds[0]:.2f} |")
    return lines


def page_of(model: Model, gpu: Gpu) -> list[str]:
    parts = (
        report(model, CASES, gpu),
        report_learnable(model, CASES, gpu),
        pipe_whole.report(model, SMALL_CASES, gpu),
    )
    return "\n\n".join("\n".join(part) for part in parts).split("\n")


def hot_spots(p: Pass, most: int = 16) -> list[str]:
    slots, warps = p.counts.constructs, p.counts.shape.logits.warps
    whole = sum(slots.values())
    return [
        f"{n / warps:8.1f} slots per warp and tile {n / whole:6.1%}  {name}"
        for name, n in slots.most_common(most)
    ]


def natural_dim(shape: Shape) -> int:
    """At which the committed table counts a kernel."""
    return shape.dims or 128


def table_of(kernels: list[sass.Kernel]) -> dict[str, dict[str, float]]:
    """Per kernel and tile: issue slots of a warp, and cycles of shared memory, without and with positives."""
    table = {}
    model = Model(kernels)
    for kernel, shape in model.wholes:
        for case in SMALL_CASES:
            whole = pipe_whole.count_whole(kernel, shape, dataclasses.replace(case, dtype=shape.dtype))
            name = f"sm_{kernel.arch} whole {shape}, {case.batch} rows of {case.dim}"
            table[name] = pipe_whole.table_row(whole)
    for kernel, shape in model.kernels:
        row = {}
        for key, share in (("", 0.0), ("_positives", 1.0)):
            case = Case(
                32768, natural_dim(shape), dtype=shape.dtype, positives=share, bounded=not shape.unbounded
            )
            counts = count(kernel, shape, case)
            row[f"slots{key}"] = round(counts.slots_per_warp, 1)
            row[f"shared{key}"] = round(counts.total["shared"], 1)
        table[f"sm_{kernel.arch} {shape}"] = row
    return dict(sorted(table.items()))


def grown(now: dict, committed: dict) -> list[str]:
    """What has to be explained, or written down again with --write."""
    faults = [f"no entry: {name}" for name in now if name not in committed]
    faults += [f"no such kernel any more: {name}" for name in committed if name not in now]
    for name in now:
        for key, value in now[name].items():
            before = committed.get(name, {}).get(key)
            if before is not None and value > before * GROWTH:
                faults.append(f"{name}: {key} {before} -> {value}")
    return faults


BEGIN, END = "<!-- made by `tools/pipe_model.py --write` -->", "<!-- end -->"


def page_with(lines: list[str]) -> str:
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n\n" + "\n".join(lines) + "\n\n" + END + rest.split(END)[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--dim", type=int, nargs="+")
    parser.add_argument("--dtype", choices=ELEMENT_BYTES, default="bfloat16")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--per-class", type=int, default=8)
    parser.add_argument("--positives", type=float, help="share of warps' tiles with a positive pair, 0 to 1")
    parser.add_argument(
        "--unbounded", action="store_true", help="the kernels for logits that are not bounded"
    )
    parser.add_argument("--hot", choices=("forward", "backward"), help="where the instructions come from")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--jobs", type=int)
    args = parser.parse_args()

    if args.check or args.write:
        kernels = sass.kernels(["80", "90"], jobs=args.jobs)
        table = table_of(kernels)
        model = Model([k for k in kernels if k.arch == "90"])
        page = page_of(model, H100)
        if args.write:
            TABLE.write_text(json.dumps(table, indent=1) + "\n")
            PAGE.write_text(page_with(page))
            return 0
        faults = grown(table, json.loads(TABLE.read_text()))
        if page_with(page) != PAGE.read_text():
            faults.append(f"{PAGE.name} does not show what the model says now")
        print("\n".join([*page, ""]))
        print("\n".join(faults or [f"{len(table)} kernels, none has grown"]))
        if faults:
            print("If that is meant: tools/pipe_model.py --write", file=sys.stderr)
        return 1 if faults else 0

    gpu = GPUS[args.gpu]
    chosen = dict(dtype=args.dtype, beta=args.beta, per_class=args.per_class, positives=args.positives,
                  bounded=not args.unbounded)  # fmt: skip
    dims = args.dim or [case.dim for case in CASES]
    cases = [dataclasses.replace(Case(b, d), **chosen) for b in args.batch or [32768] for d in dims]
    model = Model(sass.kernels([gpu.arch], jobs=args.jobs))
    for case in cases if args.hot else []:
        p = getattr(model, args.hot)(case, gpu)
        print(f"{args.hot}, {case}, {p.counts.slots_per_warp:.0f} slots per warp and tile")
        print("\n".join(hot_spots(p)))
    if not args.hot:
        print("\n".join(report(model, cases, gpu)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
