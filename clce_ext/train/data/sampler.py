"""Which images form a batch: a function of (seed, epoch) alone, so that an interrupted run repeats it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

from ..config import TrainConfig
from ..errors import TrainingError

ITEM = 64  # images that a loader's process hands over at once, at most


class EpochSampler(Sampler):
    """This process's share of the batches of one epoch, as lists of (index, draw). A loader hands over each
    list as one item: a micro-batch, but no more than ITEM images.

    A batch is of all processes together; their shares differ by one image at most. Plain: a permutation cut
    into batches; the remainder is dropped. Class-balanced: every batch holds ``images_per_class`` images of
    each of ``batch_size / images_per_class`` classes; classes and the images of a class are taken in turn
    from permutations, so that nothing is drawn again before everything was. An image that comes again in an
    epoch has another ``draw``, and so another augmentation.

    Raises:
        TrainingError: fewer images or classes than a batch needs, or fewer images in it than processes.
    """

    def __init__(self, labels: np.ndarray, config: TrainConfig, rank: int = 0, world_size: int = 1) -> None:
        self.labels, self.seed, self.batch_size = labels, config.seed, config.batch_size
        self.images_per_class = config.images_per_class
        self.item_size = min(config.micro_batch_size or ITEM, ITEM)
        self.set_position(0)
        if self.batch_size > len(labels):
            raise TrainingError(
                f"--batch-size {self.batch_size} exceeds the {len(labels)} training images: give at most "
                f"{len(labels)}"
            )
        if self.batch_size < world_size:
            raise TrainingError(
                f"--batch-size {self.batch_size} leaves some of the {world_size} processes without an image"
            )
        if self.images_per_class:
            self._check_balance(np.unique(labels, return_counts=True)[1])
        bounds = [self.batch_size * r // world_size for r in range(world_size + 1)]
        self._shares = [slice(*pair) for pair in itertools.pairwise(bounds)]
        self._own = self._shares[rank]
        self.share = self._own.stop - self._own.start  # this process's images of a batch

    def _check_balance(self, counts: np.ndarray) -> None:
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
        draw, times = self.seed * 1_000_003 + self.epoch, Counter()
        for number, batch in enumerate(batches.tolist()):
            if number >= self.first_batch:
                share = [(image, draw + (times[image] << 40)) for image in batch[self._own]]
                for begin in range(0, self.share, self.item_size):
                    yield share[begin : begin + self.item_size]
            times.update(batch)

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


def _endless(items: np.ndarray, generator: np.random.Generator) -> Callable[[int], np.ndarray]:
    """take(n): n different items, all of them before any comes again (n at most len(items))."""
    queue = generator.permutation(items)

    def take(n: int) -> np.ndarray:
        nonlocal queue
        if len(queue) < n:
            fresh = generator.permutation(items)
            comes_again = np.isin(fresh, queue)
            queue = np.concatenate([queue, fresh[~comes_again], fresh[comes_again]])
        taken, queue = queue[:n], queue[n:]
        return taken

    return take
