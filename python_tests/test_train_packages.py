"""Data sets of other packages, as these write and read them: Hugging Face's, TensorFlow's, WebDataset's."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from clce_ext.train import evaluate
from clce_ext.train.config import TrainConfig
from clce_ext.train.data import data_digest, load_classes, load_data
from clce_ext.train.errors import TrainingError, UnreadableImageError, differences
from clce_ext.train.loop import train

from .training import quick_config, results, rows, without_times

WORDS = ["zero", "one", "two"]
SPLITS = {"train": range(0, 24), "test": range(24, 36)}


def config(**options) -> TrainConfig:
    return TrainConfig.from_dict(options)


@pytest.fixture(scope="module")
def digits():
    """(pixels uint8 [36, 8, 8], labels [36]) of three kinds in turn."""
    from sklearn.datasets import load_digits

    found = load_digits(n_class=3)
    chosen = np.concatenate([np.flatnonzero(found.target == label)[:12] for label in range(3)])
    chosen = chosen.reshape(3, 12).T.flatten()
    return (found.images[chosen] * (255 / 16)).astype(np.uint8), found.target[chosen]


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def check_images(data, pixels):
    """Every image is the one that was stored, here and in a process that was sent the source."""
    for images, part in ((data.train, SPLITS["train"]), (data.val, SPLITS["test"])):
        sent = pickle.loads(pickle.dumps(images))
        for i, position in enumerate(part):
            assert np.array_equal(np.asarray(images.decode(i))[..., 0], pixels[position])
            assert images.decode(i).mode == "RGB" and sent.decode(i).tobytes() == images.decode(i).tobytes()


# Hugging Face


@pytest.fixture
def hub(tmp_path, digits):
    """write(**columns): a folder of Parquet files, one per split, as hfds/ wants its name."""
    datasets = pytest.importorskip("datasets")
    pixels, labels = digits

    def write(named: str, kind, value, folder: str = "set") -> dict[str, str]:
        for split, part in SPLITS.items():
            features = {"id": datasets.Value("int64"), "img": datasets.Image(), named: kind}
            columns = {
                "id": list(part),
                "img": [{"bytes": encoded(pixels[i]), "path": None} for i in part],
                named: [value(int(labels[i])) for i in part],
            }
            table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
            (tmp_path / folder).mkdir(exist_ok=True)
            table.to_parquet(tmp_path / folder / f"{split}-00000-of-00001.parquet")
        return {"data": f"hfds/{tmp_path / folder}", "data_dir": str(tmp_path / "cache")}

    datasets.disable_progress_bars()
    write.datasets = datasets
    return write


def test_hugging_face_columns_are_found_by_their_types(hub, digits):
    options = hub("fine_label", hub.datasets.ClassLabel(names=WORDS), int)
    data = load_data(config(**options))
    assert data.classes == WORDS and data.watched == "test"
    assert data.train.labels.tolist() == digits[1][:24].tolist()
    check_images(data, digits[0])
    parts = {"train_split": "train[:50%]", "val_split": "train[50%:]", "test_split": "test"}
    data = load_data(config(**options, **parts))
    assert (len(data.train), len(data.val), len(data.test), data.watched) == (12, 12, 12, "val")
    images, names = load_classes(config(**options), ["two"])
    assert len(images) == 12 and names == ["two"]
    with pytest.raises(TrainingError, match=r"no dev split in it; .*Should be one of \['train', 'test'\]"):
        load_data(config(**options, val_split="dev"))
    with pytest.raises(TrainingError, match=r"--image-column pixels: no such column; it has id \(Value\), i"):
        load_data(config(**options, image_column="pixels"))


def test_hugging_face_labels_that_are_only_values(hub, digits):
    """Strings and numbers are classes by themselves; numbers may begin anywhere and leave some out."""
    options = hub("target", hub.datasets.Value("int64"), lambda label: 2 + 9 * label, "numbers")
    data = load_data(config(**options))
    assert data.classes == ["2", "11", "20"] and data.val.labels.tolist() == digits[1][24:].tolist()
    options = hub("species", hub.datasets.Value("string"), lambda label: WORDS[label], "strings")
    with pytest.raises(TrainingError, match=r"--label-column: no column is known to hold labels"):
        load_data(config(**options))
    data = load_data(config(**options, label_column="species"))
    assert data.classes == sorted(WORDS)
    assert [data.classes[y] for y in data.train.labels] == [WORDS[y] for y in digits[1][:24]]
    with pytest.raises(TrainingError, match="test has labels that the training split has not: 24, 25"):
        load_data(config(**options, label_column="id"))


def test_a_split_without_labels_is_none(hub):
    """So the hub keeps the test labels of competitions to itself."""
    options = hub("label", hub.datasets.ClassLabel(names=WORDS), lambda label: label)
    table = hub.datasets.Dataset.from_parquet(f"{options['data'][5:]}/test-00000-of-00001.parquet")
    hidden = table.map(lambda row: {"label": -1})
    hidden.to_parquet(f"{options['data'][5:]}/test-00000-of-00001.parquet")
    assert load_data(config(**options, val_fraction=0.25)).test is None
    with pytest.raises(TrainingError, match="12 of the 12 images of test have no label"):
        load_data(config(**options))


def test_a_run_on_a_hugging_face_set_goes_on_and_refuses_other_data(hub, tmp_path):
    options = hub("label", hub.datasets.ClassLabel(names=WORDS), int)
    options |= {"model": "beit_tiny_digits", "batch_size": 6, "eval_embeddings": "final"}
    whole = train(quick_config(tmp_path / "whole", **options), with_map=False)
    half = quick_config(tmp_path / "half", **options, workers=2, resume=True)
    train(half, with_map=False)
    # As a run that was killed in its second epoch leaves it.
    for name in ("results.json", "checksums.json", "model.safetensors"):
        (tmp_path / "half" / name).unlink()
    newest = max((tmp_path / "half" / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert without_times(train(half, with_map=False)) == without_times(whole)
    assert [without_times(row) for row in rows(tmp_path / "half")] == [
        {k: v for k, v in row.items() if "second" not in k} for row in rows(tmp_path / "whole")
    ]
    assert evaluate.main(["--checkpoint", str(tmp_path / "half"), "--output", str(tmp_path / "e.json")]) == 0
    figures = json.loads((tmp_path / "e.json").read_text())
    assert figures["top1"] == results(tmp_path / "half")["top1"]
    digest = data_digest(load_data(config(**options)))
    hub("label", hub.datasets.ClassLabel(names=WORDS), lambda label: (label + 1) % 3)
    assert "train was 24 images" in differences(digest, data_digest(load_data(config(**options))))
    (tmp_path / "half" / "results.json").unlink()
    with pytest.raises(TrainingError, match="was trained on other data than is there now: train was 12"):
        train(half)


def test_another_set_has_columns_of_its_own(hub, tmp_path):
    options = hub("species", hub.datasets.Value("string"), lambda label: WORDS[label], "strings")
    options |= {"label_column": "species", "batch_size": 6}
    train(quick_config(tmp_path / "run", **options))
    other = hub("number", hub.datasets.ClassLabel(names=WORDS), int, "numbers")
    arguments = ["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "e.json")]
    assert evaluate.main([*arguments, "--data", other["data"]]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["images"] == 12


def test_hugging_face_sets_that_are_not_there(monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(TrainingError, match=r"--data hfds/./nowhere: no such directory"):
        load_data(config(data="hfds/./nowhere"))
    with pytest.raises(TrainingError, match=rf"--data hfds/{tmp_path}: cannot be opened: .*Error: "):
        load_data(config(data=f"hfds/{tmp_path}"))


# WebDataset


@pytest.fixture
def shards(tmp_path, digits, monkeypatch):
    """write(folder, info, **parts): two shards of each split, and timm's _info.json if asked for."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pixels, labels = digits

    def write(folder: str, info: bool = False, name: str = "{split}-{n:04d}.tar", **parts) -> dict[str, str]:
        root, splits = tmp_path / folder, {}
        parts = {"png": lambda i: encoded(pixels[i]), "cls": lambda i: str(labels[i]).encode()} | parts
        for split, indices in SPLITS.items():
            names = [name.format(split=split, n=n) for n in range(2)]
            for file, half in zip(names, np.split(np.array(indices), 2), strict=True):
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                with tarfile.open(root / file, "w") as tar:
                    for i, (suffix, make) in itertools.product(half, parts.items()):
                        if (made := make(i)) is not None:
                            member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                            member.size = len(made)
                            tar.addfile(member, io.BytesIO(made))
            splits[split] = {"filenames": names}
        if info:
            (root / "_info.json").write_text(json.dumps({"splits": splits}))
        return {"data": "wds/", "data_dir": str(root)}

    return write


