"""Whole runs on digits: what they write, how they resume, how they stop; and the commands around them."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from clce_ext.train import compare, evaluate, predict
from clce_ext.train.checkpoint import checkpoints, load_checkpoint
from clce_ext.train.cli import main, parse
from clce_ext.train.config import TrainConfig, flag, read_yaml
from clce_ext.train.data import EpochSampler
from clce_ext.train.errors import TrainingError
from clce_ext.train.intervals import corrected, difference
from clce_ext.train.loop import train
from clce_ext.train.objectives import OBJECTIVES
from clce_ext.train.records import epoch_line
from clce_ext.train.report import OF_ONE_RUN, _standing
from clce_ext.train.results import RunRecord

from .training import QUICK, command_line, quick_config, results, rows, without_times, write_digit_images

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_runs(tmp_path, objective):
    figures = train(quick_config(tmp_path, objective=objective, eval_embeddings="final", tensorboard=True))
    assert 0 <= figures["top1"] <= figures["top5"] <= 1 and figures["steps"] == 4
    found = rows(tmp_path)
    two_stage = objective in ("supcon", "lacvit", "schane")
    assert [r["stage"] for r in found] == (["contrast", "head"] if two_stage else ["joint", "joint"])
    has_contrast = [bool(r["contrast"]) for r in found]
    assert has_contrast == {"ce": [False, False], "clce": [True, True]}.get(objective, [True, False])
    if objective == "clce":
        row = {k: float(v) for k, v in found[-1].items() if v and k != "stage"}
        assert 0.1 * row["ce"] + 0.9 * row["contrast"] == pytest.approx(row["loss"], rel=1e-5)
    names = {p.name for p in tmp_path.iterdir()}
    wanted = {"config.yaml", "metrics.csv", "results.json", "model.safetensors", "report.html", "checkpoints"}
    assert wanted | {"tensorboard", "embeddings.safetensors"} <= names
    assert TrainConfig.from_dict(read_yaml(tmp_path / "config.yaml")).objective == objective
    # What is left is a file of timm's weights.
    timm.create_model("beit_tiny_digits").load_state_dict(load_file(tmp_path / "model.safetensors"))


@pytest.mark.slow
def test_it_learns(tmp_path):
    options = {
        "shots": 20,
        "batch_size": 50,
        "images_per_class": 5,
        "epochs": 15,
        "warmup_epochs": 1,
        "lr": 2e-3,
    }
    figures = train(quick_config(tmp_path, objective="clce", drop_path=0.0, **options))
    assert figures["top1"] > 0.3  # chance is 0.1


def test_mixup_and_ema_and_clipping(tmp_path):
    options = {
        "objective": "clce",
        "mixup": 0.8,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
        "ema": 0.9,
        "clip_grad": 1.0,
    }
    figures = train(quick_config(tmp_path, **options))
    assert figures["top1"] >= 0
    trained = load_checkpoint(checkpoints(tmp_path)[-1])[0]["backbone.head.weight"]
    kept = load_file(tmp_path / "model.safetensors")["head.weight"]
    assert not torch.equal(trained, kept)  # the averaged weights are kept


def test_amp(tmp_path):
    figures = train(quick_config(tmp_path, amp="bfloat16", queue_size=30, micro_batch_size=7))
    assert figures["steps"] == 4


@pytest.mark.parametrize("objective", ["ce", "clce"])
def test_micro_batches_change_nothing_but_rounding(tmp_path, objective):
    """Without dropout: with it the micro-batches draw other numbers, which test_gradcache.py accounts for.

    And without Adam, whose first steps are the gradients' signs: where a gradient is nothing but rounding,
    so is its sign.
    """
    options = {"objective": objective, "drop_path": 0.0, "opt": "sgd", "lr": 0.05}
    train(quick_config(tmp_path / "whole", **options))
    train(quick_config(tmp_path / "micro", micro_batch_size=6, **options))
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "micro"))
    assert all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-5) for k in a)
    for x, y in zip(rows(tmp_path / "whole"), rows(tmp_path / "micro"), strict=True):
        assert float(x["loss"]) == pytest.approx(float(y["loss"]), rel=1e-5)


def test_seeds(tmp_path):
    first, again, other = (
        train(quick_config(tmp_path / name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert without_times(first) == without_times(again)
    assert first["val_loss"] != other["val_loss"]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


# Resuming


def same_run(a: Path, b: Path) -> None:
    assert without_times(results(a)) == without_times(results(b))
    strip = [[{k: v for k, v in r.items() if "second" not in k} for r in rows(folder)] for folder in (a, b)]
    assert strip[0] == strip[1]
    weights = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.parametrize(
    "objective, extra",
    [
        ("clce", {"mixup": 0.5, "ema": 0.9, "queue_size": 50}),
        ("lacvit", {}),
        ("supcon", {"clip_grad": 0.1, "ema": 0.9}),
    ],
)
def test_resume_from_every_checkpoint(tmp_path, objective, extra):
    """In the middle of an epoch, at its end, between two stages: the numbers of the unbroken run."""
    options = {"objective": objective, "checkpoint_steps": 1, "keep_checkpoints": 100} | extra
    whole = tmp_path / "whole"
    train(quick_config(whole, **options))
    kept = checkpoints(whole)
    assert [p.name for p in kept] == [f"step-{i:08d}" for i in range(1, 5)]
    for stop in kept[:-1]:
        broken = tmp_path / stop.name
        shutil.copytree(whole, broken)
        for later in checkpoints(broken):
            if later.name > stop.name:
                shutil.rmtree(later)
        (broken / "results.json").unlink()
        train(quick_config(broken, resume=True, **options))
        same_run(whole, broken)


@pytest.mark.slow
def test_kill_and_resume(tmp_path):
    """SIGKILL at random moments of a real process, until it gets through."""
    options = QUICK | {"objective": "clce", "epochs": 6, "checkpoint_steps": 1, "mixup": 0.5}
    train(TrainConfig.from_dict(options | {"output": str(tmp_path / "whole")}))
    broken = tmp_path / "broken"
    command = [
        sys.executable,
        "-m",
        "clce_ext.train",
        *command_line(options),
        "--output",
        str(broken),
        "--resume",
    ]
    chance = random.Random()
    kills = 0
    for _ in range(3):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        before = len(list((broken / "checkpoints").glob("step-*"))) and checkpoints(broken)[-1].name
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            now = checkpoints(broken)
            if now and now[-1].name != before:
                time.sleep(chance.uniform(0, 0.15))
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 1
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    same_run(tmp_path / "whole", broken)


def test_finished_runs_are_kept(tmp_path):
    config = quick_config(tmp_path)
    figures = train(config)
    with pytest.raises(
        TrainingError, match="already holds a run: --resume goes on with it, --overwrite deletes it"
    ):
        train(config)
    stamp = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert train(quick_config(tmp_path, resume=True)) == figures
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(TrainingError, match=r"other options: --lr was 0.001, is 0.5; --seed was 0, is 3"):
        train(quick_config(tmp_path, resume=True, lr=0.5, seed=3))
    train(quick_config(tmp_path, overwrite=True, seed=3))
    assert results(tmp_path)["seed"] == 3


def test_checkpoints_hold_no_code(tmp_path):
    train(quick_config(tmp_path, objective="clce"))
    for folder in checkpoints(tmp_path):
        assert torch.load(folder / "training.pt", weights_only=True)["world_size"] == 1


# Stopping


def test_a_loss_that_is_not_finite(tmp_path, capsys):
    arguments = command_line(QUICK | {"objective": "ce", "lr": 1e30, "epochs": 5, "sched": "constant"})
    assert main([*arguments, "--output", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert re.search(
        r"clce-train: error: the loss is not finite \(loss (nan|inf).*step \d+, at learning rate", message
    )
    assert "--clip-grad" in message and "Traceback" not in message


def test_broken_image_on_the_command_line(tmp_path, capsys):
    folder = write_digit_images(tmp_path / "images", train=4, val=2, classes=2, size=32)
    broken = next((folder / "train" / "digit_1").iterdir())
    broken.write_bytes(broken.read_bytes()[:60])
    options = QUICK | {"batch_size": 8, "images_per_class": 4, "workers": 1}
    assert main([*command_line(options), "--data", str(folder), "--output", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("clce-train: error: cannot read image") and str(broken) in message


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--objective", "clce", "--weight", "1.5"], "--weight must be a number in [0, 1], got 1.5"),
        (["--temperature", "0"], "--temperature must be a number > 0, got 0"),
        (["--objective", "lacvit", "--epochs", "1"], "--head-epochs must lie in [1, --epochs), got 1 of 1"),
        (["--batch-size", "10", "--images-per-class", "4"], "must be a multiple of --images-per-class 4"),
        (["--lr", "1e-3", "--lr-base", "1e-3"], "--lr and --lr-base both give the learning rate: give one"),
        (
            ["--temperature", "0.1", "--objective", "ce"],
            "--temperature is an option of supcon, lacvit, schane, clce; --objective ce has none",
        ),
        (
            ["--weight", "0.5", "--objective", "supcon"],
            "--weight is an option of clce; --objective supcon has",
        ),
        (["--mixup", "0.5", "--objective", "clce", "--views", "2"], "use --views 1"),
        (["--mixup", "0.5", "--micro-batch-size", "1"], "micro-batch: --micro-batch-size 1 has one"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: cannot be read"),
        (["--device", "abacus"], "--device must be cpu or cuda, got 'abacus'"),
        (["--device", "mps"], "--device must be cpu or cuda, got 'mps'"),
        (["--checkpoint-epochs", "0"], "--checkpoint-epochs must be an integer >= 1, got 0"),
        (["--workers", "-1"], "--workers must be an integer >= 0, got -1"),
        (["--amp", "half"], "--amp must be one of none, bfloat16, float16, got half"),
        (["--lr", "fast"], "--lr must be a number > 0, got fast"),
        (["--layer-decay", "-0.5"], "--layer-decay must be a number in (0, 1], got -0.5"),
        (["--scale", "1", "0.5"], "--scale must be two numbers, the smaller first"),
        (["--clip-grad", "-1"], "--clip-grad must be a number > 0, got -1"),
        (["--min-lr", "-1"], "--min-lr must be a number >= 0, got -1"),
        (["--warmup-lr", "-1"], "--warmup-lr must be a number >= 0, got -1"),
        (["--color-jitter", "-0.4"], "--color-jitter must be a number >= 0, got -0.4"),
        (["--opt", "adamx"], "--opt adamx: timm refuses"),
        (["--sched", "cosinus"], "--sched cosinus: timm refuses"),
        (["--auto-augment", "nonsense"], "--auto-augment and other augmentation: timm refuses"),
        (["--distributed-loss", "ring"], "--distributed-loss ring needs processes: start with torchrun"),
        (["--hold-out-classes", *"012345678"], "at least two classes are needed"),
        (["--val-fraction", "1"], "--val-fraction must be a number in (0, 1), got 1"),
        (["--val-fraction", "0.1", "--val-split", "val"], "both name a validation split: give one"),
        (["--patience", "2"], "--patience needs --best-metric"),
        (["--best-metric", "knn"], "--best-metric knn needs --eval-embeddings epoch"),
    ],
)
def test_wrong_options(arguments, message, capsys, tmp_path):
    assert main([*arguments, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (main, ["--temprature", "0.1"], "unknown option --temprature (did you mean --temperature?)"),
        (main, ["--batchsize=4"], "unknown option --batchsize (did you mean --batch-size?)"),
        (main, ["photos"], "unknown option photos"),
        (compare.main, ["--objectives", "ce", "clcee"], "--objectives: invalid choice: 'clcee' (choose from"),
        (evaluate.main, ["--checkpoint", "x", "--wayss", "2"], "--wayss (did you mean --ways?)"),
        (predict.main, ["--checkpoint", "x", "a.jpg", "--batch-size", "x"], "--batch-size: invalid int"),
        (predict.main, ["a.jpg"], "required: --checkpoint"),
    ],
)
def test_what_a_command_does_not_know_is_one_line(command, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        command(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and message in said and said.endswith("; --help lists the options\n")
    assert said.count("\n") == 1


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    for module, name, arguments in (
        (compare, "compare", []),
        (evaluate, "evaluate", ["--checkpoint", "x"]),
        (sys.modules["clce_ext.train.loop"], "train", []),
    ):
        monkeypatch.setattr(module, name, interrupt)
        command = main if name == "train" else module.main
        assert command(arguments) == 130
        said = capsys.readouterr().err
        # A comparison resumes by itself and has no such option; clce-eval has nothing to resume.
        assert ("--resume" in said) == (name == "train")
        assert ("the same command" in said) == (name in ("train", "compare"))


def test_help_is_grouped_and_names_every_option(capsys):
    for command in (main, compare.main):
        with pytest.raises(SystemExit):
            command(["--help"])
        said = capsys.readouterr().out
        groups = ("data", "model", "objective", "optimisation", "machine", "run")
        places = [said.index(f"\n{group}:\n") for group in groups]
        assert places == sorted(places)
        listed = set(re.findall(r"^  (--[a-z-]+)", said, re.M))
        own = {flag(field.name) for field in dataclasses.fields(TrainConfig)}
        if command is compare.main:
            own -= {flag(name) for name in OF_ONE_RUN}
        assert own <= listed


def test_epoch_line():
    row = {"stage": "joint", "epoch": 2, "loss": 1.5, "ce": 1.5, "images_per_second": 10.4, "top1": 0.5}
    assert epoch_line(row, 3, 61) == "joint 3/3  loss 1.5000  top1 50.00 %  10 img/s  ETA 0:01:01"
    both = row | {"contrast": 2.0, "knn": 0.25}
    assert "loss 1.5000 (ce 1.5000, contrast 2.0000)  top1 50.00 %  knn 25.00 %  10" in epoch_line(both, 3, 0)


def test_options_in_a_recipe(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    for content, message in (
        (b"\xff\xfe\x00", "not YAML"),
        (b"epochs: 3\n  lr: [1", "not YAML (mapping values are not allowed here"),
        (b"temprature: 0.1", "unknown option temprature (did you mean temperature?); known are amp, augment"),
        (b"output:", "--output must be a string, got nothing"),
        (b"epochs: .inf", "--epochs must be an integer >= 0, got inf"),
    ):
        recipe.write_bytes(content)
        assert main(["--config", str(recipe)]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


def test_an_output_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([*command_line(QUICK), "--output", str(tmp_path / "file" / "run")]) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_a_start_that_failed_leaves_the_folder_free(tmp_path):
    with pytest.raises(TrainingError, match="exceeds the 40 training images"):
        train(quick_config(tmp_path, batch_size=200))
    assert train(quick_config(tmp_path))["steps"] == 4
    assert len(rows(tmp_path)) == 2


def test_a_stage_clips_its_own_gradients(tmp_path, monkeypatch):
    """Those that the first stage left on the frozen backbone do not count."""
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def clip_and_note(parameters, most):
        parameters = list(parameters)
        norms.append(sum(p.grad is not None for p in parameters))
        return clip(parameters, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_note)
    train(quick_config(tmp_path, objective="supcon", clip_grad=1.0))
    assert norms[-1] == 2  # the classifier's weight and bias


def test_class_names_of_all_kinds(tmp_path):
    """Markup, formulas, names that differ in case alone: in the report, and in one order in every process."""
    folder = write_digit_images(tmp_path / "images", train=6, val=3, classes=4, size=32)
    for split in ("train", "val"):
        for old, new in zip(range(4), ("<b>&", "$5^$10^", "a", "A"), strict=True):
            (folder / split / f"digit_{old}").rename(folder / split / new)
    options = QUICK | {"batch_size": 8, "shots": None, "eval_embeddings": "final", "data": str(folder)}
    train(TrainConfig.from_dict(options | {"output": str(tmp_path / "run")}))
    report = (tmp_path / "run" / "report.html").read_text()
    assert "&lt;b&gt;&amp;" in report and "<b>&" not in report and "$5^$10^" in report
    figures = json.loads((tmp_path / "run" / "results.json").read_text())
    command = [sys.executable, "-m", "clce_ext.train.evaluate", "--checkpoint", str(tmp_path / "run")]
    for seed in "123":
        output = tmp_path / f"{seed}.json"
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([*command, "--output", str(output)], cwd=ROOT, env=environment, check=True)
        assert json.loads(output.read_text())["top1"] == pytest.approx(figures["top1"])


# Recipes


def test_recipes_are_overruled_by_the_command_line(tmp_path):
    (tmp_path / "recipe.yaml").write_text("lr: 1e-4\nbatch-size: 128\nobjective: ce\nscale: [0.5, 1]\n")
    config = parse(["--config", str(tmp_path / "recipe.yaml"), "--objective", "clce", "--no-augment"])
    assert (config.lr, config.batch_size, config.objective, config.augment) == (1e-4, 128, "clce", False)
    assert config.scale == [0.5, 1.0]
    for text, message in {
        "learning_rate: 1": "unknown option learning_rate; known are amp, augment",
        "epochs: many": "--epochs must be an integer >= 0, got many",
        "epochs: 2.5": "--epochs must be an integer >= 0, got 2.5",
        "augment: 1": "--augment must be true or false, got 1",
        "- 1": "must map option names to values, got list",
        "a: [": "not YAML",
    }.items():
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(TrainingError, match=re.escape(message)):
            parse(["--config", str(tmp_path / "wrong.yaml")])


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# Classes of the training split, and images of each: all alike, or the smallest and the largest class's.
SHAPES = {
    "torchvision:CIFAR100": (100, 500, 500),
    "data/cub200": (200, 29, 30),
    "torchvision:Flowers102": (102, 10, 10),
    "data/imagenet": (1000, 732, 1300),
    "torchvision:OxfordIIITPet": (37, 93, 100),
    "clothing-dataset-small": (10, 106, 748),
    "digits": (10, 119, 120),
    "letters": (52, 150, 150),
}


def options_of(recipe: Path) -> TrainConfig:
    if recipe.stem == "demo":
        return TrainConfig.from_dict(compare.parse(["--config", str(recipe)]).options)
    return parse(["--config", str(recipe)])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_draw_an_epoch_at_1_2_and_8_processes(recipe):
    """With as many classes and images of each as the data sets have."""
    config = options_of(recipe)
    classes, *sizes = SHAPES[config.data]
    counts = np.linspace(*sizes, classes).astype(int)
    if config.val_fraction:
        counts -= np.maximum(1, (config.val_fraction * counts).round().astype(int))
    labels = np.repeat(np.arange(classes), np.minimum(counts, config.shots or counts))
    for ranks in (1, 2, 8):
        shares = []
        for rank in {0, ranks - 1}:
            sampler = EpochSampler(labels, config, rank, ranks)
            sampler.set_position(epoch=0, first_batch=max(0, sampler.steps - 3))
            items = list(sampler)
            per_step = len(sampler) // sampler.steps
            assert len(items) == per_step * min(3, sampler.steps)
            shares.append([{i for item in items[:per_step] for i, _ in item}, sampler.share])
        assert all(len(images) == share > 0 for images, share in shares)  # none twice in a batch
        assert ranks == 1 or not shares[0][0] & shares[1][0]
        assert abs(shares[0][1] * ranks - config.batch_size) < ranks


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_parse(recipe):
    config = options_of(recipe)
    if recipe.stem == "demo":
        asked = compare.parse(["--config", str(recipe)])
        assert asked.objectives == ["ce", "supcon", "schane", "clce"]
        assert len(asked.seeds) >= 3 and asked.baseline == "ce"
    # Somewhere there is a split that may choose: these bring one of their own.
    own = ("torchvision:Flowers102", "letters", "clothing-dataset-small")
    assert config.val_fraction or config.data in own
    assert timm.is_model(config.model.partition(".")[0])
    assert config.model in timm.list_pretrained() or not config.pretrained
    text = recipe.read_text()
    assert "From the paper:" in text and "Ours:" in text


def test_there_is_a_recipe_for_every_promise():
    names = {p.stem for p in RECIPES}
    for data in ("imagenet1k", "cub200", "cifar100", "flowers102", "pets"):
        assert {f"{data}-beit3-clce", f"{data}-beit3-ce"} <= names
    assert {"cub200-beit-lacvit", "cub200-beitv2-lacvit", "fewshot-beit3-clce"} <= names


# The other commands


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train(quick_config(folder, objective="clce", hold_out_classes=["7", "8", "9"], batch_size=14, epochs=1))
    return folder


def test_eval(finished, tmp_path, capsys):
    arguments = [
        "--checkpoint",
        str(finished),
        "--ways",
        "3",
        "--episodes",
        "20",
        "--output",
        str(tmp_path / "e.json"),
    ]
    assert evaluate.main(arguments) == 0
    figures = json.loads((tmp_path / "e.json").read_text())
    trained = results(finished)
    assert figures["top1"] == trained["top1"] and figures["val_loss"] == pytest.approx(
        trained["val_loss"], rel=1e-5
    )
    assert {"knn", "centroid", "silhouette", "alignment", "uniformity", "isotropy"} <= set(figures)
    assert figures["novel_classes"] == 3
    for head in ("centroid", "logistic"):
        assert 0.3 < figures[f"3way_5shot_{head}"] <= 1 and figures[f"3way_5shot_{head}_ci95"] > 0
    assert {"recall@1", "recall@4", "map@r"} <= set(figures)
    by_class = {row["class"]: row for row in figures["by_class"]}
    assert list(by_class) == ["0", "1", "2", "3", "4", "5", "6"]
    right = sum(row["accuracy"] * row["images"] for row in by_class.values())
    assert right / sum(row["images"] for row in by_class.values()) == pytest.approx(figures["top1"])
    worst = min(by_class.values(), key=lambda row: row["accuracy"])
    said = capsys.readouterr().out
    assert "3way_1shot_centroid" in said and f"  {worst['class']}: {100 * worst['accuracy']:.1f} % of" in said


def test_eval_on_another_folder(finished, tmp_path):
    folder = write_digit_images(tmp_path / "novel", train=20, val=0, classes=4, size=32) / "train"
    arguments = [
        "--checkpoint",
        str(finished),
        "--data",
        str(folder),
        "--ways",
        "3",
        "--shots",
        "2",
        "--queries",
        "8",
    ]
    assert evaluate.main([*arguments, "--episodes", "10", "--output", str(tmp_path / "e.json")]) == 0
    figures = json.loads((tmp_path / "e.json").read_text())
    assert figures["novel_classes"] == 4 and "top1" not in figures
    assert figures["novel_images"] == 80


def test_eval_on_more_classes_than_the_model_has(finished, tmp_path):
    folder = write_digit_images(tmp_path / "novel", train=5, val=0, classes=10, size=32) / "train"
    arguments = ["--checkpoint", str(finished), "--data", str(folder), "--shots", "1", "--queries", "4"]
    assert evaluate.main([*arguments, "--episodes", "10", "--output", str(tmp_path / "e.json")]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["novel_classes"] == 10


def test_eval_on_other_images_of_the_same_classes(three_splits, tmp_path):
    options = SPLITS | {"data": str(three_splits), "epochs": 1, "output": str(tmp_path / "run")}
    train(TrainConfig.from_dict(options))
    found = {}
    arguments = ["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "e.json")]
    other = shutil.copytree(three_splits / "test", tmp_path / "other")
    for name, data in (("own", ["--split", "test"]), ("other", ["--data", str(other)])):
        assert evaluate.main([*arguments, *data]) == 0
        found[name] = json.loads((tmp_path / "e.json").read_text())
    for figure in ("top1", "images", "silhouette"):
        assert found["other"][figure] == pytest.approx(found["own"][figure])
    assert "novel_classes" not in found["other"]


def test_episodes_are_called_novel_only_where_the_classes_are(finished, tmp_path, capsys):
    arguments = ["--checkpoint", str(finished), "--ways", "2", "--shots", "1", "--episodes", "5"]
    arguments += ["--output", str(tmp_path / "e.json")]
    for classes, kind, images in ((["7", "8", "9"], "novel", 533), (["1", "2"], "episode", 120)):
        assert evaluate.main([*arguments, "--classes", *classes]) == 0
        figures = json.loads((tmp_path / "e.json").read_text())
        assert figures[f"{kind}_classes"] == len(classes)
        assert figures[f"{kind}_images"] == pytest.approx(images, abs=5)
        assert {"novel": "episode_images", "episode": "novel_images"}[kind] not in figures
    assert evaluate.main([*arguments, "--ways", "3", "--queries", "175"]) == 2
    message = capsys.readouterr().err
    assert "too small are 8 (174)" in message and "Fewer --queries" in message


def test_episodes_draw_from_the_same_classes_whatever_the_shots(finished, tmp_path):
    """Those that are too small for the most shots are in no episode, and are named."""
    folder = write_digit_images(tmp_path / "novel", train=8, val=0, classes=4, size=32) / "train"
    for image in sorted((folder / "digit_3").iterdir())[5:]:
        image.unlink()
    arguments = ["--checkpoint", str(finished), "--data", str(folder), "--ways", "3", "--queries", "3"]
    found = []
    for shots in (["1", "4"], ["1"]):
        output = ["--episodes", "10", "--output", str(tmp_path / "e.json")]
        assert evaluate.main([*arguments, *output, "--shots", *shots]) == 0
        found.append(json.loads((tmp_path / "e.json").read_text()))
    assert found[0]["too_small_for_episodes"] == "digit_3 (5)" and "too_small_for_episodes" not in found[1]
    (folder / "digit_3").rename(tmp_path / "away")
    assert evaluate.main([*arguments, *output, "--shots", "1", "4"]) == 0
    without = json.loads((tmp_path / "e.json").read_text())
    assert without["3way_1shot_logistic"] == found[0]["3way_1shot_logistic"]


def test_eval_errors(finished, tmp_path, capsys):
    for arguments, message in (
        (["--checkpoint", str(tmp_path)], "not the directory of a run"),
        (["--checkpoint", str(finished), "--ways", "9"], "few-shot episodes of 9 ways"),
        (["--checkpoint", str(finished), "--classes", "ten"], "unknown class ten"),
        (["--checkpoint", str(finished), "--episodes", "0"], "--episodes must be >= 1"),
        (["--checkpoint", str(finished), "--shots", "0"], "--shots must be >= 1"),
        (["--checkpoint", str(finished), "--batch-size", "0"], "--batch-size must be >= 1"),
        (["--checkpoint", str(finished), "--device", "foo"], "--device must be cpu or cuda"),
    ):
        assert evaluate.main(arguments) == 2
        assert message in capsys.readouterr().err
    broken = shutil.copytree(finished, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:500])
    assert evaluate.main(["--checkpoint", str(broken)]) == 2
    assert "model.safetensors is damaged" in capsys.readouterr().err
    (broken / "model.safetensors").unlink()
    assert evaluate.main(["--checkpoint", str(broken)]) == 2
    assert "has not finished" in capsys.readouterr().err


def test_compare(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("clce_ext.train.report._SHOWN", 100)
    options = {k: v for k, v in QUICK.items() if k != "eval_embeddings"} | {"shots": 4}
    arguments = [*command_line(options), "--objectives", "ce", "clce", "--seeds", "0", "1"]
    arguments += ["--output", str(tmp_path)]
    assert compare.main(arguments) == 0
    report = (tmp_path / "report.html").read_text()
    # One file that needs nothing else.
    assert not re.search(
        r"""(src|href)\s*=\s*["']?(https?:|//|[^#"'\s>]+\.(js|css|png|svg))|@import|<script""", report
    )
    assert 'name=viewport content="width=device-width' in report
    for text in (
        "ce · clce on digits",
        "Paired differences",
        "Learning curves",
        "Cost",
        "Silhouette",
    ):
        assert text in report
    assert report.count("<svg") >= 8
    table = (tmp_path / "results.csv").read_text().splitlines()
    assert len(table) == 5 and table[0].startswith("objective,model,data,seed")
    # The mean and the paired difference of the report are those of the runs.
    found = {
        (o, s): results(tmp_path / "runs" / f"{o}-seed{s}")["top1"] for o in ("ce", "clce") for s in (0, 1)
    }
    assert "Options shared by the runs" in report and "epochs: 2" in report
    assert not re.search(r"^(seed|objective|output|resume|overwrite):", report, re.M)
    assert "4 training images of each class; batches of 20 images, 2 of a class" in report
    *progress, about, head, of_ce, of_clce, _ = capsys.readouterr().out.splitlines()
    assert about == "600 images of the val split; % correct, mean of 2 seed(s) ± 95 % interval"
    assert head.split()[:2] == ["Top-1", "Top-5"] and of_ce.startswith("ce ") and "±" in of_clce
    # Each objective's means as soon as its last seed has finished.
    mean = 50 * (found["ce", 0] + found["ce", 1])
    said = next(i for i, line in enumerate(progress) if line.startswith(f"ce: top1 {mean:.1f} ± "))
    assert progress[said].endswith("% of val") and progress[said + 1].startswith("[3/4] clce, seed 0, about")
    difference = 100 * sum(found["clce", s] - found["ce", s] for s in (0, 1)) / 2
    assert f"<b>clce</b>: {difference:+.2f} points" in report
    # Again: nothing is trained, the report is made again.
    (tmp_path / "report.html").unlink()
    monkeypatch.setattr("clce_ext.train.loop._Run", None)
    assert compare.main(arguments) == 0
    assert (tmp_path / "report.html").read_text() == report
    # Runs of two versions are not compared, and none is deleted for it.
    path = tmp_path / "runs" / "ce-seed0" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch": "1.0"}))
    assert compare.main(arguments) == 2
    message = capsys.readouterr().err
    assert "not compared: ce, seed 0 by code 0.1.0+" in message and "torch 1.0, timm" in message
    assert "torch 1.0" not in message.partition("; ")[2]


