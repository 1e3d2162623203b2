"""The tools that quote the sources find there what they quote; the study's commands and tables."""

from __future__ import annotations

import importlib
import json
import runpy
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from clce_ext.train import cli, compare, evaluate

TOOLS = Path(__file__).resolve().parent.parent / "tools"


def test_every_mutation_applies():
    tool = runpy.run_path(str(TOOLS / "mutation_check.py"))
    stale = [mutation.name for mutation in tool["MUTATIONS"] if not tool["applies"](mutation)]
    assert not stale, f"the code that these mutations change is not there any more: {stale}"


def test_every_command_of_the_study_is_one(monkeypatch):
    """Options, recipes and seeds are read as the commands read them, and no two parts share a folder."""
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.chdir(TOOLS.parent)
    study = importlib.import_module("study")
    parts = [*study.photographs("clothing"), *study.digits(), *study.episodes()]
    names = [part.name for part in parts]
    assert len(set(names)) == len(names) > 30
    folders = set()
    for part in parts:
        assert set(part.needs) <= set(names)
        if part.module == ".compare":
            asked = compare.parse(part.arguments)
            assert asked.split == "test" or part.name == "episodes"
            for objective in asked.objectives:
                config = asked.config(objective, 0, asked.output)
                # What is compared by the number of images has the same number of updates.
                if "shots" in part.name:
                    updates = 20 if "photographs" in part.name else 40
                    assert config.epochs * 10 * config.shots == updates * config.batch_size
            folders.add(asked.output)
        elif part.module == ".evaluate":
            evaluate._parser().parse_args(part.arguments)
        elif part.module == "":
            cli.parse(part.arguments)
    assert len(folders) == sum(part.module == ".compare" for part in parts)


def test_what_needs_a_failed_part_of_the_study_is_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(TOOLS))
    study = importlib.import_module("study")
    monkeypatch.chdir(tmp_path)
    parts = [study.Part(name, "", ("--version",), needs) for name, needs in (("a", ()), ("b", ("a",)))]
    started = []
    monkeypatch.setattr(study.subprocess, "call", lambda command, **_: started.append(command) or 2)
    assert not study.run(parts, 2)
    assert len(started) == 1
    assert "b: left out, for a failed (0 left)" in capsys.readouterr().out


def test_the_study_writes_what_has_finished(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(TOOLS))
    study, tables = importlib.import_module("study"), importlib.import_module("study_tables")
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    labels = np.arange(200) % 10
    for shots, share in ((5, 0.6), (10, 0.7)):
        for objective, gain in (("ce", 0.0), ("clce", 0.2)):
            for seed in range(8):
                run = tmp_path / f"runs/study/photographs-{shots}-shots/runs/{objective}-seed{seed}"
                write_run(run, objective, seed, generator.random((8, 200)) < share + gain, labels)
    document = tmp_path / "study.md"
    names = ("photographs", "photographs-shots", "digits")
    document.write_text("".join(f"<!-- study {name} -->\nSTALE\n<!-- /study -->\n" for name in names))
    study.write(document)
    text = document.read_text()
    assert text.count("STALE") == 1  # the digits' table, none of whose runs has finished
    for picture in ("study-photographs.svg", "study-photographs-shots.svg"):
        assert picture in text and (tmp_path / picture).read_text().count("<svg") == 1
    runs = {o: tables.records("photographs-5-shots", o) for o in ("ce", "clce")}
    mean = np.mean(
        [100 * (a.results["top1"] - b.results["top1"]) for a, b in zip(runs["clce"], runs["ce"], strict=True)]
    )
    (line,) = [line for line in text.splitlines() if line.startswith("| `clce` − `ce` |")]
    assert f"| {mean:+.1f} ± " in line and line.count("*") == 4
    study.write(document)
    assert document.read_text() == text


def write_run(folder, objective, seed, correct, labels):
    """The files of a finished run that a table is made of; ``correct`` [8, N] by figure."""
    folder.mkdir(parents=True)
    figures = ("top1", "knn", "centroid", "probe")
    of = dict(zip([*figures, *(f"untouched.{f}" for f in figures)], correct, strict=True))
    results = {
        "objective": objective,
        "seed": seed,
        "model": "m",
        "data": "d",
        "classes": 10,
        "train_images": 50,
    }
    (folder / "results.json").write_text(json.dumps(results))
    judged = {name: float(of[name].mean()) for name in figures} | {"split": "test", "images": len(labels)}
    judged["untouched"] = {name: float(of[f"untouched.{name}"].mean()) for name in figures[1:]}
    (folder / "results-test.json").write_text(json.dumps(judged))
    (folder / "metrics.csv").write_text("stage,epoch\njoint,0\n")
    save_file(
        {"embeddings": np.zeros((len(labels), 2)), "labels": labels}, folder / "embeddings-test.safetensors"
    )
    save_file({"images": np.arange(len(labels)), **of}, folder / "correct-test.safetensors")
