"""What a report shows and what it does not claim; predictions of a saved model."""

from __future__ import annotations

import csv
import html
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from clce_ext.train import plots, predict, report
from clce_ext.train.config import TrainConfig
from clce_ext.train.judge import Judge, Outputs
from clce_ext.train.loop import train
from clce_ext.train.processes import Processes
from clce_ext.train.results import RunRecord

from .training import QUICK, quick_config, write_digit_images


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train(quick_config(folder, hold_out_classes=["7", "8", "9"], batch_size=14, epochs=1))
    return folder


def test_what_is_kept_of_a_models_outputs():
    """Predictions, not logits; of the shares of several processes, in the order of the images."""
    logits, labels = torch.randn(11, 200, generator=torch.Generator().manual_seed(0)), torch.arange(11) % 3

    def outputs(rows):
        top = logits[rows].topk(5).indices
        shares = logits[rows].softmax(dim=1).gather(1, top)
        losses = F.cross_entropy(logits[rows], labels[rows], reduction="none")
        return Outputs(top, shares, losses, logits[rows, :4], labels[rows], rows)

    whole = outputs(torch.arange(11))
    joined = Outputs.join([outputs(torch.arange(rank, 11, 3)) for rank in range(3)])
    for ours, theirs in zip(joined, whole, strict=True):
        assert torch.equal(ours, theirs) and theirs[0].numel() <= 5
    figures = whole.classification(200)
    assert figures["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert figures["top1"] == (logits.argmax(dim=1) == labels).double().mean()
    by_class = whole.by_class([f"class {i}" for i in range(200)])
    assert [(row["class"], row["images"]) for row in by_class] == [
        ("class 0", 4),
        ("class 1", 4),
        ("class 2", 3),
    ]
    judge = Judge(TrainConfig(eval_images=6, seed=1), {}, Processes(torch.device("cpu")))
    part = judge.part(whole)
    assert len(part.rows) == 6 and torch.equal(part.labels, labels[part.rows])


def test_bold_is_only_who_is_ahead_of_chance():
    def table(gains):
        runs = {
            name: [RunRecord(name, s, {"top1": 0.5 + 0.1 * s + g}, []) for s, g in enumerate(of)]
            for name, of in gains.items()
        }
        return ["<b>" in row[1] for row in report._accuracies(runs)["accuracies"][1:]]

    assert table({"ce": [0, 0, 0], "clce": [0.03, -0.02, 0.01]}) == [False, False]
    assert table({"ce": [0, 0, 0], "clce": [0.03, 0.02, 0.03]}) == [False, True]
    assert table({"ce": [0], "clce": [0.03]}) == [False, False]
    # Of two comparisons each has to be surer: p is 0.029 here.
    ahead, same = {"clce": [0.02, 0.014, 0.026]}, [0, 0, 0]
    assert table({"ce": same} | ahead) == [False, True]
    assert table({"ce": same, "schane": same} | ahead) == [False] * 3


def test_time_per_epoch_is_shown_where_nothing_else_ran(tmp_path):
    def runs(*seconds):
        rows = [{"stage": "joint", "seconds": s} for s in seconds]
        return {"ce": [RunRecord("ce", 0, {"seconds_per_epoch": 1.0}, rows)]}

    def shown(*seconds):
        report.write_page(tmp_path / "page.html", **report._cost(runs(*seconds)))
        return (tmp_path / "page.html").read_text()

    assert "<td>1.00</td>" in shown(9.0, 2.0, 2.1, 2.2)
    for disturbed in ((9.0, 2.0, 3.0, 2.0), (9.0, 2.0)):
        assert "Time per epoch is not shown" in shown(*disturbed) and "<td>" not in shown(*disturbed)


def test_time_per_epoch_is_compared_on_one_machine_alone(tmp_path):
    def runs(of_clce=2.0, seeds=(2.0, 2.0), **machine):
        rows = {"ce": seeds, "clce": (of_clce, of_clce)}
        common = {"seconds_per_epoch": 1.0, "device": "cpu", "processes": 1}
        return {
            name: [
                RunRecord(
                    name,
                    s,
                    common | (machine if name == "clce" else {}),
                    [{"stage": "joint", "seconds": t}] * 4,
                )
                for s, t in enumerate(of)
            ]
            for name, of in rows.items()
        }

    assert report._cost(runs(of_clce=5.0))["cost"]
    for unlike, said in (
        (runs(processes=2), "not all runs had the same device"),
        (runs(device="NVIDIA H200"), "not all runs had the same device"),
        (runs(seeds=(2.0, 2.5)), "unlike times"),
    ):
        report.write_page(tmp_path / "page.html", **report._cost(unlike))
        page = (tmp_path / "page.html").read_text()
        assert said in page and "<td>" not in page


def test_a_comparison_says_what_is_shared_and_which_versions_made_it(tmp_path):
    configs = {
        "ce": TrainConfig(objective="ce", lr=1e-3),
        "clce": TrainConfig(objective="clce", lr=3e-3, weight=0.7),
    }
    results = {"top1": 0.5, "knn": 0.5, "epochs": 1, "train_images": 9, "images": 4, "split": "val"}
    runs = {name: [RunRecord(name, 0, results | {"torch": "1.0"}, [])] for name in configs}
    own = report.own_values(configs, {"clce": {"lr": 3e-3, "weight": 0.7}})
    report.write_comparison_report(tmp_path / "page.html", configs["ce"], runs, ["a", "b"], "ce", [], own)
    page = (tmp_path / "page.html").read_text()
    assert "\n# ce lr 0.001\n# clce weight 0.7, lr 0.003\n" in page and "\n# torch 1.0\n" in page
    assert re.search("^epochs: 20$", page, re.M)
    assert not re.search(r"^(lr|weight|temperature|beta|queue_size|seed|objective|output):", page, re.M)


def test_names_on_a_map_do_not_cover_each_other(monkeypatch):
    """Whatever they are: as text of the page, none is a formula, and none is hidden."""
    axes = []
    monkeypatch.setattr(plots, "_svg", lambda of, *rest, svg=plots._svg: (axes.append(of), svg(of, *rest))[1])
    generator = np.random.default_rng(0)
    points, labels = generator.normal(size=(240, 2)), np.arange(240) % 12
    names = [f"{'a rather long class ' * (i % 2)}{i}" for i in range(9)] + ["$5^$10^", "_private", "<b>&"]
    picture = plots.embedding_map(points, labels, names, "a < b")
    assert all(html.escape(name, quote=False) in picture for name in names) and "<b>" not in picture
    figure = axes[0].figure
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in figure.legends[0].get_texts()]
    boxes.append(axes[0].get_window_extent())
    assert len(boxes) == 13 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_names_in_any_script_are_drawn_without_complaints(recwarn):
    assert "\u8863\u670d" in plots._svg(plots._axes("\u8863\u670d"))
    assert not recwarn.list


