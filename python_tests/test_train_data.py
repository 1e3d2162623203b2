"""Sources, few-shot subsets, class-balanced batches, augmentation; and clear words about broken folders."""

from __future__ import annotations

import os
import random
import shutil
from itertools import chain

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from clce_ext.train.config import TrainConfig
from clce_ext.train.data import (
    EpochSampler,
    evaluation_loader,
    load_classes,
    load_data,
    training_loader,
)
from clce_ext.train.errors import TrainingError, UnreadableImageError
from clce_ext.train.models import FineTuner
from clce_ext.train.start import start_lines

from .training import write_digit_images

INPUT = {
    "input_size": (3, 32, 32),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
}


def config(**options) -> TrainConfig:
    return TrainConfig.from_dict(options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_digit_images(tmp_path_factory.mktemp("digits"), train=4, val=2, classes=3, size=32)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_digits():
    data = load_data(config())
    assert (len(data.train), len(data.val), data.classes) == (1197, 600, [str(i) for i in range(10)])
    assert not set(data.train.indices) - set(range(1197))
    assert np.bincount(data.val.labels).min() >= 58  # stratified


def test_splits_that_digits_and_letters_do_not_have():
    with pytest.raises(TrainingError, match="--data digits: no test split in it; it has train and val"):
        load_data(config(val_split="test"))
    with pytest.raises(TrainingError, match="--data letters: no dev split in it; it has train, val, test"):
        load_data(config(data="letters", letter_images=2, val_split="dev"))


def test_shots_are_drawn_per_class_with_the_seed():
    first, again, other = (load_data(config(shots=5, seed=seed)).train for seed in (1, 1, 2))
    assert list(np.bincount(first.labels)) == [5] * 10
    assert list(first.indices) == list(again.indices) != list(other.indices)
    with pytest.raises(TrainingError, match="--shots 1000: class '0' has only"):
        load_data(config(shots=1000))


def test_held_out_classes_leave_training_and_come_back_for_episodes():
    data = load_data(config(hold_out_classes=["3", "7"]))
    assert data.classes == ["0", "1", "2", "4", "5", "6", "8", "9"]
    assert set(data.train.labels) == set(data.val.labels) == set(range(8))
    kept = data.train.source.labels[data.train.indices]
    assert not {3, 7} & set(kept) and [data.classes[y] for y in data.train.labels] == [str(y) for y in kept]
    novel, names = load_classes(config(), ["3", "7"])
    assert names == ["3", "7"] and set(novel.source.labels[novel.indices]) == {3, 7}
    with pytest.raises(TrainingError, match="unknown class eleven; the classes are 0, 1"):
        load_data(config(hold_out_classes=["eleven"]))


def batches(labels, **options):
    ranks = {name: options.pop(name) for name in ("rank", "world_size") if name in options}
    sampler = EpochSampler(np.asarray(labels), config(**options), **ranks)
    return sampler, [[i for i, _ in batch] for batch in sampler]


def test_shuffled_batches():
    sampler, first = batches(np.zeros(23, int), batch_size=5)
    assert len(first) == len(sampler) == 4
    assert len({i for batch in first for i in batch}) == 20
    sampler.set_position(epoch=1)
    assert [[i for i, _ in b] for b in sampler] != first
    sampler.set_position(epoch=0, first_batch=2)
    assert [[i for i, _ in b] for b in sampler] == first[2:]


def test_class_balanced_batches():
    labels = np.repeat(np.arange(7), [4, 5, 6, 7, 8, 9, 30])
    _, found = batches(labels, batch_size=12, images_per_class=4)
    assert len(found) == len(labels) // 12
    for batch in found:
        assert len(set(batch)) == 12
        counts = np.bincount(labels[batch], minlength=7)
        assert sorted(counts[counts > 0]) == [4, 4, 4]
    # Classes come in turn: after 5 batches of 3 classes every class came twice, one of them three times.
    turns = np.concatenate([np.unique(labels[batch]) for batch in found[:5]])
    assert sorted(np.bincount(turns)) == [2] * 6 + [3]


def test_processes_share_a_global_batch():
    labels = np.repeat(np.arange(6), 10)
    options = {"batch_size": 12, "images_per_class": 3}
    _, whole = batches(labels, **options)
    for ranks in (2, 5):
        parts = [batches(labels, rank=r, world_size=ranks, **options) for r in range(ranks)]
        assert sorted({sampler.share for sampler, _ in parts}) == {2: [6], 5: [2, 3]}[ranks]
        joined = [sorted(chain(*shares)) for shares in zip(*(found for _, found in parts), strict=True)]
        assert joined == [sorted(batch) for batch in whole]
    with pytest.raises(
        TrainingError, match="--batch-size 12 leaves some of the 13 processes without an image"
    ):
        batches(labels, batch_size=12, world_size=13)


def test_items_are_the_batches_in_pieces():
    labels = np.repeat(np.arange(6), 10)
    _, whole = batches(labels, batch_size=25)
    sampler, items = batches(labels, batch_size=25, micro_batch_size=8)
    assert [len(item) for item in items] == [8, 8, 8, 1] * 2 and len(sampler) == 8
    assert [list(chain(*items[:4])), list(chain(*items[4:]))] == whole


def test_a_class_is_spread_over_its_batch():
    """Mixup takes neighbours: of images sorted by class they would be of one class."""
    labels = np.repeat(np.arange(8), 16)
    _, found = batches(labels, batch_size=32, images_per_class=8)
    same = np.mean([labels[batch] == np.roll(labels[batch], 1) for batch in found])
    assert same < 0.5  # sorted: 7/8 and more; in no order: 7/31


def test_an_image_that_comes_again_is_augmented_otherwise():
    labels = np.repeat([0, 1], [3, 29])  # class 0 comes in every batch
    sampler = EpochSampler(labels, config(batch_size=4, images_per_class=2))
    drawn = [item for batch in sampler for item in batch]
    assert len(drawn) == 32 > len({image for image, _ in drawn})
    assert len(set(drawn)) == 32
    sampler.set_position(0, 3)
    assert [item for batch in sampler for item in batch] == drawn[12:]


def test_batches_that_cannot_be_made():
    with pytest.raises(TrainingError, match="exceeds the 23 training images"):
        batches(np.zeros(23, int), batch_size=24)
    labels = np.repeat(np.arange(3), 10)
    # What a message proposes is accepted: 11 images of a class that has 10 would not be.
    for size, k, remedy in ((20, 4, "--images-per-class 10 or --batch-size 12"), (22, 2, "--batch-size 6")):
        message = f"need {size // k} classes; there are 3: {remedy} would do"
        with pytest.raises(TrainingError, match=message):
            batches(labels, batch_size=size, images_per_class=k)
    batches(labels, batch_size=20, images_per_class=10)
    batches(labels, batch_size=12, images_per_class=4)
    with pytest.raises(TrainingError, match="the smallest class has 2 images"):
        batches([0, 0, 0, 1, 1, 0, 0, 0], batch_size=6, images_per_class=3)


@pytest.mark.parametrize("views", [1, 2])
def test_augmentation_depends_on_epoch_and_image_alone(views):
    def epoch(number: int, workers: int = 0):
        options = config(shots=2, batch_size=10, workers=workers, color_jitter=0.3, random_erasing=0.5)
        loader, sampler = training_loader(load_data(options).train, options, INPUT, views, 0, 1)
        sampler.set_position(number)
        return [images for images, _ in loader]

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = epoch(0)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert first[0].shape == (10, views, 3, 32, 32)
    again = epoch(0)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], epoch(1)[0])
    if views == 2:
        assert not torch.equal(first[0][:, 0], first[0][:, 1])
    # The generators of dropout and mixup are left alone.
    assert random.getstate() == state[0] and np.random.get_state()[1].tolist() == state[1]
    assert torch.equal(torch.get_rng_state(), state[2])
    if views == 2:
        assert all(map(torch.equal, first, epoch(0, workers=2)))


