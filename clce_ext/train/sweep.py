"""clce-sweep: a grid of options for several objectives and seeds, in one table and one plot."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from . import compare
from .compare import Comparison, assignment, judged, train_all
from .config import TrainConfig
from .errors import TrainingError, run_command
from .objectives import LOSS_OPTIONS, OBJECTIVES
from .report import ACCURACIES, OF_ONE_RUN, judged_on, write_sweep_report
from .results import interval_of, write_rows

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
    parser = compare.make_parser(__doc__, _EPILOG, "--grid OPTION=V1,V2 ...")
    add, metrics = parser.add_argument, ("top1", "knn", "centroid", "probe")
    add("--grid", nargs="+", required=True, metavar="OPTION=V1,V2", help="options and the values to try")
    add("--random", type=int, metavar="N", help="try N points of the grid, drawn at random")
    add("--metric", choices=metrics, default="top1", help="accuracy that chooses the best (default: top1)")
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


def sweep(asked: Sweep) -> None:
    """Trains what has not been trained, and writes sweep.csv and sweep.html."""
    c, metric = asked.comparison, asked.metric
    # An objective at a point, and its runs; points that differ in others' options alone are one.
    settings: dict[str, dict[str, Any]] = {}
    configs: dict[str, list[TrainConfig]] = {}
    for objective, point in itertools.product(c.objectives, asked.points):
        own = _of_objective(objective, point)
        part = ",".join(f"{option}={value}" for option, value in own.items()) or "as-given"
        settings[f"{objective}, {part}"] = {"objective": objective, **own}
        configs[f"{objective}, {part}"] = c.configs(objective, part, **own)
    if not train_all(configs):
        return
    columns, found = {}, {}
    for name, row in settings.items():
        runs = [judged(config) for config in configs[name]]
        mean, half, seeds = found[name] = interval_of(runs, metric)
        row |= {"seeds": seeds, metric: mean, "ci95": half, "chosen": False}
        made = runs[0].results
        columns[metric, "ci95"] = judged_on(made)
    for objective in c.objectives:
        own = [name for name, row in settings.items() if row["objective"] == objective]
        best = max(own, key=lambda name: settings[name][metric])
        settings[best]["chosen"] = True
        said = f"chosen: {best}, of {len(own)}: {metric} {found[best].text()} % of {made['split']}"
        if c.split:  # a split that chose nothing judges only what was chosen
            runs = [judged(config, c.split) for config in configs[best]]
            names = f"{c.split}_{metric}", f"{c.split}_ci95"
            interval = interval_of(runs, metric)
            settings[best] |= dict(zip(names, interval, strict=False))
            columns[names] = judged_on(runs[0].results)
            said += f", {interval.text()} % of {c.split}"
        print(said)
    path, rows = c.output / "sweep.html", list(settings.values())
    write_rows(c.output / "sweep.csv", rows)
    write_sweep_report(
        path, next(iter(configs.values()))[0], rows, asked.grid, ACCURACIES[metric], columns, made
    )
    print(f"report: {path}")


def _of_objective(objective: str, point: dict[str, Any]) -> dict[str, Any]:
    """The point without options of other objectives' losses."""
    own = OBJECTIVES[objective].options
    return {k: v for k, v in point.items() if k not in LOSS_OPTIONS or k in own}


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("clce-sweep", lambda: sweep(parse(arguments)), "the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
