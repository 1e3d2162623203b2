"""The directory of a run: one command at a time works in it; a run that it holds is gone on with, kept or
deleted, as the options say."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .checkpoint import checkpoints, damage, write_checksums
from .config import TrainConfig, flag, read_yaml
from .errors import TrainingError, differences
from .records import TRACKED

# Options that may differ between a run and its continuation: they do not change what is computed.
FREE_TO_CHANGE = {
    "checkpoint_epochs", "checkpoint_steps", "data_dir", "device", "download", "keep_checkpoints",
    "output", "overwrite", "plan", "progress", "resume", "tensorboard", "timeout", "tracker", "workers",
}  # fmt: skip
# What evaluations, comparisons and tables read of a finished run. Nothing reads its report, and one that was
# deleted must not make the run finish again.
_OF_A_FINISHED = (
    "model.safetensors", "embeddings.safetensors", "correct.safetensors", "metrics.csv", "results.json"
)  # fmt: skip


def lasting_options(config: TrainConfig) -> dict[str, Any]:
    """Those that decide what is computed."""
    return {name: value for name, value in config.to_dict().items() if name not in FREE_TO_CHANGE}


def run_id(config: TrainConfig) -> str:
    """The same for a run and its continuation, and no other run: 12 hexadecimal digits.

    Of the options that are not at their defaults, so that one which is added later changes no run's.
    """
    defaults = lasting_options(TrainConfig())
    given = {name: value for name, value in lasting_options(config).items() if value != defaults[name]}
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]


@contextlib.contextmanager
def opened(folder: Path, config: TrainConfig) -> Iterator[dict[str, Any] | None]:
    """Makes the directory and holds it; gives the results of a run that has finished and is resumed.

    The lock ends with the process, however it ends; loader processes that outlive it for a while have no part
    in it.

    Raises:
        TrainingError: another command holds it; or it holds a run that ``config`` neither goes on with nor
            deletes, or whose parts do not belong together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / ".lock", timeout=0), folder / ".lock-holder"
    try:
        lock.acquire()
    except Timeout:
        who = holder.read_text() if holder.exists() else "another process"
        raise TrainingError(
            f"--output {folder}: {who} is at work there: wait for its end, or give another --output"
        ) from None
    except OSError:
        print(f"warning: {folder}: its file system has no locks; start no second run there", file=sys.stderr)
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield _prepared(folder, config)
    finally:
        lock.release()


def write_finished(folder: Path, config: TrainConfig) -> None:
    """Marks the run as finished: from now on its files are to have the checksums that they have now."""
    write_checksums(folder, run_id(config), [name for name in _OF_A_FINISHED if (folder / name).exists()])


def _prepared(folder: Path, config: TrainConfig) -> dict[str, Any] | None:
    results = folder / "results.json"
    # A start that failed has left nothing to keep, and a tracker's run of it is another run.
    if not (checkpoints(folder) or results.exists()):
        for name in TRACKED.values():
            (folder / name).unlink(missing_ok=True)
        return None
    if config.resume:
        return _resumed(folder, config)
    if not config.overwrite:
        raise TrainingError(
            f"--output {folder} already holds a run: --resume goes on with it, --overwrite deletes it"
        )
    # First what says that there is a run, last what says which: it may be interrupted here too.
    for name in ("results.json", "checksums.json"):
        (folder / name).unlink(missing_ok=True)
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    patterns = ("metrics.csv", "report.html", "*.safetensors", "results-*.json")
    for pattern in (*patterns, *TRACKED.values(), "config.yaml"):
        for file in folder.glob(pattern):
            file.unlink()
    return None


def _resumed(folder: Path, config: TrainConfig) -> dict[str, Any] | None:
    saved, results = folder / "config.yaml", folder / "results.json"
    if not saved.exists():
        raise TrainingError(
            f"--resume: {folder} holds a run but no config.yaml to say which: put it back, or --overwrite "
            "(without --resume) starts again"
        )
    configs = TrainConfig.from_dict(read_yaml(saved), str(saved)), config
    before, now = ({flag(name): v for name, v in lasting_options(c).items()} for c in configs)
    if changed := differences(before, now, "{name} was {before!r}, is {now!r}"):
        raise TrainingError(f"--resume: {saved} has other options: {changed}")
    if not results.exists():
        return None
    found = damage(folder, run_id(config))
    if found is None:
        return json.loads(results.read_text())
    if not checkpoints(folder):
        raise TrainingError(
            f"--resume: {folder} finished before, but {found}, and there is no checkpoint to finish again "
            "from: --overwrite (without --resume) starts again"
        )
    print(f"warning: {folder} finished before, but {found}: finishing again", file=sys.stderr)
    return None
