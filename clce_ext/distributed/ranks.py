"""The ranks of a process group: what they agree on, sums over them, and the rows of all of them."""

from __future__ import annotations

import contextlib
import hashlib
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from clce_ext.ops import only_first_derivative


class _Announcement(NamedTuple):
    """What a rank tells the others first, as integers."""

    refused: int  # 1: this rank's arguments are no good
    digest: int  # of all that must be the same on every rank
    rows: int  # that this rank contributes
    temperature: (
        int  # the bits of a temperature tensor that lies where announcements do, or 0; the last field
    )


class Ranks:
    """The ranks of a process group, as seen by one of them.

    Args:
        group: None is the default group.
        call: the public call that needs them, for messages.
    """

    def __init__(self, group: dist.ProcessGroup | None, call: str):
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(f"{call} needs torch.distributed.init_process_group() first")
        self.group = group
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            raise ValueError(f"{call}: process_group must contain this process (rank {dist.get_rank()})")
        self.size = dist.get_world_size(group)
        self.call = call

    @contextlib.contextmanager
    def exchanging(self, what: str):
        """Says what failed when a rank died, took another path through the program or was too slow."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.call}: rank {self.rank} of {self.size} could not exchange {what} with the other "
                "ranks: one of them has died, is stuck, or never made this call (the process group's timeout "
                f"says how long to wait). {type(error).__name__}: {error}"
            ) from error

    def sum(self, values: Tensor, what: str) -> Tensor:
        """The sum over ranks, in float64."""
        total = values.detach().to(torch.float64, copy=True)
        if self.size > 1:
            with self.exchanging(what):
                dist.all_reduce(total, group=self.group)
        return total

    def all_gather(self, rows: Tensor, what: str) -> tuple[Tensor, dist.Work]:
        """Starts to gather equally many rows of every rank; the result may be read after ``work.wait()``."""
        gathered = rows.new_empty((self.size * rows.shape[0], *rows.shape[1:]))
        # torch has a new name for it from some version on.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with self.exchanging(what):
            return gathered, gather(gathered, rows, group=self.group, async_op=True)

    def reduce_scatter(self, rows: Tensor, what: str) -> Tensor:
        """This rank's part of the sum over ranks of ``rows``, which hold equally many rows for every rank."""
        own = rows.new_empty((rows.shape[0] // self.size, *rows.shape[1:]))
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        with self.exchanging(what):
            scatter(own, rows, group=self.group)
        return own

    def agree(
        self,
        same: dict,
        rows: int,
        device: torch.device,
        temperature: Tensor | None = None,
        problem: Exception | None = None,
    ) -> list[int]:
        """Every rank's ``rows``, after all ranks have shown that they are about to do the ``same``.

        A rank whose arguments are refused comes here too, with its ``problem``: so the others hear of it now,
        and none waits for data that will never come.

        Nobody waits for a GPU if the group can exchange what lies on the host (a group of gloo and nccl
        together, such as torch's default) and the temperature is a number.

        Raises:
            ValueError: on every rank, if ranks differ in ``same`` or temperature, or one has a problem.
        """
        if self.size == 1:
            if problem is not None:
                raise problem
            return [rows]
        what = "what they are about to do"
        digest = hashlib.blake2b(repr((self.call, same)).encode(), digest_size=7).digest()
        announced = _Announcement(problem is not None, int.from_bytes(digest, "big"), rows, 0)
        own = torch.tensor(announced, device=announcing_device(self.group, device))
        bits = None
        if temperature is not None and problem is None:
            bits = temperature.detach().double().reshape(1).view(torch.int64)
            if is_beside(bits, own):
                own[-1:], bits = bits, None
        table = [_Announcement(*row) for row in self._table(own, what)]
        agreed = not any(a.refused for a in table) and len({(a.digest, a.temperature) for a in table}) == 1
        if agreed and bits is not None:  # then every rank has some: whether it has is part of ``same``
            agreed = len({tuple(row) for row in self._table(bits, what)}) == 1
        if not agreed:
            self._disagree(same, temperature, problem)
        return [a.rows for a in table]

    def _table(self, own: Tensor, what: str) -> list[list[int]]:
        """The row of every rank."""
        gathered, work = self.all_gather(own, what)
        with self.exchanging(what):
            work.wait()
            return gathered.view(self.size, -1).tolist()

    def _disagree(self, same: dict, temperature: Tensor | None, problem: Exception | None):
        """Finds out on what, and raises."""
        if temperature is not None and problem is None:
            same = {**same, "temperature": float(temperature.detach())}
        table: list = [None] * self.size
        with self.exchanging("what they disagree on"):
            dist.all_gather_object(table, (self.call, same, problem and str(problem)), group=self.group)
        if problem is not None:
            raise problem
        for rank, (_, _, refusal) in enumerate(table):
            if refusal is not None:
                raise ValueError(
                    f"{self.call}: rank {rank} of the process group refused its arguments: {refusal}"
                )
        first_call, first, _ = table[0]
        for rank, (call, other, _) in enumerate(table):
            if call != first_call:
                raise ValueError(
                    f"ranks must make the same call: rank 0 is in {first_call}, rank {rank} in {call}"
                )
            for name in first:
                if first[name] != other[name]:
                    raise ValueError(
                        f"{self.call}: {name} must be the same on all ranks of the process group: "
                        f"rank 0 has {first[name]!r}, rank {rank} has {other[name]!r}"
                    )
        raise RuntimeError(f"{self.call}: ranks announced different things, but name the same ones: {table}")


def announcing_device(group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """The host, where the group can exchange what lies there; else ``device``."""
    return torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else device


def is_beside(a: Tensor, b: Tensor) -> bool:
    return a.device.type == b.device.type


def collective_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where a tensor must lie that the group's ranks exchange, if no argument says it."""
    accelerator = torch.accelerator.current_accelerator() if dist.get_backend(group) == "nccl" else None
    return accelerator or torch.device("cpu")


@torch.compiler.disable
def refuse(problem: Exception, call: str, group: dist.ProcessGroup | None):
    """Raises ``problem``, but first tells the other ranks, which would wait for this one's data."""
    if not dist.is_available() or not dist.is_initialized():
        raise problem
    Ranks(group, call).agree({}, 0, collective_device(group), problem=problem)


class _SumOverRanks(torch.autograd.Function):
    """A sum over ranks; the gradient is that of the sum of what the ranks return."""

    @staticmethod
    def forward(ctx, value: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum(value, "sums").to(value.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        with torch.no_grad():
            total = ctx.ranks.sum(grad, "gradients of sums").to(grad.dtype)
        return only_first_derivative(grad, grad, (total,))[0], None


@torch.compiler.disable
def sum_over_ranks(value: Tensor, call: str, group: dist.ProcessGroup | None) -> Tensor:
    """The differentiable sum of every rank's ``value``, on every rank."""
    return _SumOverRanks.apply(value, Ranks(group, call))


@torch.compiler.disable
def gather_rows(tensors: list[Tensor], call: str, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Every rank's rows in rank order, not differentiable; ranks may have different numbers of rows."""
    ranks = Ranks(group, call)
    same = {f"tensor {i}": f"{t.dtype} [rows, {tuple(t.shape[1:])}]" for i, t in enumerate(tensors)}
    sizes = ranks.agree(same, len(tensors[0]), tensors[0].device)
    most = max(sizes)
    if most == 0 or ranks.size == 1:
        return tensors
    gathered = [ranks.all_gather(padded_rows(t.contiguous(), most, 0), "rows") for t in tensors]
    with ranks.exchanging("rows"):
        for _, work in gathered:
            work.wait()
    if min(sizes) == most:
        return [rows for rows, _ in gathered]
    return [torch.cat([rows[r * most :][:n] for r, n in enumerate(sizes)]) for rows, _ in gathered]


def padded_rows(x: Tensor, rows: int, value: int) -> Tensor:
    """``x`` with rows full of ``value`` after its own, ``rows`` altogether."""
    if x.shape[0] == rows:
        return x
    return torch.cat([x, x.new_full((rows - x.shape[0], *x.shape[1:]), value)])
