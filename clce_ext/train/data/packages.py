"""Data sets of other packages: torchvision, Hugging Face datasets, TensorFlow Datasets, WebDataset."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torchvision
from PIL import Image
from timm.utils.misc import natural_key

from ..config import TrainConfig
from ..errors import TrainingError, first_line, listing
from .images import IMAGE_SUFFIXES, Source, open_image, rgb

# Columns of labels that say nothing of classes in their type are known by these names.
_LABELS = ("label", "labels", "target", "class", "category")


class NoSplit(Exception):
    """A data set has no split of some name; says what it has."""


# Opens a split by its name, with the classes of the training split where these are known: the images, and the
# names of the classes, none where they are only numbered.
Opener = Callable[[str, Sequence[str] | None], tuple[Source, list[str]]]


# torchvision


def open_torchvision(config: TrainConfig) -> Opener:
    """torchvision:NAME, with --data-dir and --download."""
    name = config.data.partition(":")[2]
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
    options = {"download": config.download} if "download" in parameters else {}

    def opener(split: str, classes: Sequence[str] | None) -> tuple[Source, list[str]]:
        if "train" in parameters and split not in ("train", "test"):
            raise NoSplit("it has train and test")
        of_split = {"train": split == "train"} if "train" in parameters else {"split": split}
        try:
            dataset = make(root=root, **of_split, **options)
        except ValueError as error:
            raise NoSplit(error) from error
        except (RuntimeError, OSError) as error:
            raise TrainingError(
                f"--data torchvision:{name} in {root}: {error} (see --data-dir, --download)"
            ) from None
        read = functools.partial(_sample_image, config.max_image_pixels)
        source = Source(dataset, read, _torchvision_labels(dataset, name), name)
        return source, [str(c) for c in getattr(dataset, "classes", [])]

    return opener


def _torchvision_labels(dataset: Any, name: str) -> np.ndarray:
    samples = getattr(dataset, "samples", None) or getattr(dataset, "_samples", None)
    listed = [getattr(dataset, attribute, None) for attribute in ("targets", "labels", "_labels", "y")]
    for labels in (*listed, [label for _, label in samples or []]):
        if labels is not None and len(labels) == len(dataset):
            return np.asarray(labels, dtype=np.int64)
    raise TrainingError(
        f"--data torchvision:{name}: its labels cannot be listed without decoding every image"
    )


# Hugging Face, TensorFlow


def open_hugging_face(config: TrainConfig) -> Opener:
    """hfds/NAME of the hub, or hfds/DIR; --data-dir is the cache. Images are read as they are wanted."""
    datasets, name = _package(config, "datasets"), config.data.partition("/")[2]
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise TrainingError(f"--data {config.data}: no such directory: {name}")
    with _opening(config):
        builder = datasets.load_dataset_builder(os.path.expanduser(name), cache_dir=config.data_dir)
        builder.download_and_prepare()
    # The columns of a set without a description are known only now that it has been read.
    features = builder.info.features
    image, label = _columns(config, features, datasets.Image, datasets.ClassLabel)

    def opener(split: str, classes: Sequence[str] | None) -> tuple[Source, list[str]]:
        try:
            rows = builder.as_dataset(split=split)
        except ValueError as error:
            raise NoSplit(first_line(error)) from error
        rows = rows.cast_column(image, datasets.Image(decode=False))
        read = functools.partial(_row_image, config.max_image_pixels, image)
        labels, names = _labels(config, split, list(rows[label]), _names(features[label]), classes)
        return Source(rows, read, labels, config.data), names

    return opener


def open_tensorflow(config: TrainConfig) -> Opener:
    """tfds/NAME in --data-dir, with --download. It can only be read from its beginning to its end: all images
    are kept in memory as they are stored, which is compressed."""
    name, to_install = config.data.partition("/")[2], "tensorflow tensorflow-datasets"
    tensorflow, tfds = (_package(config, m, to_install) for m in ("tensorflow", "tensorflow_datasets"))
    tensorflow.config.set_visible_devices([], "GPU")  # of which it would take all the memory
    with _opening(config):
        builder = tfds.builder(name, data_dir=config.data_dir)
        if config.download:
            builder.download_and_prepare()
        if not builder.info.splits:
            raise TrainingError(
                f"--data {config.data}: not in {builder.data_path}; --download fetches it, --data-dir says "
                "where it lies"
            )
    features = builder.info.features
    image, label = _columns(config, features, tfds.features.Image, tfds.features.ClassLabel)

    def opener(split: str, classes: Sequence[str] | None) -> tuple[Source, list[str]]:
        decoders = {image: tfds.decode.SkipDecoding()}
        try:
            rows = tfds.as_numpy(builder.as_dataset(split=split, decoders=decoders))
        except ValueError as error:
            raise NoSplit(first_line(error)) from error
        pairs = [(row[image], row[label]) for row in rows]
        values = [value.decode() if isinstance(value, bytes) else value for _, value in pairs]
        labels, names = _labels(config, split, values, _names(features[label]), classes)
        items = [(f"{split}[{i}]", encoded) for i, (encoded, _) in enumerate(pairs)]
        return _encoded(config, items, labels), names

    return opener


def _columns(config: TrainConfig, features: Mapping[str, Any], image: type, label: type) -> tuple[str, str]:
    """The columns of images and of labels: as the options say, or by their types, or by usual names."""
    images = [column for column, kind in features.items() if isinstance(kind, image)]
    labels = [column for column, kind in features.items() if isinstance(kind, label)]
    labels = labels or [column for column in _LABELS if column in features]
    found = []
    for name, of, usual in (("image", images, "image"), ("label", labels, "label")):
        asked = getattr(config, f"{name}_column")
        if (asked is None and not of) or (asked is not None and asked not in features):
            what = "no such column" if asked else f"is wanted: no column is known to hold {name}s"
            has = listing([f"{column} ({type(kind).__name__})" for column, kind in features.items()])
            option = f"--{name}-column {asked}:" if asked else f"--{name}-column"
            raise TrainingError(f"--data {config.data}: {option} {what}; it has {has}")
        found.append(asked or (usual if usual in of else of[0]))
    return found[0], found[1]


def _names(kind: Any) -> list[str] | None:
    """Of the classes, where the type of a column says them."""
    return list(kind.names) if getattr(kind, "names", None) else None


# WebDataset


def open_webdataset(config: TrainConfig) -> Opener:
    """wds/: the shards in --data-dir, a folder or an address. Splits are those of _info.json, as timm writes
    it; without it, shards that are called SPLIT-0000.tar or lie in SPLIT/. All images are kept in memory as
    they are stored, which is compressed."""
    wds, root = _package(config, "webdataset"), config.data_dir
    if root is None or not ("://" in root or Path(root).is_dir()):
        raise TrainingError(
            f"--data {config.data}: wants the folder of the shards as --data-dir, got {root or 'none'}"
        )
    with _opening(config):
        splits = _splits_of_shards(wds, root)

    def opener(split: str, classes: Sequence[str] | None) -> tuple[Source, list[str]]:
        info = {"filenames": wds.shardlists.expand_urls(split)} if ".tar" in split else splits.get(split)
        if info is None:
            info = {"filenames": _shards(root, split)}
        if not info["filenames"]:
            raise NoSplit(f"{root} has {listing(sorted(splits)) or f'no {split}-*.tar'}")
        field = config.label_column or info.get("alt_label")
        items, values = [], []
        with _opening(config):
            paths = [os.path.join(root, name) for name in info["filenames"]]
            # Every process reads all shards: batches are shared out later.
            for sample in wds.WebDataset(paths, shardshuffle=False, nodesplitter=None):
                shard, key = os.path.basename(sample["__url__"]), sample["__key__"]
                items.append((f"{shard}/{key}", _part(config, sample, f"{shard}/{key}")))
                values.append(_target(config, sample, field, f"{shard}/{key}"))
        if len(items) != info.get("num_samples", len(items)):
            raise TrainingError(
                f"--data {config.data}: _info.json says that {split} has {info['num_samples']} images, its "
                f"shards in {root} hold {len(items)}"
            )
        labels, names = _labels(config, split, values, None, classes)
        return _encoded(config, items, labels), names

    return opener


def _splits_of_shards(wds: ModuleType, root: str) -> dict[str, dict[str, Any]]:
    """By name, what timm's _info.json says of each split; empty without that file."""
    for name in ("_info.json", "info.json"):
        with contextlib.suppress(OSError), wds.gopen(os.path.join(root, name)) as file:
            return json.load(file)["splits"]
    return {}


