"""Data sets by name: handwritten digits, folders of class folders, torchvision's and Hugging Face's."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.img_extensions import is_img_extension
from timm.utils.misc import natural_key

from ..config import TrainConfig
from ..errors import TrainingError, listing
from .images import Source

_SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test", "eval")}


def open_splits(config: TrainConfig) -> tuple[Source, Source, list[str]]:
    """(training split, validation split, class names) of ``config.data``."""
    name = config.data
    if name == "digits":
        return _open_digits()
    if name.startswith("torchvision:"):
        return _open_torchvision(name.partition(":")[2], config)
    if name.lower().startswith("hfds/"):
        return _open_hugging_face(name, config)
    return _open_folders(Path(name), config)


def _open_digits() -> tuple[Source, Source, list[str]]:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: 1,197 to train, 600 to validate."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).astype(np.uint8)  # [N, 8, 8], from 0..16
    labels = digits.target.astype(np.int64)
    parts = train_test_split(np.arange(len(labels)), test_size=600, stratify=labels, random_state=0)

    def source(part: np.ndarray) -> Source:
        return Source(
            image=functools.partial(_array_image, pixels[part]),
            labels=labels[part],
            name=functools.partial(_numbered, "digits", part),
        )

    return source(parts[0]), source(parts[1]), [str(i) for i in range(10)]


def _open_folders(root: Path, config: TrainConfig) -> tuple[Source, Source, list[str]]:
    if not root.is_dir():
        raise TrainingError(
            f"--data {root}: no such directory; give digits, torchvision:NAME, hfds/NAME or a directory with "
            "train/ and val/"
        )
    folders = {}
    for split, wanted in (("train", config.train_split), ("val", config.val_split)):
        folders[split] = find_split(root, split, wanted)
        if folders[split] is None:
            found = sorted(p.name for p in root.iterdir() if p.is_dir())
            raise TrainingError(
                f"--data {root}: no {wanted or '/'.join(_SPLIT_FOLDERS[split])} folder in it; it holds "
                f"{listing(found) or 'no folders'}. Wanted: {root}/train/CLASS/*.jpg and "
                f"{root}/val/CLASS/*.jpg"
            )
    train, classes = open_folder(folders["train"])
    val_classes = _class_folders(folders["val"])
    missing = sorted(set(classes) - set(val_classes))
    unknown = sorted(set(val_classes) - set(classes))
    if missing or unknown:
        sides = [f"missing in {folders['val']}: {listing(missing)}"] if missing else []
        sides += [f"missing in {folders['train']}: {listing(unknown)}"] if unknown else []
        raise TrainingError(f"--data {root}: the splits must have the same class folders; {'; '.join(sides)}")
    val, _ = open_folder(folders["val"], classes)
    return train, val, classes


def find_split(root: Path, split: str, wanted: str | None) -> Path | None:
    """The folder of a split under one of its usual names, or under the one that is wanted."""
    for name in (wanted,) if wanted else _SPLIT_FOLDERS[split]:
        if (root / name).is_dir():
            return root / name
    return None


def _class_folders(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise TrainingError(f"{folder}: the folder name {os.fsencode(name)!r} is not UTF-8") from None
    return names


def open_folder(folder: Path, classes: list[str] | None = None) -> tuple[Source, list[str]]:
    """The images under ``folder``/CLASS/, and the class names, in the order of ``classes`` where given."""
    found = _class_folders(folder)
    if not found:
        raise TrainingError(f"{folder}: empty: no class folders in it")
    for name in found:
        if not any(is_img_extension(p.suffix.lower()) for p in (folder / name).rglob("*")):
            raise TrainingError(f"{folder / name}: no images in this class folder")
    # timm labels an image by the folder it lies in; classes are the folders of the training split.
    dataset = create_dataset("", root=str(folder), split="", search_split=False)
    mapping = dataset.reader.class_to_idx
    # timm leaves names that differ in case alone in the order of their hashes, another one in each process.
    names = classes or sorted(mapping, key=lambda name: (natural_key(name), name))
    if set(mapping) != set(names):
        odd = listing(sorted(set(mapping) ^ set(names)))
        raise TrainingError(f"{folder}: images must lie in CLASS/IMAGE; folders that do not fit: {odd}")
    index = {mapping[name]: i for i, name in enumerate(names)}
    samples = dataset.reader.samples
    source = Source(
        image=functools.partial(_sample_image, samples),
        labels=np.array([index[label] for _, label in samples], dtype=np.int64),
        name=functools.partial(_sample_name, samples),
    )
    return source, list(names)


def _open_torchvision(name: str, config: TrainConfig) -> tuple[Source, Source, list[str]]:
    available = [n for n in torchvision.datasets.__all__ if inspect.isclass(getattr(torchvision.datasets, n))]
    if name not in available:
        raise TrainingError(
            f"--data torchvision:{name}: no such data set; torchvision has {', '.join(available)}"
        )
    make = getattr(torchvision.datasets, name)
    parameters = inspect.signature(make).parameters
    root = config.data_dir or "data"

    def dataset(wanted: str | None, names: Sequence[str], is_train: bool) -> Any:
        options: dict[str, Any] = {"download": config.download} if "download" in parameters else {}
        if "train" in parameters:
            return make(root, train=is_train, **options)
        if "split" not in parameters:
            raise TrainingError(f"--data torchvision:{name}: has no splits to train and validate on")
        failure: Exception | None = None
        for split in (wanted,) if wanted else names:
            try:
                return make(root, split=split, **options)
            except ValueError as error:  # an unknown split
                failure = error
        raise TrainingError(f"--data torchvision:{name}: {failure}; see --train-split and --val-split")

    try:
        train = dataset(config.train_split, ("train", "trainval"), True)
        val = dataset(config.val_split, ("val", "test"), False)
    except TrainingError:
        raise
    except (RuntimeError, OSError) as error:
        raise TrainingError(
            f"--data torchvision:{name} in {root}: {error} (see --data-dir, --download)"
        ) from None
    labels = _torchvision_labels(train, name), _torchvision_labels(val, name)
    count = int(max(y.max() for y in labels)) + 1
    classes = [str(c) for c in getattr(train, "classes", range(count))]

    def source(split: Any, split_labels: np.ndarray) -> Source:
        return Source(
            functools.partial(_item_image, split),
            split_labels,
            functools.partial(_numbered, name, range(len(split))),
        )

    return source(train, labels[0]), source(val, labels[1]), classes


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


def _open_hugging_face(name: str, config: TrainConfig) -> tuple[Source, Source, list[str]]:
    def split(wanted: str | None, names: Sequence[str]) -> Any:
        failure: Exception | None = None
        for candidate in (wanted,) if wanted else names:
            try:
                return create_dataset(name, root=config.data_dir, split=candidate)
            except ImportError as error:
                raise TrainingError(
                    f"--data {name}: needs the package datasets (pip install datasets)"
                ) from error
            except Exception as error:  # unknown split, unknown data set or no network: all kinds of types
                failure = error
        raise TrainingError(f"--data {name}: {type(failure).__name__}: {failure}") from failure

    def source(dataset: Any) -> Source:
        reader = dataset.reader
        labels = np.asarray(reader.dataset[reader.label_key]).astype(np.int64)
        return Source(
            functools.partial(_sample_image, reader),
            labels,
            functools.partial(_numbered, name, range(len(labels))),
        )

    train = split(config.train_split, ("train",))
    val = split(config.val_split, ("validation", "val", "test"))
    mapping = train.reader.class_to_idx
    return source(train), source(val), sorted(mapping, key=mapping.get)


# Sources are made of functions of this module: closures cannot be sent to loader processes that are spawned.


def _array_image(pixels: np.ndarray, i: int) -> Image.Image:
    return Image.fromarray(pixels[i]).convert("RGB")


def _sample_image(samples: Any, i: int) -> Image.Image:
    with Image.open(samples[i][0]) as image:
        return image.convert("RGB")


def _item_image(dataset: Any, i: int) -> Image.Image:
    return dataset[i][0].convert("RGB")


def _sample_name(samples: Any, i: int) -> str:
    return str(samples[i][0])


def _numbered(name: str, numbers: Sequence[int], i: int) -> str:
    return f"{name}[{numbers[i]}]"
