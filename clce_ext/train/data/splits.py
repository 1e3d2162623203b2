"""What a run trains on and is judged by: splits without held-out classes, few-shot subsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import TrainConfig
from ..errors import TrainingError, listing
from .images import Images, Source
from .sources import find_split, open_folder, open_splits


@dataclass
class Data:
    """The images of a run. Labels index ``classes``."""

    train: Images
    val: Images
    classes: list[str]


def load_data(config: TrainConfig) -> Data:
    """Reads ``config.data`` and takes the few-shot subset and the held-out classes off it.

    Raises:
        TrainingError: unknown data set, missing or empty folder, classes that differ between the splits,
            fewer images in a class than --shots.
    """
    train, val, classes = open_splits(config)
    held_out = held_out_indices(config.hold_out_classes, classes)
    kept = [i for i in range(len(classes)) if i not in held_out]
    if len(kept) < 2:
        raise TrainingError(
            f"at least two classes are needed to train on, got {listing(classes)} of which "
            f"{len(held_out)} are held out"
        )
    train_indices = np.flatnonzero(np.isin(train.labels, kept))
    if config.shots:
        train_indices = few_shot_subset(train.labels, train_indices, config.shots, config.seed, classes)
    val_indices = np.flatnonzero(np.isin(val.labels, kept))
    return Data(
        train=_relabelled(train, train_indices, kept),
        val=_relabelled(val, val_indices, kept),
        classes=[classes[i] for i in kept],
    )


def load_all_classes(config: TrainConfig, only: Sequence[str] = ()) -> tuple[Images, list[str]]:
    """The validation split with every class, or only those named: what few-shot episodes draw from.

    Where ``config.data`` is a folder of class folders without splits, that folder is the split.
    """
    root = Path(config.data)
    if config.data_is_folder and root.is_dir() and not find_split(root, "val", config.val_split):
        return _select(*open_folder(root), only)
    _, val, classes = open_splits(config)
    return _select(val, classes, only)


def _select(source: Source, classes: list[str], only: Sequence[str]) -> tuple[Images, list[str]]:
    kept = sorted(held_out_indices(only, classes)) if only else list(range(len(classes)))
    indices = np.flatnonzero(np.isin(source.labels, kept))
    return _relabelled(source, indices, kept), [classes[i] for i in kept]


def _relabelled(source: Source, indices: np.ndarray, kept: list[int]) -> Images:
    return Images(source, indices, np.searchsorted(kept, source.labels[indices]).astype(np.int64))


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
    chosen = []
    for label in np.unique(labels[indices]):
        members = indices[labels[indices] == label]
        if len(members) < shots:
            raise TrainingError(
                f"--shots {shots}: class {classes[label]!r} has only {len(members)} training images"
            )
        chosen.append(generator.choice(members, shots, replace=False))
    return np.sort(np.concatenate(chosen))