def _shards(root: str, split: str) -> list[str]:
    """imagenet-train-0000.tar, train_0.tar, train.tar or train/0000.tar; relative to ``root``."""
    if "://" in root:
        return []
    found = [path.relative_to(root).as_posix() for path in Path(root).glob("*.tar")]
    named = re.compile(rf"(.*[-_.])?{re.escape(split)}([-_.]?\d+)*\.tar")
    inside = [path.relative_to(root).as_posix() for path in (Path(root) / split).glob("*.tar")]
    return sorted([name for name in found if named.fullmatch(name)] + inside, key=natural_key)


def _part(config: TrainConfig, sample: Mapping[str, Any], place: str) -> bytes:
    """The image of a sample, as it is stored."""
    for name in sample:
        if f".{name}" in IMAGE_SUFFIXES:
            return sample[name]
    raise TrainingError(f"--data {config.data}: {place}: no image in this sample, but {_parts(sample)}")


def _target(config: TrainConfig, sample: Mapping[str, Any], field: str | None, place: str) -> str | int:
    if field is None:
        if "cls" not in sample:
            raise TrainingError(
                f"--data {config.data}: {place}: no .cls in this sample, but {_parts(sample)}; "
                "--label-column names a field of .json instead"
            )
        text = sample["cls"].decode().strip()
        return int(text) if re.fullmatch(r"-?\d+", text) else text
    fields = json.loads(sample.get("json", b"{}"))
    if field not in fields:
        raise TrainingError(
            f"--data {config.data}: --label-column {field}: {place} has no such field in its .json, but "
            f"{listing(sorted(fields)) or 'none'}"
        )
    return fields[field]


