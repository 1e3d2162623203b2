"""Progress bars: on a terminal alone, and gone once what they show is done."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress(description: str, iterable: Iterable | None = None, shown: bool = True, **options: Any) -> tqdm:
    """Over the ``iterable``, or a context whose ``update`` counts on; ``options`` are tqdm's."""
    hidden = not (shown and sys.stderr.isatty())
    return tqdm(iterable, description, leave=False, dynamic_ncols=True, disable=hidden, **options)


def waiting(description: str, shown: bool = True) -> tqdm:
    """A context for what cannot say how far it is: only that it is under way."""
    return progress(f"{description} ...", shown=shown, bar_format="{desc}")
