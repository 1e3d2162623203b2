"""What a kernel's name tells about its tile."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Fragment:
    m: int
    n: int
    warps_m: int
    warps_n: int

    @property
    def warps(self) -> int:
        return self.warps_m * self.warps_n

    @property
    def pieces_n(self) -> int:  # of 8 columns, per warp
        return self.n // self.warps_n // 8


@dataclass(frozen=True)
class Shape:
    """What a kernel's name tells about its tile; the templates are those of csrc/cuda/sm80/shapes.cuh."""

    kernel: str  # "forward" or "backward"
    dtype: str  # of the products
    unbounded: bool  # for logits that are not bounded
    logits: Fragment
    depth: int  # columns of embeddings per step
    stages: int
    band: int = 0  # forward: columns of tiles that are walked together
    dims: int = 0  # backward: columns of the gradient per block
    step: int = 0  # backward: rows of the other side per step of the second product
    resident: bool = False

    def __str__(self) -> str:
        logits = self.logits
        text = (
            f"{self.kernel} {self.dtype} {logits.m} x {logits.n}, {logits.warps_m} x {logits.warps_n} warps"
        )
        if self.dims:
            text += f", {'resident' if self.resident else 'streaming'} {self.dims}"
        return text + (", unbounded" if self.unbounded else "")

    @property
    def chunk(self) -> int:
        """Columns of a tile of logits that are made at once: resident rows leave a lane 16."""
        return 16 * 32 * self.logits.warps // self.logits.m if self.resident else self.logits.n

    def steps(self, columns: int) -> int:
        return 1 if self.resident else -(-columns // self.depth)

    def flop(self, columns: int) -> int:
        """Of one tile's products, padding and all."""
        first = 2 * self.logits.m * self.logits.n * self.steps(columns) * self.depth
        return first + 2 * self.logits.m * self.logits.n * self.dims


_DTYPES = {
    "Half<bf16>": "bfloat16",
    "Half<f16>": "float16",
    "Tf32": "tf32",
    "Fma<float>": "float32",
    "Fma<double>": "float64",
}
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "tf32": 4, "float32": 4, "float64": 8}


def parse_shape(name: str) -> Shape | None:
    """None for kernels that do not walk tiles, and for the forward pass in one launch: it is made of kernels
    that are counted each by itself.
    """
    if not re.match(r"(forward|backward)_kernel<", name):
        return None
    match = re.match(
        r"(forward|backward)_kernel<\w+Traits<(\w+)Product(<\w+>)?, "
        r"(?:BoundedOnly<)?(\w+)<(.*)>, (\w+)> ?>$",
        name,
    )
    if match is None:
        raise ValueError(f"a kernel's name has another form: {name}")
    kernel, product, element, kind, arguments, unbounded = match.groups()
    numbers = [int(x) for x in re.findall(r"\b\d+", arguments)]
    common = dict(kernel=kernel, dtype=_DTYPES[product + (element or "")], unbounded=unbounded == "true")
    if kind == "ForwardShape":
        m, warps_m, warps_n, depth, stages, _, band = numbers
        return Shape(**common, logits=Fragment(m, m, warps_m, warps_n), depth=depth, stages=stages, band=band)
    logits, gradients = Fragment(*numbers[:4]), Fragment(*numbers[4:8])
    if kind == "ResidentShape":
        stages, _ = numbers[8:]
        sizes = dict(depth=gradients.n, dims=gradients.n, step=logits.n)
        return Shape(**common, **sizes, logits=logits, stages=stages, resident=True)
    if kind == "StreamingShape":
        depth, step, stages, _ = numbers[8:]
        return Shape(**common, logits=logits, depth=depth, stages=stages, dims=gradients.n, step=step)
    raise ValueError(f"a shape without an entry here: {kind}")