def _parts(sample: Mapping[str, Any]) -> str:
    return listing([f".{name}" for name in sample if not name.startswith("__")])


# What all of them share


def _package(config: TrainConfig, module: str, to_install: str | None = None) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TrainingError(
            f"--data {config.data}: needs a package: pip install {to_install or module}"
        ) from error


@contextlib.contextmanager
def _opening(config: TrainConfig) -> Iterator[None]:
    """Complaints of the packages, which are of all types, in one line."""
    try:
        yield
    except TrainingError:
        raise
    except Exception as error:
        where = f" in {config.data_dir}" if config.data_dir else ""
        raise TrainingError(
            f"--data {config.data}{where}: cannot be opened: {type(error).__name__}: {first_line(error)}"
        ) from error


def _labels(
    config: TrainConfig,
    split: str,
    values: Sequence[Any],
    names: list[str] | None,
    classes: Sequence[str] | None,
) -> tuple[np.ndarray, list[str]]:
    """Labels [N] int64 and the names of the classes.

    Where ``names`` are not known, classes are the different values of the training split, in their natural
    order. Whole numbers that leave none out, from 0 on, are labels as they are.
    """
    if not values:
        raise TrainingError(f"--data {config.data}: no images in {split}")
    if odd := [value for value in values if not isinstance(value, (str, int, np.integer, type(None)))]:
        raise TrainingError(
            f"--data {config.data}: labels must be strings or whole numbers, got {odd[0]!r} (see "
            "--label-column)"
        )
    hidden = sum(value is None or (not isinstance(value, str) and value < 0) for value in values)
    if hidden:  # of the test splits of some competitions
        raise NoSplit(f"{hidden} of the {len(values)} images of {split} have no label")
    if names is not None:
        return np.asarray(values, dtype=np.int64), names
    words = [str(value) for value in values]
    names = list(classes) if classes else sorted(set(words), key=natural_key)
    index = {name: i for i, name in enumerate(names)}
    if unknown := sorted(set(words) - set(names), key=natural_key):
        raise TrainingError(
            f"--data {config.data}: {split} has labels that the training split has not: {listing(unknown)}"
        )
    return np.array([index[word] for word in words], dtype=np.int64), names


def _encoded(config: TrainConfig, items: Sequence[tuple[str, bytes]], labels: np.ndarray) -> Source:
    """Images in memory as they are stored, each with a name for messages."""
    return Source(items, functools.partial(_encoded_image, config.max_image_pixels), labels, config.data)


# What reads an image is a function of this module: closures cannot be sent to processes that are spawned.


def _sample_image(max_pixels: int, sample: tuple[Image.Image, Any]) -> Image.Image:
    return rgb(sample[0], max_pixels)


def _row_image(max_pixels: int, column: str, row: Mapping[str, Any]) -> Image.Image:
    image = row[column]
    return open_image(max_pixels, io.BytesIO(image["bytes"]) if image["bytes"] else image["path"])


def _encoded_image(max_pixels: int, item: tuple[str, bytes]) -> Image.Image:
    name, encoded = item
    try:
        return open_image(max_pixels, io.BytesIO(encoded))
    except Exception as error:
        raise ValueError(f"{name}: {first_line(error)}") from error
