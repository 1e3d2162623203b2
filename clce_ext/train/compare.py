"""clce-compare: several objectives on the same data, seeds and budget, in one report."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .checkpoint import read_classes
from .config import TrainConfig, add_options, command_parser, flag, read_yaml
from .data import data_digest, load_data
from .errors import TrainingError, differences, run_command
from .evaluate import FinishedRun
from .intervals import differences_of
from .objectives import LOSS_OPTIONS, OBJECTIVES, UNTOUCHED
from .processes import processes
from .report import (
    ACCURACIES,
    OF_ONE_RUN,
    accuracy_columns,
    judged_on,
    own_values,
    with_untouched,
    write_comparison_report,
)
from .results import RunRecord, interval_of, read_run, write_figures, write_rows
from .start import versions

_EPILOG = """\
Every run is a directory DIR/runs/OBJECTIVE-seedN as clce-train leaves it. Runs that have finished are kept:
the same command again goes on where it was interrupted, and makes the report again.

example:
  clce-compare --data digits --shots 10 --objectives ce supcon schane clce --seeds 0 1 2 --output runs/compare
"""
_DEFAULTS = {"objectives": ["ce", "clce"], "seeds": [0, 1, 2], "eval_embeddings": "epoch"}


class Comparison(NamedTuple):
    """What clce-compare is asked for."""

    options: dict[str, Any]  # shared by the runs
    objectives: list[str]
    seeds: list[int]
    baseline: str
    output: Path
    split: str | None = None  # that the figures are made on; None: the one that training watched
    own: Mapping[str, dict[str, Any]] = {}  # options of one objective alone, by its name

    def config(self, objective: str, seed: int, folder: Path, **options: Any) -> TrainConfig:
        """Of one run, which goes on where it was interrupted; ``options`` go before all others."""
        run = {"objective": objective, "seed": seed, "resume": True, "output": str(folder)}
        return TrainConfig.from_dict(self.options | self.own.get(objective, {}) | options | run)

    def configs(self, objective: str, part: str = "", **options: Any) -> list[TrainConfig]:
        """By seed, in folders of the ``part`` of the comparison."""
        folder = self.output / "runs" / part
        return [self.config(objective, s, folder / f"{objective}-seed{s}", **options) for s in self.seeds]


def make_parser(text: str, epilog: str, required: str = "") -> argparse.ArgumentParser:
    """With all options of a comparison."""
    parser = command_parser(text, epilog, required)
    add = parser.add_argument
    add(
        "--objectives",
        nargs="+",
        choices=OBJECTIVES,
        metavar="NAME",
        help=f"of {', '.join(OBJECTIVES)} (default: ce clce)",
    )
    add(
        "--seeds",
        nargs="+",
        type=int,
        metavar="N",
        help="a run of every objective with each (default: 0 1 2)",
    )
    text = "objective that the others are compared with (default: the first of --objectives)"
    add("--baseline", choices=OBJECTIVES, metavar="NAME", help=text)
    text = "judge the finished runs on this split (default: the one that training watches: val, or test)"
    add("--split", choices=("val", "test"), help=text)
    add(
        "--set",
        nargs="+",
        metavar="OBJECTIVE.OPTION=VALUE",
        help="options of one objective, e.g. clce.lr=3e-3",
    )
    add(
        "--output",
        default="runs/compare",
        metavar="DIR",
        help="directory of the comparison (default: runs/compare)",
    )
    add("--config", metavar="FILE", help="recipe (YAML) that gives any of the other options")
    add_options(parser, exclude=OF_ONE_RUN)
    return parser


def parse(arguments: Sequence[str] | None = None) -> Comparison:
    return asked_for(make_parser(__doc__, _EPILOG).parse_args(arguments))


def asked_for(parsed: argparse.Namespace) -> Comparison:
    given = {k: v for k, v in vars(parsed).items() if v is not None}
    output, recipe = Path(given.pop("output")), given.pop("config", None)
    options = _DEFAULTS | (read_yaml(recipe) if recipe else {}) | given
    objectives, seeds = options.pop("objectives"), options.pop("seeds")
    for name, values, kind in (("--objectives", objectives, str), ("--seeds", seeds, int)):
        if not isinstance(values, list) or not values or not all(type(value) is kind for value in values):
            raise TrainingError(f"{name} must be a list of at least one {kind.__name__}, got {values!r}")
        if len(set(values)) < len(values):
            raise TrainingError(f"{name}: each only once, got {' '.join(map(str, values))}")
    baseline, split = options.pop("baseline", objectives[0]), options.pop("split", None)
    if baseline not in objectives:
        raise TrainingError(f"--baseline {baseline} is none of --objectives {' '.join(objectives)}")
    if split not in (None, "val", "test"):
        raise TrainingError(f"--split must be val or test, got {split!r}")
    # A recipe may say more than is compared this time.
    others = () if "set" in given else (o for o in OBJECTIVES if o not in objectives)
    own = _own_options(options, given, [*objectives, *others])
    own = {objective: of for objective, of in own.items() if objective in objectives}
    options = {k: v for k, v in options.items() if k not in OF_ONE_RUN}
    if options["eval_embeddings"] == "never":
        raise TrainingError("--eval-embeddings never leaves nothing to compare: use final or epoch")
    return Comparison(options, objectives, seeds, baseline, output, split, own)


def _own_options(
    options: dict[str, Any], given: Mapping[str, Any], known: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Those of one of the ``known`` objectives alone, taken out of ``options``; ``given`` are those that came
    by the command line."""
    own: dict[str, dict[str, Any]] = {}
    for option in (name for name in LOSS_OPTIONS if name in options):
        # In a recipe of clce-train it is of that recipe's objective alone.
        value, owner = options.pop(option), options.get("objective")
        if owner is None or option in given:
            having = next((o for o in known if option in OBJECTIVES[o].options), "clce")
            raise TrainingError(
                f"{flag(option)} belongs to an objective, not to all of a comparison: give --set "
                f"{having}.{option}={value}"
            )
        own.setdefault(owner, {})[option] = value
    for text in options.pop("set", []):
        name, value = assignment(text, "--set")
        objective, _, option = name.partition(".")
        if objective not in known or not option:
            raise TrainingError(
                f"--set {text}: OBJECTIVE.OPTION=VALUE is wanted, with one of {', '.join(known)}"
            )
        if option in OF_ONE_RUN:
            raise TrainingError(f"--set {text}: {option} is what the comparison itself decides")
        own.setdefault(objective, {})[option] = value
    return own


