"""clce-sweep: a grid of options for several objectives and seeds, in one table and one plot."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import compare
from .compare import OF_THE_RUNS, Comparison, assignment, judged, train_all
from .config import TrainConfig
from .errors import TrainingError, run_command
from .metrics import Interval, confidence_interval
from .objectives import LOSS_OPTIONS, OBJECTIVES
from .results import RunRecord, write_rows

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


@dataclass
class Setting:
    """An objective at a point of the grid."""

    objective: str
    point: dict[str, Any]  # without the options that the objective does not have
    interval: Interval  # of the metric, over seeds
    records: list[RunRecord]
    chosen: bool = False  # the best of its objective


def parse(arguments: Sequence[str] | None = None) -> Sweep:
    parser = compare.make_parser()
    parser.prog, parser.epilog = "clce-sweep", _EPILOG
    parser.description = __doc__.partition(": ")[2]
    parser.add_argument(
        "--grid", nargs="+", required=True, metavar="OPTION=V1,V2", help="options and the values to try"
    )
    parser.add_argument("--random", type=int, metavar="N", help="try N points of the grid, drawn at random")
    parser.add_argument(
        "--metric", choices=("top1", "knn", "centroid", "probe"), default="top1", help="that chooses the best"
    )
    parsed = parser.parse_args(arguments)
    taken = {name: vars(parsed).pop(name) for name in ("grid", "random", "metric")}
    comparison = compare.asked_for(parsed)
    grid = _grid(taken["grid"])
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if taken["random"] is not None:
        if taken["random"] < 1:
            raise TrainingError(f"--random must be an integer >= 1, got {taken['random']}")
        # A permutation's beginning: more points later keep those of now.
        order = np.random.default_rng(0).permutation(len(points))[: taken["random"]]
        points = [points[i] for i in order]
    return Sweep(comparison, grid, points, taken["metric"])


def _grid(assignments: Sequence[str]) -> dict[str, list[Any]]:
    grid: dict[str, list[Any]] = {}
    for text in assignments:
        name, _ = assignment(text, "--grid")
        if name in OF_THE_RUNS or name in grid:
            why = "is given twice" if name in grid else "is what the comparison itself decides"
            raise TrainingError(f"--grid {text}: {name} {why}")
        grid[name] = [assignment(f"{name}={v}", "--grid")[1] for v in text.partition("=")[2].split(",")]
    return grid


def sweep(asked: Sweep) -> Path | None:
    """Trains what has not been trained, and writes sweep.csv and sweep.html; returns the latter's path, in
    the main process."""
    from .report import write_sweep_report

    c = asked.comparison
    configs: dict[tuple[str, str], list[TrainConfig]] = {}  # by objective and name of the point
    points: dict[tuple[str, str], dict[str, Any]] = {}
    for objective, point in itertools.product(c.objectives, asked.points):
        own = _of_objective(objective, point)
        name = ",".join(f"{option}={value}" for option, value in own.items()) or "as-given"
        points[objective, name] = own
        configs[objective, name] = [
            c.config(objective, seed, c.output / "runs" / name / f"{objective}-seed{seed}", **own)
            for seed in c.seeds
        ]
    named = {
        f"{objective}, {name}, seed {config.seed}": config
        for (objective, name), runs in configs.items()
        for config in runs
    }
    if not train_all(named):
        return None
    settings = [
        _setting(objective, points[objective, name], runs, asked.metric)
        for (objective, name), runs in configs.items()
    ]
    for objective in c.objectives:
        max((s for s in settings if s.objective == objective), key=lambda s: s.interval.mean).chosen = True
    if c.split:  # a split that chose nothing judges only what was chosen
        for setting in settings:
            if setting.chosen:
                name = next(n for (o, n), p in points.items() if (o, p) == (setting.objective, setting.point))
                setting.records = [judged(run, c.split) for run in configs[setting.objective, name]]
    write_rows(c.output / "sweep.csv", [_row(setting, asked) for setting in settings])
    path = c.output / "sweep.html"
    write_sweep_report(path, next(iter(configs.values()))[0], settings, asked.grid, asked.metric, c.split)
    return path


def _of_objective(objective: str, point: dict[str, Any]) -> dict[str, Any]:
    """The point without options of other objectives' losses."""
    own = OBJECTIVES[objective].options
    return {k: v for k, v in point.items() if k not in LOSS_OPTIONS or k in own}


def _setting(objective: str, point: dict[str, Any], runs: Sequence[TrainConfig], metric: str) -> Setting:
    records = [judged(run, None) for run in runs]
    interval = confidence_interval(np.array([record.results[metric] for record in records]))
    return Setting(objective, point, interval, records)


def _row(setting: Setting, asked: Sweep) -> dict[str, Any]:
    """A line of sweep.csv; the last two columns only where another split was asked to judge the chosen."""
    row: dict[str, Any] = {"objective": setting.objective, **setting.point, "seeds": len(setting.records)}
    row |= {asked.metric: setting.interval.mean, "ci95": setting.interval.half_width}
    row["chosen"] = setting.chosen
    if setting.chosen and asked.comparison.split:
        values = np.array([record.results[asked.metric] for record in setting.records])
        interval = confidence_interval(values)
        row[f"{asked.comparison.split}_{asked.metric}"] = interval.mean
        row[f"{asked.comparison.split}_ci95"] = interval.half_width
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    def command() -> None:
        if report := sweep(parse(arguments)):
            print(f"report: {report}")

    return run_command("clce-sweep", command)


if __name__ == "__main__":
    sys.exit(main())