def test_a_comparison_refuses_data_that_changed(tmp_path, capsys):
    """Where it would set runs on today's images beside runs on others."""
    folder = write_digit_images(tmp_path / "images", train=6, val=3, classes=3, size=32)
    options = QUICK | {"data": str(folder), "batch_size": 6, "eval_embeddings": "final"}
    arguments = [*command_line(options), "--seeds", "0", "--output", str(tmp_path / "runs"), "--objectives"]
    assert compare.main([*arguments, "ce"]) == 0
    next((folder / "val" / "digit_1").iterdir()).unlink()
    assert compare.main([*arguments, "ce"]) == 0  # nothing is trained: the report is made again
    capsys.readouterr()
    assert compare.main([*arguments, "ce", "clce"]) == 2
    message = capsys.readouterr().err
    assert "ce-seed0 was trained on other data than is there now: val was 9 images" in message
    assert "is 8 images" in message and not (tmp_path / "runs" / "runs" / "clce-seed0").exists()
    assert compare.main([*arguments[:-3], "--output", str(tmp_path / "new"), "--objectives", "ce"]) == 0


def test_a_report_calls_nothing_better_that_chance_may_have_put_ahead():
    def runs_of(name, gains):
        return [RunRecord(name, s, {"top1": 0.5 + 0.1 * s + g}, []) for s, g in enumerate(gains)]

    def standing(seeds):
        others = ("supcon", "schane", "lacvit", "clce")
        found = [difference(runs[name][:seeds], runs["ce"][:seeds], "top1") for name in others]
        return _standing(corrected(found), "ce", "top1")

    gains = {"ce": [0, 0, 0, 0], "supcon": [0.03, -0.02, 0.01, 0.0], "schane": [-0.02, -0.03, -0.02, -0.03]}
    # p = 0.03 for lacvit by itself, too little among four comparisons.
    gains |= {"lacvit": [0.01, 0.02, 0.03, 0.04], "clce": [0.02, 0.03, 0.02, 0.03]}
    runs = {name: runs_of(name, of) for name, of in gains.items()}
    assert standing(4) == (
        " Top-1: supcon, lacvit not distinguishable from ce; schane below ce; clce above ce."
    )
    assert standing(1) == ""


