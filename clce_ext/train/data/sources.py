"""Data sets by name: digits, letters, folders of class folders, and those that other packages read."""

from __future__ import annotations

import functools
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from timm.utils.misc import natural_key

from .. import letters
from ..config import TrainConfig
from ..errors import TrainingError, listing
from .images import IMAGE_SUFFIXES, Source, open_image
from .packages import (
    NoSplit,
    Opener,
    open_hugging_face,
    open_tensorflow,
    open_torchvision,
    open_webdataset,
)

# What splits are called, the usual names first.
_USUAL = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing", "eval"),
}
_OPENERS = {
    "torchvision:": open_torchvision, "hfds/": open_hugging_face, "tfds/": open_tensorflow,
    "wds/": open_webdataset,
}  # fmt: skip
# Characters by the name of their data set; those for few-shot episodes are none of those to train on.
LETTERS = {"letters": letters.BASE, "letters:novel": letters.NOVEL}


@dataclass
class DataSet:
    """The splits of a data set; it need not have all of them."""

    classes: list[str]
    train: Source
    val: Source | None = None
    test: Source | None = None


def open_data_set(config: TrainConfig) -> DataSet:
    """Opens the splits of ``config.data``: a training split, and at least one of the others, unless a part of
    the training images is to validate (``val_fraction``)."""
    name = config.data
    if name == "digits":
        return _open_digits()
    if name in LETTERS:
        return _open_letters(LETTERS[name], config)
    for prefix, opener_of in _OPENERS.items():
        if name.lower().startswith(prefix):
            return _open_splits(config, opener_of(config))
    return _open_splits(config, functools.partial(_open_folder_split, config))


def _open_splits(config: TrainConfig, opener: Opener) -> DataSet:
    names, found, failures = _split_names(config), {}, {}
    classes: list[str] | None = None
    for split, wanted in names.items():
        for name in wanted:
            try:
                found[split], of_split = opener(name, classes)
                classes = classes or of_split
                break
            except NoSplit as error:
                failures.setdefault(split, error)
    needed = {"train": names["train"]}
    needed |= {s: n for s, n in names.items() if getattr(config, f"{s}_split") in n}  # asked for by name
    if not (found.keys() & {"val", "test"} or config.val_fraction):
        needed["val"] = names["val"] + names["test"]
    for split, wanted in needed.items():
        if split not in found:
            kind = "folder" if config.data_is_folder else "split"
            of = ("train",) if split == "train" else ("val", "test")
            reasons = [str(failures[name]) for name in of if name in failures]
            failure = "; ".join(dict.fromkeys(reasons))
            raise TrainingError(
                f"--data {config.data}: no {'/'.join(wanted)} {kind} in it; {failure} (see --train-split, "
                "--val-split, --val-fraction)"
            )
    if not classes:
        count = 1 + max(int(source.labels.max()) for source in found.values())
        classes = [str(label) for label in range(count)]
    return DataSet(classes, **found)


def _split_names(config: TrainConfig) -> dict[str, tuple[str, ...]]:
    """The names to look for, by what the split is for: train, val, test.

    A validation split that is wanted under a name of a test split is a test split.
    """
    given = {split: getattr(config, f"{split}_split") for split in _USUAL}
    names = {split: (given[split],) if given[split] else usual for split, usual in _USUAL.items()}
    if given["val"] in _USUAL["test"] and given["test"] in (None, given["val"]):
        names |= {"val": (), "test": (given["val"],)}
    return names


def _open_digits() -> DataSet:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: 1,197 to train, 600 to validate."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).astype(np.uint8)  # [N, 8, 8], from 0..16
    labels = digits.target.astype(np.int64)
    parts = train_test_split(np.arange(len(labels)), test_size=600, stratify=labels, random_state=0)
    train, val = (Source(pixels[part], _array_image, labels[part], "digits") for part in parts)
    return DataSet([str(i) for i in range(10)], train, val)