def test_a_stage_of_one_epoch_has_a_dot_in_the_learning_curves(monkeypatch):
    axes = []
    monkeypatch.setattr(plots, "_svg", lambda of, *rest: axes.append(of))
    for epochs in (1, 2):
        plots.learning_curves({"supcon": [np.array([np.nan, *np.ones(epochs)])]}, "Top-1")
    assert [of.lines[-1].get_marker() for of in axes] == ["o", "None"]
    assert all(tick == round(tick) for of in axes for tick in of.get_xticks())  # there is no epoch 1.025


def test_every_class_and_what_it_is_taken_for():
    counts = np.array([[3, 0, 1], [0, 4, 0], [2, 0, 5]])
    labels, said = (np.repeat(np.indices((3, 3))[axis].ravel(), counts.ravel()) for axis in (0, 1))
    top, zeros = torch.from_numpy(said)[:, None], torch.zeros(len(labels), 1)
    val = Outputs(top, zeros, zeros, zeros, torch.from_numpy(labels), torch.arange(len(labels)))
    classes = ["a", "$5^$10^", "<c>"]
    shown = report._classes(val, classes)
    assert [row[0] for row in shown["classes"][1:]] == ["<c>", "a", "$5^$10^"]
    picture = shown["confusion"]
    drawn = re.findall(r"<text[^>]*>([^<]*)</text>", picture)
    assert [text for text in drawn if text.isdigit()] == ["3", "1", "4", "2", "5"]
    assert drawn.count("$5^$10^") == drawn.count("&lt;c&gt;") == 2
    assert "confusion" not in report._classes(
        val, [*classes, *map(str, range(18))]
    )  # of many it is no picture


