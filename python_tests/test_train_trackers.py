"""Weights & Biases and MLflow, as their own packages read what was logged: a run that was killed goes on in
the same run, each epoch is there once, and a run ends as the training did."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clce_ext.train.compare import main as compare
from clce_ext.train.config import TrainConfig
from clce_ext.train.errors import TrainingError
from clce_ext.train.loop import train
from clce_ext.train.records import Records

from .training import QUICK, command_line, quick_config, results

ROWS = [{"stage": "joint", "epoch": i, "step": 4 * (i + 1), "loss": 1.5 - i} for i in range(3)]
# Two epochs are logged; the checkpoint that is gone on from knows of one.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from clce_ext.train.config import TrainConfig
from clce_ext.train.records import Records
folder, tracker, rows = sys.argv[1:]
records = Records(Path(folder), TrainConfig(tracker=tracker, tensorboard=False, lr=1e-3))
for count in (1, 2):
    records.write(json.loads(rows)[:count])
os.kill(os.getpid(), signal.SIGKILL)
"""


def log_and_be_killed(folder: Path, tracker: str) -> None:
    folder.mkdir()
    command = [sys.executable, "-c", KILLED, str(folder), tracker, json.dumps(ROWS)]
    # With a helper process of its own, as a command has that is killed, not that of these tests.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL


def tracked(folder: Path, tracker: str, rows=(), **options) -> Records:
    return Records(folder, TrainConfig(tracker=tracker, tensorboard=False, **options), rows)


def go_on(folder: Path, tracker: str, **options) -> None:
    with tracked(folder, tracker, ROWS[:1], **options) as records:
        records.write(ROWS[:2])
        records.write(ROWS)
        records.finish({"top1": 0.75, "recall@1": 0.5, "images": 9, "split": "val"}, ROWS[-1]["step"])


# MLflow


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """The package, with a store of its own; client.history(folder) is what it holds of a run's losses."""
    package = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # which needs nothing more; databases do
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/store")
    package.set_tracking_uri(f"file://{tmp_path}/store")
    yield package
    assert package.active_run() is None
    package.set_tracking_uri(None)


def mlflow_run(mlflow, folder: Path):
    return mlflow.MlflowClient().get_run((folder / "mlflow-run.txt").read_text())


def mlflow_steps(mlflow, folder: Path) -> list[tuple[int, float]]:
    run_id = mlflow_run(mlflow, folder).info.run_id
    return [(point.step, point.value) for point in mlflow.MlflowClient().get_metric_history(run_id, "loss")]


def test_mlflow_goes_on_where_it_was_killed(mlflow, tmp_path):
    folder = tmp_path / "birds"
    log_and_be_killed(folder, "mlflow")
    killed = mlflow_run(mlflow, folder)
    assert killed.info.status == "RUNNING" and killed.info.run_name == "birds"
    assert killed.data.params == killed.data.params | {"lr": "0.001", "resume": "False"}
    assert mlflow_steps(mlflow, folder) == [(4, 1.5), (8, 0.5)]
    go_on(folder, "mlflow", lr=1e-3, resume=True)
    assert mlflow_steps(mlflow, folder) == [(4, 1.5), (8, 0.5), (12, -0.5)]
    ended = mlflow_run(mlflow, folder)
    assert (ended.info.run_id, ended.info.status) == (killed.info.run_id, "FINISHED")
    assert ended.data.metrics == {"epoch": 2, "loss": -0.5, "final/top1": 0.75, "final/recall_at_1": 0.5}


def test_a_tracker_that_comes_late_is_told_of_the_epochs_before(mlflow, tmp_path):
    with tracked(tmp_path, "mlflow", ROWS[:2]):
        pass
    assert mlflow_steps(mlflow, tmp_path) == [(4, 1.5), (8, 0.5)]


def test_mlflow_runs_end_as_the_training_does(mlflow, tmp_path):
    """Of a training that finishes, one that fails, one that is started over, and a comparison's."""
    done = quick_config(tmp_path / "done", tracker="mlflow", eval_embeddings="final")
    train(done, with_map=False)
    run = mlflow_run(mlflow, tmp_path / "done")
    assert run.info.status == "FINISHED" and run.data.params["objective"] == "clce"
    assert [step for step, _ in mlflow_steps(mlflow, tmp_path / "done")] == [2, 4]
    figures = results(tmp_path / "done")
    for name in ("top1", "knn", "probe", "map@r"):
        assert run.data.metrics[f"final/{name.replace('@', '_at_')}"] == pytest.approx(figures[name])
    failing = {"lr": 1e30, "warmup_lr": 1e30, "tracker": "mlflow"}
    with pytest.raises(TrainingError, match="the loss is not finite"):
        train(quick_config(tmp_path / "failed", **failing))
    assert mlflow_run(mlflow, tmp_path / "failed").info.status == "FAILED"
    train(quick_config(tmp_path / "done", tracker="mlflow", overwrite=True, epochs=1), with_map=False)
    again = mlflow_run(mlflow, tmp_path / "done")
    assert again.info.run_id != run.info.run_id and again.info.status == "FINISHED"
    options = command_line({k: v for k, v in QUICK.items() if k != "eval_embeddings"} | {"epochs": 1})
    output = ["--output", str(tmp_path / "compared"), "--seeds", "0", "--tracker", "mlflow"]
    assert compare([*options, "--objectives", "ce", "clce", *output]) == 0
    for name in ("ce-seed0", "clce-seed0"):
        run = mlflow_run(mlflow, tmp_path / "compared" / "runs" / name)
        assert (run.info.run_name, run.info.status) == (name, "FINISHED")
        assert run.data.params["objective"] == name.partition("-")[0]


