"""What the user can put right: printed as one line, without a traceback."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType


class TrainingError(RuntimeError):
    """Wrong option, data or file. The message says what was found and what to do."""


class UnreadableImageError(TrainingError):
    """An image file that cannot be decoded; the message names it."""


def listing(names: Sequence[object], most: int = 12) -> str:
    """The names, separated by commas; those beyond ``most`` are only counted."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def differences(
    before: Mapping[str, object], now: Mapping[str, object], words: str = "{name} was {before}, is {now}"
) -> str:
    """What differs, in ``words``: "train was 36 images, is 60 images; ..."; empty where nothing does."""
    pairs = {name: (before.get(name, "not there"), now.get(name, "not there")) for name in [*before, *now]}
    return "; ".join(words.format(name=name, before=a, now=b) for name, (a, b) in pairs.items() if a != b)


def first_line(error: BaseException) -> str:
    """What is worth quoting of an error's message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # torch names the model in the first line, and in the next one what does not fit it.
    return textwrap.shorten(" ".join(lines[: 1 + lines[0].endswith(":")]), 300, placeholder=" ...")


@contextlib.contextmanager
def in_one_line(before: str, after: str = "") -> Iterator[None]:
    """What other packages raise, which is of all types, becomes a TrainingError: its type and message between
    ``before``, which names the option or the file that led to it, and ``after``."""
    try:
        yield
    except TrainingError:
        raise
    except Exception as error:
        raise TrainingError(f"{before}{type(error).__name__}: {first_line(error)}{after}") from error


def imported(module: str, option: str) -> ModuleType:
    """A module of a package that only ``option`` needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.replace("_", "-")
        raise TrainingError(f"{option}: needs the package {package} (pip install {package})") from error


def run_command(name: str, main: Callable[[], None], after_interrupt: str = "") -> int:
    """Runs ``main`` and turns a TrainingError, or a file's, into one line on stderr and exit status 2.

    ``after_interrupt`` says, where Ctrl-C ended it, how it goes on.
    """
    for stream in (sys.stdout, sys.stderr):  # a file's name need not be text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (TrainingError, OSError) as error:
        # A data loader's worker wraps the message in its traceback; the message itself comes last.
        text = str(error).strip()
        if "Original Traceback" in text:
            text = text.splitlines()[-1].partition(": ")[2] or text
        print(f"{name}: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("; ".join(filter(None, (f"{name}: interrupted", after_interrupt))), file=sys.stderr)
        return 130
    return 0
