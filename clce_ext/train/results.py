"""The figures of finished runs, as reports and tables take them."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from torch import Tensor

from .checkpoint import write_text, write_weights
from .errors import in_one_line
from .judge import Outputs
from .metrics import Interval, confidence_interval
from .objectives import UNTOUCHED

# What the untouched backbone's row has of the run that started from it, beside what was found of it.
_SHARED = ("model", "data", "seed", "classes", "train_images", "split", "images")


@dataclass
class RunRecord:
    """What a report needs of one run."""

    objective: str
    seed: int
    results: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.csv
    embeddings: np.ndarray | None = None  # [N, D] of the images that the run was judged on
    labels: np.ndarray | None = None  # [N] of them
    # Which images were judged, and by figure for which the class was found, each [N].
    correct: dict[str, np.ndarray] = field(default_factory=dict)


def read_run(folder: Path, split: str | None = None) -> RunRecord:
    """Of a finished run's directory; ``split`` names the one whose figures write_figures left there.

    Raises:
        TrainingError: a file of it is missing or damaged.
    """
    suffix = f"-{split}" if split else ""
    with in_one_line(
        f"{folder}: not what a finished run leaves (", "): clce-train with --resume finishes it again"
    ):
        results = json.loads((folder / "results.json").read_text())
        if split:  # what says how the run was made comes before the figures, the first of which is the split
            made = dict(itertools.takewhile(lambda item: item[0] != "split", results.items()))
            results = made | json.loads((folder / f"results{suffix}.json").read_text())
        with (folder / "metrics.csv").open(newline="") as file:
            rows = [
                {k: v if k == "stage" else float(v) for k, v in row.items() if v}
                for row in csv.DictReader(file)
            ]
        tensors = load_file(folder / f"embeddings{suffix}.safetensors")
        correct = load_file(folder / f"correct{suffix}.safetensors")
        return RunRecord(results["objective"], results["seed"], results, rows, **tensors, correct=correct)


def write_figures(
    folder: Path,
    figures: dict[str, Any],
    outputs: Outputs | None,
    correct: dict[str, Tensor],
    split: str | None = None,
) -> None:
    """What `read_run` reads: of a run's own split, or of another ``split`` beside it."""
    suffix = f"-{split}" if split else ""
    write_weights(folder / f"correct{suffix}.safetensors", correct)
    if outputs is not None:
        tensors = {"embeddings": outputs.embeddings, "labels": outputs.labels}
        write_weights(folder / f"embeddings{suffix}.safetensors", tensors)
    write_text(folder / f"results{suffix}.json", json.dumps(figures, indent=2) + "\n")


def untouched_records(records: Iterable[RunRecord]) -> list[RunRecord]:
    """What runs on given weights noted of the backbone before their first step, as records of their own."""
    found, prefix = [], f"{UNTOUCHED}."
    for record in (r for r in records if UNTOUCHED in r.results):
        shared = {k: record.results[k] for k in _SHARED}
        results = {"objective": UNTOUCHED} | shared | record.results[UNTOUCHED]
        correct = {k.removeprefix(prefix): v for k, v in record.correct.items() if k.startswith(prefix)}
        correct |= {k: v for k, v in record.correct.items() if k == "images"}
        found.append(RunRecord(UNTOUCHED, record.seed, results, [], correct=correct))
    return found


def interval_of(records: Sequence[RunRecord], figure: str) -> Interval:
    return confidence_interval(np.array([r.results.get(figure, math.nan) for r in records]))


def write_rows(path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str] = ()) -> None:
    """A CSV of rows that may have different columns, ``columns`` first."""
    text = io.StringIO()
    names = dict.fromkeys([*columns, *(name for row in rows for name in row)])
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