def test_image_folder(folder):
    data = load_data(config(data=str(folder)))
    assert data.classes == ["digit_0", "digit_1", "digit_2"] and (len(data.train), len(data.val)) == (12, 6)
    images, labels = next(iter(evaluation_loader(data.val, config(micro_batch_size=4), INPUT)))
    assert images.shape == (4, 3, 32, 32) and labels.tolist() == [0, 0, 1, 1]


def test_images_in_folders_within_a_class_folder_are_of_that_class(copy):
    before = load_data(config(data=str(copy)))
    for image in sorted((copy / "train" / "digit_1").iterdir())[:2]:
        (image.parent / "more").mkdir(exist_ok=True)
        image.rename(image.parent / "more" / image.name)
    data = load_data(config(data=str(copy)))
    assert data.classes == before.classes and list(np.bincount(data.train.labels)) == [4, 4, 4]


def with_test_split(folder):
    """The second validation image of every class becomes a test image."""
    for old in (folder / "val").iterdir():
        new = folder / "test" / old.name
        new.mkdir(parents=True)
        image = sorted(old.iterdir())[1]
        image.rename(new / image.name)
    return folder


def files(images):
    return {images.source.name(i) for i in images.indices}


def test_a_folder_of_three_splits_is_read_as_such(copy):
    data = load_data(config(data=str(with_test_split(copy))))
    assert (data.watched, len(data.train), len(data.val), len(data.test)) == ("val", 12, 3, 3)
    assert data.split("val") is data.val and data.split("test") is data.test
    assert not files(data.val) & files(data.test)
    swapped = load_data(config(data=str(copy), val_split="test", test_split="val"))
    assert files(swapped.val) == files(data.test) and files(swapped.test) == files(data.val)
    with pytest.raises(TrainingError, match="has a validation split and a test split of its own"):
        load_data(config(data=str(copy), val_fraction=0.5))


