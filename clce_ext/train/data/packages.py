"""Data sets of other packages: torchvision's, Hugging Face's, WebDataset's shards, TensorFlow's.

What opens a split takes its name and the classes of the training split where these are known, and gives the
images and the names of their classes, none where they are only numbered. It raises NoSplit where the data set
has no split of that name.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torchvision
from timm.utils.misc import natural_key

from ..config import TrainConfig
from ..errors import TrainingError, first_line, imported, in_one_line, listing
from .images import Source

# Columns of labels that say nothing of classes in their type are known by these names; "cls" is WebDataset's.
_LABELS = ("label", "labels", "target", "class", "category", "cls")


Opened = tuple[Source, list[str]]  # a split, and the names of its classes


class NoSplit(Exception):
    """A data set has no split of some name; says what it has."""


def open_torchvision(config: TrainConfig, split: str, classes: Sequence[str] | None) -> Opened:
    """torchvision:NAME, with --data-dir and --download."""
    name, root = config.data.partition(":")[2], config.data_dir or "data"
    available = [n for n in torchvision.datasets.__all__ if inspect.isclass(getattr(torchvision.datasets, n))]
    if name not in available:
        raise TrainingError(f"--data {config.data}: no such data set; torchvision has {', '.join(available)}")
    make = getattr(torchvision.datasets, name)
    parameters = inspect.signature(make).parameters
    if "train" not in parameters and "split" not in parameters:
        raise TrainingError(f"--data {config.data}: has no splits to train and validate on")
    if "train" in parameters and split not in ("train", "test"):
        raise NoSplit("it has train and test")
    options = {"train": split == "train"} if "train" in parameters else {"split": split}
    if "download" in parameters:
        options["download"] = config.download
    try:
        dataset = make(root=root, **options)
    except ValueError as error:
        raise NoSplit(error) from error
    except (RuntimeError, OSError) as error:
        raise TrainingError(f"--data {config.data} in {root}: {error} (see --data-dir, --download)") from None
    samples = getattr(dataset, "samples", None) or getattr(dataset, "_samples", None)
    listed = [getattr(dataset, attribute, None) for attribute in ("targets", "labels", "_labels", "y")]
    for labels in (*listed, [label for _, label in samples or []]):
        if labels is not None and len(labels) == len(dataset):
            source = Source(dataset, np.asarray(labels, dtype=np.int64), name, config.max_image_pixels)
            return source, [str(c) for c in getattr(dataset, "classes", [])]
    raise TrainingError(f"--data {config.data}: its labels cannot be listed without decoding every image")


def open_hugging_face(config: TrainConfig, split: str, classes: Sequence[str] | None) -> Opened:
    """hfds/NAME of the hub, hfds/DIR, or wds/, the shards in --data-dir: by Hugging Face's datasets. Images
    are read from its cache (of hfds/: --data-dir) as they are wanted."""
    datasets = imported("datasets", f"--data {config.data}")
    with _opening(config):
        builder = _prepared(datasets, config.data, config.data_dir)
    # The columns of a set without a description are known only now that it has been read.
    features = dict(builder.info.features)
    # A field of WebDataset's .json is called json.FIELD here.
    parts = {name: kind for name, kind in features.items() if isinstance(kind, dict)}
    features |= {f"{name}.{field}": kind for name, of in parts.items() for field, kind in of.items()}
    image, label = _columns(config, features, datasets.Image, datasets.ClassLabel)
    try:
        rows = builder.as_dataset(split=split)
    except ValueError as error:
        raise NoSplit(first_line(error)) from error
    column, _, field = label.partition(".")
    values = list(rows[label]) if label in rows.features else [value[field] for value in rows[column]]
    images = rows.cast_column(image, datasets.Image(decode=False))[image]
    return _source(config, split, images, values, features[label], classes)


def _prepared(datasets: ModuleType, data: str, folder: str | None) -> Any:
    """Hugging Face's builder of the data set, which it has read into its cache."""
    if data.lower().startswith("wds/"):
        if folder is None or not Path(folder).is_dir():
            raise TrainingError(
                f"--data {data}: wants the folder of the shards as --data-dir, got {folder or 'none'}"
            )
        builder = datasets.load_dataset_builder("webdataset", data_files=_shards(Path(folder)))
    else:
        name = data.partition("/")[2]
        if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
            raise TrainingError(f"--data {data}: no such directory: {name}")
        builder = datasets.load_dataset_builder(os.path.expanduser(name), cache_dir=folder)
    builder.download_and_prepare()
    return builder