def test_photographs_and_names_of_classes_in_a_report(tmp_path):
    """Mistakes and hardest negatives are pictures; a class's name is text, whatever it holds."""
    folder = write_digit_images(tmp_path / "data", train=4, val=3, classes=3, size=32)
    for split in ("train", "val"):
        (folder / split / "digit_1").rename(folder / split / "<script>1")
    options = QUICK | {"shots": None, "batch_size": 6, "data": str(folder), "eval_embeddings": "final"}
    train(TrainConfig.from_dict(options | {"epochs": 1, "output": str(tmp_path / "run"), "image_size": 32}))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Hardest negatives" in page and page.count("data:image/jpeg;base64,") >= 2
    assert "&lt;script&gt;1" in page and "<script" not in page


def test_prediction(finished, tmp_path, capsys):
    """From the saved file alone, moved elsewhere: the run's own predictions for its own images."""
    saved = shutil.copy(finished / "model.safetensors", tmp_path / "moved.safetensors")
    folder = write_digit_images(tmp_path / "new", train=3, val=0, classes=2, size=32) / "train"
    single = next((folder / "digit_0").iterdir())
    arguments = ["--checkpoint", str(saved), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert predict.main([*arguments, str(folder), str(single)]) == 0
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["image"]).parent.name for row in rows] == ["digit_0"] * 3 + ["digit_1"] * 3 + ["digit_0"]
    model, classes, _ = predict.load_saved(finished)
    image = Image.open(single).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    shares = model.backbone((pixels - 0.5) / 0.5).softmax(dim=1)[0]
    assert rows[-1]["class_1"] == classes[shares.argmax()]
    assert float(rows[-1]["probability_1"]) == pytest.approx(shares.max().item(), abs=1e-3)
    assert (tmp_path / "out" / "contact-sheet.html").read_text().count("<img") == 7
    for wrong, message in (
        ([str(single), "--max-image-pixels", "63"], "pixels are more than --max-image-pixels 63"),
        ([str(tmp_path / "none.png")], "none.png: no such file or folder"),
        ([str(finished / "checkpoints")], "no images in this folder"),
    ):
        assert predict.main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err
    # One broken file among others does not cost the others their classes.
    broken = folder / "digit_0" / "broken.png"
    broken.write_bytes(single.read_bytes()[:60])
    assert predict.main([*arguments, "--workers", "1", str(folder)]) == 0
    assert f"warning: cannot read image {broken} (" in capsys.readouterr().err
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        again = {row["image"]: row for row in csv.DictReader(file)}
    assert again[str(broken)]["class_1"] == "" and len(again) == 7
    assert again[str(single)]["class_1"] == rows[-1]["class_1"]
    assert (tmp_path / "out" / "contact-sheet.html").read_text().count("<img") == 6
    assert predict.main([*arguments[:2], "--output", str(single), str(single)]) == 2
    assert "File exists" in capsys.readouterr().err
    torch.save(model.backbone.state_dict(), tmp_path / "plain.pth")
    assert predict.main(["--checkpoint", str(tmp_path / "plain.pth"), str(single)]) == 2
    assert "does not say its arguments, classes, input, model" in capsys.readouterr().err
