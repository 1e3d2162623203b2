"""What a run leaves behind while it goes: metrics.csv, TensorBoard events, the progress bar."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .checkpoint import write_text
from .errors import TrainingError

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

    def __init__(
        self,
        folder: Path,
        tensorboard: bool,
        rows: Sequence[dict[str, Any]] = (),
        tracker: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self._writer = None
        self._tracker, self._end = _tracker(tracker, folder, options or {}) if tracker else (None, None)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            first = rows[-1]["step"] + 1 if rows else 0
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        self._write_table(rows)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """All ``rows``, the last of which is new."""
        self._write_table(rows)
        if self._tracker is not None:
            self._tracker({k: v for k, v in rows[-1].items() if k not in ("stage", "step")}, rows[-1]["step"])
        if self._writer is not None:
            for name, value in rows[-1].items():
                if name not in ("stage", "epoch", "step"):
                    self._writer.add_scalar(name, value, rows[-1]["step"])
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._end is not None:  # before the next run of a comparison begins, in the same process
            self._end()
            self._end = None

    def _write_table(self, rows: Sequence[dict[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.folder / "metrics.csv", text.getvalue())


def _tracker(name: str, folder: Path, options: Mapping[str, Any]) -> tuple[Callable, Callable]:
    """What takes an epoch's values and step to Weights & Biases or MLflow, by the name of the run's folder,
    and what ends the run there. Where that goes is set as those packages have it, by their environment
    variables."""
    try:
        package = importlib.import_module(name)
    except ImportError as error:
        raise TrainingError(f"--tracker {name}: needs the package {name} (pip install {name})") from error
    if name == "wandb":
        # The same run, where it is resumed.
        key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
        run = package.init(name=folder.name, id=key, resume="allow", dir=str(folder), config=dict(options))
        return (lambda values, step: run.log(values, step=step)), run.finish
    known = folder / MLFLOW_RUN
    run_id = known.read_text() if known.exists() else None
    run = package.start_run(run_id=run_id, run_name=folder.name)
    if run_id is None:  # what was logged cannot be changed, and --resume may be
        package.log_params(dict(options))
        write_text(known, run.info.run_id)
    return (lambda values, step: package.log_metrics(values, step=step)), package.end_run


def progress_bar(total: int, done: int, description: str, enabled: bool) -> tqdm:
    """Images per second and time left of one epoch; on a terminal only."""
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit="img",
        unit_scale=True,
        leave=False,
        disable=not (enabled and sys.stderr.isatty()),
        dynamic_ncols=True,
    )


def epoch_line(row: dict[str, Any], epochs: int, seconds_left: float) -> str:
    """'joint 3/20  loss 1.234 (ce 0.9, contrast 1.3)  top1 91.2 %  1.2k img/s  ETA 0:41'"""
    halves = ", ".join(f"{name} {row[name]:.4f}" for name in ("ce", "contrast") if name in row)
    text = f"{row['stage']} {row['epoch'] + 1}/{epochs}  loss {row['loss']:.4f} ({halves})"
    for name in ("top1", "knn", "centroid"):
        if name in row:
            text += f"  {name} {100 * row[name]:.2f} %"
    minutes, seconds = divmod(round(seconds_left), 60)
    return (
        text + f"  {row['images_per_second']:.0f} img/s  ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    )
