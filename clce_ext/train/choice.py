"""Which epoch is the best, and when to stop: functions of a stage's rows of metrics.csv."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import TrainingError

# The figures to choose by, and what the better of two values is.
METRICS = {"top1": max, "top5": max, "val_loss": min, "knn": max, "centroid": max}


def best_row(rows: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The first of the rows with the best value.

    Raises:
        TrainingError: no row has such a value.
    """
    judged = _judged(rows, metric)
    best = METRICS[metric](row[metric] for row in judged)
    return next(row for row in judged if row[metric] == best)


def is_patience_over(rows: Sequence[dict[str, Any]], metric: str, patience: int) -> bool:
    """Whether the last ``patience`` evaluations have not bettered what was there before."""
    if not rows:
        return False
    judged = _judged(rows, metric)
    return len(judged) - 1 - judged.index(best_row(rows, metric)) >= patience


def _judged(rows: Sequence[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Those that were evaluated."""
    judged = [row for row in rows if metric in row]
    if rows and not judged:
        raise TrainingError(f"--best-metric {metric}: the evaluation of this run gives no such figure")
    return judged
