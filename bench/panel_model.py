"""What the engine of panels should cost on an H100: products, bytes through L2, launches.

    python -m bench.panel_model                     the assumptions, the tables of docs/cuda.md
    python -m bench.panel_model --rows 65536 --dim 1024

All times are *predictions*: no GPU has run this engine. What is assumed stands in ``Hardware``; the walk over
panels is that of csrc/cuda/panels/walk.h, the shape of a panel that of csrc/cuda/plan/plan.cpp.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

ACC_BYTES, HALF_BYTES = 4, 2  # of sums, logits and gradients; of 16-bit embeddings and of dL/ds
SUMS_ROWS, SUMS_COLUMNS = 64, 128  # of the tile that a block of panel_sums has
GRADIENTS_TILE = 128  # rows and columns, of panel_gradients
SLOT_BYTES = 6 * ACC_BYTES  # partial sums of one anchor, bounded logits
LABEL_BYTES = 8
STATISTICS_BYTES = 10 * ACC_BYTES  # what an anchor brings to dL/ds: derivatives, logarithms of sums


def assumption(value: float, unit: str, source: str):
    return field(default=value, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class Hardware:
    """An H100 SXM; assumed, not measured here, unless the source says so."""

    product_flops: float = assumption(
        575e12,
        "TFLOPS",
        "a 16-bit product with a float32 result over 768 columns, launches included; an 8192³ product with a "
        "bfloat16 result ran at 798 on an H100, 989 is NVIDIA's figure",
    )
    l2_bytes_per_s: float = assumption(
        5.5e12, "TB/s", "as for the fused tiles (docs/cuda.md): reads and writes of the panel"
    )
    memory_bytes_per_s: float = assumption(3.35e12, "TB/s", "NVIDIA's figure, H100 SXM")
    launch_s: float = assumption(
        1.5e-6, "µs", "from the end of one kernel to the next one's full speed, in one stream; ours only"
    )
    host_s: float = assumption(
        6e-6, "µs", "of the host for one launch, of a kernel of ours or by one call of cuBLAS"
    )


@dataclass(frozen=True)
class Problem:
    """Forward and backward over ``rows`` anchors; against as many keys, or against themselves."""

    rows: int = 32768
    dim: int = 768
    symmetric: bool = True
    panel_rows: int = 4096
    panel_columns: int = 1024

    def panels(self) -> Iterator[tuple[int, int]]:
        """Rows and columns of each, as the walk takes them."""
        for row in range(0, self.rows, self.panel_rows):
            first = row // self.panel_columns * self.panel_columns if self.symmetric else 0
            for column in range(first, self.rows, self.panel_columns):
                columns = min(self.panel_columns, self.rows - column)
                rows = min(self.panel_rows, self.rows - row)
                if self.symmetric:
                    rows = min(rows, column + columns - 1 - row)
                if rows > 0:
                    yield rows, columns

    @property
    def effective_flops(self) -> float:
        """Those of one forward product and two backward ones over all pairs, however few are computed."""
        return 6.0 * self.rows**2 * self.dim


@dataclass(frozen=True)
class Cost:
    """Seconds of forward and backward together."""

    products: float = 0.0
    between: float = 0.0  # our kernels' passes over the panels
    launches: float = 0.0  # ours
    around: float = 0.0  # prepare, slots, merge, prepare_backward
    host: float = 0.0  # to launch all of it, while the GPU computes
    panels: int = 0
    product_flops: float = 0.0

    @property
    def total(self) -> float:
        return max(self.products + self.between + self.launches + self.around, self.host)


def tiles(count: int, tile: int) -> int:
    return -(-count // tile)


def product_seconds(rows: int, columns: int, inner: int, moved: float, on: Hardware) -> float:
    """Arithmetic and the bytes that it moves through L2 overlap."""
    return max(2.0 * rows * columns * inner / on.product_flops, moved / on.l2_bytes_per_s)


def cost(problem: Problem, on: Hardware) -> Cost:
    products = between = flops = 0.0
    panels = 0
    dim, sides = problem.dim, 1 if problem.symmetric else 2
    for rows, columns in problem.panels():
        panels += 1
        pairs = rows * columns
        embeddings = HALF_BYTES * dim
        logits = product_seconds(rows, columns, dim, ACC_BYTES * pairs + embeddings * (rows + columns), on)
        gradients = [
            product_seconds(
                own, dim, other, HALF_BYTES * pairs + other * embeddings + 2 * own * dim * ACC_BYTES, on
            )
            for own, other in ((rows, columns), (columns, rows))
        ]
        products += 2 * logits + sum(gradients)
        flops += 8.0 * pairs * dim
        slots = rows * tiles(columns, SUMS_COLUMNS)
        slots += columns * tiles(rows, SUMS_ROWS) if problem.symmetric else 0
        sums = ACC_BYTES * pairs + 2 * SLOT_BYTES * slots
        blocks = tiles(rows, GRADIENTS_TILE) * tiles(columns, GRADIENTS_TILE)
        lines = blocks * GRADIENTS_TILE * (2 * LABEL_BYTES + (3 - sides) * STATISTICS_BYTES)
        between += (sums + (ACC_BYTES + HALF_BYTES) * pairs + lines) / on.l2_bytes_per_s
    all_rows = sides * problem.rows
    most_slots = tiles(problem.panel_columns, SUMS_COLUMNS)
    most_slots += tiles(problem.panel_rows, SUMS_ROWS) if problem.symmetric else 0
    around = (
        all_rows * dim * 2 * HALF_BYTES  # prepare
        + 2 * problem.rows * most_slots * SLOT_BYTES  # slots: cleared, merged
        + all_rows * dim * (ACC_BYTES + 2 * HALF_BYTES)  # prepare_backward
    ) / on.memory_bytes_per_s
    return Cost(products, between, 2 * panels * on.launch_s, around, 6 * panels * on.host_s, panels, flops)


def effective_tflops(problem: Problem, on: Hardware | None = None) -> float:
    return problem.effective_flops / cost(problem, on or Hardware()).total / 1e12


def described(name: str, value: float) -> str:
    unit = Hardware.__dataclass_fields__[name].metadata["unit"]
    scale = 1e-12 if unit.startswith("T") else 1e6
    words = {"product_flops": "products", "l2_bytes_per_s": "L2", "memory_bytes_per_s": "device memory"}
    words |= {"launch_s": "launch", "host_s": "host"}
    return f"{words[name]} {value * scale:g} {unit}"


def assumptions(on: Hardware) -> str:
    lines = ["| assumed | source |", "|---|---|"]
    for f in fields(on):
        lines.append(f"| {described(f.name, getattr(on, f.name))} | {f.metadata['source']} |")
    return "\n".join(lines)


def table(problems: list[Problem], on: Hardware) -> str:
    lines = [
        "| B | D | | panels | products | between | launches | around | host | total | effective TFLOPS |",
        "|---" * 11 + "|",
    ]
    for problem in problems:
        c = cost(problem, on)
        times = [c.products, c.between, c.launches, c.around, c.host, c.total]
        cells = [str(problem.rows), str(problem.dim), "self" if problem.symmetric else "keys", str(c.panels)]
        cells += [f"{1e3 * t:.3g} ms" for t in times]
        lines.append("| " + " | ".join([*cells, f"**{effective_tflops(problem, on):.0f}**"]) + " |")
    return "\n".join(lines)


def sensitivity(problem: Problem, on: Hardware) -> str:
    """The effective TFLOPS where one assumption is off."""
    lines = ["| if instead | self | keys |", "|---|---|---|"]
    for name, values in (
        ("product_flops", (450e12, 650e12)),
        ("l2_bytes_per_s", (4e12, 7e12)),
        ("launch_s", (1e-6, 3e-6)),
        ("host_s", (3e-6, 12e-6)),
    ):
        for value in values:
            other = replace(on, **{name: value})
            both = [effective_tflops(replace(problem, symmetric=s), other) for s in (True, False)]
            lines.append(f"| {described(name, value)} | {both[0]:.0f} | {both[1]:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 32768, 65536])
    parser.add_argument("--dim", type=int, nargs="+", default=[256, 512, 768, 1024, 4096])
    args = parser.parse_args()
    on = Hardware()
    problems = [Problem(r, d, s) for s in (True, False) for r in args.rows for d in args.dim]
    print("Predictions for an H100, 16-bit embeddings; nothing here was measured on a GPU.\n")
    print(assumptions(on), table(problems, on), sep="\n\n")
    print("\nB 32768, D 768:\n\n" + sensitivity(Problem(), on))


if __name__ == "__main__":
    main()