def _open_letters(characters: str, config: TrainConfig) -> DataSet:
    """Drawn, the same ones for every seed of a run; no font is in two splits."""
    judged = max(1, config.letter_images // 5)
    splits = {}
    for split, count in (("train", config.letter_images), ("val", judged), ("test", judged)):
        drawn = letters.draw(split, characters, count, config.letter_size, folder=config.fonts)
        splits[split] = Source(drawn.pixels, _array_image, drawn.labels, config.data)
    return DataSet(list(characters), **splits)


# Folders


def _open_folder_split(config: TrainConfig, name: str, classes: list[str] | None) -> tuple[Source, list[str]]:
    root = Path(config.data)
    if not root.is_dir():
        raise TrainingError(
            f"--data {root}: no such directory; give digits, torchvision:NAME, hfds/NAME, tfds/NAME, wds/, "
            "letters, letters:novel or a directory with train/ and val/"
        )
    folder = root / name
    if not folder.is_dir():
        found = sorted(p.name for p in root.iterdir() if p.is_dir())
        raise NoSplit(
            f"it holds {listing(found) or 'no folders'}. Wanted: {root}/train/CLASS/*.jpg and "
            f"{root}/val/CLASS/*.jpg"
        )
    return open_folder(folder, config.max_image_pixels, classes)


def holds_splits(root: Path, config: TrainConfig) -> bool:
    """Whether ``root`` holds folders of splits, not of classes."""
    return any((root / name).is_dir() for names in _split_names(config).values() for name in names)


def _class_folders(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise TrainingError(f"{folder}: the folder name {os.fsencode(name)!r} is not UTF-8") from None
    return names


def open_folder(folder: Path, max_pixels: int, classes: list[str] | None = None) -> tuple[Source, list[str]]:
    """The images under ``folder``/CLASS/, and the class names, in the order of ``classes`` where given.

    Raises:
        TrainingError: a class without images, links that lead round in a circle, images that are no files.
    """
    found = _class_folders(folder)
    files, passed_over = image_files(folder)
    if loose := [os.path.basename(path) for path, name in files if name == ""]:
        raise TrainingError(
            f"{folder}: images lie directly in it ({listing(loose, 3)}); each must lie in the folder of its "
            f"class: {folder}/CLASS/IMAGE"
        )
    if not found:
        raise TrainingError(f"{folder}: empty: no class folders in it")
    sides = {"missing": set(classes) - set(found), "only": set(found) - set(classes)} if classes else {}
    if odd := [f"{side} in {folder}: {listing(sorted(of))}" for side, of in sides.items() if of]:
        raise TrainingError(
            f"--data {folder.parent}: the splits must have the same class folders; {'; '.join(odd)}"
        )
    tops = {os.path.relpath(path, folder).split(os.sep, 1)[0] for path, _ in files}
    if empty := [name for name in found if name not in tops]:
        raise TrainingError(f"{folder / empty[0]}: no images in this class folder")
    holding = {name for _, name in files}
    # Names that differ in case alone are ordered by their letters, so that every process has the same order.
    names = classes or sorted(holding, key=lambda name: (natural_key(name), name))
    if odd := sorted(holding ^ set(names)):
        raise TrainingError(
            f"{folder}: images must lie in CLASS/IMAGE; folders that do not fit: {listing(odd)}"
        )
    index = {name: i for i, name in enumerate(names)}
    labels = np.array([index[name] for _, name in files], dtype=np.int64)
    read = functools.partial(open_image, max_pixels)
    return Source([path for path, _ in files], read, labels, passed_over=passed_over), names


def image_files(folder: Path) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(path, name of the folder it lies in, "" for ``folder`` itself) of all images, in their natural order;
    and how many files of other kinds there are, by kind.

    Raises:
        TrainingError: links that lead round in a circle, images that are no files.
    """
    images, others = [], Counter()
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        _check_links(Path(root), folders)
        label = "" if root == str(folder) else os.path.basename(root)
        for name in files:
            path, suffix = os.path.join(root, name), os.path.splitext(name)[1].lower()
            if name.startswith("."):
                others["hidden"] += 1
            elif suffix not in IMAGE_SUFFIXES:
                others[suffix or "without suffix"] += 1
            elif os.path.isfile(path):
                images.append((path, label))
            else:
                what = "a link to nothing" if os.path.islink(path) else "a pipe, socket or device"
                raise TrainingError(f"{path}: {what}, not a file: remove it")
    return sorted(images, key=lambda image: (natural_key(image[0]), image[0])), dict(others)


def _check_links(root: Path, folders: list[str]) -> None:
    for path in (root / name for name in folders):
        if path.is_symlink() and path.resolve() in {above.resolve() for above in (root, *root.parents)}:
            raise TrainingError(
                f"{path}: a link to {path.resolve()}, in which it lies, leads round in a circle: remove it"
            )


def _array_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).convert("RGB")
