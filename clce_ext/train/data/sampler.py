"""Which images form a batch: a function of (seed, epoch) alone, so that an interrupted run repeats it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

from ..errors import TrainingError


class EpochSampler(Sampler):
    """This process's share of the batches of one epoch, as lists of at most ``item_size`` (index, draw).

    A batch is of all processes together; their shares differ by one image at most. Plain: a permutation cut
    into batches; the remainder is dropped. Class-balanced: every batch holds ``images_per_class`` images of
    each of ``batch_size / images_per_class`` classes; classes and the images of a class are taken in turn
    from permutations, so that nothing is drawn again before everything was. An image that comes again in an
    epoch has another ``draw``, and so another augmentation.

    Raises:
        TrainingError: fewer images or classes than a batch needs, or fewer images in it than processes.
    """

    def __init__(
        self,
        labels: np.ndarray,
        batch_size: int,
        images_per_class: int | None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        item_size: int | None = None,
    ) -> None:
        self.labels, self.seed = labels, seed
        self.batch_size, self.images_per_class = batch_size, images_per_class
        self.item_size = item_size or batch_size
        self.set_position(0)
        if batch_size > len(labels):
            raise TrainingError(f"--batch-size {batch_size} exceeds the {len(labels)} training images")
        if batch_size < world_size:
            raise TrainingError(
                f"--batch-size {batch_size} leaves some of the {world_size} processes without an image"
            )
        if images_per_class:
            self._check_balance()
        bounds = [batch_size * r // world_size for r in range(world_size + 1)]
        self._shares = [slice(*pair) for pair in itertools.pairwise(bounds)]
        self._own = self._shares[rank]
        self.share = self._own.stop - self._own.start  # this process's images of a batch

    def _check_balance(self) -> None:
        counts = np.unique(self.labels, return_counts=True)[1]
        if counts.min() < self.images_per_class:
            raise TrainingError(
                f"--images-per-class {self.images_per_class}: the smallest class has {counts.min()} images, "
                "which is the most to ask for"
            )
        per_batch = self.batch_size // self.images_per_class
        if per_batch > len(counts):
            least = -(-self.batch_size // len(counts))
            enough = [k for k in range(least, counts.min() + 1) if self.batch_size % k == 0]
            remedies = [f"--images-per-class {k} or " for k in enough[:1]]
            raise TrainingError(
                f"batches of {self.batch_size} images with --images-per-class {self.images_per_class} need "
                f"{per_batch} classes; there are {len(counts)}: {''.join(remedies)}--batch-size "
                f"{self.images_per_class * len(counts)} would do"
            )

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return len(self.labels) // self.batch_size

    def __len__(self) -> int:
        return self.steps * -(-self.share // self.item_size)

    def set_position(self, epoch: int, first_batch: int = 0) -> None:
        """The next iteration gives batches ``first_batch``... of ``epoch``."""
        self.epoch, self.first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = np.random.default_rng([self.seed, self.epoch, 0xBA7C4])
        batches = self._balanced(generator) if self.images_per_class else self._shuffled(generator)
        times = _times_before(batches.ravel()).reshape(batches.shape)
        draw = self.seed * 1_000_003 + self.epoch
        for batch, again in zip(batches[self.first_batch :], times[self.first_batch :], strict=True):
            own = zip(batch[self._own].tolist(), again[self._own].tolist(), strict=True)
            share = [(image, draw + (n << 40)) for image, n in own]
            for begin in range(0, self.share, self.item_size):
                yield share[begin : begin + self.item_size]

    def _shuffled(self, generator: np.random.Generator) -> np.ndarray:
        order = generator.permutation(len(self.labels))
        return order[: self.steps * self.batch_size].reshape(self.steps, self.batch_size)

    def _balanced(self, generator: np.random.Generator) -> np.ndarray:
        by_class = np.split(np.argsort(self.labels, kind="stable"), np.cumsum(np.bincount(self.labels))[:-1])
        members = [_endless(images, generator) for images in by_class if len(images)]
        class_order = _endless(np.arange(len(members)), generator)
        batches = []
        for _ in range(self.steps):
            classes = class_order(self.batch_size // self.images_per_class)
            batches.append(np.concatenate([members[c](self.images_per_class) for c in classes]))
        batches = np.stack(batches)
        # A process keeps the images of few classes together, for who contrasts within a process; but in no
        # order, for mixup takes neighbours.
        for share in self._shares:
            batches[:, share] = generator.permuted(batches[:, share], axis=1)
        return batches


def _times_before(values: np.ndarray) -> np.ndarray:
    """[N] How often each of the values [N] came before."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.searchsorted(ordered, ordered)  # where the run of equal values begins
    times = np.empty(len(values), dtype=np.int64)
    times[order] = np.arange(len(values)) - first
    return times


def _endless(items: np.ndarray, generator: np.random.Generator) -> Callable[[int], np.ndarray]:
    """take(n): n different items, all of them before any comes again (n at most len(items))."""
    queue = generator.permutation(items)

    def take(n: int) -> np.ndarray:
        nonlocal queue
        if len(queue) < n:
            fresh = generator.permutation(items)
            queue = np.concatenate([queue, fresh[~np.isin(fresh, queue)], fresh[np.isin(fresh, queue)]])
        taken, queue = queue[:n], queue[n:]
        return taken

    return take