def test_the_untouched_backbone_is_a_row_of_its_own(tmp_path, capsys):
    """Where weights are given: in the results of a run, of clce-eval and of a comparison, and in reports."""
    torch.manual_seed(5)
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("beit_tiny_digits").state_dict(), weights)
    options = QUICK | {"checkpoint": str(weights), "eval_embeddings": "final"}
    arguments = [*command_line(options), "--objectives", "ce", "clce", "--seeds", "0", "1"]
    assert compare.main([*arguments, "--output", str(tmp_path)]) == 0
    runs = {(o, s): tmp_path / "runs" / f"{o}-seed{s}" for o in ("ce", "clce") for s in (0, 1)}
    untouched = {key: results(folder)["untouched"] for key, folder in runs.items()}
    for seed in (0, 1):
        assert untouched["ce", seed] == untouched["clce", seed]
        assert set(untouched["ce", seed]) == {"knn", "centroid", "probe"} <= set(results(runs["ce", seed]))
    with (tmp_path / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["objective"] for row in table] == ["untouched", "untouched", "ce", "ce", "clce", "clce"]
    assert float(table[1]["centroid"]) == untouched["ce", 1]["centroid"] and table[1]["top1"] == ""
    assert all(row["split"] == "val" and row["images"] == "600" for row in table)
    with (tmp_path / "differences.csv").open(newline="") as file:
        differences = list(csv.DictReader(file))
    # All 600 images are judged in every run, so the intervals hold their variation too.
    assert {row["images"] for row in differences} == {"600"}
    assert [(row["objective"], row["reference"], row["figure"]) for row in differences] == [
        ("clce", "ce", "top1"), ("clce", "ce", "knn"), ("ce", "untouched", "centroid"),
        ("clce", "untouched", "centroid"), ("ce", "untouched", "probe"), ("clce", "untouched", "probe"),
    ]  # fmt: skip
    for row in differences:
        before = untouched if row["reference"] == "untouched" else {k: results(f) for k, f in runs.items()}
        by_seed = [
            results(runs[row["objective"], s])[row["figure"]] - before["ce", s][row["figure"]] for s in (0, 1)
        ]
        assert float(row["difference"]) == pytest.approx(sum(by_seed) / 2)
    report = (tmp_path / "report.html").read_text()
    assert "Untouched is the given backbone" in report and "Centroid against untouched" in report
    assert "Untouched is the given backbone" in (runs["ce", 0] / "report.html").read_text()
    # It is the backbone of the weights: a run that changes nothing leaves its figures.
    still = train(
        TrainConfig.from_dict(options | {"lr": 1e-12, "min_lr": 0.0, "output": str(tmp_path / "still")})
    )
    assert still["untouched"] == {name: still[name] for name in still["untouched"]} == untouched["ce", 0]
    command = ["--checkpoint", str(runs["clce", 0]), "--output", str(tmp_path / "e.json")]
    assert evaluate.main(command) == 0
    assert json.loads((tmp_path / "e.json").read_text())["untouched"] == untouched["clce", 0]
    weights.unlink()
    assert evaluate.main(command) == 0
    assert "the untouched backbone is not judged" in capsys.readouterr().err


