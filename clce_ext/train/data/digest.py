"""Whether two processes, or a run and its continuation, have the same data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

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
    for name, images in (("train", data.train), ("val", data.val), ("test", data.test)):
        if images is not None:
            found[name] = f"{len(images)} images, {_hash(_parts(images))}"
    return found


def _parts(images: Images) -> Iterable[bytes]:
    source, count = images.source, len(images)
    yield images.labels.astype("<i8").tobytes()
    sampled = set(np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int).tolist())
    for position, index in enumerate(images.indices.tolist()):
        name = source.name(index)
        if source.title:
            yield name.encode()
            if position in sampled:
                yield images.decode(index).tobytes()[:_BYTES]
            continue
        yield os.fsencode("/".join(Path(name).parts[-2:]))
        yield str(os.stat(name).st_size).encode()
        if position in sampled:
            with open(name, "rb") as file:
                yield file.read(_BYTES)


def _hash(parts: Iterable[bytes]) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.hexdigest()[:12]