def _shards(folder: Path) -> dict[str, list[str]]:
    """By split, those that _info.json lists as timm writes it; without it, those that are called
    imagenet-train-0000.tar, train_0.tar or train.tar, or lie in train/."""
    for name in ("_info.json", "info.json"):
        if (folder / name).exists():
            splits = json.loads((folder / name).read_text())["splits"]
            return {split: [str(folder / name) for name in of["filenames"]] for split, of in splits.items()}
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.tar"), key=lambda path: natural_key(str(path))):
        stem = re.sub(r"[-_.]?\d+$", "", path.stem)
        split = path.parent.name if path.parent != folder else re.split(r"[-_.]", stem)[-1]
        found.setdefault(split, []).append(str(path))
    if not found:
        raise TrainingError(f"--data wds/: no shards (.tar) in {folder}")
    return found


def open_tensorflow(config: TrainConfig, split: str, classes: Sequence[str] | None) -> Opened:
    """tfds/NAME in --data-dir, with --download. It can only be read from its beginning to its end: all images
    are kept in memory as they are stored, which is compressed."""
    tensorflow = imported("tensorflow", f"--data {config.data}")
    tensorflow.config.set_visible_devices([], "GPU")  # of which it would take all the memory
    tfds = imported("tensorflow_datasets", f"--data {config.data}")
    with _opening(config):
        builder = tfds.builder(config.data.partition("/")[2], data_dir=config.data_dir)
        if config.download:
            builder.download_and_prepare()
        if not builder.info.splits:
            raise TrainingError(
                f"--data {config.data}: not in {builder.data_path}; --download fetches it, --data-dir says "
                "where it lies"
            )
    features = builder.info.features
    image, label = _columns(config, features, tfds.features.Image, tfds.features.ClassLabel)
    try:
        decoders = {image: tfds.decode.SkipDecoding()}
        rows = list(tfds.as_numpy(builder.as_dataset(split=split, decoders=decoders)))
    except ValueError as error:
        raise NoSplit(first_line(error)) from error
    values = [row[label].decode() if isinstance(row[label], bytes) else row[label] for row in rows]
    return _source(config, split, [row[image] for row in rows], values, features[label], classes)


def _columns(config: TrainConfig, features: Mapping[str, Any], image: type, label: type) -> tuple[str, str]:
    """The columns of images and of labels: as the options say, or by their types, or by usual names."""
    images = [column for column, kind in features.items() if isinstance(kind, image)]
    labels = [column for column, kind in features.items() if isinstance(kind, label)]
    labels = labels or [column for column in _LABELS if column in features]
    found = []
    for name, of, usual in (("image", images, "image"), ("label", labels, "label")):
        asked = getattr(config, f"{name}_column")
        if (asked is None and not of) or (asked is not None and asked not in features):
            what = f" {asked}: no such column" if asked else f": no column is known to hold {name}s"
            has = listing([f"{column} ({type(kind).__name__})" for column, kind in features.items()])
            raise TrainingError(f"--data {config.data}: --{name}-column{what}; it has {has}")
        found.append(asked or (usual if usual in of else of[0]))
    return found[0], found[1]


def _source(
    config: TrainConfig,
    split: str,
    images: Any,
    values: Sequence[Any],
    kind: Any,
    classes: Sequence[str] | None,
) -> Opened:
    """Of the ``values`` of a column of labels. Where its ``kind`` names no classes, they are the different
    values of the training split, in their natural order."""
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
    names = list(getattr(kind, "names", None) or [])
    if not names:
        values = [str(value) for value in values]
        names = list(classes) if classes else sorted(set(values), key=natural_key)
        if unknown := sorted(set(values) - set(names), key=natural_key):
            raise TrainingError(
                f"--data {config.data}: {split} has labels that the training split has not: "
                + listing(unknown)
            )
        index = {name: i for i, name in enumerate(names)}
        values = [index[value] for value in values]
    labels = np.asarray(values, dtype=np.int64)
    return Source(images, labels, config.data, config.max_image_pixels), names


def _opening(config: TrainConfig) -> AbstractContextManager:
    where = f" in {config.data_dir}" if config.data_dir else ""
    return in_one_line(f"--data {config.data}{where}: cannot be opened: ")
