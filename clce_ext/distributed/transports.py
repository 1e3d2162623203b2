"""How the keys of every rank reach the others, and how the gradients of the keys come home.

* ``"gather"``: all keys come in one all_gather and stay for the backward; their gradients go back to their
  owners in one reduce_scatter. Memory O(B D), B the whole batch.
* ``"ring"``: the keys of one rank at a time come from the left-hand neighbour, the next ones in flight while
  these are used. In the backward they go round once more, and their gradient follows one step behind,
  growing at every rank until it is home. Memory O(B_local D).

Both are used alike, once in the forward and, as a new object, once in the backward::

    transport.start(own, gathered)          # gathered: what the forward's transport has kept, or None
    for keys in transport.shards():         # the other ranks' keys
        transport.give_back(gradient)       # in the backward: of the keys last taken
    transport.own_gradient(count)           # what the other ranks gave back for this rank's keys
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from clce_ext.distributed.ranks import Ranks, padded_rows


class Shard(NamedTuple):
    """Keys of one rank, or of several."""

    z: Tensor  # [N, padded D], as clce_ext::prepare makes them
    labels: Tensor  # [N] int64


class Gather:
    """All keys at once, each rank's padded to the largest one's with rows that count for nothing."""

    def __init__(self, ranks: Ranks, sizes: list[int], ignore_index: int):
        self.ranks, self.rows, self.ignore_index = ranks, max(sizes), ignore_index
        self.alone = ranks.size == 1 or self.rows == 0
        self.works: list[dist.Work] = []
        self.gathered: Shard | None = None  # of all ranks
        self.gradient: Tensor | None = None

    def start(self, own: Shard, gathered: Shard | None):
        if self.alone:
            return
        if gathered is not None:
            self.gathered = gathered
            return
        z, z_work = self.ranks.all_gather(padded_rows(own.z, self.rows, 0), "keys")
        labels, labels_work = self.ranks.all_gather(
            padded_rows(own.labels, self.rows, self.ignore_index), "labels"
        )
        self.gathered, self.works = Shard(z, labels), [z_work, labels_work]

    def shards(self) -> Iterator[Shard]:
        """The other ranks' keys: those before this rank, those after it."""
        if self.alone:
            return
        with self.ranks.exchanging("keys"):
            for work in self.works:
                work.wait()
        begin = self.ranks.rank * self.rows
        for block in (slice(0, begin), slice(begin + self.rows, None)):
            shard = Shard(self.gathered.z[block], self.gathered.labels[block])
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
        total = self.ranks.reduce_scatter(self.gradient, "gradients of keys")
        self.gradient = None
        return total[:count]


class _Transfer(NamedTuple):
    """Tensors on their way; what is sent must live until the works are done."""

    received: tuple[Tensor, ...]
    works: list[dist.Work]
    sent: tuple[Tensor, ...]


class Ring:
    """The keys of one rank at a time, from the left-hand neighbour."""

    gathered = None  # nothing stays for the backward

    def __init__(self, ranks: Ranks, sizes: list[int], ignore_index: int):
        self.ranks, self.sizes = ranks, sizes
        self.coming: _Transfer | None = None
        self.gradient: _Transfer | None = None

    def _pass_on(self, sent: tuple[Tensor, ...], rows: int, tag: int, what: str) -> _Transfer:
        """Sends to the right; the same kind of tensors with ``rows`` rows will come from the left."""
        ranks = self.ranks
        received = tuple(t.new_empty((rows, *t.shape[1:])) for t in sent)
        messages = []
        for i, (out, into) in enumerate(zip(sent, received, strict=True)):
            for operation, tensor, peer in (
                (dist.isend, out, ranks.rank + 1),
                (dist.irecv, into, ranks.rank - 1),
            ):
                if tensor.numel():
                    peer %= ranks.size
                    messages.append(
                        dist.P2POp(operation, tensor, group=ranks.group, tag=tag + i, group_peer=peer)
                    )
        with ranks.exchanging(what):
            return _Transfer(received, dist.batch_isend_irecv(messages) if messages else [], sent)

    def _arrived(self, transfer: _Transfer, what: str) -> tuple[Tensor, ...]:
        with self.ranks.exchanging(what):
            for work in transfer.works:
                work.wait()
        return transfer.received

    def start(self, own: Shard, gathered: None):
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
        rows, tag = self.sizes[self.owner - 1], len(Shard._fields)
        self.gradient = self._pass_on((gradient,), rows, tag, "gradients of keys")

    def own_gradient(self, count: int) -> Tensor | None:
        """What the other ranks gave back for this rank's keys, [count, padded D]."""
        if self.gradient is None:
            return None
        return self._arrived(self.gradient, "gradients of keys")[0]


TRANSPORTS = {"gather": Gather, "ring": Ring}
