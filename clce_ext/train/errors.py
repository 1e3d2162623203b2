"""What the user can put right: printed as one line, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable


class TrainingError(RuntimeError):
    """Wrong option, data or file. The message says what was found and what to do."""


class UnreadableImageError(TrainingError):
    """An image file that cannot be decoded; the message names it."""


def run_command(name: str, main: Callable[[], None]) -> int:
    """Runs ``main`` and turns a TrainingError into one line on stderr and exit status 2."""
    try:
        main()
    except TrainingError as error:
        # A data loader's worker wraps the message in its traceback; the message itself comes last.
        text = str(error).strip()
        if "Original Traceback" in text:
            text = text.splitlines()[-1].partition(": ")[2] or text
        print(f"{name}: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command with --resume goes on", file=sys.stderr)
        return 130
    return 0
