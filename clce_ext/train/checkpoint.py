"""Files that are either whole or absent, and clear words about those that are broken.

A checkpoint is a directory, ``checkpoints/step-00000120/``, of ``model.safetensors`` (all weights),
``training.pt`` (optimizer, averaged weights, position in the run, metrics so far; loads with
``weights_only=True``) and ``checksums.json`` (of which run it is, and each file's SHA-256). It is written
under another name, flushed to the disk and renamed: whenever a run is killed, the newest directory of that
name is complete. What becomes of it later on the disk, its checksums tell.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.models import load_state_dict
from torch import Tensor

from .errors import TrainingError, first_line, in_one_line, listing

_CHECKSUMS = "checksums.json"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives another path to write a file or a directory at, which then takes the place of ``path``: readers
    never see a part of it.

    Raises:
        TrainingError: it cannot be written; a full disk is the usual reason.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    _remove(temporary)  # by a run that was killed
    try:
        yield temporary
        for written in (*temporary.glob("*"), temporary):
            _flush(written)
        if path.is_dir():  # the same step, written before an interruption
            _remove(path)
        os.replace(temporary, path)
        _flush(path.parent)
    # torch and safetensors have errors of their own for a full disk.
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        _remove(temporary)  # room for others
        reason = getattr(error, "strerror", None) or first_line(error)
        free = shutil.disk_usage(path.parent).free / 1e6
        raise TrainingError(
            f"{path}: cannot be written ({reason}; {free:.0f} MB are free): make room, then the same command "
            "with --resume goes on"
        ) from error


def write_text(path: Path, text: str) -> None:
    """In UTF-8; what a file's name may have that is no text is written as an escape."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    # safetensors wants contiguous tensors that share no memory.
    state = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    with replacing(path) as temporary:
        safetensors.torch.save_file(state, temporary, metadata)


def write_checksums(folder: Path, run: str, names: Sequence[str]) -> None:
    """``checksums.json``: of which run the files are (:func:`run_folder.run_id`), and their SHA-256."""
    files = {name: _sha256(folder / name) for name in names}
    write_text(folder / _CHECKSUMS, json.dumps({"run": run, "sha256": files}, indent=2) + "\n")


def damage(folder: Path, run: str) -> str | None:
    """What is wrong with files that :func:`write_checksums` was called for, in words; None if nothing is."""
    try:
        recorded = json.loads((folder / _CHECKSUMS).read_text())
        of_run, files = recorded["run"], dict(recorded["sha256"])
    except FileNotFoundError:
        return f"has no {_CHECKSUMS}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{_CHECKSUMS} is damaged"
    if of_run != run:
        return f"belongs to a run with other options (run {of_run}, not {run})"
    for name, expected in files.items():
        if not (folder / name).exists() or _sha256(folder / name) != expected:
            return f"{name} is damaged or gone"
    return None


def _sha256(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            hashed.update(part)
    return hashed.hexdigest()


def save_checkpoint(
    folder: Path, step: int, weights: dict[str, Tensor], training: dict[str, Any], keep: int, run: str
) -> None:
    """Writes ``folder/checkpoints/step-STEP`` of the run ``run``; deletes all but the newest ``keep``."""
    parent = folder / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(".*.tmp"):  # by a run that was killed
        _remove(left)
    with replacing(parent / f"step-{step:08d}") as temporary:
        temporary.mkdir()
        write_weights(temporary / "model.safetensors", weights)
        torch.save(training, temporary / "training.pt")
        write_checksums(temporary, run, ("model.safetensors", "training.pt"))
    for old in checkpoints(folder)[:-keep]:
        _remove(old)


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if p.is_dir())


def newest_intact(folder: Path, run: str) -> Path | None:
    """The newest checkpoint of the run ``run`` whose files are what was written; says which it passes over.

    Raises:
        TrainingError: there are checkpoints, and none of them is.
    """
    damages = []
    for candidate in reversed(checkpoints(folder)):
        found = damage(candidate, run)
        if found is None:
            if damages:
                print(f"warning: {'; '.join(damages)}: going on from {candidate}", file=sys.stderr)
            return candidate
        damages.append(f"{candidate} {found}")
    if damages:
        raise TrainingError(
            f"--resume: no checkpoint is left to go on from: {listing(damages, 3)}; --overwrite starts again"
        )
    return None


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights, training state) of a checkpoint, which :func:`newest_intact` has looked at."""
    training = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
    return safetensors.torch.load_file(folder / "model.safetensors"), training


def read_weights(path: str | Path, largest: int | None = None) -> dict[str, Tensor]:
    """A state dict from .safetensors, a weights-only .pth, or a run's directory.

    Args:
        largest: bytes that the file may hold, unpacked.

    Raises:
        TrainingError: no such file, a damaged or too large one, or one that holds more than tensors.
    """
    path = _weights_file(path)
    if not path.is_file():
        raise TrainingError(f"--checkpoint {path}: no such file")
    if largest is not None and (size := _unpacked_bytes(path)) > largest:
        raise TrainingError(
            f"--checkpoint {path}: unpacks to {size / 1e6:,.0f} MB, more than {largest / 1e6:,.0f} MB, which "
            "leaves room for ten times the model's weights: give a file of weights of this model"
        )
    with in_one_line(f"--checkpoint {path}: truncated, or not a file of weights (", ")"):
        state = load_state_dict(str(path), weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise TrainingError(f"--checkpoint {path}: holds no state dict (names to tensors)")
    return state


def _unpacked_bytes(path: Path) -> int:
    try:
        with zipfile.ZipFile(path) as file:  # as torch.save writes; not all need be stored as they are
            return max(path.stat().st_size, sum(entry.file_size for entry in file.infolist()))
    except (zipfile.BadZipFile, OSError):
        return path.stat().st_size


def read_classes(path: str | Path) -> list[str]:
    """The names of the classes that a run wrote into its weights; none where another has written the file."""
    return json.loads(read_metadata(path).get("classes", "[]"))


def read_metadata(path: str | Path) -> dict[str, str]:
    """What is said of the weights in a .safetensors, or in a run's directory; of another file, nothing.

    Raises:
        TrainingError: a damaged file.
    """
    path = _weights_file(path)
    if path.suffix != ".safetensors":
        return {}
    where = f"--checkpoint {path.parent}: {path.name}"
    with in_one_line(f"{where} is damaged (", ")"), safetensors.safe_open(path, "pt") as file:
        return file.metadata() or {}


def _weights_file(path: str | Path) -> Path:
    """A run's directory stands for the file in it."""
    return Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
