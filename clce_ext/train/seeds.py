"""Random numbers as functions of a key: whoever seeds with the same integers draws the same numbers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_all(*key: int) -> None:
    """Seeds every generator of this process, those of the GPUs too."""
    torch.manual_seed(_seed_cpu(*key))


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seeds the CPU's generators, which image transforms draw from, and puts their states back."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            _seed_cpu(*key)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _seed_cpu(*key: int) -> int:
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.random.default_generator.manual_seed(seed)
    return seed
