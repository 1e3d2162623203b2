"""A memory bank: embeddings of past batches as further keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clce_ext.arguments import DEFAULTS
from clce_ext.distributed.ranks import gather_rows, refuse
from clce_ext.labels import IGNORED, UNLABELLED, shape_hint

__all__ = ["EmbeddingQueue"]


class EmbeddingQueue(nn.Module):
    """The last ``size`` embeddings and their labels, as keys (XBM, arXiv 1912.06798; MoCo, 1911.05722).

    ``embeddings`` [size, dim] and ``labels`` [size] int64 hold them in no particular order. Shapes never
    change: rows that are not filled yet are zero and labelled ``ignore_index``, which the losses leave
    out. Overwriting an entry overwrites its label too. The buffers, which move with ``.to()`` and are in the
    state dict, are ``embeddings`` and ``classes``: the labels, with a mark of its own for what is ignored.

    It can stand beside the batch, or alone::

        loss = criterion(z, y, queue=queue)                                     # batch and queue are keys
        loss = criterion(z, y, keys=queue.embeddings, key_labels=queue.labels)  # the queue alone is
        queue.enqueue(z, y)                                                     # before or after backward

    Across ranks (``distributed="gather"`` or ``"ring"``), what is given as ``queue=`` stays on its rank: each
    rank's anchors see their own rank's queue. With ``enqueue(..., gather=True)`` on every rank all queues are
    equal, and the loss is that of one process with the whole batch and one queue. ``keys=`` on the other hand
    is every rank's share of the keys: queues filled without ``gather`` then make one bank, W times as large.

    DistributedDataParallel copies rank 0's buffers to all ranks. That suits equal queues; one that is
    filled without ``gather`` must stay outside the wrapped model (or ``broadcast_buffers=False``).

    Args:
        size: number of entries, >= 1.
        dim: columns of the embeddings, >= 1.
        ignore_index: label of empty entries; the loss's own, or the loss refuses the queue.
        dtype, device: of ``embeddings``. The losses take them in the batch's dtype.

    Raises:
        TypeError: size, dim or ignore_index that is no integer, a dtype that is not floating-point.
        ValueError: size or dim below 1.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        ignore_index: int = DEFAULTS.ignore_index,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        for name, value in (("size", size), ("dim", dim), ("ignore_index", ignore_index)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating-point, got {dtype}")
        if size < 1 or dim < 1:
            raise ValueError(f"size and dim must be at least 1, got size={size}, dim={dim}")
        self.ignore_index = ignore_index
        self.register_buffer("embeddings", torch.zeros(size, dim, dtype=dtype, device=device))
        self.register_buffer("classes", torch.full((size,), IGNORED, dtype=torch.int64, device=device))
        # Of all entries ever enqueued; a tensor, so that enqueue never waits for the device.
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=device))
        self.embeddings: Tensor
        self.classes: Tensor
        self.count: Tensor

    @property
    def labels(self) -> Tensor:
        """[size] int64; a copy, which a loss may keep for its backward while the queue moves on."""
        return self.classes.masked_fill(self.classes == IGNORED, self.ignore_index)

    def __len__(self) -> int:
        """Entries filled so far, at most ``size`` (waits for the device)."""
        return min(int(self.count), self.classes.shape[0])

    @torch.no_grad()
    def enqueue(
        self, embeddings: Tensor, labels: Tensor | None = None, *, gather: bool = False, process_group=None
    ) -> None:
        """Puts a batch in the place of the oldest entries; of a batch larger than the queue, its end.

        Args:
            embeddings: [B, D] or [B, V, D], any floating dtype; detached.
            labels: [B] integers. None: entries are negatives for every anchor.
            gather: every rank of the process group calls this, with batches of any size, and all enqueue
                all ranks' batches in rank order.
            process_group: for gather; None is the default group.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit; with gather, on every rank.
            RuntimeError: with gather, a rank that died or did not call in the process group's time.
        """
        if gather:
            call = "EmbeddingQueue.enqueue(gather=True)"
            try:
                own = self._rows(embeddings, labels)
            except (TypeError, ValueError) as problem:
                refuse(problem, call, process_group)
            rows, labels = gather_rows(list(own), call, process_group)
        else:
            rows, labels = self._rows(embeddings, labels)
        size = self.classes.shape[0]
        positions = torch.arange(rows.shape[0], device=self.count.device) + self.count
        self.count += rows.shape[0]
        positions = positions[-size:] % size
        self.embeddings.index_copy_(0, positions, rows[-size:])
        self.classes.index_copy_(0, positions, labels[-size:])

    def _rows(self, embeddings: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """[N, D] and [N] in the buffers' dtype and on their device."""
        dim = self.embeddings.shape[1]
        for name, value in (("embeddings", embeddings), ("labels", labels)):
            if not isinstance(value, Tensor) and (value is not None or name == "embeddings"):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if embeddings.dim() not in (2, 3) or embeddings.shape[-1] != dim:
            raise ValueError(
                f"embeddings must have shape [B, {dim}] or [B, V, {dim}], got {tuple(embeddings.shape)}"
            )
        images = embeddings.shape[0]
        views = embeddings.shape[1] if embeddings.dim() == 3 else 1
        if labels is None:
            labels = torch.full((images,), UNLABELLED, dtype=torch.int64, device=self.classes.device)
        elif labels.shape != (images,):
            hint = shape_hint(labels, embeddings.shape)
            raise ValueError(f"labels must have shape [{images}], got {tuple(labels.shape)}{hint}")
        elif labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integers (class indices), got {labels.dtype}")
        rows = embeddings.detach().reshape(-1, dim).to(self.embeddings)
        labels = labels.to(self.classes).repeat_interleave(views)
        return rows, labels.masked_fill(labels == self.ignore_index, IGNORED)

    def as_keys(self, like: Tensor, labelled: bool, ignore_index: int) -> tuple[Tensor, Tensor]:
        """Keys [size, dim] and labels [size] for a loss on embeddings ``like`` [M, dim].

        Args:
            labelled: the loss has labels. Where it has none, every entry is a negative.
            ignore_index: the loss's.

        Raises:
            ValueError: another ignore_index, number of columns or device than the queue's.
        """
        if ignore_index != self.ignore_index:
            raise ValueError(
                f"queue must have the loss's ignore_index {ignore_index}, which marks empty entries, "
                f"got {self.ignore_index}"
            )
        if like.shape[1] != self.embeddings.shape[1] or like.device != self.embeddings.device:
            raise ValueError(
                f"queue must have the embeddings' {like.shape[1]} columns on {like.device}, "
                f"got {self.embeddings.shape[1]} on {self.embeddings.device}"
            )
        labels = self.labels
        if not labelled:
            labels = labels.masked_fill(labels != ignore_index, UNLABELLED)
        return self.embeddings.to(like.dtype), labels

    def extra_repr(self) -> str:
        size, dim = self.embeddings.shape
        return f"size={size}, dim={dim}, ignore_index={self.ignore_index}"
