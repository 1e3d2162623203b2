"""clce-sweep: a grid of options for several objectives and seeds, in one table and one plot."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import compare
from .compare import Comparison, assignment, judged, train_all
from .errors import TrainingError, run_command
from .objectives import LOSS_OPTIONS, OBJECTIVES
from .page import interval_of
from .report import OF_ONE_RUN, write_sweep_report
from .results import Setting, write_rows

_EPILOG = """\
Every other option is clce-compare's. Options that an objective does not have (a temperature of ce) are not
varied for it. Finished runs are kept: the same command again goes on, and a larger grid uses what is there.

examples:
  clce-sweep --data digits --shots 5 --objectives ce clce --grid lr=3e-4,1e-3,3e-3 --output runs/lr
  clce-sweep --config recipes/cub200-beit3-clce.yaml --data data/cub200 --objectives clce \\
             --grid temperature=0.1,0.5 beta=0,1,2 weight=0.5,0.9 --random 8 --output runs/sweep
"""


class Sweep(NamedTuple):
    """What clce-sweep is asked for."""

    comparison: Comparison
    grid: dict[str, list[Any]]
    points: list[dict[str, Any]]  # of the grid: a value of each of its options
    metric: str  # that chooses, on the split that training watches


def parse(arguments: Sequence[str] | None = None) -> Sweep:
    parser = compare.make_parser(__doc__, _EPILOG)
    parser.add_argument(
        "--grid", nargs="+", required=True, metavar="OPTION=V1,V2", help="options and the values to try"
    )
    parser.add_argument("--random", type=int, metavar="N", help="try N points of the grid, drawn at random")
    parser.add_argument(
        "--metric", choices=("top1", "knn", "centroid", "probe"), default="top1", help="that chooses the best"
    )
    parsed = parser.parse_args(arguments)
    assignments, count, metric = (vars(parsed).pop(name) for name in ("grid", "random", "metric"))
    comparison, grid = compare.asked_for(parsed), _grid(assignments)
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if count is not None:
        if count < 1:
            raise TrainingError(f"--random must be an integer >= 1, got {count}")
        # A permutation's beginning: more points later keep those of now.
        points = [points[i] for i in np.random.default_rng(0).permutation(len(points))[:count]]
    return Sweep(comparison, grid, points, metric)


def _grid(assignments: Sequence[str]) -> dict[str, list[Any]]:
    grid: dict[str, list[Any]] = {}
    for text in assignments:
        name, _ = assignment(text, "--grid")
        if name in OF_ONE_RUN or name in grid:
            why = "is given twice" if name in grid else "is what the comparison itself decides"
            raise TrainingError(f"--grid {text}: {name} {why}")
        grid[name] = [assignment(f"{name}={v}", "--grid")[1] for v in text.partition("=")[2].split(",")]
    return grid


def sweep(asked: Sweep) -> Path | None:
    """Trains what has not been trained, and writes sweep.csv and sweep.html; returns the latter's path, in
    the main process."""
    c = asked.comparison
    settings: dict[str, Setting] = {}  # points that differ in others' options alone are one
    for objective, point in itertools.product(c.objectives, asked.points):
        own = _of_objective(objective, point)
        name = ",".join(f"{option}={value}" for option, value in own.items()) or "as-given"
        folders = {seed: c.output / "runs" / name / f"{objective}-seed{seed}" for seed in c.seeds}
        configs = [c.config(objective, seed, folder, **own) for seed, folder in folders.items()]
        settings[f"{objective}, {name}"] = Setting(objective, own, configs)
    if not train_all({name: s.configs for name, s in settings.items()}):
        return None
    for s in settings.values():
        s.records = [judged(run, None) for run in s.configs]
        s.interval = interval_of(s.records, asked.metric)
    for objective in c.objectives:
        of_objective = (s for s in settings.values() if s.objective == objective)
        best = max(of_objective, key=lambda s: s.interval.mean)
        best.chosen = True
        if c.split:  # a split that chose nothing judges only what was chosen
            best.judged = [judged(run, c.split) for run in best.configs]
    rows = []
    for s in settings.values():
        row = {"objective": s.objective, **s.point, "seeds": len(s.records)}
        row |= {asked.metric: s.interval.mean, "ci95": s.interval.half_width, "chosen": s.chosen}
        if s.judged:
            other = interval_of(s.judged, asked.metric)
            row |= {f"{c.split}_{asked.metric}": other.mean, f"{c.split}_ci95": other.half_width}
        rows.append(row)
    write_rows(c.output / "sweep.csv", rows)
    path, first = c.output / "sweep.html", next(iter(settings.values()))
    write_sweep_report(path, first.configs[0], list(settings.values()), asked.grid, asked.metric)
    return path


def _of_objective(objective: str, point: dict[str, Any]) -> dict[str, Any]:
    """The point without options of other objectives' losses."""
    own = OBJECTIVES[objective].options
    return {k: v for k, v in point.items() if k not in LOSS_OPTIONS or k in own}


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("clce-sweep", lambda: compare.print_report(sweep(parse(arguments))))


if __name__ == "__main__":
    sys.exit(main())
