"""What a step computes, costs and leaves: passes of the model, waiting, odd losses, memory of images."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import save_for_hf
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from clce_ext.train import checkpoint, loop, models
from clce_ext.train.cli import main
from clce_ext.train.config import TrainConfig
from clce_ext.train.data import evaluation_loader, in_memory, load_data, loaders, training_loader
from clce_ext.train.data.images import Images, Source
from clce_ext.train.errors import TrainingError, UnreadableImageError
from clce_ext.train.judge import Judge, Outputs, run_model
from clce_ext.train.loop import train
from clce_ext.train.objectives import OBJECTIVES
from clce_ext.train.processes import Processes
from clce_ext.train.run_folder import run_id
from clce_ext.train.stages import stages
from clce_ext.train.trainer import RunningLosses, Trainer

from .ranks import World
from .training import QUICK, command_line, quick_config, rows, write_digit_images

ROOT = Path(__file__).resolve().parent.parent


def make_trainer(stage: int = 0, rank: int = 0, world_size: int = 1, **options) -> Trainer:
    """Of a stage of a quick run, at the start of its first epoch."""
    config = quick_config(Path("nowhere"), **options)
    torch.manual_seed(0)
    data = load_data(config)
    projection = OBJECTIVES[config.objective].projection
    model = models.create_model(config, len(data.classes), projection)
    group = Processes(torch.device("cpu"), rank, world_size)
    trainer = Trainer(stages(config, world_size)[stage], model, data, config, group)
    trainer.start_epoch(0, 0)
    return trainer


# Passes


@pytest.mark.parametrize(
    "objective, stage, passes", [("ce", 0, 1), ("clce", 0, 2), ("supcon", 0, 2), ("supcon", 1, 1)]
)
def test_only_contrast_pays_for_gradient_caching(objective, stage, passes, monkeypatch):
    """Cross-entropy is a mean over images: micro-batches add up to it. A frozen backbone runs once."""
    seen = []
    embed = models.FineTuner.embed

    def counted(self, images):
        seen.append(len(images))
        return embed(self, images)

    trainer = make_trainer(stage, objective=objective, micro_batch_size=6)
    monkeypatch.setattr(models.FineTuner, "embed", counted)
    trainer.gradients(0)
    assert sum(seen) == 20 * passes * trainer.stage.views and max(seen) == 6 * trainer.stage.views


def test_the_warm_up_of_a_stage_ends_before_the_stage(monkeypatch):
    options = {"objective": "supcon", "epochs": 8, "head_epochs": 2, "warmup_epochs": 5.0}
    for stage in (0, 1):
        trainer = make_trainer(stage, **options)
        rates = []
        for step in range(trainer.stage.epochs * trainer.sampler.steps):
            trainer.scheduler.step_update(step)
            rates.append(trainer.learning_rate)
        assert max(rates) > 0.4 * trainer.stage.lr and rates[0] < 0.01 * trainer.stage.lr
        assert rates.index(max(rates)) <= len(rates) / 2 and rates[-1] < max(rates)


def test_the_decay_of_averaged_weights_is_the_one_given():
    trainer = make_trainer(objective="ce", ema=0.75, opt="sgd")
    before, weight = None, trainer.model.backbone.head.weight
    for step in range(2):
        before = trainer.averaged.module.backbone.head.weight.clone()
        trainer.gradients(step)
        trainer.update()
    after = trainer.averaged.module.backbone.head.weight
    assert torch.allclose(after, 0.75 * before + 0.25 * weight, atol=1e-7)
    assert not torch.allclose(after, weight, atol=1e-7)


def test_learning_rates_scale_with_the_batch():
    for opt, rate in (("adamw", 1e-3 * (1024 / 256) ** 0.5), ("sgd", 1e-3 * 1024 / 256)):
        config = TrainConfig(opt=opt, lr_base=1e-3, batch_size=1024)
        assert stages(config)[0].lr == pytest.approx(rate) == pytest.approx(config.resolved_head_lr)
    assert stages(TrainConfig())[0].lr == 5e-4


def test_a_queue_holds_embeddings_of_steps_before():
    losses = {}
    for size in (None, 30):
        trainer = make_trainer(objective="clce", queue_size=size, drop_path=0.0, lr=1e-12)
        losses[size] = [float(trainer.gradients(step)["contrast"]) for step in range(2)]
    assert len(trainer.criterion.queue) == 30 and trainer.criterion.queue.embeddings.shape == (30, 96)
    assert losses[None][0] == losses[30][0] and abs(losses[None][1] - losses[30][1]) > 1e-3


# Waiting and losses that are not finite


class Reads(TorchDispatchMode):
    """Counts how often the host asks for a tensor's values, for which it would wait for a GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.count += "_local_scalar_dense" in name or "nonzero" in name
        return function(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """The same of methods that on the CPU are no operations."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "ce", "clip_grad": 1.0},
        {"objective": "clce", "clip_grad": 1.0, "micro_batch_size": 6, "queue_size": 30},
        {"objective": "clce", "amp": "float16"},
        {"objective": "ce", "amp": "float16", "opt": "adamw", "clip_grad": 1.0},
    ],
)
def test_a_step_reads_nothing_back(options):
    """But for what is read anyway on the CPU alone, such as an unfused Adam's count of steps."""
    trainer = make_trainer(**{"opt": "sgd", "ema": 0.9} | options)
    losses = RunningLosses(Processes(torch.device("cpu")))
    with Reads() as reads, Lists() as lists:
        for step in range(2):
            losses.add(trainer.gradients(step), 20, step)
            trainer.update()
        assert reads.count == lists.count == 0
        last, odd = losses.read()
        assert odd is None and set(last) == set(losses.sums) and lists.count == 1
        trainer.scaler.get_scale()
        assert reads.count == trainer.scaler.is_enabled()


@pytest.mark.parametrize("opt", ["adamw", "lamb"])
def test_gradients_of_float16_that_overflow_move_nothing(opt):
    """Whether the optimizer itself looks at them, as torch's fused ones do, or the host."""
    trainer = make_trainer(objective="ce", amp="float16", opt=opt)
    before, scale = copy.deepcopy(trainer.model.state_dict()), trainer.scaler.get_scale()
    trainer.gradients(0)
    trainer.model.backbone.head.weight.grad[0, 0] = float("inf")
    trainer.update()
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trainer.scaler.get_scale() == scale / 2
    trainer.gradients(1)
    trainer.update()
    assert not torch.equal(before["backbone.head.weight"], trainer.model.backbone.head.weight)


@pytest.mark.parametrize("opt", ["adamw", "sgd"])
def test_checkpoints_of_optimizers_that_were_not_fused_are_gone_on_with(opt, monkeypatch):
    options = {"objective": "ce", "amp": "float16", "opt": opt}
    with monkeypatch.context() as patch:
        patch.setattr("clce_ext.train.trainer._FUSED", ())
        before = make_trainer(**options)
    fused = make_trainer(**options)
    assert not before.optimizer.param_groups[0]["fused"] and fused.optimizer.param_groups[0]["fused"]
    before.gradients(0)
    before.update()
    fused.restore(copy.deepcopy(before.state()))
    fused.model.load_state_dict(before.model.state_dict())
    for trainer in (before, fused):
        torch.manual_seed(1)  # of dropout
        trainer.start_epoch(0, 1)
        trainer.gradients(1)
        trainer.update()
    for one, other in zip(before.model.parameters(), fused.model.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_losses_that_nobody_looked_at():
    losses = RunningLosses(Processes(torch.device("cpu")))
    for step, value in enumerate((1.0, 2.0, float("inf"), 3.0, float("nan"))):
        losses.add({"loss": torch.tensor(value), "ce": torch.tensor(0.5)}, 10, step)
    assert losses.read()[1] == (2, {"loss": float("inf"), "ce": 0.5})
    losses = RunningLosses(Processes(torch.device("cpu")), {"loss": [30.0, 20.0]})
    losses.add({"loss": torch.tensor(2.0)}, 10, 0)
    assert losses.read() == ({"loss": 2.0}, None) and losses.sums == {"loss": [50.0, 30.0]}
    assert losses.means() == {"loss": 50 / 30}


def test_weights_of_a_loss_that_is_not_finite_are_never_saved(tmp_path, monkeypatch):
    """Where the losses of a GPU are looked at now and then, it is before every checkpoint."""
    monkeypatch.setitem(loop._CHECK_EVERY, "cpu", 1000)
    options = {"objective": "ce", "lr": 1e30, "epochs": 5, "sched": "constant", "shots": 12}
    messages = []
    for name, every in (("each", 1), ("late", 2)):
        with pytest.raises(TrainingError, match=r"the loss is not finite .*step \d+, at") as error:
            train(quick_config(tmp_path / name, checkpoint_steps=every, keep_checkpoints=100, **options))
        messages.append(str(error.value).split(", at")[0])
        for folder in (tmp_path / name).glob("checkpoints/*"):
            weights = loop.checkpoint.load_checkpoint(folder)[0]
            step = int(folder.name[5:])
            assert step <= int(messages[0].split("step ")[1]), "saved after the loss was not finite"
            assert weights
    assert messages[0] == messages[1]


def test_weights_that_diverged_are_neither_judged_nor_saved(tmp_path, monkeypatch):
    """Of a finite loss the gradient may be infinite, or the next weights so large that all outputs are."""
    options = {"objective": "ce", "opt": "sgd", "epochs": 1, "sched": "constant", "eval_embeddings": "final"}
    with pytest.raises(TrainingError, match="outputs for 600 of 600 images are not finite: its weights have"):
        train(quick_config(tmp_path / "large", lr=1e38, shots=2, **options))  # one step
    update = Trainer.update

    def overflowing(self):
        update(self)
        self.model.backbone.head.bias.data[0] = float("inf")

    monkeypatch.setattr(Trainer, "update", overflowing)
    for name, other in (("epoch", {"shots": 2, "eval_every": 9}), ("early", {"checkpoint_steps": 1})):
        with pytest.raises(TrainingError, match=r"update left weights that are not finite .* step 0, at"):
            train(quick_config(tmp_path / name, **options | other))
    assert not list(tmp_path.glob("*/checkpoints/*"))


def one_rank_fails(folder: str, options: dict) -> str:
    rank = torch.distributed.get_rank()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    gradients = Trainer.gradients

    def poisoned(self, step):
        losses = gradients(self, step)
        return {name: value * float("nan") for name, value in losses.items()} if rank and step else losses

    Trainer.gradients = poisoned
    try:
        train(TrainConfig.from_dict(options | {"output": folder}))
    except TrainingError as error:
        return str(error)
    return "went on"


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_stops_all(tmp_path):
    world = World(2, tmp_path / "store")
    try:
        answers = world.run(one_rank_fails, {r: (str(tmp_path / "run"), QUICK) for r in range(2)})
        assert answers[0] == answers[1] and "the loss is not finite (loss nan" in answers[0]
        assert "step 1, at" in answers[0]
    finally:
        world.close()


def test_micro_batches_weigh_unequal_shares_alike(monkeypatch):
    """A loss that does not span processes counts by their images, with gradient caching too."""
    monkeypatch.setattr("clce_ext.train.trainer._wrapped", lambda model, *_: model)
    options = {"world_size": 2, "distributed_loss": "none", "batch_size": 7, "images_per_class": None}
    for rank, share in ((0, 3), (1, 4)):
        found = []
        for micro_batch in (None, 2):
            trainer = make_trainer(rank=rank, micro_batch_size=micro_batch, drop_path=0.0, **options)
            assert trainer.sampler.share == share and (trainer.grad_cache is None) == (micro_batch is None)
            losses = trainer.gradients(0)
            gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            found.append((losses["loss"], torch.cat([g.flatten() for g in gradients])))
        (loss, gradient), (other_loss, other) = found
        assert torch.allclose(loss, other_loss) and torch.allclose(gradient, other, rtol=1e-3, atol=1e-5)


# Resuming and doing nothing


def test_every_process_gets_its_own_queue_back(monkeypatch):
    """Where the loss does not span them, the processes' queues hold different images."""
    monkeypatch.setattr("clce_ext.train.trainer._wrapped", lambda model, *_: model)
    options = {"world_size": 2, "distributed_loss": "none", "queue_size": 30}
    trainers = [make_trainer(rank=rank, **options) for rank in range(2)]
    for trainer in trainers:
        trainer.gradients(0)
        trainer.update()
    queues = [trainer.criterion.queue for trainer in trainers]
    assert not torch.equal(queues[0].embeddings, queues[1].embeddings)
    every = [trainer.criterion.state_dict() for trainer in trainers]
    monkeypatch.setattr(Processes, "gather", lambda *_: every)
    state = trainers[0].state()
    for rank in range(2):
        resumed = make_trainer(rank=rank, **options)
        resumed.restore(state)
        assert torch.equal(resumed.criterion.queue.embeddings, queues[rank].embeddings)


def test_what_is_downloaded_is_opened_once_by_each_process(monkeypatch):
    """First by the main process, which fetches it."""
    calls = []
    monkeypatch.setattr(loop, "load_data", lambda config: calls.append("load"))
    for download, rank, wanted in (
        (True, 0, ["load", "wait"]),
        (True, 1, ["wait", "load"]),
        (False, 1, ["load"]),
    ):
        group = SimpleNamespace(is_main=rank == 0, from_main=lambda value: calls.append("wait"))
        run = SimpleNamespace(config=quick_config(Path("nowhere"), download=download), group=group)
        loop._Run._load_data(run)
        assert calls == wanted
        calls.clear()


def test_resuming_refuses_changed_data(tmp_path):
    folder = write_digit_images(tmp_path / "images", train=6, val=3, classes=3, size=32)
    options = {"data": str(folder), "shots": None, "batch_size": 6, "images_per_class": 2}
    train(quick_config(tmp_path / "run", **options))
    (tmp_path / "run" / "results.json").unlink()
    some = next((folder / "train" / "digit_1").iterdir())
    shutil.copy(some, some.with_name("another.png"))
    with pytest.raises(
        TrainingError, match=r"--resume: .* other data than .*: train was 18 images, .* is 19 images"
    ):
        train(quick_config(tmp_path / "run", resume=True, **options))
    some.with_name("another.png").unlink()
    assert train(quick_config(tmp_path / "run", resume=True, **options))["steps"] == 6


def test_resuming_refuses_another_number_of_processes(tmp_path, monkeypatch):
    train(quick_config(tmp_path))
    (tmp_path / "results.json").unlink()

    def of_two(folder, load=loop.checkpoint.load_checkpoint):
        weights, state = load(folder)
        return weights, state | {"world_size": 2}

    monkeypatch.setattr(loop.checkpoint, "load_checkpoint", of_two)
    with pytest.raises(TrainingError, match=r"written by 2 process\(es\); resume with as many, not 1"):
        train(quick_config(tmp_path, resume=True))


def test_results_name_every_version_that_a_run_was_made_by(tmp_path, monkeypatch):
    made = loop.versions() | {"code": "0+a"}
    monkeypatch.setattr(loop, "versions", lambda: made)
    train(quick_config(tmp_path))
    shutil.rmtree(sorted(tmp_path.glob("checkpoints/*"))[-1])
    (tmp_path / "results.json").unlink()
    now = made | {"code": "0+b"}
    monkeypatch.setattr(loop, "versions", lambda: now)
    assert train(quick_config(tmp_path, resume=True)).items() >= (now | {"code": "0+a, then 0+b"}).items()
    assert train(quick_config(tmp_path, overwrite=True)).items() >= now.items()


def test_results_of_a_run_that_began_before_versions_were_kept_say_so(tmp_path):
    train(quick_config(tmp_path))
    last = sorted(tmp_path.glob("checkpoints/*"))[-1]
    weights, state = checkpoint.load_checkpoint(last)
    state["run"].pop("versions")
    (tmp_path / "results.json").unlink()
    run = run_id(quick_config(tmp_path))
    checkpoint.save_checkpoint(tmp_path, state["run"]["step"], weights, state, 2, run)
    results = train(quick_config(tmp_path, resume=True))
    assert {k: results[k] for k in loop.versions()} == {
        k: f"unknown, then {v}" for k, v in loop.versions().items()
    }


def test_the_time_of_an_epoch_holds_the_start_of_its_loader(tmp_path, monkeypatch):
    def slow(self, *position, start=Trainer.start_epoch):
        time.sleep(0.5)
        start(self, *position)

    monkeypatch.setattr(Trainer, "start_epoch", slow)
    assert train(quick_config(tmp_path, epochs=1))["seconds"] >= 0.5


def test_no_epochs(tmp_path):
    """The given weights are judged as they are."""
    torch.manual_seed(0)
    weights = tmp_path / "weights.pth"
    torch.save(models.timm.create_model("beit_tiny_digits").state_dict(), weights)
    for objective in ("ce", "supcon"):
        options = {
            "epochs": 0,
            "checkpoint": str(weights),
            "eval_embeddings": "final",
            "objective": objective,
        }
        figures = train(quick_config(tmp_path / objective, **options))
        assert figures["steps"] == figures["epochs"] == 0 and rows(tmp_path / objective) == []
        for name in ("knn", "centroid", "probe"):
            assert figures[name] == figures["untouched"][name]
        assert (tmp_path / objective / "report.html").exists()
        assert (tmp_path / objective / "model.safetensors").exists()


def test_no_epochs_leave_nothing_to_choose_from(tmp_path):
    figures = train(quick_config(tmp_path, epochs=0, best_metric="top1"), with_map=False)
    assert figures["epochs"] == 0 and "top1" in figures and "best_epoch" not in figures


def test_fewer_images_to_judge_than_processes():
    trainer = make_trainer(eval_embeddings="final")
    model, images = trainer.model, load_data(trainer.config).val.take(slice(2))
    given = model.input
    judges = [
        Judge(trainer.config, given, Processes(torch.device("cpu"), rank, world_size))
        for rank, world_size in [(0, 1), (0, 3), (1, 3), (2, 3)]
    ]
    shards = []
    for judge in judges[1:]:
        shard = run_model(model, judge._loaded(images), judge.group.device)
        shards.append(shard._replace(rows=shard.rows * 3 + judge.group.rank))
    whole, joined = judges[0].outputs(model, images), Outputs.join(shards)
    assert torch.equal(joined.labels, whole.labels) and torch.equal(joined.rows, whole.rows)
    assert torch.allclose(joined.embeddings, whole.embeddings, atol=1e-5)


def test_what_leaves_a_process_of_its_training_images():
    """To judge embeddings: the nearest, sums, and the images that a probe is fitted to."""
    trainer = make_trainer(eval_embeddings="final", eval_images=12)
    model, data = trainer.model, load_data(trainer.config)
    given, val = model.input, data.val.take(slice(10))
    alone = Judge(trainer.config, given, Processes(torch.device("cpu")))
    test = alone.outputs(model, val)
    wanted = alone.frozen(model, data.train, test)
    sent, barrier = {}, threading.Barrier(2)

    class Thread(Processes):
        def gather(self, value):
            sent.setdefault(self.rank, []).append(value)
            barrier.wait()
            values = [sent[rank][-1] for rank in range(2)]
            barrier.wait()
            return values

    judges = [Judge(trainer.config, given, Thread(torch.device("cpu"), rank, 2)) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        arguments = (judges, [copy.deepcopy(model) for _ in judges])
        found = list(pool.map(lambda judge, own: judge.frozen(own, data.train, test), *arguments))
    for name, correct in wanted.items():
        assert torch.equal(found[0][name], correct) and torch.equal(found[1][name], correct)
    for (cosines, labels), (classes, sums), fitted in sent.values():
        assert cosines.shape == labels.shape == (10, 20) and sums.shape == (len(classes), 96 + 1)
        assert 0 < len(fitted.rows) < 12
    assert len(data.train) == 40 and sum(len(value[-1].rows) for value in sent.values()) == 12


def test_a_plan_prints_and_stops(tmp_path, capsys):
    options = QUICK | {
        "objective": "supcon",
        "epochs": 8,
        "warmup_epochs": 5,
        "micro_batch_size": 8,
        "workers": 2,
    }
    assert main([*command_line(options), "--plan", "--output", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    for text in (
        "40: 10 classes, 4 of each class", "20 images: 2 of each of 10 classes", "in micro-batches of 8",
        "steps per epoch  2", "stage contrast   6 epochs, 12 steps, 2 view(s); learning rate 0.001",
        "stage head       2 epochs, 4 steps, 1 view(s)", "after 2 steps of warm-up",
        "2 workers prepare ahead",
    ):  # fmt: skip
        assert text in printed
    assert not (tmp_path / "run").exists()
    assert main([*command_line(QUICK | {"batch_size": 80}), "--plan"]) == 2
    assert "--batch-size 80 exceeds the 40 training images" in capsys.readouterr().err
    assert main([*command_line(QUICK | {"model": "resnet_50"}), "--plan"]) == 2
    assert "--model resnet_50: timm has no such model; near it: resnet" in capsys.readouterr().err


def test_a_plan_of_a_model_elsewhere(tmp_path, capsys):
    save_for_hf(models.timm.create_model("resnet10t"), tmp_path, model_config={"num_classes": 1000})
    options = {"model": f"local-dir:{tmp_path}", "batch_norm": "train"}
    assert main([*command_line(QUICK | options), "--plan"]) == 0
    size = models.timm.get_pretrained_cfg("resnet10t").input_size[-1]
    assert f"on the device {20 * 3 * size**2 / 1e9:.2g} GB" in capsys.readouterr().out


# Images


def source(count: int, size: tuple[int, int], calls: list[int] | None = None) -> Images:
    class Colours(list):
        def __getitem__(self, i: int) -> Image.Image:
            if calls is not None:
                calls.append(i)
            return Image.new("RGB", size, (i % 256, 0, 0))

    labels = np.arange(count) % 2
    return Images(Source(Colours(), labels, "colours"), np.arange(count), labels)


INPUT = {
    "input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "interpolation": "bilinear",
    "crop_pct": 1.0,
}  # fmt: skip


def test_a_small_training_set_is_decoded_once(monkeypatch):
    calls: list[int] = []
    images = in_memory(source(12, (40, 40), calls))
    loader, sampler = training_loader(images, quick_config(Path("nowhere"), batch_size=4), INPUT, 2, 0, 1)
    decoded = len(calls)
    for epoch in range(2):
        sampler.set_position(epoch)
        list(loader)
    assert len(calls) == decoded and set(calls) == set(range(12))
    monkeypatch.setattr(loaders, "KEPT_BYTES", 12 * 40 * 40 * 3 - 1)
    large = source(12, (40, 40))
    assert in_memory(large) is large
    broken = source(3, (8, 8))
    broken.source.items = [None] * 3
    with pytest.raises(UnreadableImageError, match="cannot read image"):
        in_memory(broken)


def test_pixels_are_normalised_by_the_model():
    config = quick_config(Path("nowhere"))
    model = models.create_model(config, 10, False).eval()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    given = model.input
    mean, std = (torch.tensor(given[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        assert torch.allclose(model(pixels)[0], model((pixels / 255 - mean) / std)[0], atol=1e-5)
    assert "mean" not in model.state_dict()


def test_erasing_fills_with_noise_around_the_mean():
    options = {
        "batch_size": 2,
        "images_per_class": None,
        "random_erasing": 1.0,
        "color_jitter": 0,
        "hflip": 0,
    }
    images = source(2, (32, 32))
    loader, _ = training_loader(images, quick_config(Path("nowhere"), **options), INPUT, 1, 0, 1)
    ((found, _),) = loader
    assert found.dtype == torch.uint8
    blue = found[:, 0, 2].flatten().float()
    noise = blue[blue > 0]
    assert 0 < len(noise) < len(blue)
    assert abs(noise.mean() - 0.6 * 255) < 15 and 45 < noise.std() < 75  # 0.25 * 255 is 64, cut at 0 and 255


@pytest.mark.parametrize("mode, seen", [("center", 0), ("squash", 32 * 8), ("border", 16 * 8)])
def test_the_crop_of_evaluation_is_the_models(mode, seen):
    """A wide image, white at its left quarter: what is left of that quarter in 32 x 32 pixels."""
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, :16] = 255
    images = Images(Source([picture], np.zeros(1, int), "one"), np.zeros(1, int), np.zeros(1, int))
    config = quick_config(Path("nowhere"))
    ((found, _),) = evaluation_loader(images, config, INPUT | {"crop_mode": mode, "mean": (0, 0, 0)})
    white = int((found[0, 0] > 127).sum())
    assert white == pytest.approx(seen, abs=40) and (white == 0) == (seen == 0)


@pytest.mark.slow
def test_host_memory_of_large_batches():
    """4,096 images of 224 pixels, 8 workers: all processes together, interpreter and libraries included."""
    code = """
import threading, time
import numpy as np, psutil, torch
from PIL import Image
from clce_ext.train import models
from clce_ext.train.config import TrainConfig
from clce_ext.train.data import Data, training_loader
from clce_ext.train.data.images import Images, Source
from clce_ext.train.processes import Processes
from clce_ext.train.stages import stages
from clce_ext.train.trainer import Trainer

picture = Image.new("RGB", (224, 224))
labels = np.arange(8192) % 16
images = Images(Source([picture] * 8192, labels, "black"), np.arange(8192), labels)
config = TrainConfig(data="DIR", model="test_resnet", image_size=224, batch_size=4096, workers=8,
    augment=False, micro_batch_size=64, tensorboard=False, device="cpu")
model = models.create_model(config, 16, False)
data = Data(images, images, None, [str(i) for i in range(16)], "val")
trainer = Trainer(stages(config)[0], model, data, config,
    Processes(torch.device("cpu")))
peak, done = 0, threading.Event()

def watch():
    global peak
    me = psutil.Process()
    while not done.wait(0.2):
        total = 0
        for process in (me, *me.children(recursive=True)):
            try:
                total += process.memory_full_info().pss
            except psutil.NoSuchProcess:
                pass
        peak = max(peak, total)

thread = threading.Thread(target=watch)
thread.start()
trainer.start_epoch(0, 0)
batch, labels, _ = trainer._batch()
assert batch.shape == (4096, 3, 224, 224) and batch.dtype == torch.uint8
time.sleep(1)  # the workers go on preparing the next one
done.set()
thread.join()
print(peak / 1e9)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(f"host memory: {float(done.stdout):.2f} GB")
    assert 0.6 < float(done.stdout) < 2.0