def test_where_only_a_test_split_is_it_is_watched_as_such(copy):
    (copy / "val").rename(copy / "test")
    for options in ({}, {"val_split": "test"}):
        data = load_data(config(data=str(copy), **options))
        assert data.watched == "test" and data.val is data.test and len(data.test) == 6
        with pytest.raises(TrainingError, match="--split val: the data has no such split; see --val-f"):
            data.split("val")
    with pytest.raises(TrainingError, match="no nowhere folder in it; it holds test, train"):
        load_data(config(data=str(copy), val_split="nowhere"))


def test_a_validation_split_is_taken_off_the_training_split(copy):
    (copy / "val").rename(copy / "test")
    whole = load_data(config(data=str(copy)))
    data, again, other = (load_data(config(data=str(copy), val_fraction=0.25, seed=s)) for s in (1, 1, 2))
    assert data.watched == "val" and files(data.test) == files(whole.test)
    assert list(np.bincount(data.val.labels)) == [1] * 3 and list(np.bincount(data.train.labels)) == [3] * 3
    assert files(data.train) | files(data.val) == files(whole.train)
    assert not files(data.train) & files(data.val)
    assert files(data.val) == files(again.val) != files(other.val)
    # Without a test split nothing is left to judge, which is fine until somebody asks for it.
    shutil.rmtree(copy / "test")
    alone = load_data(config(data=str(copy), val_fraction=0.25))
    assert alone.test is None
    with pytest.raises(TrainingError, match="--split test: the data has no such split; see --test-split"):
        alone.split("test")


def test_few_shots_leave_the_validation_split_whole():
    data = load_data(config(val_fraction=0.2, shots=3))
    assert len(data.train) == 30 and len(data.test) == 600 and data.watched == "val"
    assert 230 < len(data.val) < 250 and not set(data.train.indices) & set(data.val.indices)
    shares = np.bincount(data.val.labels) / np.bincount(load_data(config()).train.labels)
    assert np.allclose(shares, 0.2, atol=0.01)


def test_a_class_of_one_image_cannot_be_split(copy):
    for path in sorted((copy / "train" / "digit_1").iterdir())[1:]:
        path.unlink()
    with pytest.raises(TrainingError, match="class 'digit_1' has only one training image; every class needs"):
        load_data(config(data=str(copy), val_fraction=0.5))


def test_image_folder_of_capital_endings(copy):
    for path in list(copy.rglob("*.png")):
        path.rename(path.with_suffix(".JPEG"))
    assert len(load_data(config(data=str(copy))).train) == 12


def test_formats_and_files_that_are_no_images(copy):
    first, second, third, _ = sorted((copy / "train" / "digit_0").iterdir())
    for path, suffix in ((first, ".webp"), (second, ".bmp"), (third, ".gif")):
        Image.open(path).save(path.with_suffix(suffix))
        path.unlink()
    (copy / "train" / "digit_0" / "._0001.jpg").write_bytes(b"\0\5\x16\7")
    (copy / "train" / "digit_0" / "notes.txt").write_text("blurred")
    data = load_data(config(data=str(copy)))
    assert len(data.train) == 12 and all(data.train.decode(i).mode == "RGB" for i in range(12))
    assert data.train.source.passed_over == {"hidden": 1, ".txt": 1} and not data.val.source.passed_over
    said = "\n".join(start_lines(config(data=str(copy)), data, FineTuner(timm.create_model("resnet10t"))))
    for line in (
        "3 classes (digit_0, digit_1, digit_2)",
        "12 images, 4 of each class",
        "1 .txt, 1 hidden: these",
        "val      6 images, watched",
        "weights  none given: from scratch",
    ):
        assert line in said


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_workers_started_either_way(copy, start):
    """macOS spawns the processes of loaders, and so does Python 3.14."""
    data = load_data(config(data=str(copy)))
    for images in (data.val, load_data(config()).val.take(slice(0, 6))):
        loader = evaluation_loader(images, config(workers=1), INPUT)
        loader.multiprocessing_context = start
        assert len(next(iter(loader))[1]) == 6


