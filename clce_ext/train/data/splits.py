"""What a run trains on, is chosen by and judged by: splits without held-out classes, few-shot subsets."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import TrainConfig
from ..errors import TrainingError, listing
from .images import Images, Source, joined
from .sources import holds_splits, is_folder, open_data_set, open_folder

# Of a digest: images of each split whose content is looked at, and bytes at most of each of them.
_SAMPLE, _BYTES = 500, 1 << 20


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
    splits, classes = open_data_set(config)
    held_out = _indices(config.hold_out_classes, classes)
    kept = [i for i in range(len(classes)) if i not in held_out]
    if len(kept) < 2:
        raise TrainingError(
            f"at least two classes are needed to train on, got {listing(classes)} of which "
            f"{len(held_out)} are held out"
        )
    classes = [classes[i] for i in kept]
    parts = {name: _of_classes(source, kept) for name, source in splits.items()}
    train, val, test = map(parts.get, ("train", "val", "test"))
    if config.val_fraction:
        if val is not None and test is not None:
            raise TrainingError(
                f"--val-fraction: {config.data} has a validation split and a test split of its own"
            )
        # The split that would have been watched has nothing to choose any more: it is left to judge.
        test = val if test is None else test
        sizes = _sizes(train)
        if 1 in sizes.values():
            lone = next(classes[label] for label, size in sizes.items() if size == 1)
            raise TrainingError(
                f"--val-fraction: class {lone!r} has only one training image; every class needs one to train "
                "on and one to validate"
            )
        counts = {y: min(max(1, round(config.val_fraction * n)), n - 1) for y, n in sizes.items()}
        held_back = _drawn(train, counts, config.seed, 0x7A11)
        val, train = train.take(held_back), train.take(np.setdiff1d(np.arange(len(train)), held_back))
    if config.shots:
        sizes = _sizes(train)
        for label, size in sizes.items():
            if size < config.shots:
                raise TrainingError(
                    f"--shots {config.shots}: class {classes[label]!r} has only {size} training images; the "
                    f"smallest class allows --shots {min(sizes.values())}"
                )
        train = train.take(_drawn(train, dict.fromkeys(sizes, config.shots), config.seed, 0x5407))
    return Data(train, test if val is None else val, test, classes, "test" if val is None else "val")


def load_classes(
    config: TrainConfig, only: Sequence[str] = (), split: str | None = None
) -> tuple[Images, list[str]]:
    """Images of every class, or of those named, and the class names; no class is held out.

    Of all splits, or of ``split``: "val", "test", or "watched" for the one of the two that training watches.
    Where ``config.data`` is a folder of class folders without splits, all its images are taken.
    """
    root = Path(config.data)
    if is_folder(config.data) and root.is_dir() and not holds_splits(root, config):
        source, classes = open_folder(root, config.max_image_pixels)
    else:
        splits, classes = open_data_set(config)
        if split == "watched":
            split = "val" if "val" in splits else "test"
        chosen = [source for name, source in splits.items() if split in (None, name)]
        if not chosen:
            raise TrainingError(f"--split {split}: {config.data} has no such split")
        source = joined(chosen)
    kept = sorted(_indices(only, classes)) if only else list(range(len(classes)))
    return _of_classes(source, kept), [classes[i] for i in kept]


def _of_classes(source: Source, kept: list[int]) -> Images:
    indices = np.flatnonzero(np.isin(source.labels, kept))
    return Images(source, indices, np.searchsorted(kept, source.labels[indices]).astype(np.int64))


def _indices(names: Sequence[str], classes: Sequence[str]) -> set[int]:
    """Class indices of ``names``; raises TrainingError where a name is none of ``classes``."""
    if unknown := [name for name in names if name not in classes]:
        raise TrainingError(f"unknown class {listing(unknown)}; the classes are {listing(classes)}")
    return {list(classes).index(name) for name in names}


def _sizes(images: Images) -> dict[int, int]:
    """How many images there are of each label that there is."""
    labels, counts = np.unique(images.labels, return_counts=True)
    return dict(zip(labels.tolist(), counts.tolist(), strict=True))


def _drawn(images: Images, counts: dict[int, int], *key: int) -> np.ndarray:
    """Positions of as many images of each label as ``counts`` says, drawn with ``key``; in order."""
    generator = np.random.default_rng(key)
    members = {label: np.flatnonzero(images.labels == label) for label in counts}
    chosen = [generator.choice(members[y], count, replace=False) for y, count in counts.items()]
    return np.sort(np.concatenate(chosen))


def data_digest(data: Data) -> dict[str, str]:
    """What the data is, in words to compare: of the classes and each split, ``"60 images, 3fa4c1d2e5b6"``.

    The digits (SHA-256, cut) are of labels and names in their order and, of files, of sizes; and of the
    first MiB of up to 500 images, evenly spread (of their pixels, where images do not lie in files). The
    folder that holds the data does not count: a file's name is CLASS/FILE.
    """
    found = {"classes": f"{len(data.classes)} classes, {_hash(name.encode() for name in data.classes)}"}
    for name, images in (("train", data.train), ("val", data.val), ("test", data.test)):
        if images is not None:
            found[name] = f"{len(images)} images, {_hash(_parts(images))}"
    return found


def _parts(images: Images) -> Iterable[bytes]:
    source, count = images.source, len(images)
    yield images.labels.astype("<i8").tobytes()
    sampled = set(np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int).tolist())
    for position, index in enumerate(images.indices.tolist()):
        name = source.name(index)
        if source.title:
            yield name.encode()
            if position in sampled:
                yield images.decode(index).tobytes()[:_BYTES]
            continue
        yield os.fsencode("/".join(Path(name).parts[-2:]))
        yield str(os.stat(name).st_size).encode()
        if position in sampled:
            with open(name, "rb") as file:
                yield file.read(_BYTES)


def _hash(parts: Iterable[bytes]) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.hexdigest()[:12]
