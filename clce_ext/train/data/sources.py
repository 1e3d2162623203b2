"""Data sets by name: digits, letters, folders of class folders, and those of other packages."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from timm.utils.misc import natural_key

from .. import letters
from ..config import TrainConfig
from ..errors import TrainingError, listing
from .images import Source
from .packages import NoSplit, Opened, open_hugging_face, open_tensorflow, open_torchvision

# What splits are called, the usual names first.
_USUAL = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing", "eval"),
}
# Of folders. Files of other kinds are passed over and counted, and so is what a system hides, such as the
# ._photo.jpg that macOS leaves beside photo.jpg.
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# What opens data sets whose names begin so.
_OF_PACKAGES = {
    "torchvision:": open_torchvision, "hfds/": open_hugging_face, "wds/": open_hugging_face,
    "tfds/": open_tensorflow,
}  # fmt: skip
# Characters by the name of their data set; those for few-shot episodes are none of those to train on.
LETTERS = {"letters": letters.BASE, "letters:novel": letters.NOVEL}


def open_data_set(config: TrainConfig) -> tuple[dict[str, Source], list[str]]:
    """The splits of ``config.data`` by name, and its classes: train, and at least one of val and test, unless
    a part of the training images is to validate (``val_fraction``)."""
    names, found, failures, classes = _split_names(config), {}, {}, None
    opener = _opener(config.data)
    for split, wanted in names.items():
        for name in wanted:
            try:
                # The classes of the training split, where these are known, are those of the others.
                found[split], of_split = opener(config, name, classes)
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
            kind = "folder" if is_folder(config.data) else "split"
            of = ("train",) if split == "train" else ("val", "test")
            failure = "; ".join(dict.fromkeys(str(failures[name]) for name in of if name in failures))
            raise TrainingError(
                f"--data {config.data}: no {'/'.join(wanted)} {kind} in it; {failure} (see --train-split, "
                "--val-split, --val-fraction)"
            )
    if not classes:
        count = 1 + max(int(source.labels.max()) for source in found.values())
        classes = [str(label) for label in range(count)]
    return found, classes


def _opener(name: str) -> Callable[[TrainConfig, str, list[str] | None], Opened]:
    """What opens a split by its name, with the classes of the training split where these are known."""
    if name == "digits":
        return _digits
    if name in LETTERS:
        return _letters
    begins = (opener for prefix, opener in _OF_PACKAGES.items() if name.lower().startswith(prefix))
    return next(begins, _folder)


def is_folder(name: str) -> bool:
    """Whether a data set's name is that of a directory."""
    return _opener(name) is _folder


def _split_names(config: TrainConfig) -> dict[str, tuple[str, ...]]:
    """The names to look for, by what the split is for: train, val, test.

    A validation split that is wanted under a name of a test split is a test split.
    """
    given = {split: getattr(config, f"{split}_split") for split in _USUAL}
    names = {split: (given[split],) if given[split] else usual for split, usual in _USUAL.items()}
    if given["val"] in _USUAL["test"] and given["test"] in (None, given["val"]):
        names |= {"val": (), "test": (given["val"],)}
    return names


def _digits(config: TrainConfig, split: str, classes: list[str] | None) -> Opened:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: 1,197 to train, 600 to validate."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if split not in ("train", "val"):
        raise NoSplit("it has train and val")
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).astype(np.uint8)  # [N, 8, 8], from 0..16
    labels = digits.target.astype(np.int64)
    parts = train_test_split(np.arange(len(labels)), test_size=600, stratify=labels, random_state=0)
    part = parts[split == "val"]
    return Source(pixels[part], labels[part], "digits"), [str(i) for i in range(10)]


def _letters(config: TrainConfig, split: str, classes: list[str] | None) -> Opened:
    """Drawn, the same ones for every seed of a run; no font is in two splits."""
    if split not in letters.SPLITS:
        raise NoSplit(f"it has {listing(letters.SPLITS)}")
    count = config.letter_images if split == "train" else max(1, config.letter_images // 5)
    drawn = letters.draw(split, LETTERS[config.data], count, config.letter_size, folder=config.fonts)
    return Source(drawn.pixels, drawn.labels, config.data), drawn.classes


def _folder(config: TrainConfig, split: str, classes: list[str] | None) -> Opened:
    root = Path(config.data)
    if not root.is_dir():
        raise TrainingError(
            f"--data {root}: no such directory; give digits, torchvision:NAME, hfds/NAME, tfds/NAME, wds/, "
            "letters, letters:novel or a directory with train/ and val/"
        )
    if not (root / split).is_dir():
        found = sorted(p.name for p in root.iterdir() if p.is_dir())
        raise NoSplit(
            f"it holds {listing(found) or 'no folders'}. Wanted: {root}/train/CLASS/*.jpg and "
            f"{root}/val/CLASS/*.jpg"
        )
    return open_folder(root / split, config.max_image_pixels, classes)


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


def open_folder(folder: Path, max_pixels: int, classes: list[str] | None = None) -> Opened:
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
    holding = {name for _, name in files}
    if empty := [name for name in found if name not in holding]:
        raise TrainingError(f"{folder / empty[0]}: no images in this class folder")
    # Names that differ in case alone are ordered by their letters, so that every process has the same order.
    names = classes or sorted(found, key=lambda name: (natural_key(name), name))
    index = {name: i for i, name in enumerate(names)}
    labels = np.array([index[name] for _, name in files], dtype=np.int64)
    paths = [path for path, _ in files]
    return Source(paths, labels, max_pixels=max_pixels, passed_over=passed_over), names


def image_files(folder: Path) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(path, name of the folder in ``folder`` that it lies in, "" for ``folder`` itself) of all images, in
    their natural order; and how many files of other kinds there are, by kind.

    Raises:
        TrainingError: links that lead round in a circle, images that are no files.
    """
    images, others = [], Counter()
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        _check_links(Path(root), folders)
        label = "" if root == str(folder) else os.path.relpath(root, folder).partition(os.sep)[0]
        for name in files:
            path, suffix = os.path.join(root, name), os.path.splitext(name)[1].lower()
            if name.startswith("."):
                others["hidden"] += 1
            elif suffix not in _IMAGE_SUFFIXES:
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
