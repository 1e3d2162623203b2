"""What a run leaves behind as it goes: metrics.csv, TensorBoard events, a tracker's run, terminal lines."""

from __future__ import annotations

import contextlib
import datetime
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .checkpoint import write_text
from .config import TrainConfig
from .errors import first_line, imported, in_one_line
from .results import write_rows

COLUMNS = (
    "stage", "epoch", "step", "lr", "loss", "ce", "contrast", "val_loss", "top1", "top5", "knn", "centroid",
    "seconds", "images_per_second",
)  # fmt: skip
# The files that say which run of a tracker goes on, where this one is resumed.
TRACKED = {"wandb": "wandb-run.txt", "mlflow": "mlflow-run.txt"}


class Records:
    """One row per epoch, in metrics.csv, as TensorBoard events and at a tracker. The rows are part of every
    checkpoint, so that a resumed run writes the file that the unbroken one would have written.

    A context, at whose end the loggers end too: as failed where it ends by an exception.
    """

    def __init__(self, folder: Path, config: TrainConfig, rows: Sequence[dict[str, Any]] = ()) -> None:
        self._file = folder / "metrics.csv"
        self._loggers: list[_TensorBoard | _WandB | _MLflow] = []
        if config.tracker:
            self._loggers.append(_started(config, folder))
        if config.tensorboard:
            self._loggers.append(_TensorBoard(folder / "tensorboard", rows[-1]["step"] if rows else -1))
        write_rows(self._file, rows, COLUMNS)
        for row in rows:  # those that a tracker has not seen
            self._log(row)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """All ``rows``, the last of which is new."""
        write_rows(self._file, rows, COLUMNS)
        self._log(rows[-1])

    def finish(self, figures: Mapping[str, Any], step: int) -> None:
        """The final figures, for trackers; metrics.csv has none of them, but results.json."""
        values = {f"final/{name}": value for name, value in figures.items() if isinstance(value, float)}
        for logger in self._loggers:
            with _outlived(logger):
                logger.conclude(values, step)

    def _log(self, row: Mapping[str, Any]) -> None:
        values = {name: value for name, value in row.items() if name not in ("stage", "step")}
        for logger in self._loggers:
            if row["step"] > logger.last_step:
                with _outlived(logger):
                    logger.log(values, row["step"])

    def __enter__(self) -> Records:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        while self._loggers:  # before the next run of a comparison begins, in the same process
            logger = self._loggers.pop()
            with _outlived(logger):
                logger.end(kind)


@contextlib.contextmanager
def _outlived(logger: _TensorBoard | _WandB | _MLflow) -> Iterator[None]:
    """No training ends because a server does not answer."""
    try:
        yield
    except Exception as error:
        print(f"warning: {logger.name}: {type(error).__name__}: {first_line(error)}", file=sys.stderr)


# Where rows go beside metrics.csv. A logger has those of up to ``last_step``.


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, folder: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.last_step = last_step
        self._writer = SummaryWriter(str(folder), purge_step=last_step + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def conclude(self, values: Mapping[str, float], step: int) -> None:
        """Its curves show what there is."""

    def end(self, failure: type[BaseException] | None) -> None:
        self._writer.close()


class _WandB:
    name = "--tracker wandb"

    def __init__(self, wandb: ModuleType, known: Path, options: Mapping[str, Any]) -> None:
        key = known.read_text() if known.exists() else uuid.uuid4().hex[:12]
        folder = known.parent
        self._run = wandb.init(
            name=folder.name,
            id=key,
            resume="allow",
            dir=str(folder),
            config=dict(options),
            allow_val_change=True,  # such as of --resume
        )
        write_text(known, key)
        # Offline nothing is known of what was logged before: all of it is logged again.
        self.last_step = self._run.starting_step - 1

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def conclude(self, values: Mapping[str, float], step: int) -> None:
        self._run.summary.update(dict(values))

    def end(self, failure: type[BaseException] | None) -> None:
        self._run.finish(exit_code=0 if failure is None else 1)


class _MLflow:
    name = "--tracker mlflow"
    last_step = -1

    def __init__(self, mlflow: ModuleType, known: Path, options: Mapping[str, Any]) -> None:
        self._mlflow = mlflow
        key = known.read_text() if known.exists() else None
        run = mlflow.start_run(run_id=key, run_name=known.parent.name)
        if key is None:  # what was logged cannot be changed, and --resume may be
            mlflow.log_params(dict(options))
            write_text(known, run.info.run_id)
        else:
            points = mlflow.MlflowClient().get_metric_history(key, "loss")
            self.last_step = max((point.step for point in points), default=-1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def conclude(self, values: Mapping[str, float], step: int) -> None:
        # MLflow accepts no recall@1.
        self.log({name.replace("@", "_at_"): value for name, value in values.items()}, step)

    def end(self, failure: type[BaseException] | None) -> None:
        stopped = "KILLED" if failure is KeyboardInterrupt else "FAILED"
        self._mlflow.end_run("FINISHED" if failure is None else stopped)


def _started(config: TrainConfig, folder: Path) -> _WandB | _MLflow:
    """Weights & Biases or MLflow, by the name of the run's folder. Where that goes is set as those packages
    have it, by their environment variables."""
    name = config.tracker
    package = imported(name, f"--tracker {name}")
    with in_one_line(f"--tracker {name}: starts no run: "):  # no key, no server, no such run
        return {"wandb": _WandB, "mlflow": _MLflow}[name](package, folder / TRACKED[name], config.to_dict())


def epoch_line(row: dict[str, Any], epochs: int, seconds_left: float) -> str:
    """'joint 3/20  loss 1.2345 (ce 0.9876, contrast 1.3210)  top1 91.20 %  1234 img/s  ETA 0:00:41'"""
    halves = [f"{name} {row[name]:.4f}" for name in ("ce", "contrast") if name in row]
    text = f"{row['stage']} {row['epoch'] + 1}/{epochs}  loss {row['loss']:.4f}"
    if len(halves) == 2:  # of a single one the loss is all
        text += f" ({', '.join(halves)})"
    judged = percentages({name: value for name, value in row.items() if name != "top5"})
    left = datetime.timedelta(seconds=round(seconds_left))
    parts = filter(None, (text, judged, f"{row['images_per_second']:.0f} img/s", f"ETA {left}"))
    return "  ".join(parts)


def percentages(figures: Mapping[str, Any]) -> str:
    """Those of the accuracies that there are: 'top1 91.20 %  knn 90.10 %'"""
    names = [name for name in ("top1", "top5", "knn", "centroid", "probe") if name in figures]
    return "  ".join(f"{name} {100 * figures[name]:.2f} %" for name in names)
