"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .config import TrainConfig
from .errors import TrainingError, differences, first_line


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

    def agree(self, what: str, found: dict[str, Any], *words: str) -> None:
        """Compares what the processes have ``found``; see errors.differences for ``words``.

        Raises:
            TrainingError: a process ``what`` ("found other data") than process 0; in every process.
        """
        main, *others = self.gather(found)
        for rank, other in enumerate(others, 1):
            if odd := differences(main, other, *words):
                raise TrainingError(f"process {rank} {what} than process 0: {odd}; all must have the same")

    def from_main(self, value: Any) -> Any:
        """The main process's ``value``."""
        return self.gather(value)[0]


def choose_device(wanted: str | None) -> torch.device:
    """``wanted``, or CUDA where there is one.

    Raises:
        TrainingError: neither cpu nor a CUDA device that is there.
    """
    kind = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", kind):
        raise TrainingError(f"--device must be cpu or cuda, got {kind!r}")
    if kind != "cpu" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: this machine or this build of torch has no CUDA device")
    return torch.device(kind)


def device_name(device: torch.device) -> str:
    """cpu, or what the GPU calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextlib.contextmanager
def processes(config: TrainConfig) -> Iterator[Processes]:
    """Joins torchrun's process group (NCCL on CUDA, gloo on the CPU), if there is one."""
    device = choose_device(config.device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        if config.distributed_loss in ("gather", "ring"):
            raise TrainingError(
                f"--distributed-loss {config.distributed_loss} needs processes: start with torchrun "
                "--nproc-per-node N -m clce_ext.train"
            )
        yield Processes(device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if joined := not dist.is_initialized():
        timeout = datetime.timedelta(seconds=config.timeout)
        # gloo as well: what processes tell each other between them need not wait for a GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    rank = dist.get_rank()
    try:
        yield Processes(device, rank, dist.get_world_size())
    except RuntimeError as error:
        # gloo has no type of its own, but names its source.
        is_lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if isinstance(error, TrainingError) or not is_lost:
            raise
        raise TrainingError(
            f"process {rank}: another process of the run has ended, or did not answer within --timeout "
            f"{config.timeout:g} seconds ({first_line(error)}); the same command with --resume goes on"
        ) from error
    finally:
        if joined:
            dist.destroy_process_group()
