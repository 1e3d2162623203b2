"""The contrastive loss over the batches of all ranks of a process group.

One rule says what it computes: what one process computes from the ranks' embeddings, labels, keys and
key labels laid end to end in rank order. An :class:`~clce_ext.EmbeddingQueue` does not travel: each rank's
anchors see their own rank's queue.

Every rank scores its own anchors against its own keys first (with the symmetric kernel in
self-contrast), while the other ranks' keys are on their way, and then against those:

* ``"gather"``: all keys come in one all_gather and stay for the backward; their gradients go back to their
  owners in one reduce_scatter. Memory O(B D), B the whole batch.
* ``"ring"``: the keys of one rank at a time come from the left-hand neighbour, the next ones in flight while
  these are used. In the backward they go round once more, and their gradient follows one step behind,
  growing at every rank until it is home. Memory O(B_local D).

Statistics of disjoint key sets merge exactly (csrc/family/statistics.h), here in float64. Only then is there
a loss, so both ways give the same numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from clce_ext.ops import only_first_derivative
from clce_ext.queue import own_class_labels

_ops = torch.ops.clce_ext

# Newer torch has new names for these two.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# ---- the process group ----


class Ranks:
    """The ranks of a process group, as seen by one of them."""

    def __init__(self, group: dist.ProcessGroup | None, asked_by: str):
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(f"{asked_by} needs torch.distributed.init_process_group() first")
        self.group = group
        self.rank = dist.get_rank(group)
        if self.rank < 0:
            raise ValueError(f"{asked_by}: process_group must contain this process (rank {dist.get_rank()})")
        self.size = dist.get_world_size(group)
        self.asked_by = asked_by

    @contextlib.contextmanager
    def talking(self, about: str):
        """Says what failed when a rank died, left the common path or was too slow."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.asked_by}: rank {self.rank} of {self.size} could not exchange {about} with the other "
                "ranks: one of them has died, is stuck, or never made this call (the process group's timeout "
                f"says how long to wait). {type(error).__name__}: {error}"
            ) from error

    def sum(self, values: Tensor, about: str) -> Tensor:
        """The sum over ranks, in float64."""
        total = values.detach().to(torch.float64, copy=True)
        if self.size > 1:
            with self.talking(about):
                dist.all_reduce(total, group=self.group)
        return total

    def all_gather(self, rows: Tensor, about: str) -> tuple[Tensor, dist.Work]:
        """Starts to gather equally many rows of every rank; the result may be read after ``work.wait()``."""
        gathered = rows.new_empty((self.size * rows.shape[0], *rows.shape[1:]))
        with self.talking(about):
            return gathered, _all_gather(gathered, rows, group=self.group, async_op=True)

    def agree(
        self,
        same: dict,
        counts: tuple[int, int],
        like: Tensor,
        temperature: Tensor | None,
        problem: Exception | None,
    ) -> list[tuple[int, int]]:
        """Every rank's ``counts``, after all ranks have shown that they are about to do the ``same``.

        A rank whose arguments are no good comes here as well, with its ``problem``: so the others hear of it
        now, and none waits for data that will never come.

        Raises:
            ValueError: on every rank, if ranks differ in ``same`` or temperature, or one has a problem.
        """
        if problem is not None and self.size == 1:
            raise problem
        if self.size == 1:
            return [counts]
        digest = hashlib.blake2b(repr((self.asked_by, same)).encode(), digest_size=7).digest()
        own = torch.tensor(
            [problem is not None, int.from_bytes(digest, "big"), *counts, 0], device=like.device
        )
        if temperature is not None and problem is None:
            own[-1:] = temperature.detach().double().reshape(1).view(torch.int64)  # stays on the device
        gathered, work = self.all_gather(own, "what they are about to do")
        with self.talking("what they are about to do"):
            work.wait()
            table = gathered.view(self.size, -1).tolist()
        if any(row[0] for row in table) or any(
            (row[1], row[4]) != (table[0][1], table[0][4]) for row in table
        ):
            self._disagree(same, temperature, problem)
        return [(row[2], row[3]) for row in table]

    def _disagree(self, same: dict, temperature: Tensor | None, problem: Exception | None):
        if temperature is not None and problem is None:
            same = {**same, "temperature": float(temperature.detach())}
        said: list = [None] * self.size
        with self.talking("what they disagree on"):
            dist.all_gather_object(said, (self.asked_by, same, problem and str(problem)), group=self.group)
        if problem is not None:
            raise problem
        for rank, (_, _, text) in enumerate(said):
            if text is not None:
                raise ValueError(
                    f"{self.asked_by}: rank {rank} of the process group refused its arguments: {text}"
                )
        first_call, first, _ = said[0]
        for rank, (call, other, _) in enumerate(said):
            if call != first_call:
                raise ValueError(
                    f"ranks must make the same call: rank 0 is in {first_call}, rank {rank} in {call}"
                )
            for name in first:
                if first[name] != other[name]:
                    raise ValueError(
                        f"{self.asked_by}: {name} must be the same on all ranks of the process group: "
                        f"rank 0 has {first[name]!r}, rank {rank} has {other[name]!r}"
                    )
        raise RuntimeError(f"{self.asked_by}: ranks disagree, but agree when asked again: {said}")


