"""Characters drawn at run time: the same for the same seed, no font in two splits, no class that is two."""

from __future__ import annotations

import shutil
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from clce_ext.train import letters
from clce_ext.train.errors import TrainingError

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def draw(split="train", characters="AΩЖ", images_per_class=8, **options):
    return letters.draw(split, characters, images_per_class, **options)


def test_images_and_labels_go_together():
    drawn = draw(size=28)
    assert drawn.pixels.shape == (24, 28, 28) and drawn.pixels.dtype == np.uint8
    assert drawn.classes == ["A", "Ω", "Ж"]
    assert list(drawn.labels) == [0] * 8 + [1] * 8 + [2] * 8 and len(drawn.fonts) == 24


def test_the_seed_decides_every_image():
    first, again, other = draw(), draw(), draw(seed=1)
    assert np.array_equal(first.pixels, again.pixels)
    assert all((a != b).any() for a, b in zip(first.pixels, other.pixels, strict=True))
    assert len(np.unique(first.pixels, axis=0)) == len(first.pixels)  # variations differ


def test_fewer_images_or_characters_are_some_of_the_same():
    few = draw(characters="Ж", images_per_class=3)
    assert np.array_equal(few.pixels, draw().pixels[16:19])


def test_no_font_in_two_splits_and_relatives_stay_together():
    families = [{font.family for font in letters.fonts_of_split(split)} for split in letters.SPLITS]
    files = [{font.path.name for font in letters.fonts_of_split(split)} for split in letters.SPLITS]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not families[i] & families[j] and not files[i] & files[j]
    assert all(families)
    for relatives in ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cm"):
        assert sum(any(name.startswith(relatives) for name in split) for split in files) == 1


@pytest.mark.parametrize("split", letters.SPLITS)
def test_every_split_draws_every_character_legibly(split):
    """Neither blank nor a filled box."""
    drawn = letters.draw(split, letters.CHARACTERS, 4)
    assert drawn.classes == list(letters.CHARACTERS)
    ink = drawn.pixels.mean(axis=(1, 2)) / 255
    assert drawn.pixels.max(axis=(1, 2)).min() > 150
    assert ink.min() > 0.01 and ink.max() < 0.7
    drawn_from = {font.path.name for font in letters.fonts_of_split(split)}
    assert {Path(path).name for path in drawn.fonts} <= drawn_from


def test_fonts_without_a_character_do_not_draw_it():
    """A font draws a box for what it lacks, and matplotlib's placeholder font has a box for everything."""
    for split in letters.SPLITS:
        for font in letters.fonts_of_split(split):
            assert "LastResort" not in font.path.name and "STIXSiz" not in font.path.name
    drawn = draw(characters="Ω", images_per_class=30)
    assert not any(Path(path).name.startswith("cm") for path in drawn.fonts)  # Latin only


def test_base_and_novel_characters_share_none():
    assert not set(letters.BASE) & set(letters.NOVEL)
    assert set(letters.BASE) | set(letters.NOVEL) == set(letters.CHARACTERS)
    for part in (letters.BASE, letters.NOVEL):
        assert {unicodedata.name(c).split()[0] for c in part} == {"LATIN", "GREEK", "CYRILLIC"}


@pytest.mark.parametrize(
    "alike",
    ["AΑА", "BΒВв", "CcСс", "EΕЕ", "HΗНн", "KkΚκКк", "MМм", "NΝ", "PpΡρРр", "SsЅѕ", "TΤТт", "Uuυ", "VvΝν",
     "WwԜ", "XxΧχХх", "YΥ", "ZzΖ", "ΓГг", "ΠПп", "ΦФф", "Дд", "ΩΏ", "JjЈј", "nп", "qԛ", "hһ", "ЬЫ"],
)  # fmt: skip
def test_of_characters_that_look_alike_one_is_a_class(alike):
    assert sum(c in letters.CHARACTERS for c in alike) <= 1


def test_what_looks_like_a_digit_is_no_class():
    assert not set("0123456789OoΟοОоIiliΙІіЗзЧч|") & set(letters.CHARACTERS)
    assert len(set(letters.CHARACTERS)) == len(letters.CHARACTERS)


def test_a_folder_adds_its_fonts(tmp_path):
    shutil.copy(FONTS / "DejaVuSerif.ttf", tmp_path / "Mine.ttf")
    before = {split: letters.fonts_of_split(split) for split in letters.SPLITS}
    after = {split: letters.fonts_of_split(split, tmp_path) for split in letters.SPLITS}
    (split,) = [s for s in letters.SPLITS if any(f.path.name == "Mine.ttf" for f in after[s])]
    assert any(f.family == "DejaVu Serif" for f in after[split])  # with its relatives
    assert sum(map(len, after.values())) == sum(map(len, before.values())) + 1


def test_folders_without_fonts_and_broken_fonts_are_named(tmp_path):
    with pytest.raises(TrainingError, match="no fonts"):
        draw(folder=tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "half.ttf").write_bytes((FONTS / "DejaVuSans.ttf").read_bytes()[:100])
    with pytest.raises(TrainingError, match=r"half\.ttf: not a font"):
        draw(folder=tmp_path / "broken")
    with pytest.raises(TrainingError, match="no font of the split train has the character '龍'"):
        draw(characters="龍")