def assignment(text: str, option: str) -> tuple[str, Any]:
    """ "name=value" -> (name, value), the value read as in a recipe."""
    name, equals, value = str(text).partition("=")
    if not (name and equals and value):
        raise TrainingError(f"{option}: NAME=VALUE is wanted, got {text!r}")
    return name.strip().replace("-", "_"), yaml.safe_load(value)


def compare(asked: Comparison) -> None:
    """Trains what has not been trained, and writes results.csv, differences.csv and report.html."""
    configs = {objective: asked.configs(objective) for objective in asked.objectives}
    if not train_all(configs):
        return
    runs = {o: [judged(config, asked.split) for config in of] for o, of in configs.items()}
    shown = with_untouched(runs)
    table = [record.results for records in shown.values() for record in records]
    table = [{k: v for k, v in row.items() if not isinstance(v, dict)} for row in table]
    write_rows(asked.output / "results.csv", table)
    if found := differences_of(runs, shown.get(UNTOUCHED, ()), asked.baseline):
        write_rows(asked.output / "differences.csv", [difference.row() for difference in found])
    config = configs[asked.objectives[0]][0]
    path, classes = asked.output / "report.html", read_classes(config.output)
    own = own_values({name: first for name, (first, *_) in configs.items()}, asked.own)
    write_comparison_report(path, config, runs, classes, asked.baseline, found, own)
    columns, (first, *_) = accuracy_columns(runs), runs[asked.objectives[0]]
    print(f"\n{judged_on(first.results)}; % correct, mean of {len(asked.seeds)} seed(s) ± 95 % interval")
    print(f"{'':<12}" + "".join(f"{title:>15}" for title in columns.values()))
    for name, records in shown.items():
        print(f"{name:<12}" + "".join(f"{interval_of(records, c).text():>15}" for c in columns))
    print(f"report: {path}")


