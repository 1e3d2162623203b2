"""Memory grows with B D, never with B^2."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import clce_ext
from clce_ext.portable import kept

DIM = 128


def saved_bytes(rows: int) -> int:
    """Bytes that autograd keeps for the backward, every storage counted once."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(rows, DIM, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = clce_ext.hard_negative_contrastive_loss(x, torch.arange(rows) % 10)
    assert loss.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("rows", [512, 2048, 4096])  # the last one's B x B matrix has 64 MiB
def test_bytes_saved_for_backward_are_linear(engine, rows):
    # The portable backend keeps the logits of a small batch besides.
    constant = 4 * kept.MOST_KEPT if engine == "portable" and rows == 512 else 0
    # The normalised embeddings, the labels and some twenty numbers a row.
    assert saved_bytes(rows) <= rows * (4 * DIM + 8 + 4 * 24) + constant


SCRIPT = """
import resource, sys, torch, clce_ext
rows = int(sys.argv[1])
x = torch.randn(rows, 128).requires_grad_()
labels = torch.randint(100, (rows,))
clce_ext.hard_negative_contrastive_loss(x[:300].detach().requires_grad_(), labels[:300]).backward()  # warm-up
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clce_ext.hard_negative_contrastive_loss(x, labels).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fused", "portable"])
def test_peak_memory_of_a_large_batch(engine):
    """Forward and backward at B 32768, D 128 (a B x B float32 matrix alone would be 4096 MiB)."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, "32768"], capture_output=True, text=True, check=True,
        env=os.environ | {"CLCE_ENGINE": engine},
    )  # fmt: skip
    assert float(run.stdout) <= 160