@pytest.mark.parametrize(
    ("info", "name"),
    [
        (True, "{n}-of-{split}.tar"),
        (False, "{split}-{n:04d}.tar"),
        (False, "few-digits_{split}.{n}.tar"),
        (False, "{split}/{n}.tar"),
    ],
)
def test_webdataset(shards, digits, info, name, monkeypatch):
    options = shards("set", info, name)
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "2")  # every process has all images
    data = load_data(config(**options))
    assert data.classes == ["0", "1", "2"] and data.watched == "test"
    assert data.train.labels.tolist() == digits[1][:24].tolist()
    check_images(data, digits[0])
    with pytest.raises(TrainingError, match=r"no dev split in it; .*Should be one of \['t.*, 't.*'\]"):
        load_data(config(**options, val_split="dev"))


def test_webdataset_labels_in_json_and_text(shards, digits):
    def said(i):
        return json.dumps({"species": WORDS[digits[1][i]]}).encode()

    options = shards("set", png=lambda i: None, jpeg=lambda i: encoded(digits[0][i]), json=said)
    assert load_data(config(**options)).classes == ["0", "1", "2"]
    data = load_data(config(**options, label_column="json.species"))
    assert data.classes == sorted(WORDS) and len(data.train) == 24
    assert [data.classes[y] for y in data.train.labels] == [WORDS[y] for y in digits[1][:24]]
    with pytest.raises(
        TrainingError, match=r"--label-column kind: no such column; it has .*json\.species \(Value\)"
    ):
        load_data(config(**options, label_column="kind"))
    words = shards("words", cls=lambda i: None, txt=lambda i: WORDS[digits[1][i]].encode())
    assert load_data(config(**words, label_column="txt")).classes == sorted(WORDS)


