from __future__ import annotations

import csv

import pytest

from clce_ext.train import compare, sweep
from clce_ext.train.errors import TrainingError
from clce_ext.train.objectives import OBJECTIVES
from python_tests.training import QUICK, command_line, results

_OPTIONS = {k: v for k, v in QUICK.items() if k not in ("eval_embeddings", "lr")}


def test_sweep(tmp_path, capsys):
    arguments = [
        *command_line(_OPTIONS | {"val_fraction": 0.2, "shots": 6, "epochs": 1}),
        "--objectives",
        "ce",
        "clce",
    ]
    arguments += ["--seeds", "0", "1", "--output", str(tmp_path), "--grid", "lr=1e-3,3e-3", "beta=0,1"]
    assert sweep.main(arguments) == 0
    said = capsys.readouterr().out
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # Cross-entropy has no beta: it is not varied for it.
    assert [row["objective"] for row in rows] == ["ce"] * 2 + ["clce"] * 4
    assert {(row["lr"], row["beta"]) for row in rows if row["objective"] == "ce"} == {
        ("1e-3", ""),
        ("3e-3", ""),
    }
    for objective in ("ce", "clce"):
        of_objective = [row for row in rows if row["objective"] == objective]
        best = max(of_objective, key=lambda row: float(row["top1"]))
        assert [row["chosen"] for row in of_objective].count("True") == 1 and best["chosen"] == "True"
        point = f"lr={best['lr']}" + f",beta={best['beta']}" * bool(best["beta"])
        top1 = f"{100 * float(best['top1']):.1f} ± "
        assert f"chosen: {objective}, {point}, of {len(of_objective)}: top1 {top1}" in said
    run = rows[2]
    folder = tmp_path / "runs" / f"lr={run['lr']},beta={run['beta']}"
    mean = sum(results(folder / f"clce-seed{seed}")["top1"] for seed in (0, 1)) / 2
    assert float(run["top1"]) == pytest.approx(mean)
    report = (tmp_path / "sweep.html").read_text()
    assert report.count("<svg") == 2 and "Top-1 by lr" in report and "<script" not in report


def test_random_points_are_the_beginning_of_more():
    def points(count):
        return sweep.parse(["--grid", "lr=1,2,3", "beta=0,1,2", "--random", str(count)]).points

    assert len(points(9)) == len({tuple(p.items()) for p in points(9)}) == 9
    assert points(4) == points(9)[:4]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_only_options_of_other_losses_are_not_varied(objective):
    """Label smoothing is an option of CLCE's loss, and of every other objective's cross-entropy too."""
    point = {"label_smoothing": 0.1, "lr": 1e-3, "weight": 0.5}
    taken = sweep._of_objective(objective, point)
    assert taken == {k: v for k, v in point.items() if k != "weight" or objective == "clce"}


def test_options_of_one_objective(tmp_path):
    asked = compare.parse(["--objectives", "ce", "clce", "--set", "clce.lr=3e-3", "ce.weight-decay=0"])
    assert asked.config("clce", 0, tmp_path).lr == 3e-3
    assert asked.config("ce", 0, tmp_path).lr != 3e-3 and asked.config("ce", 0, tmp_path).weight_decay == 0


@pytest.mark.parametrize(
    ("parse", "arguments", "message"),
    [
        (compare.parse, ["--set", "schane.lr=1"], "with one of ce, clce"),
        (compare.parse, ["--set", "lr=1"], "OBJECTIVE.OPTION=VALUE is wanted"),
        (compare.parse, ["--set", "clce.seed=1"], "seed is what the comparison itself decides"),
        (sweep.parse, ["--grid", "lr"], "NAME=VALUE is wanted"),
        (sweep.parse, ["--grid", "seed=0,1"], "seed is what the comparison itself decides"),
        (sweep.parse, ["--grid", "lr=1", "lr=2"], "lr is given twice"),
        (sweep.parse, ["--grid", "lr=1", "--random", "0"], "--random must be an integer >= 1"),
    ],
)
def test_mistakes_are_named(parse, arguments, message):
    with pytest.raises(TrainingError, match=message):
        parse(arguments)
