"""Files that are either whole or absent, and clear words about those that are broken.

A checkpoint is a directory, ``checkpoints/step-00000120/``, of ``model.safetensors`` (all weights) and
``training.pt`` (optimizer, averaged weights, position in the run, metrics so far; loads with
``weights_only=True``). It is written under another name, flushed to the disk and renamed: whenever a run is
killed, the newest directory of that name is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.models import load_state_dict
from torch import Tensor

from .errors import TrainingError, first_line

_PREFIX = "step-"


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """``write(temporary path)``, then rename to ``path``: readers never see a part of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda p: p.write_text(text))


def write_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    # safetensors wants contiguous tensors that share no memory.
    state = {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}
    write_file(path, lambda p: safetensors.torch.save_file(state, p, metadata))


def save_checkpoint(
    run: Path, step: int, weights: dict[str, Tensor], training: dict[str, Any], keep: int
) -> Path:
    """Writes ``run/checkpoints/step-STEP`` and deletes all but the newest ``keep``."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = folder / f"{_PREFIX}{step:08d}", folder / f".{_PREFIX}{step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write_weights(temporary / "model.safetensors", weights)
    write_file(temporary / "training.pt", lambda p: torch.save(training, p))
    shutil.rmtree(final, ignore_errors=True)  # the same step, written before an interruption
    os.replace(temporary, final)
    _flush(folder)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folder = run / "checkpoints"
    return sorted(p for p in folder.glob(f"{_PREFIX}*") if p.is_dir()) if folder.is_dir() else []


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights, training state) of a checkpoint.

    Raises:
        TrainingError: a file is missing, truncated or not a checkpoint.
    """
    try:
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        training = torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zip, pickle and the file system each raise their own
        raise TrainingError(
            f"{folder}: damaged checkpoint ({type(error).__name__}: {first_line(error)}); delete this "
            "directory to go on from the one before it"
        ) from error
    return weights, training


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, a weights-only .pth, or a run's directory.

    Raises:
        TrainingError: no such file, a damaged one, or one that holds more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise TrainingError(f"--checkpoint {path}: no such file")
    try:
        state = load_state_dict(str(path), weights_only=True)
    except safetensors.SafetensorError as error:
        raise TrainingError(
            f"--checkpoint {path}: truncated or not a safetensors file ({first_line(error)})"
        ) from error
    except Exception as error:
        raise TrainingError(
            f"--checkpoint {path}: truncated, or not a file of weights ({type(error).__name__}: "
            f"{first_line(error)})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise TrainingError(f"--checkpoint {path}: holds no state dict (names to tensors)")
    return state


def read_classes(run: Path) -> list[str]:
    """The names of the classes that a finished run was trained on.

    Raises:
        TrainingError: its model.safetensors is damaged.
    """
    try:
        with safetensors.safe_open(run / "model.safetensors", "pt") as file:
            return json.loads(file.metadata()["classes"])
    except (safetensors.SafetensorError, OSError, KeyError, TypeError) as error:
        raise TrainingError(f"--checkpoint {run}: model.safetensors is damaged ({error})") from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
