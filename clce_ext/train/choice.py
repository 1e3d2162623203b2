"""Which epoch is the best, and when to stop: functions of a stage's rows of metrics.csv."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import TrainingError

# The figures to choose by, and what gives the best of several.
METRICS = {"top1": max, "top5": max, "val_loss": min, "knn": max, "centroid": max}


def best_row(rows: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The first of the rows with the best value.

    Raises:
        TrainingError: no row has such a value.
    """
    judged = [row for row in rows if metric in row]
    if not judged:
        raise TrainingError(f"--best-metric {metric}: the evaluation of this run gives no such figure")
    return METRICS[metric](judged, key=lambda row: row[metric])


def is_patience_over(rows: Sequence[dict[str, Any]], metric: str, patience: int) -> bool:
    """Whether the last ``patience`` evaluations have not bettered what was there before."""
    judged = [row for row in rows if metric in row]
    return bool(judged) and judged.index(best_row(judged, metric)) < len(judged) - patience
