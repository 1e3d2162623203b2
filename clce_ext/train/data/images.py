"""Images with labels, as loaders take them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UnreadableImageError
from ..seeds import seeded


@dataclass
class Source:
    """One split: image(i) decodes, labels[i] is a class index, name(i) is for messages."""

    image: Callable[[int], Image.Image]
    labels: np.ndarray  # [N] int64
    name: Callable[[int], str]
    passed_over: dict[str, int] = field(default_factory=dict)  # files beside them that are no images, by kind
    in_files: bool = False  # whether name(i) is the path of a file


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
    """One source after another, as one."""
    starts = np.cumsum([0, *(len(source.labels) for source in sources)])
    return Source(
        image=functools.partial(_of_joined, [source.image for source in sources], starts),
        labels=np.concatenate([source.labels for source in sources]),
        name=functools.partial(_of_joined, [source.name for source in sources], starts),
        in_files=all(source.in_files for source in sources),
    )


def _of_joined(functions: Sequence[Callable[[int], Any]], starts: np.ndarray, i: int) -> Any:
    part = int(np.searchsorted(starts, i, side="right")) - 1
    return functions[part](i - int(starts[part]))


@dataclass(eq=False)
class Images(Dataset):
    """Some of a source's images, with their labels.

    ``self[i]`` is (image [C, H, W], label); ``self[i, draw]`` is (views [V, C, H, W], label), with random
    augmentation that only (draw, i) decides. The loaders set the transform.
    """

    source: Source
    indices: np.ndarray  # [N] into the source
    labels: np.ndarray  # [N] int64
    transform: Callable[[Image.Image], Tensor] | None = None
    views: int = 1

    def take(self, positions: np.ndarray | slice) -> Images:
        return Images(self.source, self.indices[positions], self.labels[positions])

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
        try:
            return self.source.image(index)
        except Exception as error:  # PIL raises OSError, SyntaxError, struct.error, ... for broken files
            reason = f"{type(error).__name__}: {error}"
            raise UnreadableImageError(f"cannot read image {self.source.name(index)} ({reason})") from None
