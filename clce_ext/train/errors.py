"""What the user can put right: printed as one line, without a traceback."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from typing import Any


class TrainingError(RuntimeError):
    """Wrong option, data or file. The message says what was found and what to do."""


class UnreadableImageError(TrainingError):
    """An image file that cannot be decoded; the message names it."""


def listing(names: Sequence[object], most: int = 12) -> str:
    """The names, separated by commas; those beyond ``most`` are only counted."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(error: BaseException) -> str:
    """What is worth quoting of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def timm_makes(what: str, factory: Callable[..., Any]) -> Callable[..., Any]:
    """``factory``, whose complaints name the options that led to it."""

    def make(*arguments: Any, **options: Any) -> Any:
        try:
            return factory(*arguments, **options)
        except Exception as error:  # timm asserts, looks up and raises as it comes
            raise TrainingError(f"{what}: timm refuses: {type(error).__name__}: {error}") from error

    return make


def run_command(name: str, main: Callable[[], None]) -> int:
    """Runs ``main`` and turns a TrainingError, or a file's, into one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):  # a file's name need not be text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except TrainingError as error:
        # A data loader's worker wraps the message in its traceback; the message itself comes last.
        text = str(error).strip()
        if "Original Traceback" in text:
            text = text.splitlines()[-1].partition(": ")[2] or text
        print(f"{name}: error: {text}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command with --resume goes on", file=sys.stderr)
        return 130
    return 0
