"""Folders of images as they come: odd formats, links, pipes, names that are no text."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from clce_ext.train.cli import main
from clce_ext.train.config import TrainConfig
from clce_ext.train.data import load_data
from clce_ext.train.errors import TrainingError, UnreadableImageError

from .training import QUICK, command_line, results, write_digit_images


@pytest.fixture
def folder(tmp_path):
    return write_digit_images(tmp_path / "data", train=3, val=1, classes=2, size=8)


def first_image(folder, **options):
    """Pixels [H, W, 3] of the first training image."""
    images = load_data(TrainConfig(data=str(folder), **options)).train
    return np.asarray(images.decode(0))


def replace_first(folder, image, suffix, **options):
    """``image`` in place of the first training image."""
    path = sorted((folder / "train/digit_0").iterdir())[0]
    path.unlink()
    path = path.with_suffix(suffix)
    image.save(path, **options)
    return path


@pytest.mark.parametrize("content", ["PNG", "TIFF"])
def test_16_bits_of_grey_are_scaled_not_clipped(folder, content):
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    path = replace_first(folder, Image.fromarray(ramp), ".png", format=content)
    with Image.open(path) as image:
        assert image.mode.startswith("I")
    pixels = first_image(folder)
    assert pixels.shape == (8, 8, 3)
    np.testing.assert_allclose(pixels[..., 0], ramp / 257.0, atol=0.5)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_grey_of_unknown_range_is_refused_by_file_name(folder, dtype):
    path = replace_first(
        folder, Image.fromarray(np.arange(64, dtype=dtype).reshape(8, 8)), ".png", format="TIFF"
    )
    with pytest.raises(
        UnreadableImageError, match=f"{path.name} .*32-bit grey .* convert it to 8 or 16 bits"
    ):
        first_image(folder)


def test_an_image_of_too_many_pixels_is_refused_by_file_name(folder):
    path = replace_first(folder, Image.new("1", (13000, 13000)), ".png")
    message = rf"{path.name} .*13000 x 13000 pixels are more than --max-image-pixels 89478485"
    with pytest.raises(UnreadableImageError, match=message):
        first_image(folder)
    with pytest.raises(UnreadableImageError, match="are more than --max-image-pixels 168999999"):
        first_image(folder, max_image_pixels=168_999_999)


def test_the_limit_of_pixels_is_an_option(folder):
    assert first_image(folder, max_image_pixels=64).shape == (8, 8, 3)
    with pytest.raises(UnreadableImageError, match="8 x 8 pixels are more than --max-image-pixels 63"):
        first_image(folder, max_image_pixels=63)


def test_colour_spaces_palettes_and_metadata_are_read(folder):
    red = Image.new("RGB", (8, 8), (250, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    cases = [
        (red.convert("CMYK"), ".jpg", {}),
        (red.quantize(4), ".png", {}),
        (red.convert("RGBA"), ".png", {}),
        (red, ".jpg", {"exif": exif}),
        (Image.new("LA", (8, 8), (200, 100)), ".png", {}),
        (Image.new("1", (8, 8), 1), ".png", {}),
    ]
    for image, suffix, options in cases:
        replace_first(folder, image, suffix, **options)
        pixels = first_image(folder)
        assert pixels.shape == (8, 8, 3) and pixels[..., 0].min() > 190


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_images_stand_upright(folder, suffix):
    """Orientation 6: the camera was held so that the left side of what is stored is the top."""
    stored = Image.new("RGB", (48, 16), (10, 10, 10))
    stored.paste((250, 250, 250), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    replace_first(folder, stored, suffix, exif=exif)
    pixels = first_image(folder)
    assert pixels.shape == (48, 16, 3) and pixels[:12].min() > 190 and pixels[20:].max() < 60


def test_damaged_exif_does_not_make_an_image_unreadable(folder):
    image = Image.new("RGB", (8, 8), (250, 10, 10))
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        replace_first(folder, image, ".jpg", exif=exif)
        assert first_image(folder).shape == (8, 8, 3)


@pytest.mark.parametrize("target", ["..", "../..", "."])
def test_links_that_lead_round_in_a_circle_are_named(folder, target):
    for name in ("digit_0", "digit_1"):
        (folder / "train" / name / "loop").symlink_to(target)
    with pytest.raises(TrainingError, match=r"digit_0/loop: a link to .* leads round in a circle: remove it"):
        load_data(TrainConfig(data=str(folder)))


def test_links_to_images_and_to_class_folders_are_followed(folder, tmp_path):
    (folder / "train/digit_1").rename(tmp_path / "elsewhere")
    (folder / "train/digit_1").symlink_to(tmp_path / "elsewhere")
    image = sorted((folder / "train/digit_0").iterdir())[0]
    (folder / "train/digit_0/link.png").symlink_to(image)
    assert len(load_data(TrainConfig(data=str(folder))).train) == 7


def test_a_pipe_among_the_images_is_named(folder):
    os.mkfifo(folder / "train/digit_1/f.png")
    with pytest.raises(
        TrainingError, match=r"digit_1/f\.png: a pipe, socket or device, not a file: remove it"
    ):
        load_data(TrainConfig(data=str(folder)))


def test_a_link_to_nothing_is_named(folder):
    (folder / "train/digit_1/gone.png").symlink_to("nowhere.png")
    with pytest.raises(TrainingError, match=r"digit_1/gone\.png: a link to nothing, not a file: remove it"):
        load_data(TrainConfig(data=str(folder)))


def test_a_data_folder_whose_name_is_no_text(folder, tmp_path):
    """Trains, writes results and report, and resumes; in processes whose standard streams are strict."""
    strange = os.fsencode(tmp_path) + b"/d\xff ta"
    os.rename(folder, strange)
    output = tmp_path / "run"
    options = QUICK | {"shots": 2, "batch_size": 4, "epochs": 1, "progress": True}
    command = [sys.executable, "-m", "clce_ext.train", *command_line(options), "--output", str(output)]
    command = [*map(os.fsencode, command), b"--data", strange]
    for extra in ([], [b"--resume"]):
        done = subprocess.run(command + extra, capture_output=True, env={**os.environ, "PYTHONUTF8": "1"})
        assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert os.fsencode(results(output)["data"]) == strange
    assert "d\\udcff ta" in (output / "report.html").read_text(encoding="utf-8")


def test_wrong_options_with_a_name_that_is_no_text_are_one_line(capfd, tmp_path):
    assert main(["--data", os.fsdecode(b"no\xff where"), "--output", str(tmp_path)]) == 2
    error = capfd.readouterr().err
    assert "no such directory" in error and error.count("\n") == 1
