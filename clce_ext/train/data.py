"""Images and labels: sources, few-shot subsets, class-balanced batches, augmentation, loaders.

Nothing here depends on how many workers load the images or where a run was interrupted: the order of an epoch
is a function of (seed, epoch), and the augmentation of an image of (seed, epoch, image, view).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from timm.data import create_dataset, create_transform
from timm.data.readers.img_extensions import is_img_extension
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .config import TrainConfig
from .errors import TrainingError, UnreadableImageError, timm_makes

_SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test", "eval")}


@dataclass
class Source:
    """One split: image(i) decodes, labels[i] is a class index, name(i) is for messages."""

    image: Callable[[int], Image.Image]
    labels: np.ndarray  # [N] int64
    name: Callable[[int], str]


@dataclass
class Data:
    """What a run trains on and is judged by. Labels index ``classes``."""

    train: Images
    val: Images
    classes: list[str]


class Images(Dataset):
    """Some of a source's images, with their labels.

    ``self[i]`` is (image [C, H, W], label); ``self[i, draw]`` is (views [V, C, H, W], label), with random
    augmentation that only (draw, i) decides. The transforms are set by the loaders below.
    """

    def __init__(self, source: Source, indices: np.ndarray, labels: np.ndarray) -> None:
        self.source = source
        self.indices = indices  # [N] into the source
        self.labels = labels  # [N] int64
        self.transform: Callable[[Image.Image], Tensor] | None = None
        self.views = 1

    def take(self, positions: np.ndarray | slice) -> Images:
        return Images(self.source, self.indices[positions], self.labels[positions])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[Tensor, int]:
        index, draw = item if isinstance(item, tuple) else (item, None)
        image = self._decode(int(self.indices[index]))
        label = int(self.labels[index])
        if draw is None:
            return self.transform(image), label
        with seeded(draw, int(self.indices[index])):
            return torch.stack([self.transform(image) for _ in range(self.views)]), label

    def _decode(self, index: int) -> Image.Image:
        try:
            return self.source.image(index)
        except Exception as error:  # PIL raises OSError, SyntaxError, struct.error, ... for broken files
            reason = f"{type(error).__name__}: {error}"
            raise UnreadableImageError(f"cannot read image {self.source.name(index)} ({reason})") from None


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seeds the generators that transforms draw from, and puts their states back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.random.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


# Sources


def load_data(config: TrainConfig) -> Data:
    """Reads ``config.data`` and takes the few-shot subset and the held-out classes off it.

    Raises:
        TrainingError: unknown data set, missing or empty folder, classes that differ between the splits,
            fewer images in a class than --shots.
    """
    train, val, classes = _open(config)
    held_out = held_out_indices(config.hold_out_classes, classes)
    kept = [i for i in range(len(classes)) if i not in held_out]
    if len(kept) < 2:
        raise TrainingError(
            f"at least two classes are needed to train on, got {_listing(classes)} of which "
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
    if ":" not in config.data and config.data != "digits" and not config.data.lower().startswith("hfds/"):
        root = Path(config.data)
        if root.is_dir() and not _find_split(root, "val", config.val_split):
            split, classes = _open_folder(root, None)
            return _select(split, classes, only)
    _, val, classes = _open(config)
    return _select(val, classes, only)


def _select(source: Source, classes: list[str], only: Sequence[str]) -> tuple[Images, list[str]]:
    kept = sorted(held_out_indices(only, classes)) if only else list(range(len(classes)))
    indices = np.flatnonzero(np.isin(source.labels, kept))
    return _relabelled(source, indices, kept), [classes[i] for i in kept]


def _relabelled(source: Source, indices: np.ndarray, kept: list[int]) -> Images:
    return Images(source, indices, np.searchsorted(kept, source.labels[indices]).astype(np.int64))


def _open(config: TrainConfig) -> tuple[Source, Source, list[str]]:
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
        folders[split] = _find_split(root, split, wanted)
        if folders[split] is None:
            found = sorted(p.name for p in root.iterdir() if p.is_dir())
            raise TrainingError(
                f"--data {root}: no {wanted or '/'.join(_SPLIT_FOLDERS[split])} folder in it; it holds "
                f"{_listing(found) or 'no folders'}. Wanted: {root}/train/CLASS/*.jpg and "
                f"{root}/val/CLASS/*.jpg"
            )
    train, classes = _open_folder(folders["train"], None)
    val_classes = _class_folders(folders["val"])
    missing = sorted(set(classes) - set(val_classes))
    unknown = sorted(set(val_classes) - set(classes))
    if missing or unknown:
        sides = [f"missing in {folders['val']}: {_listing(missing)}"] if missing else []
        sides += [f"missing in {folders['train']}: {_listing(unknown)}"] if unknown else []
        raise TrainingError(f"--data {root}: the splits must have the same class folders; {'; '.join(sides)}")
    val, _ = _open_folder(folders["val"], classes)
    return train, val, classes


def _find_split(root: Path, split: str, wanted: str | None) -> Path | None:
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


def _open_folder(folder: Path, classes: list[str] | None) -> tuple[Source, list[str]]:
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
        odd = _listing(sorted(set(mapping) ^ set(names)))
        raise TrainingError(f"{folder}: images must lie in CLASS/IMAGE; folders that do not fit: {odd}")
    index = {mapping[name]: i for i, name in enumerate(names)}
    samples = dataset.reader.samples
    source = Source(
        image=functools.partial(_sample_image, samples),
        labels=np.array([index[label] for _, label in samples], dtype=np.int64),
        name=functools.partial(_sample_name, samples),
    )
    return source, list(names)


# What sources are made of: functions of a module, which reach the loaders' processes however these start.


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


def held_out_indices(names: Sequence[str], classes: Sequence[str]) -> set[int]:
    """Class indices of ``names``; raises TrainingError where a name is none of ``classes``."""
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise TrainingError(f"unknown class {_listing(unknown)}; the classes are {_listing(classes)}")
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


def _listing(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


# Batches


class EpochSampler(Sampler):
    """This process's batches of one epoch, as lists of (index, draw).

    Plain: a permutation cut into global batches; the remainder is dropped. Class-balanced: every global batch
    holds ``images_per_class`` images of each of ``global batch / images_per_class`` classes; classes and the
    images of a class are taken in turn from permutations, so that nothing is drawn again before everything
    was.

    Raises:
        TrainingError: fewer images or classes than one global batch needs.
    """

    def __init__(
        self,
        labels: np.ndarray,
        batch_size: int,
        images_per_class: int | None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.labels = labels
        self.batch_size = batch_size
        self.images_per_class = images_per_class
        self.seed = seed
        self.rank = rank
        self.global_batch = batch_size * world_size
        self.epoch = 0
        self.first_batch = 0
        if len(labels) < self.global_batch:
            raise TrainingError(
                f"--batch-size {batch_size} x {world_size} process(es) exceeds the {len(labels)} training "
                "images"
            )
        if images_per_class:
            self._check_balance()

    def _check_balance(self) -> None:
        counts = np.bincount(self.labels)
        counts = counts[counts > 0]
        per_batch = self.global_batch // self.images_per_class
        if per_batch > len(counts):
            least = -(-self.global_batch // len(counts))
            enough = [k for k in range(least, self.batch_size + 1) if self.batch_size % k == 0]
            advice = f"--images-per-class {enough[0]} would do, or " if enough else ""
            raise TrainingError(
                f"batches of {self.global_batch} images with --images-per-class {self.images_per_class} need "
                f"{per_batch} classes; there are {len(counts)}: {advice}a smaller --batch-size"
            )
        if counts.min() < self.images_per_class:
            raise TrainingError(
                f"--images-per-class {self.images_per_class}: the smallest class has {counts.min()} images"
            )

    def __len__(self) -> int:
        return len(self.labels) // self.global_batch

    def set_position(self, epoch: int, first_batch: int = 0) -> None:
        """The next iteration gives batches ``first_batch``... of ``epoch``."""
        self.epoch, self.first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = np.random.default_rng([self.seed, self.epoch, 0xBA7C4])
        batches = self._balanced(generator) if self.images_per_class else self._shuffled(generator)
        draw = self.seed * 1_000_003 + self.epoch
        begin = self.rank * self.batch_size
        for batch in batches[self.first_batch :]:
            yield [(int(i), draw) for i in batch[begin : begin + self.batch_size]]

    def _shuffled(self, generator: np.random.Generator) -> np.ndarray:
        order = generator.permutation(len(self.labels))
        return order[: len(self) * self.global_batch].reshape(len(self), self.global_batch)

    def _balanced(self, generator: np.random.Generator) -> np.ndarray:
        members = [_endless(np.flatnonzero(self.labels == c), generator) for c in np.unique(self.labels)]
        class_order = _endless(np.arange(len(members)), generator)
        batches = []
        for _ in range(len(self)):
            classes = class_order(self.global_batch // self.images_per_class)
            batches.append(np.concatenate([members[c](self.images_per_class) for c in classes]))
        return np.stack(batches)


def _endless(items: np.ndarray, generator: np.random.Generator) -> Callable[[int], np.ndarray]:
    """take(n): n different items, all of them before any comes again (n at most len(items))."""
    queue = generator.permutation(items)

    def take(n: int) -> np.ndarray:
        nonlocal queue
        if len(queue) < n:
            fresh = generator.permutation(items)
            queue = np.concatenate([queue, fresh[~np.isin(fresh, queue)], fresh[np.isin(fresh, queue)]])
        taken, queue = queue[:n], queue[n:]
        return taken

    return take


# Loaders


def training_loader(
    images: Images, config: TrainConfig, input_config: dict[str, Any], views: int, rank: int, world_size: int
) -> tuple[DataLoader, EpochSampler]:
    """Batches (views [B, V, C, H, W], labels [B]) of the augmented training images."""
    digits = config.data == "digits"
    images.views = views
    images.transform = timm_makes("--auto-augment and other augmentation", create_transform)(
        input_size=input_config["input_size"],
        is_training=True,
        no_aug=not config.augment,
        scale=tuple(config.scale) or ((0.8, 1.0) if digits else None),
        hflip=_first(config.hflip, 0.0 if digits else 0.5),
        color_jitter=_first(config.color_jitter, 0.0 if digits else 0.4) or None,
        auto_augment=config.auto_augment,
        re_prob=config.random_erasing,
        re_mode="pixel",
        interpolation=input_config["interpolation"],
        mean=input_config["mean"],
        std=input_config["std"],
    )
    sampler = EpochSampler(
        images.labels, config.batch_size, config.images_per_class, config.seed, rank, world_size
    )
    return _loader(images, config, batch_sampler=sampler), sampler


def evaluation_loader(
    images: Images, config: TrainConfig, input_config: dict[str, Any], rank: int = 0, world_size: int = 1
) -> DataLoader:
    """Batches (images [B, C, H, W], labels [B]) without augmentation; every process gets its share once."""
    shard = images.take(slice(rank, None, world_size))
    shard.transform = create_transform(
        input_size=input_config["input_size"],
        is_training=False,
        interpolation=input_config["interpolation"],
        mean=input_config["mean"],
        std=input_config["std"],
        crop_pct=input_config["crop_pct"],
    )
    return _loader(shard, config, batch_size=config.micro_batch_size or max(config.batch_size, 64))


def subset(images: Images, most: int, seed: int) -> Images:
    """At most ``most`` of the images, drawn with ``seed``, in their order."""
    if len(images) <= most:
        return images
    return images.take(np.sort(np.random.default_rng([seed, 0x5AB]).choice(len(images), most, replace=False)))


def _loader(dataset: Images, config: TrainConfig, **batching: Any) -> DataLoader:
    return DataLoader(
        dataset,
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # not the one that dropout draws from
        persistent_workers=config.workers > 0 and "batch_sampler" in batching,
        **batching,
    )


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value