def train_all(groups: Mapping[str, Sequence[TrainConfig]]) -> bool:
    """Trains what has not been trained, and says the means of each group, the same runs but for their seeds,
    as it goes; the keys name the groups. Returns whether this is the main process, which goes on."""
    from .loop import train

    start, done, count = time.perf_counter(), 0, sum(map(len, groups.values()))
    with processes(next(iter(groups.values()))[0]) as group:  # joined once: for all runs
        if problem := group.from_main(_unlike(groups)):
            raise TrainingError(problem)
        for name, configs in groups.items():
            found = []
            for config in configs:
                elapsed = time.perf_counter() - start
                left = f", about {elapsed / done * (count - done):.0f} s left" if done else ""
                if group.is_main:
                    print(f"[{done + 1}/{count}] {name}, seed {config.seed}{left}", flush=True)
                # The comparison draws the maps that it shows.
                found.append(RunRecord(config.objective, config.seed, train(config, with_map=False), []))
                done += 1
            if group.is_main:
                first = found[0].results
                means = [f"{c} {interval_of(found, c).text()}" for c in ACCURACIES if c in first]
                print(f"{name}: {', '.join(means)} % of {first['split']}", flush=True)
    return group.is_main


def _unlike(groups: Mapping[str, Sequence[TrainConfig]]) -> str:
    """What is wrong where finished runs were made by other versions than each other, or than those that would
    train the rest now; or where there is a rest, and the first finished run had other data than is there now.
    Nothing is deleted for it."""
    runs = [(name, config, _finished(config)) for name, configs in groups.items() for config in configs]
    now, made = versions(), {}  # by versions, a run that they made
    for name, config, results in runs:
        version = ", ".join(f"{k} {(results or now).get(k, 'unknown')}" for k in now)
        made.setdefault(version, f"{name}, seed {config.seed}")
    if len(made) > 1:
        which = "; ".join(f"{name} by {version}" for version, name in made.items())
        return (
            f"runs of different versions are not compared: {which}. Another --output trains all of them, or "
            "delete those of the other version"
        )
    known = [(config, results["data_digest"]) for _, config, results in runs if "data_digest" in results]
    if known and not all(results for *_, results in runs):
        config, before = known[0]
        if changed := differences(before, data_digest(load_data(config))):
            return (
                f"{config.output} was trained on other data than is there now: {changed}. Another --output "
                "trains all runs on today's"
            )
    return ""


def _finished(config: TrainConfig) -> dict[str, Any]:
    """The results of a run; none where it is not there yet, or damaged: it will be made now."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((Path(config.output) / "results.json").read_text())
    return {}


def judged(config: TrainConfig, split: str | None = None) -> RunRecord:
    """A finished run with its figures on ``split``, which are made once and kept beside the run's own."""
    folder = Path(config.output)
    record = read_run(folder)
    if split in (None, record.results["split"]):
        return record
    with contextlib.suppress(TrainingError):  # not there yet, or damaged
        return read_run(folder, split)
    run = FinishedRun(folder, workers=config.workers, device=config.device)
    figures, outputs, correct = run.figures(split)
    write_figures(folder, figures, run.judge.part(outputs), correct, split)
    return read_run(folder, split)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("clce-compare", lambda: compare(parse(arguments)), "the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
