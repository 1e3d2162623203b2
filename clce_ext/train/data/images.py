"""Images with labels, as loaders take them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from ..errors import UnreadableImageError
from ..seeds import seeded


@dataclass
class Source:
    """One split: N images and their classes."""

    items: Any  # of images: paths, files or what they hold, arrays, PIL's images, or samples of these
    labels: np.ndarray  # [N] int64
    title: str = ""  # of the data set; none where the items are paths
    max_pixels: int | None = None  # larger images are refused
    passed_over: dict[str, int] = field(default_factory=dict)  # files beside them that are no images, by kind

    def name(self, i: int) -> str:
        """Of an image, for messages; its path, where it lies in a file."""
        return f"{self.title}[{i}]" if self.title else self.items[i]

    def read(self, i: int) -> Image.Image:
        item = self.items[i]
        item = item[0] if isinstance(item, tuple) else item
        if isinstance(item, dict):  # Hugging Face's
            item = item["path"] if item["bytes"] is None else item["bytes"]
        if isinstance(item, bytes):
            item = io.BytesIO(item)
        if isinstance(item, np.ndarray):
            item = Image.fromarray(item)
        if isinstance(item, Image.Image):
            return rgb(item, self.max_pixels)
        Image.MAX_IMAGE_PIXELS = None  # Pillow only warns; ours is a limit
        with Image.open(item) as image:
            return rgb(image, self.max_pixels)


def rgb(image: Image.Image, max_pixels: int | None = None) -> Image.Image:
    """8 bits of red, green and blue, upright where EXIF says how the camera was held. Pillow itself would
    clip 16 bits of grey to white instead of scaling.

    Raises:
        ValueError: more than ``max_pixels`` pixels, or numbers of unknown range.
    """
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise ValueError(
            f"{image.width} x {image.height} pixels are more than --max-image-pixels {max_pixels}"
        )
    kind = image.format  # which a turned image has lost
    with contextlib.suppress(Exception):  # EXIF that is damaged; images that are fail below
        image = ImageOps.exif_transpose(image)
    # Older versions of Pillow read the 16 bits of a PNG as 32.
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit grey (mode {image.mode}) has no known range: convert it to 8 or 16 bits")
    return image.convert("RGB")


def joined(sources: Sequence[Source]) -> Source:
    """Splits of one data set, one after another."""
    items = ConcatDataset([source.items for source in sources])
    labels = np.concatenate([source.labels for source in sources])
    return Source(items, labels, sources[0].title, sources[0].max_pixels)


@dataclass(eq=False)
class Images(Dataset):
    """Some of a source's images, with their labels.

    ``self[i]`` is (image [C, H, W], label); ``self[i, draw]`` is (views [V, C, H, W], label), with random
    augmentation that only (draw, i) decides. The loaders set the transform.
    """

    source: Source
    indices: np.ndarray  # [N] into the source
    labels: np.ndarray  # [N] int64
    decoded: Mapping[int, Image.Image] | None = None  # by index into the source, where they are kept
    transform: Callable[[Image.Image], Tensor] | None = None
    views: int = 1

    def take(self, positions: np.ndarray | slice) -> Images:
        return type(self)(self.source, self.indices[positions], self.labels[positions], self.decoded)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int | tuple[int, int]) -> tuple[Tensor, int]:
        index, draw = item if isinstance(item, tuple) else (item, None)
        image = self.decode(int(self.indices[index]))
        label = int(self.labels[index])
        if draw is None:
            return self.transform(image), label
        with seeded(draw, int(self.indices[index])):
            return torch.stack([self.transform(image) for _ in range(self.views)]), label

    def decode(self, index: int) -> Image.Image:
        """The source's image ``index``; raises UnreadableImageError."""
        if self.decoded is not None:
            return self.decoded[index]
        try:
            return self.source.read(index)
        except Exception as error:  # PIL raises OSError, SyntaxError, struct.error, ... for broken files
            reason = f"{type(error).__name__}: {error}"
            raise UnreadableImageError(f"cannot read image {self.source.name(index)} ({reason})") from None
