"""Data sets by name: digits, letters, folders of class folders, torchvision's and Hugging Face's."""

from __future__ import annotations

import functools
import inspect
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from PIL import Image
from timm.data import create_dataset
from timm.utils.misc import natural_key

from .. import letters
from ..config import TrainConfig
from ..errors import TrainingError, listing
from .images import Source, read_image, rgb

# What splits are called, the usual names first.
_TRAIN = ("train", "training", "trainval")
_VAL = ("val", "valid", "validation")
_TEST = ("test", "testing", "eval")


# Of folders. Files of other kinds are passed over and counted, and so is what a system hides, such as the
# ._photo.jpg that macOS leaves beside photo.jpg.
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

# Data sets that timm reads, by the beginnings of their names, with the package that each of them needs.
OF_TIMM = ("hfds/", "tfds/", "wds/")
_PACKAGES = {"hfds/": "datasets", "tfds/": "tensorflow-datasets", "wds/": "webdataset"}

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
    if name.startswith("torchvision:"):
        return _open_torchvision(name.partition(":")[2], config)
    if name.lower().startswith(OF_TIMM):
        return _open_timm(name, config)
    return _open_folders(Path(name), config)


def _split_names(config: TrainConfig) -> dict[str, tuple[str, ...]]:
    """The names to look for, by what the split is for: train, val, test.

    A validation split that is wanted under a name of a test split is a test split.
    """
    val, test = config.val_split, config.test_split
    if val in _TEST and test in (None, val):
        val, test = None, val
        return {"train": _wanted(config.train_split, _TRAIN), "val": (), "test": (test,)}
    return {
        "train": _wanted(config.train_split, _TRAIN),
        "val": _wanted(val, _VAL),
        "test": _wanted(test, _TEST),
    }


def _wanted(name: str | None, usual: tuple[str, ...]) -> tuple[str, ...]:
    return (name,) if name else usual


def _open_digits() -> DataSet:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: 1,197 to train, 600 to validate."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).astype(np.uint8)  # [N, 8, 8], from 0..16
    labels = digits.target.astype(np.int64)
    parts = train_test_split(np.arange(len(labels)), test_size=600, stratify=labels, random_state=0)
    train, val = (
        Source(
            image=functools.partial(_array_image, pixels[part]),
            labels=labels[part],
            name=functools.partial(_numbered, "digits", part),
        )
        for part in parts
    )
    return DataSet([str(i) for i in range(10)], train, val)


