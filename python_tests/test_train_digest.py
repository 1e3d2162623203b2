"""A digest of the data tells other files, labels or classes, and nothing else."""

from __future__ import annotations

import shutil

import pytest
from PIL import Image

from clce_ext.train.config import TrainConfig
from clce_ext.train.data import data_digest, load_data
from clce_ext.train.errors import differences

from .training import write_digit_images


def digest_of(data, **options):
    return data_digest(load_data(TrainConfig(data=str(data), **options)))


@pytest.fixture
def folder(tmp_path):
    return write_digit_images(tmp_path / "one", train=3, val=1, classes=3, size=8)


def test_the_same_data_in_another_folder_has_the_same_digest(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "two")
    assert digest_of(folder) == digest_of(copy)
    assert differences(digest_of(folder), digest_of(copy)) == ""


def _swap_labels(root):
    a, b = root / "train/digit_0", root / "train/digit_1"
    first, second = sorted(a.iterdir())[0], sorted(b.iterdir())[0]
    first.rename(b / first.name), second.rename(a / second.name)


def _other_pixels_of_one_size(root):
    path = sorted((root / "train/digit_2").iterdir())[1]
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        _swap_labels,
        _other_pixels_of_one_size,
        lambda root: sorted((root / "train/digit_1").iterdir())[0].unlink(),
        lambda root: sorted((root / "train/digit_1").iterdir())[0].rename(root / "train/digit_1/new.png"),
        lambda root: Image.new("L", (8, 8)).save(root / "train/digit_1/added.png"),
    ],
    ids=["labels", "content", "missing", "renamed", "added"],
)
def test_changed_training_images_have_another_digest(folder, change):
    before = digest_of(folder)
    change(folder)
    now = digest_of(folder)
    assert {name for name in now if now[name] != before[name]} == {"train"}
    assert f"train was {before['train']}, is {now['train']}" == differences(before, now)


def test_renamed_classes_have_another_digest(folder):
    before = digest_of(folder)
    for split in ("train", "val"):
        (folder / split / "digit_2").rename(folder / split / "digit_7")
    assert "classes was" in differences(before, digest_of(folder))


def test_images_that_lie_in_no_files_have_a_digest_of_their_pixels():
    assert digest_of("digits", shots=4) == digest_of("digits", shots=4)
    assert digest_of("digits", shots=4) != digest_of("digits", shots=4, seed=1)
