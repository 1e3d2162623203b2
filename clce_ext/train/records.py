"""What a run leaves behind while it goes: metrics.csv, TensorBoard events, lines in the terminal."""

from __future__ import annotations

import datetime
import hashlib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import write_text
from .config import TrainConfig
from .errors import TrainingError
from .results import write_rows

# fmt: off
COLUMNS = (
    "stage", "epoch", "step", "lr", "loss", "ce", "contrast", "val_loss", "top1", "top5", "knn", "centroid",
    "seconds", "images_per_second",
)
# fmt: on
MLFLOW_RUN = "mlflow-run.txt"  # the file that says which run of MLflow goes on, where this one is resumed


class Records:
    """One row per epoch, in metrics.csv and as TensorBoard events. The rows are part of every checkpoint, so
    that a resumed run writes the file that the unbroken one would have written."""

    def __init__(self, folder: Path, config: TrainConfig, rows: Sequence[dict[str, Any]] = ()) -> None:
        self._file = folder / "metrics.csv"
        self._loggers = [_tracker(config, folder)] if config.tracker else []
        if config.tensorboard:
            first = rows[-1]["step"] + 1 if rows else 0
            self._loggers.append(_tensorboard(folder / "tensorboard", first))
        write_rows(self._file, rows, COLUMNS)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """All ``rows``, the last of which is new."""
        write_rows(self._file, rows, COLUMNS)
        values = {name: value for name, value in rows[-1].items() if name not in ("stage", "step")}
        for log, _ in self._loggers:
            log(values, rows[-1]["step"])

    def close(self) -> None:
        """Before the next run of a comparison begins, in the same process."""
        while self._loggers:
            self._loggers.pop()[1]()


Logger = tuple[Callable[[dict[str, Any], int], Any], Callable[[], Any]]  # log(values, step), end()


def _tensorboard(folder: Path, first: int) -> Logger:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=first)

    def log(values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log, writer.close


def _tracker(config: TrainConfig, folder: Path) -> Logger:
    """Weights & Biases or MLflow, by the name of the run's folder. Where that goes is set as those packages
    have it, by their environment variables."""
    name = config.tracker
    try:
        package = importlib.import_module(name)
    except ImportError as error:
        raise TrainingError(f"--tracker {name}: needs the package {name} (pip install {name})") from error
    if name == "wandb":
        # The same run, where it is resumed.
        key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
        run = package.init(name=folder.name, id=key, resume="allow", dir=str(folder), config=config.to_dict())
        return (lambda values, step: run.log(values, step=step)), run.finish
    known = folder / MLFLOW_RUN
    run_id = known.read_text() if known.exists() else None
    run = package.start_run(run_id=run_id, run_name=folder.name)
    if run_id is None:  # what was logged cannot be changed, and --resume may be
        package.log_params(config.to_dict())
        write_text(known, run.info.run_id)
    return (lambda values, step: package.log_metrics(values, step=step)), package.end_run


def epoch_line(row: dict[str, Any], epochs: int, seconds_left: float) -> str:
    """'joint 3/20  loss 1.234 (ce 0.9, contrast 1.3)  top1 91.2 %  1.2k img/s  ETA 0:41'"""
    halves = ", ".join(f"{name} {row[name]:.4f}" for name in ("ce", "contrast") if name in row)
    text = f"{row['stage']} {row['epoch'] + 1}/{epochs}  loss {row['loss']:.4f} ({halves})"
    for name in ("top1", "knn", "centroid"):
        if name in row:
            text += f"  {name} {100 * row[name]:.2f} %"
    left = datetime.timedelta(seconds=round(seconds_left))
    return f"{text}  {row['images_per_second']:.0f} img/s  ETA {left}"
