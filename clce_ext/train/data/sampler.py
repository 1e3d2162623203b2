"""Which images form a batch: a function of (seed, epoch) alone, so that an interrupted run repeats it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

from ..errors import TrainingError


class EpochSampler(Sampler):
    """This process's batches of one epoch, as lists of (index, draw).

    Plain: a permutation cut into global batches; the remainder is dropped. Class-balanced: every global batch
    holds ``images_per_class`` images of each of ``global batch / images_per_class`` classes; classes and the
    images of a class are taken in turn from permutations, so that nothing is drawn again before everything
    was.

    Raises:
        TrainingError: fewer images or classes than one global batch needs.
    """

    def __init__(
        self,
        labels: np.ndarray,
        batch_size: int,
        images_per_class: int | None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.labels = labels
        self.batch_size = batch_size
        self.images_per_class = images_per_class
        self.seed = seed
        self.rank = rank
        self.global_batch = batch_size * world_size
        self.epoch = 0
        self.first_batch = 0
        if len(labels) < self.global_batch:
            raise TrainingError(
                f"--batch-size {batch_size} x {world_size} process(es) exceeds the {len(labels)} training "
                "images"
            )
        if images_per_class:
            self._check_balance()

    def _check_balance(self) -> None:
        counts = np.bincount(self.labels)
        counts = counts[counts > 0]
        per_batch = self.global_batch // self.images_per_class
        if per_batch > len(counts):
            least = -(-self.global_batch // len(counts))
            enough = [k for k in range(least, self.batch_size + 1) if self.batch_size % k == 0]
            advice = f"--images-per-class {enough[0]} would do, or " if enough else ""
            raise TrainingError(
                f"batches of {self.global_batch} images with --images-per-class {self.images_per_class} need "
                f"{per_batch} classes; there are {len(counts)}: {advice}a smaller --batch-size"
            )
        if counts.min() < self.images_per_class:
            raise TrainingError(
                f"--images-per-class {self.images_per_class}: the smallest class has {counts.min()} images, "
                "which is the most to ask for"
            )

    def __len__(self) -> int:
        return len(self.labels) // self.global_batch

    def set_position(self, epoch: int, first_batch: int = 0) -> None:
        """The next iteration gives batches ``first_batch``... of ``epoch``."""
        self.epoch, self.first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = np.random.default_rng([self.seed, self.epoch, 0xBA7C4])
        batches = self._balanced(generator) if self.images_per_class else self._shuffled(generator)
        draw = self.seed * 1_000_003 + self.epoch
        begin = self.rank * self.batch_size
        for batch in batches[self.first_batch :]:
            yield [(int(i), draw) for i in batch[begin : begin + self.batch_size]]

    def _shuffled(self, generator: np.random.Generator) -> np.ndarray:
        order = generator.permutation(len(self.labels))
        return order[: len(self) * self.global_batch].reshape(len(self), self.global_batch)

    def _balanced(self, generator: np.random.Generator) -> np.ndarray:
        members = [_endless(np.flatnonzero(self.labels == c), generator) for c in np.unique(self.labels)]
        class_order = _endless(np.arange(len(members)), generator)
        batches = []
        for _ in range(len(self)):
            classes = class_order(self.global_batch // self.images_per_class)
            batches.append(np.concatenate([members[c](self.images_per_class) for c in classes]))
        return np.stack(batches)


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
