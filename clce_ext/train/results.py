"""The figures of finished runs, as reports and tables take them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from .checkpoint import write_text
from .objectives import UNTOUCHED


@dataclass
class RunRecord:
    """What a report needs of one run."""

    objective: str
    seed: int
    results: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.csv
    embeddings: np.ndarray | None = None  # [N, D] of the images that the run was judged on
    labels: np.ndarray | None = None  # [N]


def read_run(folder: Path) -> RunRecord:
    """Of a finished run's directory."""
    results = json.loads((folder / "results.json").read_text())
    tensors = load_file(folder / "embeddings.safetensors")
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [
            {k: v if k == "stage" else float(v) for k, v in row.items() if v != ""}
            for row in csv.DictReader(file)
        ]
    return RunRecord(
        results["objective"], results["seed"], results, rows, tensors["embeddings"], tensors["labels"]
    )


def untouched_records(records: Iterable[RunRecord]) -> list[RunRecord]:
    """What runs on given weights noted of the backbone before their first step, as records of their own."""
    found = []
    for record in records:
        if UNTOUCHED in record.results:
            shared = ("model", "data", "seed", "classes", "train_images", "split", "images")
            results = {"objective": UNTOUCHED} | {k: record.results[k] for k in shared}
            found.append(RunRecord(UNTOUCHED, record.seed, results | record.results[UNTOUCHED], []))
    return found


def write_table(path: Path, records: Sequence[RunRecord]) -> None:
    """A line per record: results.csv."""
    rows = [{k: v for k, v in record.results.items() if k != UNTOUCHED} for record in records]
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