def test_a_folder_name_that_is_no_text(copy):
    for split in ("train", "val"):
        os.rename(copy / split / "digit_1", os.fsencode(copy / split) + b"/caf\xe9")
    with pytest.raises(TrainingError, match="is not UTF-8"):
        load_data(config(data=str(copy)))


def test_shards_of_evaluation_cover_every_image_once(folder):
    data = load_data(config(data=str(folder)))
    shards = [list(evaluation_loader(data.val, config(), INPUT, rank, 4)) for rank in range(4)]
    assert sorted(y for shard in shards for _, labels in shard for y in labels.tolist()) == [0, 0, 1, 1, 2, 2]


def test_folder_without_splits_serves_for_episodes(folder):
    images, names = load_classes(config(data=str(folder / "train")))
    assert len(images) == 12 and names == ["digit_0", "digit_1", "digit_2"]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: shutil.rmtree(f / "val" / "digit_1"), "--data .*same class.*; missing in .*val: digit_1"),
        (lambda f: shutil.rmtree(f / "train" / "digit_1"), "same class folders; only in .*val: digit_1"),
        (lambda f: shutil.rmtree(f / "val"), "no val/valid/.* folder in it; it holds train"),
        (lambda f: [p.unlink() for p in (f / "train" / "digit_2").iterdir()], "digit_2: no images"),
        (lambda f: [shutil.rmtree(p) for p in (f / "train").iterdir()], "train: empty"),
        (
            lambda f: next((f / "train" / "digit_0").iterdir()).rename(f / "train" / "a.png"),
            r"train: images lie directly in it \(a.png\); each must lie in .*CLASS/IMAGE",
        ),
        (lambda f: shutil.rmtree(f), "no such directory; give digits, torchvision:NAME"),
    ],
    ids=[
        "class missing in val",
        "class missing in train",
        "no val",
        "empty class",
        "empty split",
        "images directly in a split",
        "nothing",
    ],
)
def test_broken_folders(copy, damage, message):
    damage(copy)
    with pytest.raises(TrainingError, match=message):
        load_data(config(data=str(copy)))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["truncated", "not an image", "empty"])
def test_an_unreadable_image_is_named(copy, kind, workers):
    broken = sorted((copy / "val" / "digit_1").iterdir())[1]
    content = broken.read_bytes()
    broken.write_bytes(
        {"truncated": content[: len(content) // 2], "not an image": b"hello", "empty": b""}[kind]
    )
    data = load_data(config(data=str(copy)))
    with pytest.raises(UnreadableImageError, match=rf"cannot read image .*{broken.name}"):
        list(evaluation_loader(data.val, config(workers=workers), INPUT))


def test_letters(tmp_path):
    options = {"letter_images": 10, "letter_size": 12}
    data = load_data(config(data="letters", **options))
    assert (len(data.train), len(data.val), len(data.test)) == tuple(
        n * len(data.classes) for n in (10, 2, 2)
    )
    assert data.train.decode(0).size == (12, 12) and data.watched == "val"
    again = load_data(config(data="letters", seed=1, **options))
    assert np.array_equal(data.train.decode(7), again.train.decode(7))
    novel, names = load_classes(config(data="letters:novel", **options))
    assert set(names).isdisjoint(data.classes) and len(novel) == 14 * len(names)
    with pytest.raises(TrainingError, match="no fonts"):
        load_data(config(data="letters", fonts=str(tmp_path), **options))


class FakeTorchvision:
    """A torchvision data set as its users see it."""

    classes = ("cat", "dog")

    def __init__(self, root, split="train", download=False):
        if split not in ("trainval", "test"):
            raise ValueError(f"Unknown value {split!r} for argument split")
        self._labels = [0, 1, 1] if split == "trainval" else [1, 0]

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, i):
        return Image.new("L", (8, 8), 10 * i), self._labels[i]


def test_torchvision(monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision.datasets, "Flowers102", FakeTorchvision)
    data = load_data(config(data="torchvision:Flowers102"))
    assert data.classes == ["cat", "dog"] and data.train.labels.tolist() == [0, 1, 1]
    assert data.val.decode(0).mode == "RGB"
    with pytest.raises(TrainingError, match=r"Unknown value 'nowhere'.*--val-split"):
        load_data(config(data="torchvision:Flowers102", val_split="nowhere"))
    with pytest.raises(TrainingError, match=r"no such data set; torchvision has .*CIFAR100"):
        load_data(config(data="torchvision:Imaginary"))


def test_torchvision_not_downloaded(tmp_path):
    with pytest.raises(TrainingError, match=r"CIFAR10 in .*(see --data-dir, --download)"):
        load_data(config(data="torchvision:CIFAR10", data_dir=str(tmp_path)))