def test_a_server_that_fails_ends_no_training(mlflow, tmp_path, capsys):
    with tracked(tmp_path, "mlflow") as records:
        run_id = (tmp_path / "mlflow-run.txt").read_text()
        mlflow.MlflowClient().delete_run(run_id)
        records.write(ROWS[:1])
    assert "warning: --tracker mlflow: MlflowException: " in capsys.readouterr().err
    assert "joint,0,4" in (tmp_path / "metrics.csv").read_text()
    with pytest.raises(TrainingError, match=r"--tracker mlflow: starts no run: MlflowException: .*deleted"):
        tracked(tmp_path, "mlflow")


# Weights & Biases


@pytest.fixture
def wandb(monkeypatch):
    package = pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("API_KEY", "")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    return package


def wandb_log(folder: Path, ended: int) -> list[dict[str, object]]:
    """Of every part that was logged offline: the run, its options, points of the loss, how it ended.

    W&B's helper process may write the end of a part a moment after the run has finished: that of ``ended``
    parts is waited for.
    """
    deadline = time.monotonic() + 60
    while True:
        found = wandb_parts(folder)
        if sum(part["exit"] is not None for part in found) >= ended or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def wandb_parts(folder: Path) -> list[dict[str, object]]:
    from wandb.proto import wandb_internal_pb2

    found = []
    # The time is part of the folders' names; one of the same second has a number behind that.
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.parent.name):
        part = {"options": {}, "loss": [], "summary": {}, "exit": None}
        for content in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(content)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                part |= {"id": record.run.run_id, "name": record.run.display_name}
                part["options"] |= {item.key: item.value_json for item in record.run.config.update}
            elif kind == "history":
                values = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
                part["loss"].append((int(values["_step"]), float(values["loss"])))
            elif kind == "summary":
                part["summary"] |= {item.key: item.value_json for item in record.summary.update if item.key}
            elif kind == "exit":
                part["exit"] = record.exit.exit_code
        found.append(part)
    return found


def log_records(data: bytes, header: int = 7, block: int = 1 << 15):
    """The records of a file in LevelDB's log format, whose own header is of seven bytes too."""
    place, content = header, b""
    while place + header <= len(data):
        if block - place % block < header:  # padding
            place += block - place % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        place += header
        content += data[place : place + length]
        place += length
        if kind in (1, 4):  # whole, or a last piece
            yield content
            content = b""


def test_wandb_goes_on_where_it_was_killed(wandb, tmp_path):
    folder = tmp_path / "birds"
    log_and_be_killed(folder, "wandb")
    go_on(folder, "wandb", lr=1e-3, resume=True)
    _, part = wandb_log(folder, ended=1)
    # Offline nothing is known of what was logged before: the second part has all of it.
    assert part["loss"] == [(4, 1.5), (8, 0.5), (12, -0.5)] and part["exit"] == 0
    assert part["id"] == (folder / "wandb-run.txt").read_text() and part["name"] == "birds"
    assert part["options"]["lr"] == "0.001"
    assert part["summary"]["final/top1"] == "0.75" and part["summary"]["final/recall@1"] == "0.5"
    assert "final/images" not in part["summary"]


def test_wandb_runs_end_as_the_training_does(wandb, tmp_path):
    failing = {"lr": 1e30, "warmup_lr": 1e30, "tracker": "wandb"}
    with pytest.raises(TrainingError, match="the loss is not finite"):
        train(quick_config(tmp_path / "run", **failing))
    train(quick_config(tmp_path / "run", tracker="wandb", overwrite=True), with_map=False)
    parts = {part["id"]: part for part in wandb_log(tmp_path / "run", ended=2)}
    done = parts.pop((tmp_path / "run" / "wandb-run.txt").read_text())
    assert [part["exit"] for part in (*parts.values(), done)] == [1, 0]
    assert [step for step, _ in done["loss"]] == [2, 4]
    assert float(done["summary"]["final/top1"]) == results(tmp_path / "run")["top1"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrainingError, match=rf"--tracker {name}: needs the package {name} \(pip install"):
        tracked(tmp_path, name)
