"""Images of characters, drawn at run time in the fonts that matplotlib ships.

A class is a character; its images are fonts x variations of shear, weight, size and place. Every image is a
function of (seed, split, character, number), so that fewer images are the beginning of more. The splits share
no family of fonts.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from .errors import TrainingError

# Of characters that look alike one is here, whatever their scripts and, as sizes vary, whatever their cases:
# A is Latin, Greek and Cyrillic A, K is k. Cyrillic letters are capitals: the small ones are the same made
# smaller, or look like other scripts' in italics (the small Te is an m).
# Left out because they are digits by their looks: O (0), I, l and i (1), Cyrillic Ze (3) and Che (4). Near a
# digit, but none: Z (2), S (5), b, δ and σ (6), B (8), g and q (9).
_LATIN = "ABCDEFGHJKLMNPQRSTUVWXYZabdefghmnqrty"
_GREEK = "ΓΔΘΛΞΠΣΦΨΩβδεζηλμξσω"
_CYRILLIC = "БДЖИЦШЫЭЮЯЂЉЊ"
CHARACTERS = _LATIN + _GREEK + _CYRILLIC
# For few-shot episodes: characters of every script that a model trained on BASE never saw.
NOVEL = CHARACTERS[1::4]
BASE = "".join(c for c in CHARACTERS if c not in NOVEL)

SPLITS = ("train", "val", "test")
_HELD_OUT_SHARE = 0.15  # of the families, in each of val and test
# Fonts that give letters' codes to other things: a placeholder for every code, brackets, symbols.
_NOT_LETTERS = {"LastResortHE-Regular.ttf", "cmex10.ttf", "cmsy10.ttf"}
# Words of a family's name that tell its members apart.
_STYLES = {"mono", "display", "condensed", "narrow", "extralight", "light", "medium", "semibold", "black"}


@dataclass(frozen=True)
class Letters:
    """One split, class after class."""

    pixels: np.ndarray  # [N, size, size] uint8, ink bright on black like scikit-learn's digits
    labels: np.ndarray  # [N] int64, of classes
    fonts: np.ndarray  # [N], the file each image was drawn from
    classes: list[str]


@dataclass(frozen=True)
class _Font:
    path: Path
    family: str
    characters: str  # those of CHARACTERS that it has


def draw(
    split: str,
    characters: str = BASE,
    images_per_class: int = 150,
    size: int = 32,
    seed: int = 0,
    folder: str | Path | None = None,
) -> Letters:
    """``images_per_class`` images of every character; the fonts of ``split`` take turns.

    ``folder`` adds its fonts to those of matplotlib.

    Raises:
        TrainingError: ``folder`` holds no fonts or broken ones; a character that no font of the split draws.
    """
    fonts = fonts_of_split(split, folder)
    pixels, paths = [], []
    for character in characters:
        having = [font.path for font in fonts if character in font.characters]
        if not having:
            raise TrainingError(f"no font of the split {split} has the character {character!r}")
        for number in range(images_per_class):
            path = having[number % len(having)]
            key = [seed, SPLITS.index(split), ord(character), number]
            pixels.append(_image(str(path), character, size, np.random.default_rng(key)))
            paths.append(str(path))
    labels = np.repeat(np.arange(len(characters)), images_per_class)
    return Letters(np.stack(pixels), labels, np.array(paths), list(characters))


# Fonts


def fonts_of_split(split: str, folder: str | Path | None = None) -> list[_Font]:
    """Whole families: of those that have every character the smallest go to val and test in turn."""
    families: dict[str, list[_Font]] = {}
    for font in _fonts(folder):
        families.setdefault(font.family, []).append(font)
    complete = [name for name, fonts in families.items() if all(f.characters == CHARACTERS for f in fonts)]
    complete.sort(key=lambda name: (len(families[name]), name))
    each = max(1, round(_HELD_OUT_SHARE * len(families)))
    held_out = complete[: min(2 * each, len(complete) - 1)]
    chosen = {"val": held_out[::2], "test": held_out[1::2]}
    names = chosen.get(split, [name for name in families if name not in held_out])
    return [font for name in names for font in families[name]]


@functools.cache
def _fonts(folder: str | Path | None) -> list[_Font]:
    folders = [Path(matplotlib.get_data_path()) / "fonts" / "ttf"] + ([Path(folder)] if folder else [])
    fonts: dict[str, _Font] = {}  # by file name: a font that lies in both folders counts once
    for place in folders:
        files = sorted(p for p in place.rglob("*") if p.suffix.lower() in (".ttf", ".otf"))
        if not files:
            raise TrainingError(f"{place}: no fonts (.ttf, .otf) in it")
        for path in files:
            if path.name not in _NOT_LETTERS:
                fonts.setdefault(path.name, _read_font(path))
    return [font for font in fonts.values() if font.characters]


def _read_font(path: Path) -> _Font:
    try:
        font = FT2Font(path)
    except RuntimeError as error:
        raise TrainingError(f"{path}: not a font ({error})") from None
    characters = "".join(c for c in CHARACTERS if font.get_char_index(ord(c)))
    return _Font(path, _family(font.family_name), characters)


def _family(name: str) -> str:
    """The name that a font shares with all that are drawn nearly alike."""
    if re.fullmatch(r"cm[a-z]+\d+", name):
        return "Computer Modern"
    return " ".join(word for word in name.split() if word.lower() not in _STYLES)


# Drawing

_sized_font = functools.cache(ImageFont.truetype)


def _image(path: str, character: str, size: int, generator: np.random.Generator) -> np.ndarray:
    """One variation: [size, size] uint8."""
    factor = -(-64 // size)  # small images are drawn larger and averaged
    side = size * factor
    glyph = _glyph(path, character, side, weight=int(generator.integers(0, side // 20)))
    shear, tilt = generator.uniform(-0.35, 0.35), generator.uniform(-0.1, 0.1)
    width = np.exp(generator.uniform(-0.25, 0.25))
    matrix = np.array([[width, shear], [tilt, 1.0]])  # of the glyph's coordinates to the image's
    extent = np.abs(matrix) @ glyph.size
    scale = generator.uniform(0.75, 1.0) * side / extent.max()
    room = (side - scale * extent) / 2
    inverse = np.linalg.inv(scale * matrix)
    centre = side / 2 + generator.uniform(-room, room)
    offset = np.array(glyph.size) / 2 - inverse @ centre
    coefficients = [*inverse[0], offset[0], *inverse[1], offset[1]]
    image = glyph.transform((side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return np.asarray(image.reduce(factor))


@functools.lru_cache(maxsize=20000)
def _glyph(path: str, character: str, height: int, weight: int) -> Image.Image:
    """The character's ink, cut out; ``weight`` pixels are added on either side of every stroke."""
    font = _sized_font(path, height)
    left, top, right, bottom = font.getbbox(character, stroke_width=weight)
    image = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2))
    ImageDraw.Draw(image).text((1 - left, 1 - top), character, 255, font, stroke_width=weight)
    ink = image.getbbox()
    if ink is None:
        raise TrainingError(f"{path}: draws nothing for the character {character!r}")
    return image.crop(ink)
