"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .config import TrainConfig
from .errors import TrainingError


@dataclass(frozen=True)
class Processes:
    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value`` (anything that pickles), in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """The main process's ``value``."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device if self.device.type == "cuda" else None)
        return values[0]


@contextlib.contextmanager
def processes(config: TrainConfig) -> Iterator[Processes]:
    """Joins torchrun's process group (NCCL on CUDA, gloo on the CPU), if there is one."""
    kind = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(kind)
    except RuntimeError:
        raise TrainingError(f"--device must be cpu or cuda, got {kind!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: this machine or this build of torch has no CUDA device")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Processes(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    joined = not dist.is_initialized()
    if joined:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(device, dist.get_rank(), dist.get_world_size())
    finally:
        if joined:
            dist.destroy_process_group()
