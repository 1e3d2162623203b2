"""What a run trains on, is chosen by and judged by: splits without held-out classes, few-shot subsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import TrainConfig
from ..errors import TrainingError, listing
from .images import Images, Source, joined
from .sources import DataSet, holds_splits, open_data_set, open_folder


@dataclass
class Data:
    """The images of a run. Labels index ``classes``.

    ``val`` is what training watches: learning curves are drawn of it, --best-metric and --patience choose by
    it. Where there is no validation split it is the test split, and ``watched`` says so: that may be looked
    at, but must choose nothing.
    """

    train: Images
    val: Images
    test: Images | None
    classes: list[str]
    watched: str  # "val" or "test"

    def split(self, name: str) -> Images:
        """The validation or the test split.

        Raises:
            TrainingError: there is none.
        """
        if name == self.watched:
            return self.val
        if name == "test" and self.test is not None:
            return self.test
        remedy = "--val-fraction" if name == "val" else "--test-split"
        raise TrainingError(f"--split {name}: the data has no such split; see {remedy}")


def load_data(config: TrainConfig) -> Data:
    """Reads ``config.data``; takes validation split, few-shot subset and held-out classes off it.

    Raises:
        TrainingError: unknown data set, missing or empty folder, classes that differ between the splits,
            fewer images in a class than --shots or --val-fraction need.
    """
    data = open_data_set(config)
    held_out = held_out_indices(config.hold_out_classes, data.classes)
    kept = [i for i in range(len(data.classes)) if i not in held_out]
    if len(kept) < 2:
        raise TrainingError(
            f"at least two classes are needed to train on, got {listing(data.classes)} of which "
            f"{len(held_out)} are held out"
        )

    def images(source: Source | None, indices: np.ndarray | None = None) -> Images | None:
        if source is None:
            return None
        return _relabelled(source, _of_classes(source, kept) if indices is None else indices, kept)

    train_indices, val, test = _of_classes(data.train, kept), images(data.val), images(data.test)
    if config.val_fraction:
        train_indices, val_indices = _split_off(data, train_indices, config)
        # The split that would have been watched has nothing to choose any more: it is left to judge.
        val, test = images(data.train, val_indices), val if test is None else test
    if config.shots:
        train_indices = few_shot_subset(
            data.train.labels, train_indices, config.shots, config.seed, data.classes
        )
    return Data(
        train=images(data.train, train_indices),
        val=test if val is None else val,
        test=test,
        classes=[data.classes[i] for i in kept],
        watched="test" if val is None else "val",
    )


def load_classes(
    config: TrainConfig, only: Sequence[str] = (), split: str | None = None
) -> tuple[Images, list[str]]:
    """Images of every class, or of those named, and the class names; no class is held out.

    Of all splits, or of ``split``: "val", "test", or "watched" for the one of the two that training watches.
    Where ``config.data`` is a folder of class folders without splits, all its images are taken.
    """
    root = Path(config.data)
    if config.data_is_folder and root.is_dir() and not holds_splits(root, config):
        source, classes = open_folder(root, config.max_image_pixels)
    else:
        data = open_data_set(config)
        splits = {"train": data.train, "val": data.val, "test": data.test}
        if split == "watched":
            split = "test" if data.val is None else "val"
        chosen = [source for name, source in splits.items() if source is not None and split in (None, name)]
        if not chosen:
            raise TrainingError(f"--split {split}: {config.data} has no such split")
        source, classes = joined(chosen), data.classes
    kept = sorted(held_out_indices(only, classes)) if only else list(range(len(classes)))
    return _relabelled(source, _of_classes(source, kept), kept), [classes[i] for i in kept]


def _of_classes(source: Source, kept: list[int]) -> np.ndarray:
    return np.flatnonzero(np.isin(source.labels, kept))


def _relabelled(source: Source, indices: np.ndarray, kept: list[int]) -> Images:
    return Images(source, indices, np.searchsorted(kept, source.labels[indices]).astype(np.int64))


def _split_off(data: DataSet, indices: np.ndarray, config: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """(what to train on, what to validate on): the latter is ``val_fraction`` of every class, drawn with
    ``seed``."""
    if data.val is not None and data.test is not None:
        raise TrainingError(
            f"--val-fraction: {config.data} has a validation split and a test split of its own"
        )
    generator = np.random.default_rng([config.seed, 0x7A11])
    labels = data.train.labels[indices]
    held_back = []
    for label in np.unique(labels):
        members = indices[labels == label]
        if len(members) < 2:
            raise TrainingError(
                f"--val-fraction: class {data.classes[label]!r} has only one training image; every class "
                "needs one to train on and one to validate"
            )
        count = min(max(1, round(config.val_fraction * len(members))), len(members) - 1)
        held_back.append(generator.choice(members, count, replace=False))
    val = np.sort(np.concatenate(held_back))
    return np.setdiff1d(indices, val), val


def held_out_indices(names: Sequence[str], classes: Sequence[str]) -> set[int]:
    """Class indices of ``names``; raises TrainingError where a name is none of ``classes``."""
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise TrainingError(f"unknown class {listing(unknown)}; the classes are {listing(classes)}")
    return {list(classes).index(name) for name in names}


def few_shot_subset(
    labels: np.ndarray, indices: np.ndarray, shots: int, seed: int, classes: Sequence[str]
) -> np.ndarray:
    """``shots`` of ``indices`` per class, drawn with ``seed``: sorted [classes * shots]."""
    generator = np.random.default_rng([seed, 0x5407])
    counts = np.unique(labels[indices], return_counts=True)[1]
    chosen = []
    for label in np.unique(labels[indices]):
        members = indices[labels[indices] == label]
        if len(members) < shots:
            raise TrainingError(
                f"--shots {shots}: class {classes[label]!r} has only {len(members)} training images; the "
                f"smallest class allows --shots {counts.min()}"
            )
        chosen.append(generator.choice(members, shots, replace=False))
    return np.sort(np.concatenate(chosen))
