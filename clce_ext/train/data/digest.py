"""Whether two processes, or a run and its continuation, have the same data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import first_line
from .images import Images
from .splits import Data

_SAMPLE = 500  # images of each split whose content is looked at
_BYTES = 1 << 20  # at most, of each of them


def data_digest(data: Data) -> dict[str, str]:
    """What the data is, in words to compare: of the classes and each split, ``"60 images, 3fa4c1d2e5b6"``.

    The digits (SHA-256, cut) are of labels and names in their order and, of files, of sizes; and of the
    first MiB of up to 500 images, evenly spread (of their pixels, where images do not lie in files). The
    folder that holds the data does not count: a file's name is CLASS/FILE.
    """
    found = {"classes": f"{len(data.classes)} classes, {_hash(name.encode() for name in data.classes)}"}
    for name in ("train", "val", "test"):
        images = getattr(data, name)
        if images is not None:
            found[name] = f"{len(images)} images, {_hash(_parts(images))}"
    return found


def digest_differences(before: dict[str, str], now: dict[str, str]) -> str:
    """``"train was 36 images, 3fa4c1d2e5b6, is 60 images, 1b2c3d4e5f60"``; empty where nothing differs."""
    return "; ".join(
        f"{name} was {before.get(name, 'not there')}, is {now.get(name, 'not there')}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    )


def _parts(images: Images) -> Iterable[bytes]:
    source, count = images.source, len(images)
    yield images.labels.astype("<i8").tobytes()
    sampled = set(np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int).tolist()) if count else set()
    for position, index in enumerate(images.indices.tolist()):
        name = source.name(index)
        if source.in_files:
            yield os.fsencode("/".join(Path(name).parts[-2:]))
            yield str(os.stat(name).st_size).encode()
            if position in sampled:
                with open(name, "rb") as file:
                    yield file.read(_BYTES)
        else:
            yield name.encode()
            if position in sampled:
                yield _pixels(images, index)


def _pixels(images: Images, index: int) -> bytes:
    try:
        return images.source.image(index).tobytes()[:_BYTES]
    except Exception as error:  # a broken image is named when it is needed
        return first_line(error).encode()


def _hash(parts: Iterable[bytes]) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.hexdigest()[:12]