@pytest.fixture(scope="module")
def three_splits(tmp_path_factory):
    """A folder of 8 training, 6 validation and 4 test images of each of 4 classes."""
    folder = write_digit_images(tmp_path_factory.mktemp("splits"), train=8, val=10, classes=4, size=32)
    for path in (folder / "val").iterdir():
        (folder / "test" / path.name).mkdir(parents=True)
        for image in sorted(path.iterdir())[6:]:
            image.rename(folder / "test" / path.name / image.name)
    return folder


SPLITS = {k: v for k, v in QUICK.items() if k != "shots"}
SPLITS |= {"batch_size": 8, "images_per_class": 2, "eval_embeddings": "final"}


def test_every_result_names_its_split(three_splits, tmp_path, monkeypatch):
    """Training watches val; clce-eval and clce-compare judge on the split that they are asked for."""
    options = SPLITS | {"data": str(three_splits)}
    arguments = [*command_line(options), "--objectives", "ce", "--seeds", "0", "1", "--output", str(tmp_path)]
    assert compare.main(arguments) == 0
    run = tmp_path / "runs" / "ce-seed0"
    assert (results(run)["split"], results(run)["images"]) == ("val", 24)
    assert "24 images of the val split" in (tmp_path / "report.html").read_text()
    found = {}
    for split, images in (("val", 24), ("test", 16)):
        output = tmp_path / f"{split}.json"
        assert evaluate.main(["--checkpoint", str(run), "--split", split, "--output", str(output)]) == 0
        found[split] = json.loads(output.read_text())
        assert (found[split]["split"], found[split]["images"]) == (split, images)
        assert f"{split}_loss" in found[split]
    assert found["val"]["top1"] == results(run)["top1"]
    # Nothing is trained again for the figures of another split.
    monkeypatch.setattr("clce_ext.train.loop._Run", None)
    assert compare.main([*arguments, "--split", "test"]) == 0
    with (tmp_path / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["split"], row["images"]) for row in table] == [("test", "16")] * 2
    assert float(table[0]["top1"]) == found["test"]["top1"]
    assert float(table[0]["silhouette"]) == found["test"]["silhouette"]
    assert "16 images of the test split" in (tmp_path / "report.html").read_text()
    # Nor are these figures trusted where their files are damaged.
    (run / "results-test.json").write_text("{")
    (tmp_path / "runs" / "ce-seed1" / "correct-test.safetensors").unlink()
    assert compare.main([*arguments, "--split", "test"]) == 0
    with (tmp_path / "results.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == table
    assert (tmp_path / "runs" / "ce-seed1" / "correct-test.safetensors").exists()


def test_a_watched_test_split_chooses_nothing(three_splits, tmp_path, capsys):
    options = SPLITS | {"data": str(three_splits), "val_split": "test", "epochs": 1}
    figures = train(TrainConfig.from_dict(options | {"output": str(tmp_path / "run")}))
    assert (figures["split"], figures["images"]) == ("test", 16) and "test_loss" in figures
    assert "no validation split: curves and figures are of the test split" in capsys.readouterr().err
    with pytest.raises(TrainingError, match="the test split must choose nothing"):
        train(TrainConfig.from_dict(options | {"best_metric": "top1", "output": str(tmp_path / "best")}))


BEST = {"epochs": 6, "best_metric": "val_loss", "lr": 1e-2, "sched": "constant", "objective": "ce"}


def test_the_best_epoch_is_kept(tmp_path):
    """And resuming from any checkpoint keeps the same one."""
    whole = tmp_path / "whole"
    figures = train(quick_config(whole, keep_checkpoints=100, **BEST))
    losses = [float(row["val_loss"]) for row in rows(whole)]
    assert figures["best_epoch"] == 1 + losses.index(min(losses)) and figures["best_metric"] == "val_loss"
    assert figures["val_loss"] == pytest.approx(min(losses), rel=1e-6)
    best, last = (load_file(whole / f"{name}.safetensors")["head.weight"] for name in ("model", "last"))
    kept = {p.name: load_checkpoint(p)[0]["backbone.head.weight"] for p in checkpoints(whole)}
    assert torch.equal(best, kept[f"step-{2 * figures['best_epoch']:08d}"])
    assert torch.equal(last, kept["step-00000012"])
    for stop in checkpoints(whole)[1:-1:2]:
        broken = tmp_path / stop.name
        shutil.copytree(whole, broken)
        for later in checkpoints(broken):
            if later.name > stop.name:
                shutil.rmtree(later)
        (broken / "results.json").unlink()
        train(quick_config(broken, resume=True, keep_checkpoints=100, **BEST))
        same_run(whole, broken)


def test_a_run_whose_best_epoch_was_chosen_by_neighbours_is_judged_again(tmp_path):
    options = {"epochs": 1, "best_metric": "knn", "patience": 1, "eval_embeddings": "epoch"}
    figures = train(quick_config(tmp_path, **options), with_map=False)
    again, *_ = evaluate.FinishedRun(tmp_path, device="cpu").figures()
    assert again["knn"] == figures["knn"]


def test_patience_ends_the_last_stage(tmp_path):
    options = BEST | {"epochs": 30, "patience": 2, "lr": 1e-12, "min_lr": 0.0, "best_metric": "top1"}
    whole = tmp_path / "whole"
    figures = train(quick_config(whole, **options))
    # Nothing changes, so the first epoch is the best, and two more are waited for.
    assert figures["epochs"] == 3 == len(rows(whole)) and figures["best_epoch"] == 1
    assert figures["steps"] == 6
    two_stage = options | {"objective": "schane", "epochs": 8, "head_epochs": 5}
    figures = train(quick_config(tmp_path / "two", **two_stage))
    assert [row["stage"] for row in rows(tmp_path / "two")] == ["contrast"] * 3 + ["head"] * 3
    assert figures["best_epoch"] == 4


def test_patience_counts_evaluations_not_epochs(tmp_path):
    options = BEST | {"epochs": 30, "patience": 2, "lr": 1e-12, "min_lr": 0.0, "best_metric": "top1"}
    figures = train(quick_config(tmp_path, **options, eval_every=2))
    # The epochs 2, 4 and 6 are evaluated: the first of them is the best, and two more are waited for.
    assert figures["epochs"] == 6 and figures["best_epoch"] == 2


def test_options_of_a_loss_in_a_recipe_are_its_objectives(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("objective: clce\nweight: 0.7\ntemperature: 0.3\nlr: 1e-3\n")
    arguments = ["--config", str(recipe), "--objectives", "ce", "supcon", "clce"]
    asked = compare.parse([*arguments, "--set", "supcon.temperature=0.2"])
    found = {o: asked.config(o, 0, tmp_path) for o in asked.objectives}
    assert {o: (c.weight, c.temperature, c.lr) for o, c in found.items()} == {
        "ce": (0.9, None, 1e-3), "supcon": (0.9, 0.2, 1e-3), "clce": (0.7, 0.3, 1e-3),
    }  # fmt: skip


def test_compare_errors(capsys, tmp_path):
    for arguments, message in (
        (["--seeds", "1", "1"], "--seeds: each only once"),
        (
            ["--objectives", "ce", "clce", "--baseline", "schane"],
            "--baseline schane is none of --objectives ce clce",
        ),
        (["--eval-embeddings", "never"], "leaves nothing to compare"),
        (
            ["--temperature", "0.1"],
            "belongs to an objective, not to all of a comparison: give --set clce.temperature=0.1",
        ),
    ):
        assert compare.main([*arguments, "--output", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err
    for content in ("seeds: 3", "seeds: []", "objectives: clce"):
        (tmp_path / "recipe.yaml").write_text(content)
        assert compare.main(["--config", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path)]) == 2
        assert "must be a list of at least one" in capsys.readouterr().err


# Real models on a folder of images, from weights that timm saved


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beit_base_patch16_224", "beit3_base_patch16_224"])
def test_base_models_from_a_checkpoint_of_timm(tmp_path, name):
    folder = write_digit_images(tmp_path / "images", train=3, val=1, classes=2, size=64)
    saved = timm.create_model(name, num_classes=1000)
    torch.save(saved.state_dict(), tmp_path / "timm.pth")
    before = saved.blocks[3].mlp.fc1.weight.clone()
    config = TrainConfig.from_dict(
        {
            "data": str(folder), "model": name, "checkpoint": str(tmp_path / "timm.pth"),
            "objective": "clce", "opt": "sgd", "lr": 1e-4, "epochs": 2,
            "batch_size": 4, "micro_batch_size": 2, "images_per_class": 2,
            "layer_decay": 0.75, "keep_checkpoints": 1, "output": str(tmp_path / "run"), "progress": False,
            "tensorboard": False, "eval_embeddings": "never", "device": "cpu",
        }
    )  # fmt: skip
    figures = train(config)
    assert figures["steps"] == 2 and figures["classes"] == 2
    after = load_file(tmp_path / "run" / "model.safetensors")["blocks.3.mlp.fc1.weight"]
    assert 0 < (after - before).abs().max() < 1e-2  # started from timm's weights, and moved
    shutil.rmtree(tmp_path)


# Several processes


@pytest.mark.slow
def test_a_comparison_of_two_processes_is_that_of_one(tmp_path):
    """Of 7 and 8 images, which are a batch of 15: contrast and queue included."""
    options = QUICK | {"drop_path": 0.0, "eval_embeddings": "final", "batch_size": 15, "images_per_class": 3}
    for objective, own in (("ce", {}), ("clce", {"queue_size": 30})):
        output = {"objective": objective, "output": str(tmp_path / "one" / f"{objective}-seed0")}
        train(TrainConfig.from_dict(options | own | output))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(20000 + os.getpid() % 20000), "-m", "clce_ext.train.compare"]
    command += [*command_line(options), "--objectives", "ce", "clce", "--seeds", "0"]
    command += ["--set", "clce.queue_size=30", "--output", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1 and (tmp_path / "two" / "report.html").exists()
    for objective in ("ce", "clce"):
        one, two = (tmp_path / n / f"{objective}-seed0" for n in ("one", "two/runs"))
        for name in ("val_loss", "top1", "silhouette", "uniformity"):
            assert results(two)[name] == pytest.approx(results(one)[name], rel=1e-3, abs=1e-3)
        for a, b in zip(rows(one), rows(two), strict=True):
            assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-4)
