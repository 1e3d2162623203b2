"""What is measured: one case is a problem of one size, in one dtype, on one device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Case:
    """B embeddings of D numbers.

    ``problem`` is "self" (the batch against itself, ``per_class`` images of each class) or "clip" (row i
    against B keys of which key i is the positive).
    """

    device: str
    problem: str
    dtype: str
    batch: int
    dim: int
    beta: float = 1.0
    temperature: float = 0.5
    summation: str = "out"
    per_class: int = 8
    seed: int = 0

    @property
    def options(self) -> dict:
        return {"beta": self.beta, "temperature": self.temperature, "summation": self.summation}

    @property
    def matrix_elements(self) -> int:
        return self.batch * self.batch

    def flop(self, mode: str) -> int:
        """Multiply-adds counted as two, those of the plain formula: 2 B^2 D forward, 4 B^2 D backward."""
        per_pair = {"mm": 2, "forward": 2, "backward": 4, "full": 6}[mode]
        return per_pair * self.matrix_elements * self.dim

    def __str__(self) -> str:
        return (
            f"{self.problem} {self.dtype} B={self.batch} D={self.dim} beta={self.beta:g} "
            f"temperature={self.temperature:g}"
        )


@dataclass
class Inputs:
    """Embeddings [B, D]; keys [B, D] and no labels ("clip"), or labels [B] ("self")."""

    x: Tensor
    keys: Tensor | None
    labels: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x] if self.keys is None else [self.x, self.keys]

    def to(self, dtype: torch.dtype) -> Inputs:
        def leaf(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(dtype).requires_grad_()

        return Inputs(leaf(self.x), leaf(self.keys), self.labels)


def make_inputs(case: Case, copies: int = 1) -> list[Inputs]:
    """Clustered embeddings, so that logits spread as a trained model's do; every anchor has a positive."""
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    generator = torch.Generator(device=device).manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def leaf(rows: Tensor) -> Tensor:
        return rows.to(dtype).requires_grad_()

    out = []
    for _ in range(copies):
        if case.problem == "clip":
            shared = normal(case.batch, case.dim)
            rows, keys = shared + normal(case.batch, case.dim), shared + normal(case.batch, case.dim)
            out.append(Inputs(leaf(rows), leaf(keys), None))
            continue
        classes = max(1, case.batch // case.per_class)
        order = torch.randperm(case.batch, generator=generator, device=device)
        labels = order % classes
        rows = normal(classes, case.dim)[labels] + normal(case.batch, case.dim)
        out.append(Inputs(leaf(rows), None, labels))
    return out


def copies_to_leave_cache(case: Case, cache_bytes: int, most: int = 1024) -> int:
    """How many inputs to rotate among, so that none is still in a cache when its turn comes again."""
    itemsize = DTYPES[case.dtype].itemsize
    one = case.batch * case.dim * itemsize * (2 if case.problem == "clip" else 1)
    return 1 if one > cache_bytes else min(most, math.ceil(2 * cache_bytes / one))