def test_webdataset_passes_over_nothing(shards, tmp_path, digits):
    broken = shards("broken", png=lambda i: b"no image" if i == 30 else encoded(digits[0][i]))
    with pytest.raises(UnreadableImageError, match=r"cannot read image wds/\[6\] \(UnidentifiedImageError"):
        load_data(config(**broken)).val.decode(6)
    lacking = shards("lacking", png=lambda i: None if i == 31 else encoded(digits[0][i]))
    with pytest.raises(UnreadableImageError, match=r"cannot read image wds/\[7\]"):
        load_data(config(**lacking)).val.decode(7)
    unlabelled = shards("unlabelled", cls=lambda i: None if i == 31 else b"1")
    with pytest.raises(TrainingError, match="1 of the 12 images of test have no label"):
        load_data(config(**unlabelled))
    options = shards("damaged", info=True)
    (tmp_path / "damaged" / "_info.json").write_text("{")
    with pytest.raises(TrainingError, match="damaged: cannot be opened: JSONDecodeError"):
        load_data(config(**options))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError, match=r"no shards \(.tar\) in .*empty"):
        load_data(config(data="wds/", data_dir=str(tmp_path / "empty")))
    for folder in (None, str(tmp_path / "nowhere")):
        with pytest.raises(
            TrainingError, match=r"wants the folder of the shards as --data-dir, got (none|.*nowhere)"
        ):
            load_data(config(data="wds/", data_dir=folder))


# TensorFlow


def test_tensorflow(tmp_path, digits):
    """Read compressed, in the order in which they are stored; the columns are found by their types."""
    tensorflow, tfds = map(pytest.importorskip, ("tensorflow", "tensorflow_datasets"))
    pixels, labels = digits
    kinds = tfds.features
    features = {"img": kinds.Image(shape=(8, 8, 1)), "digit": kinds.ClassLabel(names=WORDS)}
    tables = {
        split: tensorflow.data.Dataset.from_tensor_slices(
            {"img": pixels[list(part), ..., None], "digit": labels[list(part)]}
        )
        for split, part in SPLITS.items()
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name="few_digits", version="1.0.0", features=kinds.FeaturesDict(features), data_dir=tmp_path,
        split_datasets=tables,
    )  # fmt: skip
    options = {"data": "tfds/few_digits", "data_dir": str(tmp_path)}
    data = load_data(config(**options))
    assert data.classes == WORDS and data.watched == "test"
    # The order is TensorFlow's, by a hash of what is stored.
    stored = {pixels[i].tobytes(): labels[i] for i in SPLITS["train"]}
    read = {np.asarray(data.train.decode(i))[..., 0].tobytes(): y for i, y in enumerate(data.train.labels)}
    assert read == stored
    assert data_digest(data) == data_digest(load_data(config(**options)))
    with pytest.raises(TrainingError, match=r"no dev split in it; Unknown split 'dev'"):
        load_data(config(**options, val_split="dev"))
    with pytest.raises(
        TrainingError, match=r"cannot be opened: DatasetNotFoundError: Dataset none not found"
    ):
        load_data(config(**options | {"data": "tfds/none"}))
    with pytest.raises(TrainingError, match=r"tfds/mnist: not in .*; --download fetches it"):
        load_data(config(**options | {"data": "tfds/mnist"}))


@pytest.mark.parametrize(
    ("name", "package"), [("hfds/x", "datasets"), ("tfds/x", "tensorflow"), ("wds/", "datasets")]
)
def test_packages_that_are_not_there(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TrainingError, match=rf"--data {name}: needs the package {package}"):
        load_data(config(data=name))