def _open_letters(characters: str, config: TrainConfig) -> DataSet:
    """Drawn, the same ones for every seed of a run; no font is in two splits."""

    def source(split: str, images_per_class: int) -> Source:
        drawn = letters.draw(split, characters, images_per_class, config.letter_size, folder=config.fonts)
        return Source(
            image=functools.partial(_array_image, drawn.pixels),
            labels=drawn.labels,
            name=functools.partial(_numbered, config.data, range(len(drawn.labels))),
        )

    judged = max(1, config.letter_images // 5)
    return DataSet(
        list(characters), source("train", config.letter_images), source("val", judged), source("test", judged)
    )


def _open_folders(root: Path, config: TrainConfig) -> DataSet:
    if not root.is_dir():
        raise TrainingError(
            f"--data {root}: no such directory; give digits, torchvision:NAME, hfds/NAME, tfds/NAME, wds/, "
            "letters, letters:novel or a directory with train/ and val/"
        )
    names = _split_names(config)
    folders = {split: _find_folder(root, wanted) for split, wanted in names.items()}
    needed = {"train": names["train"]}
    needed |= {s: n for s, n in names.items() if getattr(config, f"{s}_split") in n}  # asked for by name
    if not (folders["val"] or folders["test"] or config.val_fraction):
        needed["val"] = names["val"] + names["test"]
    for split, wanted in needed.items():
        if folders[split] is None:
            found = sorted(p.name for p in root.iterdir() if p.is_dir())
            raise TrainingError(
                f"--data {root}: no {'/'.join(wanted)} folder in it; it holds "
                f"{listing(found) or 'no folders'}. Wanted: {root}/train/CLASS/*.jpg and "
                f"{root}/val/CLASS/*.jpg, or --val-fraction"
            )
    train, classes = open_folder(folders["train"], config.max_image_pixels)
    val, test = (
        _open_same_classes(folders[split], folders["train"], config.max_image_pixels, classes)
        if folders[split]
        else None
        for split in ("val", "test")
    )
    return DataSet(classes, train, val, test)


def _open_same_classes(folder: Path, train: Path, max_pixels: int, classes: list[str]) -> Source:
    found = _class_folders(folder)
    missing = sorted(set(classes) - set(found))
    unknown = sorted(set(found) - set(classes))
    if missing or unknown:
        sides = [f"missing in {folder}: {listing(missing)}"] if missing else []
        sides += [f"missing in {train}: {listing(unknown)}"] if unknown else []
        raise TrainingError(
            f"--data {folder.parent}: the splits must have the same class folders; {'; '.join(sides)}"
        )
    return open_folder(folder, max_pixels, classes)[0]


def holds_splits(root: Path, config: TrainConfig) -> bool:
    """Whether ``root`` holds folders of splits, not of classes."""
    return any(_find_folder(root, names) for names in _split_names(config).values())


def _find_folder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


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
    loose = [path for path, name in files if name == ""]
    if loose:
        raise TrainingError(
            f"{folder}: images lie directly in it ({listing([os.path.basename(p) for p in loose], 3)}); each "
            f"must lie in the folder of its class: {folder}/CLASS/IMAGE"
        )
    if not found:
        raise TrainingError(f"{folder}: empty: no class folders in it")
    holding = {name for _, name in files}
    tops = {os.path.relpath(path, folder).split(os.sep, 1)[0] for path, _ in files}
    for name in found:
        if name not in tops:
            raise TrainingError(f"{folder / name}: no images in this class folder")
    # Names that differ in case alone are ordered by their letters, so that every process has the same order.
    names = classes or sorted(holding, key=lambda name: (natural_key(name), name))
    if holding != set(names):
        odd = listing(sorted(holding ^ set(names)))
        raise TrainingError(f"{folder}: images must lie in CLASS/IMAGE; folders that do not fit: {odd}")
    index = {name: i for i, name in enumerate(names)}
    samples = [(path, index[name]) for path, name in files]
    source = Source(
        image=functools.partial(file_image, samples, max_pixels),
        labels=np.array([label for _, label in samples], dtype=np.int64),
        name=functools.partial(sample_name, samples),
        in_files=True,
        passed_over=passed_over,
    )
    return source, list(names)


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
            suffix = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                others["hidden"] += 1
            elif suffix in _IMAGE_SUFFIXES:
                path = os.path.join(root, name)
                if not os.path.isfile(path):
                    what = "a link to nothing" if os.path.islink(path) else "a pipe, socket or device"
                    raise TrainingError(f"{path}: {what}, not a file: remove it")
                images.append((path, label))
            else:
                others[suffix or "without suffix"] += 1
    return sorted(images, key=lambda image: (natural_key(image[0]), image[0])), dict(others)


def _check_links(root: Path, folders: list[str]) -> None:
    for path in (root / name for name in folders):
        if path.is_symlink() and path.resolve() in {above.resolve() for above in (root, *root.parents)}:
            raise TrainingError(
                f"{path}: a link to {path.resolve()}, in which it lies, leads round in a circle: remove it"
            )


def _open_torchvision(name: str, config: TrainConfig) -> DataSet:
    available = [n for n in torchvision.datasets.__all__ if inspect.isclass(getattr(torchvision.datasets, n))]
    if name not in available:
        raise TrainingError(
            f"--data torchvision:{name}: no such data set; torchvision has {', '.join(available)}"
        )
    make = getattr(torchvision.datasets, name)
    parameters = inspect.signature(make).parameters
    if "train" not in parameters and "split" not in parameters:
        raise TrainingError(f"--data torchvision:{name}: has no splits to train and validate on")
    root = config.data_dir or "data"
    options: dict[str, Any] = {"root": root} | (
        {"download": config.download} if "download" in parameters else {}
    )

    def first_of(names: Sequence[str], needed: bool) -> Any:
        failure: Exception | None = None
        for split in names:
            try:
                return make(split=split, **options)
            except ValueError as error:  # an unknown split
                failure = error
        if needed:
            raise TrainingError(f"--data torchvision:{name}: {failure}; see --train-split and --val-split")
        return None

    try:
        if "train" in parameters:
            splits = {"train": make(train=True, **options), "test": make(train=False, **options)}
        else:
            names = _split_names(config)
            splits = {
                s: first_of(n, s == "train" or getattr(config, f"{s}_split") in n) for s, n in names.items()
            }
            if not (splits["val"] or splits["test"] or config.val_fraction):
                first_of(names["val"] + names["test"], needed=True)
    except TrainingError:
        raise
    except (RuntimeError, OSError) as error:
        raise TrainingError(
            f"--data torchvision:{name} in {root}: {error} (see --data-dir, --download)"
        ) from None
    sources = {
        s: _torchvision_source(split, name, config.max_image_pixels)
        for s, split in splits.items()
        if split is not None
    }
    count = 1 + int(max(source.labels.max() for source in sources.values()))
    return DataSet([str(c) for c in getattr(splits["train"], "classes", range(count))], **sources)


def _torchvision_source(dataset: Any, name: str, max_pixels: int) -> Source:
    return Source(
        functools.partial(_item_image, dataset, max_pixels),
        _torchvision_labels(dataset, name),
        functools.partial(_numbered, name, range(len(dataset))),
    )


def _torchvision_labels(dataset: Any, name: str) -> np.ndarray:
    for attribute in ("targets", "labels", "_labels", "y"):
        labels = getattr(dataset, attribute, None)
        if labels is not None and len(labels) == len(dataset):
            return np.asarray(labels).astype(np.int64)
    samples = getattr(dataset, "samples", None) or getattr(dataset, "_samples", None)
    if samples is not None and len(samples) == len(dataset):
        return np.array([label for _, label in samples], dtype=np.int64)
    raise TrainingError(
        f"--data torchvision:{name}: its labels cannot be listed without decoding every image"
    )


def _open_timm(name: str, config: TrainConfig) -> DataSet:
    """Hugging Face's (hfds/NAME), and by one pass over all their images TensorFlow's (tfds/NAME) and
    WebDataset's (wds/ with --data-dir)."""
    prefix = name[: name.index("/") + 1].lower()
    failure: Exception | None = None
    columns: dict[str, str] = {}

    def first_of(names: Sequence[str]) -> Any:
        nonlocal failure
        for split in names:
            try:
                if prefix == "hfds/":
                    columns.update(columns or _hugging_face_columns(name, config))
                dataset = create_dataset(name, root=config.data_dir, split=split, **columns)
                open_source = _hugging_face_source if prefix == "hfds/" else _kept
                return open_source(dataset, name, config.max_image_pixels)
            except TrainingError:
                raise
            except ImportError as error:
                raise TrainingError(
                    f"--data {name}: needs the package {_PACKAGES[prefix]} (pip install {_PACKAGES[prefix]})"
                ) from error
            except Exception as error:  # unknown split, unknown data set or no network: all kinds of types
                failure = error
        return None

    names = _split_names(config)
    splits = {split: first_of(wanted) for split, wanted in names.items()}
    needed = {s for s, n in names.items() if getattr(config, f"{s}_split") in n} | {"train"}
    judged = splits["val"] or splits["test"] or config.val_fraction
    if not judged or any(splits[split] is None for split in needed):
        raise TrainingError(f"--data {name}: {type(failure).__name__}: {failure}") from failure
    found = {split: of for split, of in splits.items() if of is not None}
    count = 1 + int(max(source.labels.max() for source, _ in found.values()))
    classes = splits["train"][1] or [str(label) for label in range(count)]
    return DataSet(classes, **{split: source for split, (source, _) in found.items()})


def _hugging_face_columns(name: str, config: TrainConfig) -> dict[str, str]:
    """The columns of images and labels as timm wants them, by their types: sets name them as they like."""
    import datasets

    features = datasets.load_dataset_builder(name[5:], cache_dir=config.data_dir).info.features or {}
    images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    labels = [column for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if features and not (images and labels):
        raise TrainingError(
            f"--data {name}: a column of images and one of class labels are wanted, it has "
            + listing([f"{column} ({type(kind).__name__})" for column, kind in features.items()])
        )
    usual = {"image": images, "label": labels}
    image, label = (name if name in of or not of else of[0] for name, of in usual.items())
    return {"input_key": image, "target_key": label}


def _hugging_face_source(dataset: Any, name: str, max_pixels: int) -> tuple[Source, list[str]]:
    reader = dataset.reader
    labels = np.asarray(reader.dataset[reader.label_key]).astype(np.int64)
    numbered = functools.partial(_numbered, name, range(len(labels)))
    image = functools.partial(_reader_image, reader, max_pixels)
    return Source(image, labels, numbered), _classes_of(reader)


def _kept(dataset: Any, name: str, max_pixels: int) -> tuple[Source, list[str]]:
    """Of a set that can only be read from its beginning to its end: all its images, in memory."""
    pixels, labels = [], []
    for image, label in dataset:
        pixels.append(np.asarray(rgb(image, max_pixels)))
        labels.append(int(label))
    if not labels:
        raise TrainingError(f"--data {name}: no images in it")
    numbered = functools.partial(_numbered, name, range(len(labels)))
    source = Source(functools.partial(_array_image, pixels), np.array(labels, dtype=np.int64), numbered)
    return source, _classes_of(dataset.reader)


def _classes_of(reader: Any) -> list[str]:
    mapping = getattr(reader, "class_to_idx", None) or {}
    return sorted(mapping, key=mapping.get)


# Sources are made of functions of this module: closures cannot be sent to loader processes that are spawned.


def _array_image(pixels: np.ndarray, i: int) -> Image.Image:
    return Image.fromarray(pixels[i]).convert("RGB")


def file_image(samples: Any, max_pixels: int, i: int) -> Image.Image:
    return read_image(samples[i][0], max_pixels)


def _reader_image(reader: Any, max_pixels: int, i: int) -> Image.Image:
    with Image.open(reader[i][0]) as image:
        return rgb(image, max_pixels)


def _item_image(dataset: Any, max_pixels: int, i: int) -> Image.Image:
    return rgb(dataset[i][0], max_pixels)


def sample_name(samples: Any, i: int) -> str:
    return str(samples[i][0])


def _numbered(name: str, numbers: Sequence[int], i: int) -> str:
    return f"{name}[{numbers[i]}]"
