"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .config import TrainConfig
from .errors import TrainingError, first_line


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

    def agree(self, values: dict[str, Any]) -> None:
        """Compares ``values`` of all processes.

        Raises:
            TrainingError: they differ; in every process.
        """
        main, *others = self.gather(values)
        for rank, other in enumerate(others, 1):
            if odd := [name for name in main if other.get(name) != main[name]]:
                found = "; ".join(f"{name} {other.get(name)!r}, not {main[name]!r}" for name in odd)
                raise TrainingError(
                    f"process {rank} was given other options than process 0: {found}; give all the same"
                )

    def main_first(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """``action(*arguments)`` in the main process, then in the others: files it leaves are made once."""
        if not self.is_main:
            self.from_main(None)
        value = action(*arguments)
        if self.is_main:
            self.from_main(None)
        return value

    def from_main(self, value: Any) -> Any:
        """The main process's ``value``."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device if self.device.type == "cuda" else None)
        return values[0]


def choose_device(wanted: str | None) -> torch.device:
    """``wanted``, or CUDA where there is one.

    Raises:
        TrainingError: neither cpu nor a CUDA device that is there.
    """
    kind = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(kind)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise TrainingError(f"--device must be cpu or cuda, got {kind!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: this machine or this build of torch has no CUDA device")
    return device


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
    joined = not dist.is_initialized()
    if joined:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(seconds=config.timeout)
        )
    rank = dist.get_rank()
    try:
        yield Processes(device, rank, dist.get_world_size())
    except RuntimeError as error:
        # gloo has no type of its own, but names its source.
        if isinstance(error, TrainingError) or not (
            isinstance(error, dist.DistError) or "gloo" in str(error)
        ):
            raise
        raise TrainingError(
            f"process {rank}: another process of the run has ended, or did not answer within --timeout "
            f"{config.timeout:g} seconds ({first_line(error)}); the same command with --resume goes on"
        ) from error
    finally:
        if joined:
            dist.destroy_process_group()