@torch.compiler.disable
def refuse(problem: Exception, asked_by: str, group: dist.ProcessGroup | None):
    """Raises ``problem``, but first tells the other ranks, which would wait for this one's data."""
    if not dist.is_initialized():
        raise problem
    ranks = Ranks(group, asked_by)
    device = torch.accelerator.current_accelerator() if dist.get_backend(group) == "nccl" else None
    ranks.agree({}, (0, 0), torch.empty(0, device=device), None, problem)


class _SumOverRanks(torch.autograd.Function):
    """A sum over ranks; the gradient is that of the sum of what the ranks return."""

    @staticmethod
    def forward(ctx, value: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum(value, "sums").to(value.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        with torch.no_grad():
            out = ctx.ranks.sum(grad, "gradients of sums").to(grad.dtype)
        return only_first_derivative(grad, grad, (out,))[0], None


@torch.compiler.disable
def sum_over_ranks(value: Tensor, asked_by: str, group: dist.ProcessGroup | None) -> Tensor:
    """The differentiable sum of every rank's ``value``, on every rank."""
    return _SumOverRanks.apply(value, Ranks(group, asked_by))


@torch.compiler.disable
def gather_rows(tensors: list[Tensor], asked_by: str, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Every rank's rows in rank order, not differentiable; ranks may have different numbers of rows."""
    ranks = Ranks(group, asked_by)
    same = {f"tensor {i}": f"{t.dtype} [rows, {tuple(t.shape[1:])}]" for i, t in enumerate(tensors)}
    sizes = [rows for rows, _ in ranks.agree(same, (len(tensors[0]), 0), tensors[0], None, None)]
    most = max(sizes)
    if most == 0 or ranks.size == 1:
        return tensors
    gathered = [ranks.all_gather(_padded_rows(t.contiguous(), most, 0), "rows") for t in tensors]
    with ranks.talking("rows"):
        for _, work in gathered:
            work.wait()
    if min(sizes) == most:
        return [rows for rows, _ in gathered]
    return [torch.cat([rows[r * most :][:n] for r, n in enumerate(sizes)]) for rows, _ in gathered]


def _padded_rows(x: Tensor, rows: int, value: int) -> Tensor:
    if x.shape[0] == rows:
        return x
    return torch.cat([x, x.new_full((rows - x.shape[0], *x.shape[1:]), value)])


# ---- how keys and their gradients travel ----


class Shard(NamedTuple):
    """Keys of one rank, or of several."""

    z: Tensor  # [N, padded D], as clce_ext::prepare makes them
    labels: Tensor  # [N] int64


class _Flight(NamedTuple):
    """Tensors on their way; what is sent must live until the works are done."""

    received: tuple[Tensor, ...]
    works: list[dist.Work]
    sent: tuple[Tensor, ...]


class _Gather:
    """All keys at once, each rank's padded to the largest one's with rows that count for nothing."""

    def __init__(self, ranks: Ranks, sizes: list[int], ignore_index: int):
        self.ranks, self.rows, self.ignore_index = ranks, max(sizes), ignore_index
        self.alone = ranks.size == 1 or self.rows == 0
        self.works: list[dist.Work] = []
        self.kept: tuple[Tensor, ...] = ()
        self.gradient: Tensor | None = None

    def start(self, own: Shard, kept: tuple[Tensor, ...]):
        if self.alone:
            return
        if kept:
            self.kept = kept
            return
        z, z_work = self.ranks.all_gather(_padded_rows(own.z, self.rows, 0), "keys")
        labels, labels_work = self.ranks.all_gather(
            _padded_rows(own.labels, self.rows, self.ignore_index), "labels"
        )
        self.kept, self.works = (z, labels), [z_work, labels_work]

    def shards(self) -> Iterator[Shard]:
        """The other ranks' keys: those before this rank, those after it."""
        if self.alone:
            return
        with self.ranks.talking("keys"):
            for work in self.works:
                work.wait()
        begin = self.ranks.rank * self.rows
        for block in (slice(0, begin), slice(begin + self.rows, None)):
            shard = Shard(*(tensor[block] for tensor in self.kept))
            if len(shard.z):
                self.block = block
                yield shard

    def give_back(self, gradient: Tensor):
        """The gradient of the shard last taken from :meth:`shards`."""
        if self.gradient is None:
            self.gradient = gradient.new_zeros((self.ranks.size * self.rows, gradient.shape[1]))
        self.gradient[self.block] = gradient

    def own_gradient(self, count: int) -> Tensor | None:
        """What the other ranks gave back for this rank's keys, [count, padded D]."""
        if self.gradient is None:
            return None
        total = self.gradient.new_empty((self.rows, self.gradient.shape[1]))
        with self.ranks.talking("gradients of keys"):
            _reduce_scatter(total, self.gradient, group=self.ranks.group)
        self.gradient = None
        return total[:count]


class _Ring:
    """The keys of one rank at a time, from the left-hand neighbour."""

    def __init__(self, ranks: Ranks, sizes: list[int], ignore_index: int):
        self.ranks, self.sizes = ranks, sizes
        self.kept: tuple[Tensor, ...] = ()
        self.coming: _Flight | None = None
        self.gradient: _Flight | None = None

    def _pass_on(self, sent: tuple[Tensor, ...], rows: int, tag: int, about: str) -> _Flight:
        """Sends to the right; the same kind of tensors with ``rows`` rows will come from the left."""
        ranks = self.ranks
        received = tuple(t.new_empty((rows, *t.shape[1:])) for t in sent)
        messages = []
        for i, (out, into) in enumerate(zip(sent, received, strict=True)):
            for way, tensor, peer in ((dist.isend, out, ranks.rank + 1), (dist.irecv, into, ranks.rank - 1)):
                if tensor.numel():
                    messages.append(
                        dist.P2POp(way, tensor, group=ranks.group, tag=tag + i, group_peer=peer % ranks.size)
                    )
        with ranks.talking(about):
            return _Flight(received, dist.batch_isend_irecv(messages) if messages else [], sent)

    def _arrived(self, flight: _Flight, about: str) -> tuple[Tensor, ...]:
        with self.ranks.talking(about):
            for work in flight.works:
                work.wait()
        return flight.received

    def start(self, own: Shard, kept: tuple[Tensor, ...]):
        self.owner = self.ranks.rank
        if self.ranks.size > 1:
            self.coming = self._pass_on(own, self.sizes[self.owner - 1], 0, "keys")

    def shards(self) -> Iterator[Shard]:
        """The other ranks' keys, the left-hand neighbour's first."""
        size = self.ranks.size
        for step in range(1, size):
            shard = Shard(*self._arrived(self.coming, "keys"))
            self.coming = None  # and with it what was sent, before more is allocated
            self.owner = (self.ranks.rank - step) % size
            if step < size - 1:
                self.coming = self._pass_on(shard, self.sizes[self.owner - 1], 0, "keys")
            yield shard

    def give_back(self, gradient: Tensor):
        """The gradient of the shard last taken from :meth:`shards`, to be sent after it."""
        if self.gradient is not None:
            gradient += self._arrived(self.gradient, "gradients of keys")[0]
            self.gradient = None
        self.gradient = self._pass_on(
            (gradient,), self.sizes[self.owner - 1], len(Shard._fields), "gradients of keys"
        )

    def own_gradient(self, count: int) -> Tensor | None:
        """What the other ranks gave back for this rank's keys, [count, padded D]."""
        if self.gradient is None:
            return None
        return self._arrived(self.gradient, "gradients of keys")[0]


_WAYS = {"gather": _Gather, "ring": _Ring}


# ---- the loss ----


@dataclass(frozen=True)
class Options:
    """The loss's options, as torch.ops.clce_ext takes them."""

    temperature: float  # used where there is no temperature tensor
    beta: float
    summation: str
    denominator: str
    debias: float
    detach_weights: bool
    normalize: bool
    ignore_index: int
    reduction: str


class _Contrast:
    """One rank's anchors against any keys."""

    def __init__(self, z: Tensor, labels: Tensor, temperature: Tensor | None, dim: int, options: Options):
        self.z, self.labels, self.temperature, self.dim, self.options = z, labels, temperature, dim, options

    def _arguments(self, keys: Shard | None, key_offset: int | None):
        z, labels = keys if keys is not None else (None, None)
        o = self.options
        return (
            self.z, z, self.labels, labels, self.temperature, o.temperature, self.dim, key_offset, o.beta,
            o.normalize, o.ignore_index,
        )  # fmt: skip

    def statistics(self, keys: Shard | None, key_offset: int | None = None) -> Tensor:
        """[9, M]; keys None: the anchors themselves."""
        return _ops.statistics(*self._arguments(keys, key_offset))

    def loss(self, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of the terms (or each one, reduction "none"), their number, the derivatives [5, M]."""
        o = self.options
        return _ops.loss_from_statistics(
            statistics, self.temperature, o.temperature, o.beta, o.summation, o.denominator, o.debias,
            o.detach_weights, "none" if o.reduction == "none" else "sum",
        )  # fmt: skip

    def backward(
        self,
        derivatives: Tensor,
        statistics: Tensor,
        keys: Shard | None,
        key_offset: int | None,
        need_anchors: bool,
        need_keys: bool,
    ) -> tuple[Tensor, Tensor]:
        """dz [M, padded D], dkeys [N, padded D] in the accumulation dtype; unneeded ones have no rows."""
        arguments = self._arguments(keys, key_offset)
        return _ops.statistics_backward(derivatives, statistics, *arguments, need_anchors, need_keys)


class _Merged:
    """Statistics of disjoint key sets, merged in float64 (csrc/family/statistics.h names the rows)."""

    _LOW = 6  # rows 3, 4, 5 are logarithms, rows 6, 7, 8 their low parts

    def __init__(self, first: Tensor):
        self.only: Tensor | None = first
        self.dtype = first.dtype
        self.sums, self.logs = self._wide(first)

    def _wide(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        wide = statistics.double()
        return wide[:3], wide[3 : self._LOW] + wide[self._LOW :]

    def add(self, statistics: Tensor):
        sums, logs = self._wide(statistics)
        self.sums, self.logs, self.only = self.sums + sums, torch.logaddexp(self.logs, logs), None

    def result(self) -> Tensor:
        """[9, M] in the accumulation dtype."""
        if self.only is not None:
            return self.only
        high = self.logs.to(self.dtype)
        low = torch.where(high.isfinite(), self.logs - high, 0).to(self.dtype)
        return torch.cat([self.sums.to(self.dtype), high, low])


class _AcrossRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, embeddings, keys, temperature, labels, key_labels, queue, queue_labels, key_offset, way, sizes,
        options, ranks,
    ):  # fmt: skip
        normalize = options.normalize
        z, norms = _ops.prepare(embeddings, normalize)
        key_z = key_norms = queue_z = None
        if keys is not None:
            key_z, key_norms = _ops.prepare(keys, normalize)
        own = None if keys is None else Shard(key_z, key_labels)
        journey = _WAYS[way](ranks, sizes, options.ignore_index)
        journey.start(own or Shard(z, labels), ())

        contrast = _Contrast(z, labels, temperature, embeddings.shape[1], options)
        merged = _Merged(contrast.statistics(own, key_offset))
        if queue is not None:
            queue_z, _ = _ops.prepare(queue, normalize)
            merged.add(contrast.statistics(Shard(queue_z, queue_labels)))
        for shard in journey.shards():
            merged.add(contrast.statistics(shard))
            del shard
        statistics = merged.result()
        loss, terms, derivatives = contrast.loss(statistics)
        if options.reduction != "none":
            total, terms = ranks.sum(torch.stack([loss, terms]), "the loss").unbind()
            loss = (total / terms.clamp_min(1) if options.reduction == "mean" else total).to(loss.dtype)

        here = loss.new_empty(0)  # saved, it leads back to this node (see only_first_derivative)
        ctx.save_for_backward(
            here, z, norms, key_z, key_norms, temperature, labels, key_labels, queue_z, queue_labels,
            statistics, derivatives, terms, *journey.kept,
        )  # fmt: skip
        ctx.rest = (embeddings.shape[1], key_offset, way, sizes, options, ranks)
        return loss, here

    @staticmethod
    def backward(ctx, grad_loss, _):
        here, *saved = ctx.saved_tensors
        with torch.no_grad():
            grads = _AcrossRanks._backward(ctx, saved, grad_loss)
        present = [i for i, g in enumerate(grads) if g is not None]
        once = only_first_derivative(here, grad_loss, tuple(grads[i] for i in present))
        for i, g in zip(present, once, strict=True):
            grads[i] = g
        return (*grads, *(None,) * 9)

    @staticmethod
    def _backward(ctx, saved, grad_loss) -> list[Tensor | None]:
        (
            z, norms, key_z, key_norms, temperature, labels, key_labels, queue_z, queue_labels, statistics,
            derivatives, terms, *kept,
        ) = saved  # fmt: skip
        dim, key_offset, way, sizes, options, ranks = ctx.rest
        need_embeddings, need_keys, need_temperature = ctx.needs_input_grad[:3]
        self_contrast = key_z is None
        # Whose gradient travels: keys' own, or the embeddings' as keys.
        travelling = need_embeddings if self_contrast else need_keys

        if options.reduction == "none":
            weight = grad_loss
        else:
            # All ranks have returned this loss: its gradient is the sum of what each of them was given.
            weight = ranks.sum(grad_loss, "the loss's gradient")
            if options.reduction == "mean":
                weight = weight / terms.clamp_min(1)
        derivatives = derivatives * weight.to(derivatives.dtype)

        own = None if self_contrast else Shard(key_z, key_labels)
        journey = _WAYS[way](ranks, sizes, options.ignore_index)
        journey.start(own or Shard(z, labels), tuple(kept))
        contrast = _Contrast(z, labels, temperature, dim, options)
        needs = (need_embeddings or need_temperature, travelling)
        dz, dkeys = contrast.backward(derivatives, statistics, own, key_offset, *needs)
        # In self-contrast dz holds both sides; the temperature takes the anchors' side alone.
        keys_side = _dot(z, dz) / 2 if need_temperature and self_contrast else 0
        if queue_z is not None and needs[0]:
            past = Shard(queue_z, queue_labels)
            dz += contrast.backward(derivatives, statistics, past, None, True, False)[0]
        for shard in journey.shards():
            rows, columns = contrast.backward(derivatives, statistics, shard, None, *needs)
            dz += rows
            if travelling:
                journey.give_back(columns)
            del shard, rows, columns  # before the next ones are made
        dtemperature = None
        if need_temperature:
            t = temperature.detach().double().reshape(())
            by_floor = derivatives[4].sum(dtype=torch.float64)
            dtemperature = -(_dot(z, dz) - keys_side + by_floor / t) / t
            dtemperature = dtemperature.to(temperature.dtype).reshape(temperature.shape)
        returned = journey.own_gradient(sizes[ranks.rank])
        if returned is not None:
            (dz if self_contrast else dkeys).add_(returned)
        return [
            _ops.prepare_backward(dz, z, norms, dim, options.normalize) if need_embeddings else None,
            _ops.prepare_backward(dkeys, key_z, key_norms, dim, options.normalize) if need_keys else None,
            dtemperature,
        ]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a.to(b.dtype), b).sum(dtype=torch.float64)


@torch.compiler.disable
def contrastive_loss(
    embeddings: Tensor,
    views: int,
    labels: Tensor | None,
    keys: Tensor | None,
    key_labels: Tensor | None,
    key_offset: int | None,
    queue: tuple[Tensor, Tensor] | None,
    temperature: Tensor | None,
    options: Options,
    way: str,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """What :func:`clce_ext.hard_negative_contrastive_loss` does with ``distributed=way``.

    Args:
        embeddings: [B * V, D]; views: V.
        queue: [Q, D] and [Q]: keys of this rank's anchors alone, constants.
        temperature: a tensor of one element, or None for ``options.temperature``.
    """
    asked_by = f"hard_negative_contrastive_loss(distributed={way!r})"
    if way not in _WAYS:
        refuse(ValueError(f"distributed must be None, 'gather' or 'ring', got {way!r}"), asked_by, group)
    ranks = Ranks(group, asked_by)
    problem = None
    try:
        _ops.check_arguments(
            embeddings.detach(), labels, None if keys is None else keys.detach(), key_labels,
            None if temperature is None else temperature.detach(), options.temperature, views, key_offset,
            options.beta, options.summation, options.denominator, options.debias, options.reduction,
        )  # fmt: skip
    except Exception as error:  # every rank must hear of it
        problem = error
    same = {
        "dtype": str(embeddings.dtype),
        "the embeddings' dim": embeddings.shape[1],
        "labels being given": labels is not None,
        "keys being given": keys is not None,
        "a queue being given": queue is not None,
        **vars(options),
    }
    for name, tensor in (("embeddings", embeddings), ("keys", keys), ("temperature", temperature)):
        needed = tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
        same[f"{name} requiring grad"] = needed
    moving = embeddings if keys is None else keys
    sizes = [rows for rows, _ in ranks.agree(same, (len(moving), 0), embeddings, temperature, problem)]

    if labels is None:
        images = embeddings.shape[0] // views
        labels = key_labels = own_class_labels(images, options.ignore_index, embeddings.device, ranks.rank)
    labels = labels.long().repeat_interleave(views) if views > 1 else labels.long()
    key_labels = None if keys is None else key_labels.long()
    return _AcrossRanks.apply(
        embeddings, keys, temperature, labels, key_labels, *(queue or (None, None)), key_offset, way, sizes,
        options, ranks,
    )[0]  # fmt: skip
