"""What the forward pass of a small batch costs in one launch, from the machine code of its kernel.

The kernel (csrc/cuda/kernels/whole_forward.cuh) has three phases between which blocks meet: prepare, tiles,
merge. Counted is all that a warp issues in its life, phase by phase, in a block that takes part in each: of
the tiles and rows that blocks have on average. What the plan decides is read from its source. Of the formats
only those of 16 bits are counted: in the others' machine code ways that read no vectors are woven into all.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from dataclasses import dataclass

import pipe_rules
import sass
import sass_flow
from gpu_table import Gpu
from pipe_shapes import Shape, parse_shape
from sass_flow import Rule
from sass_pipes import cycles_of, pipes_of

PHASES = ("prepare", "tiles", "merge")


def constant(name: str, path: str = "csrc/cuda/plan/plan.cpp") -> int:
    """Of the C++ source, where it stands as `name = 2 * 108`."""
    text = (sass.ROOT / path).read_text()
    match = re.search(rf"\b{name} = ([\d *]+)[,;]", text)
    if match is None:
        raise ValueError(f"no constant {name} in {path}")
    return math.prod(int(factor) for factor in match[1].split("*"))


WHOLE_ROWS = constant("kWholeRows")
BLOCKS_AT_ONCE = constant("kBlocksAtOnce")
MOST_GROUPS = constant("kMaxGroups")
ROWS_PER_BLOCK = constant("kRowsPerBlock", "csrc/cuda/grid.h")
MERGE_ROWS = constant("kMergeRows", "csrc/cuda/grid.h")
MERGE_PARTS = constant("kMergeParts", "csrc/cuda/grid.h")


@dataclass(frozen=True)
class Plan:
    """Of self-contrast, as csrc/cuda/plan/plan.cpp makes it."""

    tiles: int  # of all blocks; on and above the diagonal
    groups: int  # slots of a row
    row_blocks: int  # that have four rows to prepare
    tile_blocks: int
    merge_blocks: int
    blocks: int

    @staticmethod
    def of(batch: int, shape: Shape) -> Plan:
        side = -(-batch // shape.logits.m)
        groups = min(side, MOST_GROUPS)
        row_blocks = -(-batch // ROWS_PER_BLOCK)
        tile_blocks = groups * (groups + 1) // 2
        blocks = max(tile_blocks, min(row_blocks, BLOCKS_AT_ONCE))
        merge_blocks = -(-batch // MERGE_ROWS)
        return Plan(side * (side + 1) // 2, groups, row_blocks, tile_blocks, merge_blocks, blocks)

    def active(self, phase: str) -> int:
        """Blocks that have something to do."""
        if phase == "prepare":
            return min(self.blocks, self.row_blocks)
        return self.tile_blocks if phase == "tiles" else self.merge_blocks


def rules_for(shape: Shape, case, plan: Plan) -> list[Rule]:
    """The tiles' rules are the forward kernel's, but for walks that are over after a tile or few."""
    tiles = plan.tiles / plan.tile_blocks
    warps, steps = shape.logits.warps, shape.steps(case.columns)
    vector = 16 // case.element_bytes
    on_diagonal = plan.groups / plan.tiles
    positives = case.share_with_positives(shape)
    looked_at = 1 - (1 - positives) * (1 - on_diagonal)
    loads = tiles * steps
    always, never = 1.0, 0.0
    special = [
        # Prepare: a warp's row, 32 lanes at a time.
        Rule("for (uint32_t i = block(); i < p.row_blocks;", trips=-(-plan.row_blocks // plan.blocks)),
        Rule("if (row < side.rows) use(side, row);", share=always),
        Rule("if (p.normalize) {", share=always),
        Rule("col < padded; col += 32 * Pack::kSize) {", trips=-(-case.columns // (32 * vector))),
        Rule("if (p.vectors && col + Pack::kSize <= p.dim) {", share=always),
        Rule("factor = 1 / (norm < T(kNormEps)", share=always),
        # Tiles.
        Rule("if (blockIdx.x >= p.tile_grid.x", share=never, leaves=True),
        Rule("if (logits_are_unbounded(p.tiles.scale,", share=never),
        Rule("return normalized && (1.0 + beta) / temperature", share=never),
        Rule("if (alike || some_left_out) {", share=looked_at),
        Rule("if (some_left_out)", share=on_diagonal / looked_at),
        Rule("if (by_column) ", share=1 - on_diagonal),
        # The pipeline asks once for each place ahead and once for each step, and there are so many steps.
        Rule("if (steps.left()) steps.load(memory_ + place);", share=loads / (loads + shape.stages - 1)),
        # Merge: threads t, t + 32, ... have a row's slots by turns, and the first of them the rest.
        Rule("if (int(block()) < p.merge_blocks) merge_loss(", share=always),
        Rule("first < p.rows; first += int64_t(blocks) * kMergeRows) {", trips=1),
        Rule("if (row < p.rows) {", share=always),
        Rule("for (int64_t i = part; i < p.num_slots; i += kMergeParts) {", trips=plan.groups / MERGE_PARTS),
        Rule("if (unbounded) {", share=never),
        Rule("if (part > 0) ptx::shared_store(shares", share=1 - 1 / MERGE_PARTS),
        Rule("if (part == 0 && row < p.rows) {", share=1 / MERGE_PARTS),
        Rule("for (int i = 0; i < kMergeParts - 1; ++i) {", trips=MERGE_PARTS - 1),
        Rule("if (sums.n_pos > 0) log_in_two(", share=always),
        Rule("if (sums.n_neg > 0) {", share=always),
        Rule("if (p.with_loss) ", share=always),
        Rule("if (p.debias) config.debias =", share=never),
        # The loss as it is by default; more negatives than positives.
        Rule("if (!(s.n_pos > 0) || (config.negatives_only", share=never, leaves=True),
        Rule("if (has_negatives) {", share=always),
        Rule("if (config.debias > 0) {", share=never),
        Rule("if (share >= 1 || debiased <= floor) {", share=never),
        Rule("if (config.negatives_only) {", share=never),
        Rule("} else if (gap > 0) {", share=always),
        Rule("const T e = has_negatives ? std::exp(gap) : T(0);", share=always),
        Rule("if (config.mean_inside_log) {", share=never),
        Rule("out.d.lse_wn = config.detach_weights ?", share=never),
        # The block that is last adds up what all have left.
        Rule("for (int w = 1; w < warps; ++w) {", trips=warps - 1, few=True),
        Rule("for (int i = 0; i < kCount; ++i) mine[i] = combine(", trips=warps - 1, few=True),
        Rule("if (blocks == 1) return store_loss(p, sum);", share=float(plan.merge_blocks == 1), leaves=True),
        Rule("if (threadIdx.x == 0) {", share=1 / warps),
        Rule("for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) {",
             trips=max(1 / warps, plan.merge_blocks / (32 * warps))),
        Rule("ptx::global_store(p.loss, p.mean ?", share=always),
    ]  # fmt: skip
    # One tile is a band of its own.
    walked = dataclasses.replace(shape, band=max(1, min(shape.band, round(tiles))))
    return [*special, *HEADER_RULES, *pipe_rules.rules_for(walked, case, tiles)]


# CUDA's own headers: one thread of a block asks whether all have come. How often is not counted.
HEADER_RULES = [
    Rule("if (is_cta_master()) {", share=0.25),
    Rule("unsigned int token = details::sync_grids_arrive(bar);", share=0.25),
    Rule("details::sync_grids_wait(token, bar);", trips=1),
    Rule("NV_IF_ELSE_TARGET(NV_PROVIDES_SM_70,", trips=1),
]


def phase_of(source: tuple[tuple[str, int], ...]) -> str:
    texts = [sass_flow.text_at(place) for place in source]
    for phase, part in (
        ("meet", "this_grid().sync()"),
        ("prepare", "with_row(p.rows, i,"),
        ("prepare", "i < p.row_blocks;"),
        ("merge", "merge_loss(p.merge, "),
    ):
        if any(part in text for text in texts):
            return phase
    return "tiles"


@dataclass(frozen=True)
class WholeForward:
    shape: Shape
    plan: Plan
    phases: dict[str, Counter]  # of a block, in the units of PIPES; and "meet"

    def slots_per_warp(self, phase: str) -> float:
        return self.phases[phase]["issue"] / self.shape.logits.warps

    def seconds(self, phase: str, gpu: Gpu) -> float:
        """Of the multiprocessor that has most blocks."""
        busiest = -(-self.plan.active(phase) // gpu.multiprocessors)
        return busiest * max(cycles_of(self.phases[phase], gpu).values()) / gpu.clock


def parse_whole(name: str) -> Shape | None:
    """The shape of its tiles; None for other kernels, and formats that are not counted."""
    match = re.match(r"phases_kernel<WholeForward<(Half.*)> ?>$", name)
    return parse_shape(f"forward_kernel<ForwardTraits<{match[1].rstrip()}, false> >") if match else None


def count_whole(kernel: sass.Kernel, shape: Shape, case) -> WholeForward:
    plan = Plan.of(case.batch, shape)
    flow = sass_flow.flow_of(kernel)
    frequencies = flow.frequencies(rules_for(shape, case, plan)).tolist()
    phases = {phase: Counter() for phase in (*PHASES, "meet")}
    for block, frequency in zip(flow.blocks, frequencies, strict=True):
        often = frequency * shape.logits.warps
        for instruction in kernel.code.instructions[block.first : block.end] if often > 1e-9 else ():
            total = phases[phase_of(instruction.source)]
            for pipe, cost in pipes_of(instruction).items():
                total[pipe] += cost * often
    tiles = phases["tiles"]
    expected = shape.flop(case.columns) * plan.tiles / plan.tile_blocks
    on_tensor_cores = tiles["tensor"] + tiles["tf32"]
    flop = on_tensor_cores or 64 * tiles["fma"]
    if not expected * 0.999 <= flop <= expected * (1.001 if on_tensor_cores else 1.5):
        raise sass_flow.UnknownBranch(f"{kernel.name}: {flop:.0f} FLOP counted, {expected} expected")
    return WholeForward(shape, plan, phases)


def table_row(whole: WholeForward) -> dict[str, float]:
    """For the committed table: per phase, issue slots of a warp, and cycles of shared memory of a block."""
    row = {}
    for phase in PHASES:
        row[f"slots_{phase}"] = round(whole.slots_per_warp(phase), 1)
        row[f"shared_{phase}"] = round(whole.phases[phase]["shared"], 1)
    return row


def report(model, cases: list, gpu: Gpu) -> list[str]:
    """Two markdown tables: the phases of the one launch, and times, in one launch and in three."""
    work = ["| B | D | phase | blocks | slots per warp | shared | time |", "|---" * 7 + "|"]
    times = [
        "| B | D | tiles, forward and backward | forward, 1 launch | 3 launches | backward, 2 launches |",
        "|---" * 6 + "|",
    ]
    for case in cases:
        assert case.batch <= WHOLE_ROWS
        whole = model.whole(case)
        seconds = {phase: whole.seconds(phase, gpu) for phase in PHASES}
        for phase in PHASES:
            cells = [case.batch, case.dim, phase, whole.plan.active(phase)]
            cells += [f"{whole.slots_per_warp(phase):,.0f}", f"{whole.phases[phase]['shared']:,.0f}"]
            work.append("| " + " | ".join(map(str, cells)) + f" | {seconds[phase] * 1e6:.1f} µs |")
        forward = sum(seconds.values())
        backward = model.backward(case, gpu).seconds - gpu.launch
        _, after = model.around(case, gpu)
        shown = (
            forward + gpu.launch + 2 * gpu.meet,
            forward + 3 * gpu.launch,
            backward + after + 2 * gpu.launch,
        )
        tiles = " + ".join(f"{x * 1e6:.1f}" for x in (seconds["tiles"], backward))
        cells = [str(case.batch), str(case.dim), f"{tiles} µs", *(f"{x * 1e6:.1f} µs" for x in shown)]
        times.append("| " + " | ".join(cells) + " |")
    return [*work, "", *times]
